"""What rounding the weights of a generator changes in its predictions: one network beside the other, on the same inputs.

Tokens are compared by KL(before || after) in nats, predictions of latents by their distance over their length. The inputs are made of
images that the model before rounding drew itself.

Shapes: B images, N tokens of an image, M of them masked, V codebook entries, c latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genvision.kernels.draw import draw_tokens
from genvision.models.rar import RAR
from genvision.objectives.gaussian import GaussianDiffusion
from genvision.objectives.paths import Flow
from genvision.samplers.guided_network import told_scale
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose

MASKED_PARTS = (0.25, 0.5, 0.75, 1.0)
NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times of a flow, or steps of a diffusion over 1,000."""
LOGITS_AT_ONCE = 2**23
"""Logits of one pass; in float64, and of two networks, 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far two networks are apart in one kind of prediction."""

    what: str
    """Which predictions."""
    mean: float
    """KL in nats a token, or relative distance of an image's prediction."""
    high: float
    """99 of 100 are below."""
    largest: float
    same_best: float | None = None
    """Part of the tokens whose most likely value is the same; None of latents."""

    @classmethod
    def of(cls, what: str, values: Sequence[Tensor], same: Sequence[Tensor] = ()) -> "Change":
        """From the values of all predictions, and where the most likely tokens are the same."""
        flat = torch.cat([value.flatten() for value in values]).double().cpu().numpy()
        agreement = float(torch.cat([value.flatten() for value in same]).double().mean()) if len(same) else None
        high = float(np.quantile(flat, 0.99))
        return cls(what=what, mean=float(flat.mean()), high=high, largest=float(flat.max()), same_best=agreement)


