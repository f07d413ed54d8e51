import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genvision.layers import token_loss
from genvision.layers.token_loss import TokenTargets, head_loss, layer_loss, logits_loss
from genvision.models.llamagen import LlamaGen
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR

B, M, C, K = 3, 10, 8, 24
FEW_ROWS = 7 * K
"""Logits of 7 of the 30 rows."""


@pytest.fixture
def in_chunks(monkeypatch):
    return lambda: monkeypatch.setattr(token_loss, "CHUNK", FEW_ROWS)


def parts(seed=0):
    """Hidden states, weights and biases that need gradients; codes, weights of tokens, and what a teacher's last layer read."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias, teacher = (torch.randn(*shape, generator=generator) for shape in ((B, M, C), (K, C), (K,), (B, M, C)))
    codes = torch.randint(K, (B, M), generator=generator)
    weights = torch.rand(B, M, generator=generator) * (torch.rand(B, M, generator=generator) > 0.3)
    return [tensor.requires_grad_() for tensor in (hidden, weight, bias)], codes, weights, teacher


def gradients(loss, tensors):
    loss.backward()
    found = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def assert_about_equal(found, expected, relative):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= relative * other.norm()


class TestLoss:
    def test_it_is_the_mean_of_minus_log_probabilities_of_all_tokens_or_of_those_that_count(self):
        logits, codes = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
        picked = logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
        torch.testing.assert_close(logits_loss(logits, TokenTargets(codes)).loss, -picked.mean())
        valid = torch.tensor([1, 0, 1])[:, None].expand(3, 4)
        torch.testing.assert_close(logits_loss(logits, TokenTargets(codes, valid)).loss, -picked[[0, 2]].mean())
        assert logits_loss(logits, TokenTargets(codes, torch.zeros(3, 4))).loss == 0
        assert torch.equal(logits_loss(logits, TokenTargets(codes)).correct, logits.argmax(-1) == codes)

    @pytest.mark.parametrize("reduction", ["sample", "batch"])
    def test_guessing_costs_the_logarithm_and_certainty_what_smoothing_asks_for(self, reduction):
        codes, weights = torch.randint(0, K, (3, 5)), torch.rand(3, 5)

        def loss(logits, smoothing):
            return float(logits_loss(logits, TokenTargets(codes, weights, reduction, smoothing)).loss)

        assert loss(torch.zeros(3, 5, K), 0.1) == pytest.approx(math.log(K))
        certain = 60.0 * F.one_hot(codes, K)
        assert loss(certain, 0.0) == pytest.approx(0, abs=1e-6)
        assert loss(certain, 0.1) == pytest.approx(0.1 * 60 * (K - 1) / K)

    def test_reductions_weigh_tokens_or_samples_alike_and_a_sample_without_weight_costs_nothing(self):
        logits, codes = torch.randn(3, 2, K), torch.randint(0, K, (3, 2))
        costs = -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
        weights = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
        by_token = logits_loss(logits, TokenTargets(codes, weights, "batch")).loss
        torch.testing.assert_close(by_token, (costs[0].sum() + costs[1, 1]) / 3)
        by_sample = logits_loss(logits, TokenTargets(codes, weights, "sample")).loss
        torch.testing.assert_close(by_sample, (costs[0].mean() + costs[1, 1]) / 3)

    def test_a_teacher_is_learnt_beside_the_labels_and_learns_nothing(self):
        (hidden, weight, _), codes, _, teacher = parts()
        teacher.requires_grad_()
        losses = head_loss(hidden, weight, None, TokenTargets(codes, teacher=teacher, label_share=0.3))
        log_p, told = F.linear(hidden, weight).log_softmax(-1), F.linear(teacher, weight).softmax(-1)
        hard, soft = -log_p.gather(-1, codes[..., None]).mean(), -(told * log_p).sum(-1).mean()
        torch.testing.assert_close(losses.loss, 0.3 * hard + 0.7 * soft)
        torch.testing.assert_close(losses.label_loss, hard)
        losses.loss.backward()
        assert teacher.grad is None and not losses.label_loss.requires_grad


class TestChunks:
    @pytest.mark.parametrize("reduction", ["sample", "batch", None])
    @pytest.mark.parametrize("taught", [False, True])
    def test_they_give_the_loss_and_the_gradients_of_all_logits_at_once(self, in_chunks, reduction, taught):
        trained, codes, weights, teacher = parts()
        targets = TokenTargets(codes, weights if reduction else None, reduction or "batch", smoothing=0.1 if reduction else 0.0)
        if taught:
            targets = targets._replace(teacher=teacher, label_share=0.4)
        plain = head_loss(*trained, targets)
        expected = gradients(3 * plain.loss, trained)
        in_chunks()
        chunked = head_loss(*trained, targets)
        for name in ("loss", "label_loss"):
            torch.testing.assert_close(getattr(chunked, name), getattr(plain, name), atol=1e-6, rtol=1e-6)
        assert torch.equal(chunked.correct, plain.correct)
        assert_about_equal(gradients(3 * chunked.loss, trained), expected, 1e-5)
        with torch.no_grad():
            torch.testing.assert_close(head_loss(*trained, targets).loss, plain.loss.detach(), atol=1e-6, rtol=1e-6)

    def test_nothing_as_large_as_the_logits_is_kept(self, in_chunks):
        trained, codes, _, _ = parts()
        kept: list[int] = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            head_loss(*trained, TokenTargets(codes))
            plain = max(kept)
            kept.clear()
            in_chunks()
            head_loss(*trained, TokenTargets(codes))
        assert plain == B * M * K and max(kept) == max(B * M, K) * C

    def test_what_needs_no_gradient_gets_none(self, in_chunks):
        (hidden, weight, bias), codes, _, _ = parts()
        in_chunks()
        head_loss(hidden, weight.detach(), bias, TokenTargets(codes)).loss.backward()
        assert weight.grad is None and hidden.grad.any() and bias.grad.any()
        bias.grad = None
        head_loss(hidden.detach(), weight, None, TokenTargets(codes)).loss.backward()
        assert weight.grad.any()

    @pytest.mark.parametrize("dtype, relative", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
    def test_products_are_of_low_precision_under_autocast_and_the_rest_is_not(self, in_chunks, dtype, relative):
        trained, codes, weights, _ = parts()
        targets = TokenTargets(codes, weights, smoothing=0.1)
        exact = head_loss(*trained, targets)
        expected = gradients(exact.loss, trained)
        in_chunks()
        with torch.autocast("cpu", dtype):
            losses = head_loss(*trained, targets)
        assert losses.loss.dtype == torch.float32
        torch.testing.assert_close(losses.loss, exact.loss, atol=0, rtol=relative)
        assert_about_equal(gradients(losses.loss, trained), expected, relative)

    def test_half_precision_does_not_lose_small_shares(self, monkeypatch):
        """The mean of many rows has gradients below what float16 can hold; the scaler's factor comes with the backward pass only."""
        monkeypatch.setattr(token_loss, "CHUNK", 512 * K)
        hidden, weight = torch.randn(4, 4096, C) * 1e-3, (torch.randn(K, C) * 1e-3).requires_grad_()
        codes = torch.randint(K, (4, 4096))
        (expected,) = gradients(head_loss(hidden, weight, None, TokenTargets(codes)).loss, [weight])
        with torch.autocast("cpu", torch.float16):
            loss = head_loss(hidden, weight, None, TokenTargets(codes)).loss
        assert_about_equal(gradients(loss * 65536, [weight]), [expected * 65536], 1e-2)

    @pytest.mark.slow
    def test_they_compile_without_a_graph_break_and_not_anew_for_another_share(self, in_chunks):
        from torch._dynamo.testing import CompileCounter

        in_chunks()
        layer, (_, codes, weights, teacher), counter = nn.Linear(C, K), parts(), CompileCounter()
        compiled = torch.compile(layer_loss, backend=counter, fullgraph=True)
        for step in range(4):
            hidden = torch.randn(B, M, C)
            targets = TokenTargets(codes, weights, "sample", 0.1, teacher=teacher, label_share=1 - step / 10)
            torch.testing.assert_close(compiled(layer, hidden, targets).loss, layer_loss(layer, hidden, targets).loss)
        assert counter.frame_count == 2  # a number, then any number


