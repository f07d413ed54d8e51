"""Cross-entropy of predicted tokens without their logits in memory: B * N * K of them are the largest tensor of a training step.

`head_loss` takes what the last linear layer reads, in chunks of rows. While the logits of a chunk are there, its loss is computed and at
once the loss's gradient, by which the backward pass only multiplies: no logits are kept and none are computed twice (fused linear
cross-entropy, arXiv:2410.10989, section 3.2). On a CPU core (1,024 rows, C 768, K 16384) that takes 0.93 of the time of plain logits;
computing each chunk's logits again in the backward pass would take 1.45. A loss that fits into one chunk is computed plainly.

Shapes: B images, M tokens that are predicted, R = B M rows, C width, K codebook entries.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**25
"""Logits that are held at once: 128 MB in float32, and on a CPU as fast as any smaller number."""


class TokenTargets(NamedTuple):
    """What a network should say, and how its errors are averaged. It is handed to the network, which gives `TokenLosses` then."""

    codes: Tensor
    """int64 [B, M]."""
    weights: Tensor | None = None
    """[B, M], of the tokens; None weighs all alike."""
    reduction: Literal["sample", "batch"] = "batch"
    """Weighted mean over all tokens; or that of each sample, then the mean of samples. A sample without any weight costs 0 there."""
    smoothing: float = 0.0
    """Part of each target that is spread evenly over all K."""
    teacher: Tensor | None = None
    """`hidden` of another pass, [B, M, C], whose probabilities are learnt beside the labels."""
    label_share: float = 1.0
    """Weight of the labels; the rest is the teacher's."""
    keep_hidden: bool = False
    """Give `hidden`, too."""

    def mean(self, losses: Tensor) -> Tensor:
        """Losses of tokens [B, M], averaged."""
        if self.weights is None:
            return losses.mean()
        weights = self.weights.float()
        weighted = losses * weights
        if self.reduction == "batch":
            return weighted.sum() / weights.sum().clamp(min=1e-8)
        return (weighted.sum(1) / weights.sum(1).clamp(min=1e-8)).mean()

    def shares(self) -> Tensor:
        """What a token's loss counts for in the mean: its derivative, float32 [B, M]."""
        if self.weights is None:
            return torch.full(self.codes.shape, 1 / self.codes.numel(), device=self.codes.device)
        weights = self.weights.float()
        if self.reduction == "batch":
            return weights / weights.sum().clamp(min=1e-8)
        return weights / weights.sum(1, keepdim=True).clamp(min=1e-8) / len(weights)


class TokenLosses(NamedTuple):
    """What the predictions of a network cost, in nats a token."""

    loss: Tensor
    """What is minimised."""
    label_loss: Tensor
    """Of the labels alone, without gradient."""
    correct: Tensor
    """Boolean [B, M], where the best guess is right."""
    hidden: Tensor | None
    """[B, M, C], what the last layer read, for a network that learns from this one; without gradient."""


def layer_loss(layer: nn.Module, hidden: Tensor, targets: TokenTargets) -> TokenLosses:
    """Loss of an output layer [.., C] -> [.., K] on hidden [B, M, C]. One that does more than nn.Linear (LoRA) makes its logits in full."""
    if type(layer) is nn.Linear:
        return head_loss(hidden, layer.weight, layer.bias, targets)
    teacher = None if targets.teacher is None else layer(targets.teacher).detach()
    return _with_hidden(logits_loss(layer(hidden), targets, teacher), hidden, targets)


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: TokenTargets) -> TokenLosses:
    """Loss of the logits hidden weight^T + bias, which exist in chunks only.

    Args:
        hidden: [B, M, C].
        weight: [K, C].
        bias: [K].
    """
    if targets.codes.numel() * len(weight) <= CHUNK:
        teacher = None if targets.teacher is None else F.linear(targets.teacher, weight, bias).detach()
        losses = logits_loss(F.linear(hidden, weight, bias), targets, teacher)
    else:
        trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        loss, label_loss, correct = _ChunkedLoss.apply(hidden, weight, bias, targets, trains)
        losses = TokenLosses(loss, label_loss, correct, None)
    return _with_hidden(losses, hidden, targets)


def logits_loss(logits: Tensor, targets: TokenTargets, teacher: Tensor | None = None) -> TokenLosses:
    """The same of logits [B, M, K] that are there, and of a teacher's."""
    rows = logits.flatten(0, 1).float()
    losses = F.cross_entropy(rows, targets.codes.flatten(), reduction="none", label_smoothing=targets.smoothing)
    loss = label_loss = targets.mean(losses.view(targets.codes.shape))
    if teacher is not None:
        distances = F.cross_entropy(rows, teacher.float().softmax(-1).flatten(0, 1), reduction="none")
        loss = targets.label_share * loss + (1 - targets.label_share) * targets.mean(distances.view(targets.codes.shape))
    return TokenLosses(loss, label_loss.detach(), logits.detach().argmax(-1) == targets.codes, None)


