"""Rows D, V and E at tiny sizes: networks with the peer's weights are checked, then timed; what differs is not."""

import pytest
import torch

from genvision.bench import decoders, diffusion, inception
from genvision.bench.plan import ROWS
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.vq import VQTokenizer

ROUNDS = 1


def assert_measured(result, *, floor="matrix products"):
    assert result.outcome == "measured", result.reason
    assert result.ratio.median > 0 and result.own_ms > 0 and result.check.endswith(("of diffusers'", "of torch-fidelity's"))
    assert result.floor == floor and result.fraction.median > 0


def test_calls_and_samplings_of_a_diffusion_transformer():
    sizes = diffusion.Sizes(rounds=ROUNDS, network="tiny", wide_network="tiny", depth=1, batch_size=2, loop_rounds=ROUNDS, steps=3)
    results = list(diffusion.measure([ROWS[name] for name in ("D1", "D1b", "D2", "D3")], sizes))
    assert [result.row for result in results] == ["D1", "D1b", "D2", "D3"]
    for result in results:
        assert_measured(result)
        assert result.samples_differ == (result.row == "D3")
    assert "of 1 blocks" in results[0].what and "from fully guided ones" in results[3].notes[0]


def test_decoders_have_the_weights_of_diffusers():
    tiny = {"image_size": 8, "base_channels": 4, "encoder_multipliers": (1, 2, 2), "num_res_blocks": 1, "norm_groups": 2}
    tokenizer = VQTokenizer(codebook_size=16, codebook_dim=4, z_channels=4, **tiny)
    kl = KLTokenizer(image_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    with torch.inference_mode():
        for row, peers in (("V1", decoders.vq_peers(2, 8, tokenizer)), ("V1k", decoders.kl_peers(2, 8, kl))):
            result = decoders.decoding_result(ROWS[row], "tiny", peers, ROUNDS)
            assert_measured(result)
            assert "channels last" in result.notes[0]


@pytest.mark.slow
def test_features_of_a_small_picture(tmp_path):
    torch.save(inception.random_inception(), tmp_path / "inception.pth")
    with torch.inference_mode():
        peers = inception.inception_peers(tmp_path / "inception.pth", 1, 32)
        assert_measured(inception.features_result(ROWS["E1"], "tiny", peers, ROUNDS))


@pytest.mark.parametrize(
    ("function", "row", "names"),
    [
        (diffusion.forward_result, "D1", (diffusion.OWN, diffusion.KNOWN, diffusion.PEER)),
        (decoders.decoding_result, "V1", (decoders.OWN, decoders.PEER, decoders.PEER_LAST)),
        (inception.features_result, "E1", (inception.OWN, inception.PEER)),
    ],
)
def test_other_outputs_than_the_peers_are_wrong_and_nothing_is_timed(function, row, names):
    calls = []
    outputs = {name: torch.linspace(1, 2, 5) + 3e-4 * (name == "genvision") for name in names}
    peers = {name: (lambda name=name: calls.append(name) or outputs[name]) for name in names}
    result = function(ROWS[row], "work", peers, 3)
    assert result.outcome == "wrong" and "differs by 1.5e-04 of the largest number" in result.reason
    assert result.own_ms is None and len(calls) <= 4
