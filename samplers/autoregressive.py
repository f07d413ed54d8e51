"""Token by token sampling with a static key/value cache (LlamaGen, arXiv:2406.06525 section 3.3).

Shapes: B images, N tokens, V codebook entries.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.samplers.base import Sampler, check_labels
from genvision.samplers.guidance import Guidance, combine
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose


class AutoregressiveSampler(Sampler, SchedulerMixin):
    """Draws tokens in raster order; conditional and null rows share one batch while guidance is on.

    Args:
        guidance_scale: 1 is off.
        guidance_schedule: `constant`, `linear`, `cosine` or `power-cosine`.
        guidance_power: of `power-cosine`.
        guidance_start: part of the tokens before guidance begins.
        guidance_stop: part of the tokens after which it ends; the null rows are dropped there.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_power: float = 1.0,
    ) -> None:
        interval = {"start": guidance_start, "stop": guidance_stop}
        self.guidance = Guidance(scale=guidance_scale, schedule=guidance_schedule, power=guidance_power, **interval)  # type: ignore[arg-type]
        if temperature < 0:
            raise UserError(f"temperature {temperature} is not allowed; give 0 (most likely token) or more")
        if top_k < 0:
            raise UserError(f"top_k {top_k} is not allowed; give 0 (off) or more")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p} is not allowed; give a probability in (0, 1], 1 is off")

    def check(self, generator: Any, guide: Any = None) -> None:
        if guide is not None:
            raise UserError("a guide is for samplers of latents; tokens are guided by the null class, so leave it out")
        if "codebook_size" not in generator.config:
            raise UserError(f"AutoregressiveSampler draws tokens, and {type(generator).__name__} predicts latents; use another sampler")
        if not generator.is_causal:
            raise UserError(
                f"AutoregressiveSampler draws tokens one after another, and {type(generator).__name__} masked ones; use another"
            )
        if any(scale != 1 for scale in self.guidance.scales(generator.num_tokens)) and not generator.has_null_label:
            raise UserError("this model was trained without class_dropout, so it has no null class to guide with; set guidance to 1")

    def network_calls(self, generator: Any) -> int:
        guided = [i for i, scale in enumerate(self.guidance.scales(generator.num_tokens)) if scale != 1]
        return int(generator.num_tokens) + (guided[-1] - guided[0] + 1 if guided else 0)  # null rows are kept from first to last

    def read_known(self, generator: Any, known: Tensor, num_images: int) -> Tensor:
        """See `Sampler.read_known`; a token sees only those before it, so the known ones are the first in raster order."""
        tokens = super().read_known(generator, known, num_images)
        if ((tokens[:, 1:] >= 0) & (tokens[:, :-1] < 0)).any():
            raise UserError(
                "AutoregressiveSampler draws in raster order, so known tokens must be the first ones, from the upper left, without a gap; "
                "models of masked tokens take any"
            )
        return tokens

    @torch.inference_mode()
    def sample(
        self,
        generator: Any,
        condition: Tensor,
        noise: ImageStreams,
        *,
        condition_mask: Tensor | None = None,
        known: Tensor | None = None,
        guide: Any = None,
    ) -> Tensor:
        """Draw the tokens of B images.

        Args:
            generator: a LlamaGen in eval mode.
            condition: labels int64 [B], or text features [B, T, F].
            noise: the streams of the B images; one uniform number a token.
            condition_mask: [B, T], true where text is no padding; used for the null rows too, as officially.
            known: int64 [B, h, w] or [B, N], -1 where a token is to be drawn: the first ones in raster order, which are kept.
            guide: not for tokens.

        Returns:
            int64 [B, h, w], or [B, L] where codes are no grid.
        """
        if condition.dtype == torch.int64:
            check_labels(condition, generator.num_classes)
        self.check(generator, guide)
        num_tokens = generator.num_tokens
        first: list[Tensor] = []
        if known is not None:
            tokens = self.read_known(generator, known, len(noise)).to(condition.device)
            first = list(tokens[:, : int((tokens >= 0).all(0).sum())].unbind(1))
        uniform = noise.uniform(Purpose.TOKEN, num_tokens).to(condition.device)
        rows = _Rows(generator, condition, condition_mask, self.guidance, first)
        for i in range(len(first), num_tokens):
            logits = rows.next_logits()  # [B, V]
            rows.take(self._choose(logits, uniform[:, i]))
        self.calls = torch.full((len(noise),), rows.calls)
        return torch.stack(rows.tokens, dim=1).view(len(noise), *generator.code_shape)

    def _choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        if self.config.temperature == 0:
            return logits.argmax(-1)
        kept = filter_logits(logits, temperature=self.config.temperature, top_k=self.config.top_k, top_p=self.config.top_p)
        return draw(F.softmax(kept, dim=-1), uniform)


