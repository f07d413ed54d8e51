"""lpips_* of the fixture: f0_k and f1_k are the feature maps of a pair at layer k before they are normalised, lin{k} the linear layers,
term_k what `layer_distance` gives, value their sum, and scaled the scaling layer of `real`."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from genvision.errors import UserError
from genvision.tokenizers.lpips import LPIPS, LPIPSOptions, layer_distance, load_lpips, read_weights
from parity_fixtures import Fixture

WIDTHS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
"""VGG16 in blocks: channels that go in, then those of each convolution; a pooling stands between blocks."""
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Their numbers in torchvision's `features`."""


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pairs = [pair for block in WIDTHS for pair in pairwise(block)]
    tensors = {}
    for number, (num_in, num_out) in zip(CONVOLUTIONS, pairs, strict=True):
        tensors[f"features.{number}.weight"] = torch.randn(num_out, num_in, 3, 3, generator=generator) * (2 / (9 * num_in)) ** 0.5
        tensors[f"features.{number}.bias"] = 0.1 * torch.randn(num_out, generator=generator)
    for layer, block in enumerate(WIDTHS):
        tensors[f"linear.{layer}"] = torch.rand(1, block[-1], 1, 1, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors()


@pytest.fixture(scope="module")
def lpips(tensors) -> LPIPS:
    return LPIPS(tensors)


def images(seed: int, side: int = 32) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def in_files(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Linear layers as the official file names them, and VGG16 as torchvision's does, classifier and all."""
    linear = {f"lin{name[-1]}.model.1.weight": tensor for name, tensor in tensors.items() if name.startswith("linear")}
    vgg = {name: tensor for name, tensor in tensors.items() if name.startswith("features")}
    return linear, vgg | {"classifier.0.weight": torch.zeros(2, 2)}


def test_the_arithmetic_equals_taming_transformers(lpips):
    fixture = Fixture("taming_losses")
    terms = []
    for layer in range(5):
        a, b = (fixture.inputs[f"lpips_f{side}_{layer}"] for side in (0, 1))
        terms.append(layer_distance(a, b, fixture.state[f"lpips_lin{layer}.model.1.weight"]))
        torch.testing.assert_close(terms[-1], fixture.outputs[f"lpips_term_{layer}"].flatten(), atol=fixture.atol, rtol=0)
    torch.testing.assert_close(sum(terms), fixture.outputs["lpips_value"].flatten(), atol=fixture.atol, rtol=0)
    torch.testing.assert_close(lpips.scaled(fixture.inputs["real"]), fixture.outputs["lpips_scaled"], atol=fixture.atol, rtol=0)


def test_the_whole_metric_equals_the_definition_written_out(lpips, tensors):
    def maps(x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        numbers, found = iter(CONVOLUTIONS), []
        for block in WIDTHS:
            for _ in block[1:]:
                number = next(numbers)
                x = F.relu(F.conv2d(x, tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"], padding=1))
            found.append(x)
            x = F.max_pool2d(x, 2)
        return found

    a, b = images(1), images(2)
    expected = torch.zeros(3)
    for layer, (p, q) in enumerate(zip(maps(a), maps(b), strict=True)):
        p, q = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (p, q))
        expected += F.conv2d((p - q) ** 2, tensors[f"linear.{layer}"]).mean(dim=(1, 2, 3))
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-5, atol=0)


def test_equal_images_have_distance_zero_and_order_does_not_matter(lpips):
    a, b = images(1), images(2)
    assert torch.equal(lpips(a, a), torch.zeros(3))
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    nearer = lpips(a, a + 0.1 * (b - a))
    assert (nearer > 0).all() and (nearer < lpips(a, b)).all()


def test_a_pair_has_its_distance_whatever_the_batch(lpips):
    a, b = images(1), images(2)
    one_by_one = torch.cat([lpips(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(lpips(a, b), one_by_one, rtol=1e-5, atol=0)


def test_gradients_reach_the_images_and_nothing_else_even_in_train_mode(lpips):
    a, b = images(1).requires_grad_(), images(2)
    in_eval = lpips(a, b)
    network = LPIPS(lpips.state_dict()).train()
    assert torch.equal(network(a, b), in_eval)
    in_eval.sum().backward()
    assert a.grad is not None and (a.grad != 0).any(dim=(1, 2, 3)).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_dropout_is_drawn_in_train_mode_alone_and_leaves_the_mean_as_it_is(lpips, tensors):
    noisy = LPIPS(tensors, dropout=0.5)
    a, b = (images(seed, 16)[:1].expand(32, -1, -1, -1) for seed in (1, 2))
    expected = lpips(a, b)
    assert torch.equal(noisy(a, b), expected)
    drawn = noisy.train()(a, b)
    assert len(set(drawn.tolist())) == 32  # each pair draws its own
    error = drawn.std() / 32**0.5
    assert 0 < error < 0.05 * expected[0] and abs(drawn.mean() - expected[0]) < 4 * error
    torch.manual_seed(3)
    again = noisy(a, b)
    torch.manual_seed(3)
    assert torch.equal(noisy(a, b), again)


def test_half_of_what_a_layer_adds_is_dropped_and_the_rest_doubled():
    ones = torch.ones(500, 1, 1, 1)  # unit vectors of one channel: the squared distance of 1 and -1 is 4
    found = layer_distance(ones, -ones, ones[:1], dropout=0.5)
    assert set(found.tolist()) == {0.0, 8.0} and 200 < (found == 8).sum() < 300


def test_dropout_comes_from_the_options_and_must_be_a_probability(tensors, tmp_path):
    save_file(tensors, tmp_path / "whole.safetensors")
    options = LPIPSOptions(lpips_weights=tmp_path / "whole.safetensors", dropout=0.5)
    assert load_lpips(options).dropout == 0.5
    for value in (-0.1, 1.0):
        with pytest.raises(UserError, match="dropout of LPIPS must be at least 0 and below 1"):
            LPIPS(tensors, dropout=value)


def test_a_step_along_the_gradient_makes_images_more_alike(lpips):
    a, b = images(1).requires_grad_(), images(2)
    before = lpips(a, b)
    before.sum().backward()
    assert a.grad is not None
    with torch.no_grad():
        assert (lpips(a - 0.01 * a.grad / a.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1), b) < before).all()


def test_positions_without_any_feature_have_a_finite_gradient():
    a = torch.zeros(1, 4, 2, 2, requires_grad=True)
    b = torch.zeros(1, 4, 2, 2)
    b[0, :, 0, 0] = 1
    layer_distance(a.relu(), b, torch.ones(1, 4, 1, 1)).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_building_it_leaves_the_global_random_state_alone(tensors):
    before = torch.get_rng_state()
    LPIPS(tensors)
    assert torch.equal(torch.get_rng_state(), before)


def test_small_images_are_refused(lpips):
    assert lpips(images(1, 16), images(2, 16)).shape == (3,)
    with pytest.raises(UserError, match="at least 16x16 pixels, got 15x15"):
        lpips(images(1, 15), images(2, 15))


def test_two_official_files_or_one_with_both_make_the_same_metric(tensors, lpips, tmp_path):
    linear, vgg = in_files(tensors)
    torch.save(linear, tmp_path / "linear.pth")
    torch.save(vgg, tmp_path / "vgg16.pth")
    # the layout of the official package's and of taming-transformers' modules; the package has the linear layers twice
    slices = [range(4), range(4, 9), range(9, 16), range(16, 23), range(23, 30)]
    whole = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)} | linear
    whole |= {name.replace("lin", "lins."): tensor for name, tensor in linear.items()}
    for number in CONVOLUTIONS:
        [part] = [k + 1 for k, numbers in enumerate(slices) if number in numbers]
        whole |= {f"net.slice{part}.{number}.{kind}": tensors[f"features.{number}.{kind}"] for kind in ("weight", "bias")}
    save_file({name: tensor.clone() for name, tensor in whole.items()}, tmp_path / "whole.safetensors")
    torch.save({**linear, **vgg}, tmp_path / "both.pth")
    expected = lpips(images(1), images(2))
    for options in (
        LPIPSOptions(lpips_weights=tmp_path / "linear.pth", vgg_weights=tmp_path / "vgg16.pth"),
        LPIPSOptions(lpips_weights=tmp_path / "whole.safetensors"),
        LPIPSOptions(lpips_weights=tmp_path / "both.pth"),
    ):
        found = load_lpips(options)
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in tensors.items())
        torch.testing.assert_close(found(images(1), images(2)), expected, rtol=1e-5, atol=0)
        assert not found.is_published


def test_files_in_torch_hubs_folder_are_found_and_missing_ones_named(tensors, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    linear, vgg = in_files(tensors)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"give `--lpips-weights FILE` or `--download` \(https://github.com/.*weights-vgg16-lpips.pth"):
        load_lpips()
    torch.save(linear, folder / "weights-vgg16-lpips.pth")
    with pytest.raises(
        UserError, match=r"give `--vgg-weights FILE` or `--download` \(https://download.pytorch.org/models/vgg16-397923af.pth"
    ):
        load_lpips()
    torch.save(vgg, folder / "vgg16-397923af.pth")
    assert isinstance(load_lpips(), LPIPS)


def test_files_that_do_not_fit_are_refused_in_one_line(tensors, tmp_path):
    linear, vgg = in_files(tensors)

    def refused(content: object, expected: str) -> None:
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(UserError, match=expected) as caught:
            load_lpips(LPIPSOptions(lpips_weights=tmp_path / "file.pth"))
        assert "\n" not in str(caught.value) and str(tmp_path / "file.pth") in str(caught.value)

    both = linear | vgg
    refused({name: tensor for name, tensor in both.items() if name != "lin3.model.1.weight"}, r"1 missing \(linear.3\)")
    refused(both | {"extra": torch.zeros(1)}, r"1 unexpected \(extra\)")
    refused(both | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, r"features.0.weight \[64, 1, 3, 3\] instead of \[64, 3, 3, 3\]")
    refused(both | {"features.0.bias": torch.full((64,), float("nan"))}, r"1 not finite \(features.0.bias\)")
    refused([torch.zeros(1)], "mapping of names to tensors")
    refused({"linear": re.compile("x")}, "more than tensors")
    with pytest.raises(UserError, match="no such file; --lpips-weights wants"):
        load_lpips(LPIPSOptions(lpips_weights=tmp_path / "nothing.pth"))
    torch.save(linear, tmp_path / "file.pth")
    with pytest.raises(UserError, match="no such file; --vgg-weights wants"):
        load_lpips(LPIPSOptions(lpips_weights=tmp_path / "file.pth", vgg_weights=tmp_path / "nothing.pth"))


def test_a_file_cut_off_is_refused(tensors, tmp_path):
    path = tmp_path / "linear.pth"
    torch.save(in_files(tensors)[0], path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not readable as LPIPS weights"):
        read_weights(Path(path))
