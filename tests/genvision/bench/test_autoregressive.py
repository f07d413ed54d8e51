"""Rows A at tiny sizes: the peer has our weights, every row is checked and timed, and other tokens are no result."""

import pytest
import torch

pytest.importorskip("transformers", reason="the peer of these rows: pip install transformers")

from genvision.bench.autoregressive import SETTINGS, Decoding, Sizes, measure, prepared, random_llamagen
from genvision.bench.autoregressive import check_divergence as check
from genvision.bench.checks import WrongAnswer
from genvision.bench.peer_llama import peer_llama
from genvision.bench.plan import MODULES, ROWS
from genvision.models.llamagen import LlamaGen

TINY = Sizes(rounds=1, num_tokens=5, images=2, hidden_dim=32, depth=2, num_heads=2, codebook_size=50, top_k=10)


def perturbed(seed: int) -> LlamaGen:
    model = random_llamagen(TINY)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_every_row_is_checked_and_timed():
    results = {result.row: result for result in measure(MODULES["autoregressive"], TINY)}
    assert list(results) == ["A1", "A2", "A2m", "A4", "A3", "A3m", "A5"]
    for name, result in results.items():
        assert result.outcome == "measured" and result.rounds == 1 and result.unit == "token"
        assert result.ratio.median == pytest.approx(result.peer_ms / result.own_ms)
        assert 0 < result.fraction.median < 1
        assert ("KL of next tokens" if name in ("A4", "A5") else "tokens equal") in result.check
        assert "first token after" in result.notes[0]


def test_the_peer_draws_our_greedy_tokens_with_and_without_guidance():
    model = perturbed(seed=1)
    for setting in SETTINGS:
        decoding = Decoding(model, peer_llama(model), TINY, setting)
        tokens = decoding.draw(model, temperature=0.0)
        assert len(tokens.unique()) > 1
        for name in setting.rows:
            assert torch.equal(decoding.peer_draws(ROWS[name], greedy=True), tokens)


def test_a_model_with_other_weights_than_the_peer_is_wrong_and_not_timed():
    decoding = Decoding(perturbed(seed=1), peer_llama(perturbed(seed=2)), TINY, SETTINGS[1])
    (result,) = decoding.results([ROWS["A2"]])
    assert result.outcome == "wrong" and "tokens are equal" in result.reason
    assert result.own_ms is None and result.ratio is None


def test_distributions_of_another_model_are_no_int8_weights():
    model = perturbed(seed=1)
    codes, labels = torch.randint(50, (2, 5)), torch.tensor([0, 1])
    with torch.inference_mode():
        assert "mean" in check(model, prepared(model, "int8", 2), codes, labels)
        with pytest.raises(WrongAnswer, match="KL of next tokens"):
            check(model, perturbed(seed=2), codes, labels)