def _with_hidden(losses: TokenLosses, hidden: Tensor, targets: TokenTargets) -> TokenLosses:
    return losses._replace(hidden=hidden.detach()) if targets.keep_hidden else losses


class _ChunkedLoss(torch.autograd.Function):
    """Gradients of the loss are computed with it, except for the factor that the backward pass brings."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: TokenTargets, trains: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _Chunks(hidden, weight, bias, targets)
        shares = targets.shares().flatten()
        # fp16 would lose gradients as small as 1 / R: they are scaled when the backward pass brings a factor
        largest = shares.max().clamp(min=torch.finfo(torch.float32).tiny)
        to_hidden = torch.empty_like(chunks.hidden) if trains and hidden.requires_grad else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if trains and weight.requires_grad else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if trains and bias is not None and bias.requires_grad else None
        parts = []
        for rows in chunks.rows():
            errors, label_losses, losses, correct = chunks.errors(rows)
            parts.append((label_losses, losses, correct))
            if not trains:
                continue
            errors.mul_((shares[rows] / largest).unsqueeze(1))
            if to_bias is not None:
                to_bias += errors.sum(0)
            errors = errors.to(chunks.dtype)
            if to_hidden is not None:
                to_hidden[rows] = errors @ chunks.weight
            if to_weight is not None:
                if chunks.dtype == torch.float32:
                    to_weight.addmm_(errors.T, chunks.read(rows))
                else:
                    to_weight += errors.T @ chunks.read(rows)
        label_losses, losses, correct = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(largest, to_hidden, to_weight, to_bias)
        ctx.shape, ctx.dtypes = hidden.shape, (weight.dtype, None if bias is None else bias.dtype)
        label_loss, loss = ((part * shares).sum() for part in (label_losses, losses))
        correct = correct.view(targets.codes.shape)
        ctx.mark_non_differentiable(label_loss, correct)
        return loss, label_loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        largest, to_hidden, to_weight, to_bias = ctx.saved_tensors
        factor = gradient * largest
        of_weight, of_bias = ctx.dtypes
        return (
            None if to_hidden is None else (to_hidden * factor).to(to_hidden.dtype).view(ctx.shape),
            None if to_weight is None else (to_weight * factor).to(of_weight),
            None if to_bias is None else (to_bias * factor).to(of_bias),
            None,
            None,
        )


class _Chunks:
    """The rows of a head's input, a chunk at a time, in the precision in which autocast would have its linear layer."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: TokenTargets) -> None:
        device = hidden.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        self.hidden, self.codes, self.targets = hidden.flatten(0, 1), targets.codes.flatten(), targets
        self.teacher = None if targets.teacher is None else targets.teacher.flatten(0, 1)
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def rows(self) -> Iterator[slice]:
        size = max(1, CHUNK // len(self.weight))
        return (slice(start, start + size) for start in range(0, len(self.hidden), size))

    def read(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.dtype)

    def errors(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives of each row's loss by its logits, float32 [r, K]; its loss against the label, its loss, and whether it is right, [r].

        Written in place where it can be: one buffer of [r, K], two where there is a teacher.
        """
        targets, codes = self.targets, self.codes[rows].unsqueeze(1)
        logits = self._logits(self.hidden[rows])
        best, guesses = logits.max(-1)
        smoothing, share = targets.smoothing, targets.label_share if self.teacher is not None else 1.0
        wanted = logits.gather(1, codes).squeeze(1)
        if smoothing:
            wanted = (1 - smoothing) * wanted + smoothing * logits.mean(-1)
        taught, told = wanted, None
        if self.teacher is not None:
            told = self._logits(self.teacher[rows]).softmax(-1)
            taught = share * wanted + (1 - share) * (told * logits).sum(-1)
        p = logits.sub_(best.unsqueeze(1)).exp_()
        total = p.sum(-1)
        normaliser = best + total.log()
        p.div_(total.unsqueeze(1))
        if smoothing:
            p.sub_(share * smoothing / p.shape[1])
        if told is not None:
            p.sub_(told, alpha=1 - share)
        p.scatter_add_(1, codes, p.new_full(codes.shape, -share * (1 - smoothing)))
        return p, normaliser - wanted, normaliser - taught, guesses == codes.squeeze(1)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.dtype), self.weight, self.bias).float()