def test_a_layer_that_is_more_than_linear_is_called(in_chunks):
    """As where LoRA stands around it: its weight alone does not say what it gives."""
    in_chunks()
    (hidden, _, _), codes, _, teacher = parts()
    layer = nn.Sequential(nn.Linear(C, K), nn.Tanh())
    targets = TokenTargets(codes, teacher=teacher, label_share=0.5, keep_hidden=True)
    losses = layer_loss(layer, hidden, targets)
    expected = logits_loss(layer(hidden), targets, layer(teacher))
    torch.testing.assert_close(losses.loss, expected.loss)
    assert torch.equal(losses.hidden, hidden) and not losses.hidden.requires_grad


PLACES = {"codebook_size": K, "grid_size": 3, "hidden_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}
MASKGIT = PLACES | {"mlp_multiple_of": 8, "dropout": 0.0}
FAMILIES = {
    "llamagen": (LlamaGen, PLACES | {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}),
    "rar": (RAR, PLACES | {"attention_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}),
    "maskgit, tied": (MaskGIT, MASKGIT),
    "maskgit, linear": (MaskGIT, MASKGIT | {"head": "linear"}),
    "maskgit, mlm": (MaskGIT, MASKGIT | {"head": "mlm", "block": "post_norm"}),
    "mage": (MAGE, PLACES | {"decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2, "dropout": 0.0}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_that_is_given_targets_costs_what_its_logits_cost_and_learns_the_same(name, in_chunks):
    build, options = FAMILIES[name]
    torch.manual_seed(0)
    model = build(**options).train()
    for parameter in model.parameters():  # heads and modulations start at zero
        nn.init.normal_(parameter, std=0.2)
    codes, labels = torch.randint(K, (5, 9)), torch.arange(5) % 3
    told, targets = {"drop": labels == 1}, TokenTargets(codes)
    shown = codes[:, :-1] if name == "llamagen" else codes
    if not name.startswith(("llamagen", "rar")):
        told |= {"nesting": 2, "where": torch.arange(1, 9, 2).expand(5, -1)}
        targets = TokenTargets(codes[:, 1::2], torch.rand(5, 4), "sample", 0.1)
    parameters = list(model.parameters())
    expected = logits_loss(model(shown, labels, **told), targets)
    plain = gradients(expected.loss, parameters)
    in_chunks()
    losses = model(shown, labels, **told, targets=targets)
    torch.testing.assert_close(losses.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert torch.equal(losses.correct, expected.correct)
    found = gradients(losses.loss, parameters)
    assert [gradient is None for gradient in found] == [gradient is None for gradient in plain]
    largest = max(gradient.norm() for gradient in plain if gradient is not None)
    for one, other in zip(found, plain, strict=True):
        if other is not None:
            assert (one - other).norm() <= 1e-5 * max(other.norm(), 1e-2 * largest)
