"""One token a row from logits: guidance, temperature, top-k, top-p (nucleus sampling, arXiv:1904.09751), then the inverse CDF.

There are three forms: `draw_plainly` over the whole vocabulary, a fast one for CPUs over the kept tokens alone, and one Triton kernel.
They give the same token for the same uniform number. That is no matter of luck: weights are exponentials in float64 of differences of
the same float32 logits, and they are summed in float64 in the order of the vocabulary, so tokens that are left out add exact zeros and
the first two forms agree bit by bit. The kernel adds within blocks first, and CUDA's cumsum adds in another order too: these can differ
only where u * total lies within about 1e-14 of the total from a border between two tokens, once in some 10^10 tokens at V = 16384.

Shapes: B images, V codebook entries.
"""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from genvision.kernels.backends import fuses

MIN_TEMPERATURE = 1e-5


def draw_tokens(
    logits: Tensor, uniform: Tensor, *, guidance_scale: float | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draw one token an image; row i of a batch gets what it would get alone.

    Args:
        logits: floating [B, V], or [2B, V] with the null rows behind if `guidance_scale` is given; computed with in float32.
        uniform: float64 [B] in [0, 1), on the device of `logits`.
        guidance_scale: s of null + s (conditional - null); None for logits without null rows.
        temperature: divides the logits; 0 takes the most likely token, the first of those that tie.
        top_k: keep the k most likely tokens and all that tie with the k-th; 0 keeps all.
        top_p: keep the smallest set of the most likely tokens with more than this probability, of equal ones the first; 1 keeps all.

    Returns:
        int64 [B].
    """
    if fuses(logits, uniform):
        from genvision.kernels.triton_draw import draw_in_one_kernel

        return draw_in_one_kernel(logits, uniform, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    guided = _guided(logits.float(), guidance_scale)
    if temperature == 0:
        return guided.argmax(dim=-1)
    if guided.device.type == "cpu":
        return _draw_over_kept(_divided(guided, temperature), uniform, top_k, top_p)
    return draw_plainly(guided, uniform, temperature=temperature, top_k=top_k, top_p=top_p)


def draw_plainly(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """`draw_tokens` without guidance, above temperature 0, over the whole vocabulary: the formula that the faster forms are held to."""
    return draw(_weights(filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)), uniform)


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Temperature, then top-k, then top-p, in the official order of LlamaGen; -inf where dropped.

    All that tie with the k-th stay; the token that crosses `top_p` stays, and of equal tokens those that come first.

    Args:
        logits: [B, V].
    """
    logits = _divided(logits, temperature)
    if 0 < top_k < logits.shape[-1]:
        border = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = _weights(ordered).cumsum(dim=-1)
        before = mass.roll(1, dims=-1)
        before[:, 0] = 0
        dropped = before > top_p * mass[:, -1:]
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by the inverse of the cumulative distribution.

    Args:
        weights: [B, V], not negative; probabilities, or anything proportional to them.
        uniform: float64 [B] in [0, 1).

    Returns:
        int64 [B]; never a token of weight 0.
    """
    cumulative = weights.double().cumsum(dim=-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    last_possible = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True).squeeze(1), last_possible)


def _guided(logits: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return logits
    conditional, null = logits.chunk(2)
    return (conditional - null).mul_(scale).add_(null)  # rounded after each step, like `samplers.guidance.combine`


def _divided(logits: Tensor, temperature: float) -> Tensor:
    # a product, since CUDA divides by a number in this way, and all devices shall round alike
    return logits if temperature == 1 else logits * (1 / max(temperature, MIN_TEMPERATURE))


def _weights(logits: Tensor) -> Tensor:
    """Proportional to softmax, the largest of a row 1: float64 [..., V]; bit for bit the same wherever in a row a logit stands."""
    return logits.double().sub_(logits.amax(dim=-1, keepdim=True)).exp_()


def _draw_over_kept(logits: Tensor, uniform: Tensor, top_k: int, top_p: float) -> Tensor:
    """The plain draw without sorting the vocabulary, with numpy, whose partition takes a tenth of `topk`'s time."""
    rows = logits.detach().numpy()
    return torch.tensor([_draw_row(row, u, top_k, top_p) for row, u in zip(rows, uniform.tolist(), strict=True)], dtype=torch.int64)


def _draw_row(logits: np.ndarray, uniform: float, top_k: int, top_p: float) -> int:
    kept = None  # where in the vocabulary `logits` stand, once they are no longer all
    if 0 < top_k < len(logits):
        at = len(logits) - top_k
        kept = np.flatnonzero(~(logits < np.partition(logits, at)[at]))  # NaN, which nothing compares with, is kept
        logits = logits[kept]
    if top_p < 1:
        nucleus = _nucleus(logits, top_p)
        kept, logits = nucleus if kept is None else kept[nucleus], logits[nucleus]
    weights = _weights(torch.from_numpy(logits))
    cumulative = weights.cumsum(0).numpy()
    place = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    if place == len(cumulative):  # u * total was rounded up to the total
        place = int(weights.nonzero()[-1])
    return place if kept is None else int(kept[place])


def _nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the kept tokens, ascending. Only values are sorted: equal ones weigh the same, whichever comes first."""
    ordered = np.sort(logits)[::-1].copy()
    mass = _weights(torch.from_numpy(ordered)).cumsum(0).numpy()
    number = 1 + int(mass[:-1].searchsorted(top_p * mass[-1], side="right"))
    border = ordered[number - 1]
    above = np.count_nonzero(logits > border)
    surplus = np.flatnonzero(logits == border)[number - above :]
    is_kept = ~(logits < border)
    is_kept[surplus] = False
    return cast(np.ndarray, np.flatnonzero(is_kept))