class _Collected:
    """Values of some kinds of predictions, batch by batch."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.same: dict[str, list[Tensor]] = {}

    def add_logits(self, what: str, before: Tensor, after: Tensor) -> None:
        """Logits [..., V]."""
        self.values.setdefault(what, []).append(divergence(before, after))
        self.same.setdefault(what, []).append(before.argmax(-1) == after.argmax(-1))

    def changes(self) -> list[Change]:
        return [Change.of(what, values, self.same.get(what, ())) for what, values in self.values.items()]


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats of logits [..., V]: float64 [...]."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


@torch.inference_mode()
def next_token_changes(before: Any, after: Any, sampler: Any, codes: Tensor, labels: Tensor, seed: int) -> tuple[list[Change], float]:
    """Of an autoregressive model that is shown the tokens drawn so far (teacher forcing).

    The first change is that of the distribution which the sampler draws from, guidance and temperature applied, before top-k and top-p,
    which cut tokens off and would make KL infinite.

    Args:
        sampler: says how conditional and null rows are mixed at each token, and how tokens are drawn.
        codes: int64 [B, ...], drawn by `before` and `sampler` as images 0 .. B - 1 of a job of this seed.
        labels: int64 [B].

    Returns:
        The changes, and the part of the tokens that would have been drawn otherwise from the same uniform numbers, after the same tokens.
    """
    options, num_tokens = sampler.config, before.num_tokens
    scales = sampler.guidance.scales(num_tokens)
    guided = [i for i, scale in enumerate(scales) if scale != 1]
    scale = torch.tensor(scales, device=codes.device).unsqueeze(1)  # [N, 1]
    kept = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    drawn, collected = _drawn_from(scales, options.temperature), _Collected()
    otherwise = torch.zeros((), dtype=torch.int64)
    for rows in torch.arange(len(codes)).split(max(1, LOGITS_AT_ONCE // (num_tokens * before.config.codebook_size))):
        tokens, told = codes[rows].flatten(1), labels[rows]
        uniform = ImageStreams(seed, rows.tolist()).uniform(Purpose.TOKEN, num_tokens).to(codes.device)
        mixed = []
        for network in (before, after):
            logits = mix = _next_logits(network, tokens, told, is_null=False)  # [B, N, V]
            null = _next_logits(network, tokens, told, is_null=True) if guided else logits
            if guided:
                mix = torch.where(scale == 1, logits, null + scale * (logits - null))
            mixed.append((mix, logits, null))
        (mix, logits, null), (mix_after, logits_after, null_after) = mixed
        temperature = options.temperature or 1.0
        collected.add_logits(drawn, mix / temperature, mix_after / temperature)
        if guided:
            collected.add_logits("conditional rows", logits, logits_after)
            collected.add_logits("null rows", null[:, guided], null_after[:, guided])
        for i in range(num_tokens):
            otherwise += (draw_tokens(mix_after[:, i], uniform[:, i], **kept) != tokens[:, i]).sum().cpu()
    return collected.changes(), float(otherwise) / codes.numel()


def _drawn_from(scales: Sequence[float], temperature: float) -> str:
    guidance = {scale for scale in scales if scale != 1}
    parts = [f"guidance {max(guidance):.3g}" if guidance else "no guidance"]
    if temperature not in (0, 1):
        parts.append(f"T {temperature:g}")
    return f"as drawn ({', '.join(parts)})"


def _next_logits(generator: Any, codes: Tensor, labels: Tensor, *, is_null: bool) -> Tensor:
    drop = torch.full_like(labels, is_null, dtype=torch.bool)
    logits: Tensor = generator(codes if isinstance(generator, RAR) else codes[:, :-1], labels, drop=drop)
    return logits


@torch.inference_mode()
def masked_changes(before: Any, after: Any, codes: Tensor, labels: Tensor, seed: int) -> list[Change]:
    """Of a MaskedGenerator, conditional rows, with some parts of each image masked; where a token is masked.

    Args:
        codes: int64 [B, ...], drawn by `before`.
        labels: int64 [B].
    """
    num_tokens, collected = before.num_tokens, _Collected()
    for step, part in enumerate(MASKED_PARTS):
        num_masked = max(1, round(part * num_tokens))
        for rows in torch.arange(len(codes)).split(max(1, LOGITS_AT_ONCE // (num_masked * before.codebook_size))):
            order = ImageStreams(seed, rows.tolist()).uniform(Purpose.MASK, num_tokens, step=step).argsort(1).to(codes.device)
            where = order[:, :num_masked].sort(1).values  # [B, M]
            shown = codes[rows].flatten(1).scatter(1, where, before.mask_id)
            drop = torch.zeros_like(labels[rows], dtype=torch.bool)
            of_before, of_after = (network(shown, labels[rows], drop=drop, where=where) for network in (before, after))
            collected.add_logits(f"{part:.0%} of the tokens masked", of_before, of_after)
    return collected.changes()


@torch.inference_mode()
def latent_changes(before: Any, after: Any, sampler: Any, codes: Tensor, labels: Tensor, seed: int, batch_size: int) -> list[Change]:
    """Of a diffusion transformer, conditional rows, on latents with some noise in them.

    Args:
        codes: float [B, c, ...], drawn by `before`.
        labels: int64 [B].
    """
    collected = _Collected()
    scale = told_scale(before, sampler.config.scale_condition)
    for step, t in enumerate(NOISE_LEVELS):
        for rows in torch.arange(len(codes)).split(batch_size):
            noise = ImageStreams(seed, rows.tolist()).normal(Purpose.TRAINING_NOISE, codes.shape[1:], step=step).to(codes.device)
            x_t, time = _noised(before, codes[rows], noise, t)
            told = {} if scale is None else {"scale": torch.full_like(time, scale)}
            drop = torch.zeros_like(labels[rows], dtype=torch.bool)
            outputs = [network(x_t, time, labels[rows], drop=drop, **told)[:, : codes.shape[1]] for network in (before, after)]
            collected.values.setdefault(f"noise level {t:g}", []).append(distance(*outputs))
    return collected.changes()


def distance(before: Tensor, after: Tensor) -> Tensor:
    """Distance of two tensors over the length of the first, for each image: float64 [B]."""
    before, after = before.double().flatten(1), after.double().flatten(1)
    return (after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)


def _noised(generator: Any, codes: Tensor, noise: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """x_t and what the network is told of the time, float32 [B]."""
    if generator.config.path == "ddpm":
        diffusion = GaussianDiffusion.linear()
        steps = torch.full((len(codes),), round(t * (len(diffusion.betas) - 1)), device=codes.device)
        return diffusion.mix(codes, noise, steps), steps.float()
    flow, times = Flow.of(generator), torch.full((len(codes),), t, device=codes.device)
    return flow.path.mix(codes, noise, times), flow.network_time(times)
