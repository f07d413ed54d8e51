import pytest
import torch

from genvision.errors import UserError
from genvision.samplers.randomness import ImageStreams, draw_labels
from genvision.streams import Purpose

FIRST = [0.9890500327641266, 0.043691321770255476, 0.5562997753153373]


def test_a_stream_depends_on_seed_and_index_alone():
    together = ImageStreams(5, [3, 9, 4]).uniform(Purpose.TOKEN, 6)
    assert torch.equal(ImageStreams(5, [9]).uniform(Purpose.TOKEN, 6)[0], together[1])
    assert torch.equal(ImageStreams(5, [9]).uniform(Purpose.TOKEN, 3)[0], together[1, :3])
    for other in (ImageStreams(6, [9]), ImageStreams(5, [10])):
        assert not torch.equal(other.uniform(Purpose.TOKEN, 6)[0], together[1])


def test_purposes_do_not_share_numbers():
    streams = ImageStreams(0, [0])
    assert not torch.equal(streams.uniform(Purpose.LABEL, 4), streams.uniform(Purpose.TOKEN, 4))


def test_the_first_numbers_never_change():
    # published samples depend on these; a new NumPy must not move them
    numbers = ImageStreams(42, [7]).uniform(Purpose.TOKEN, 3)[0].tolist()
    assert numbers == pytest.approx(FIRST, abs=0)


def test_numbers_are_uniform():
    numbers = ImageStreams(1, range(200)).uniform(Purpose.TOKEN, 100).flatten()
    assert numbers.min() >= 0 and numbers.max() < 1
    shares = torch.histc(numbers.float(), bins=10, min=0, max=1) / len(numbers)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_labels_are_uniform_over_the_classes_and_belong_to_the_image():
    labels = draw_labels(0, range(3000), [2, 5, 7])
    assert set(labels.tolist()) == {2, 5, 7}
    assert (torch.bincount(labels)[[2, 5, 7]] / 3000 - 1 / 3).abs().max() < 0.03
    assert torch.equal(draw_labels(0, [17, 4], [2, 5, 7]), labels[[17, 4]])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(UserError):
        ImageStreams(seed, [0])