class _Rows:
    """The sequences so far, with the cache of the conditional rows and, only while they are needed, of the null rows."""

    def __init__(self, generator: Any, condition: Tensor, condition_mask: Tensor | None, guidance: Guidance, first: list[Tensor]) -> None:
        self.generator, self.condition, self.mask = generator, condition, condition_mask
        self.scales = guidance.scales(generator.num_tokens)
        self.num_rows = condition.shape[0]
        self.tokens = first
        self.cache: Any = None
        self.has_null = False
        self.calls = 0

    def next_logits(self) -> Tensor:
        """Logits of the next token after guidance, [B, V]."""
        scale, last_guided = self.scales[len(self.tokens)], self._guided_later()
        if self.has_null and not last_guided:
            self.cache, self.has_null = self.cache.first_rows(self.num_rows), False
        if scale != 1 and not self.has_null and self.cache is not None:
            self._add_null_rows()
        logits = self._start(scale != 1) if self.cache is None else self._extend()
        self.calls += 1 + self.has_null
        if not self.has_null:
            return logits
        conditional, null = logits.chunk(2)
        return combine(conditional, null, scale) if scale != 1 else conditional

    def take(self, tokens: Tensor) -> None:
        self.tokens.append(tokens)

    def _guided_later(self) -> bool:
        return any(scale != 1 for scale in self.scales[len(self.tokens) :])

    def _doubled(self, x: Tensor | None, with_null: bool) -> Tensor | None:
        return torch.cat([x, x]) if with_null and x is not None else x

    def _start(self, with_null: bool) -> Tensor:
        known = torch.stack(self.tokens, dim=1) if self.tokens else None
        drop = torch.arange(self.num_rows * (1 + with_null), device=self.condition.device) >= self.num_rows
        logits, self.cache = self.generator.start(
            self._doubled(self.condition, with_null),
            self._doubled(self.mask, with_null),
            drop if with_null else None,
            self._doubled(known, with_null),
        )
        self.has_null = with_null
        return logits

    def _extend(self) -> Tensor:
        last = self._doubled(self.tokens[-1], self.has_null)
        return self.generator.extend(last, self.cache, self._doubled(self.mask, self.has_null))

    def _add_null_rows(self) -> None:
        """Guidance begins in the middle: read everything up to the token before last into null rows, in one pass."""
        past = self.tokens[:-1]
        drop = torch.ones(self.num_rows, dtype=torch.bool, device=self.condition.device)
        _, null_cache = self.generator.start(self.condition, self.mask, drop, torch.stack(past, dim=1) if past else None)
        self.cache, self.has_null = self.cache.joined(null_cache), True


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Temperature, then top-k, then top-p (nucleus sampling, arXiv:1904.09751), in the official order; -inf where dropped.

    All that tie with the k-th stay; the token that crosses `top_p` stays.

    Args:
        logits: [B, V].
    """
    logits = logits / max(temperature, 1e-5)
    if 0 < top_k < logits.shape[-1]:
        border = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < border, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = F.softmax(ordered, dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        logits = logits.masked_fill((before > top_p).scatter(-1, order, before > top_p), float("-inf"))
    return logits


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by the inverse of the cumulative distribution.

    Args:
        probabilities: [B, V], need not sum to 1 exactly.
        uniform: float64 [B] in [0, 1).

    Returns:
        int64 [B]; never a token of probability 0.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    last_possible = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True).squeeze(1), last_possible)
