"""Token by token sampling with a static key/value cache (LlamaGen, arXiv:2406.06525 section 3.3).

Shapes: B images, N tokens, V codebook entries.
"""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.kernels.draw import draw_tokens
from genvision.samplers.base import Sampler, check_labels
from genvision.samplers.graphed_step import GraphedStep, graphed_step
from genvision.samplers.guidance import Guidance
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
        kept = {"temperature": self.config.temperature, "top_k": self.config.top_k, "top_p": self.config.top_p}
        for i in range(len(first), num_tokens):
            logits, scale = rows.next_logits()
            rows.take(draw_tokens(logits, uniform[:, i], guidance_scale=scale, **kept))
        self.calls = torch.full((len(noise),), rows.calls)
        return torch.stack(rows.tokens, dim=1).view(len(noise), *generator.code_shape)


class _Rows:
    """The sequences so far, with the cache of the conditional rows and, only while they are needed, of the null rows."""

    def __init__(self, generator: Any, condition: Tensor, condition_mask: Tensor | None, guidance: Guidance, first: list[Tensor]) -> None:
        self.generator, self.condition, self.mask = generator, condition, condition_mask
        self.scales = guidance.scales(generator.num_tokens)
        self.guided_until = max((i + 1 for i, scale in enumerate(self.scales) if scale != 1), default=0)
        self.num_rows = condition.shape[0]
        self.tokens = first
        self.cache: Any = None
        self.graph: GraphedStep | None = None
        self.captured: Any = None  # the cache that `graph` is for
        self.has_null = False
        self.calls = 0

    def next_logits(self) -> tuple[Tensor, float | None]:
        """Logits of the next token, [B, V], or [2B, V] with null rows behind and the scale to guide with."""
        scale = self.scales[len(self.tokens)]
        if self.has_null and len(self.tokens) >= self.guided_until:
            self.cache, self.has_null = self.cache.first_rows(self.num_rows), False
        if scale != 1 and not self.has_null and self.cache is not None:
            self._add_null_rows()
        logits = self._start(scale != 1) if self.cache is None else self._extend()
        self.calls += 1 + self.has_null
        return (logits, scale) if scale != 1 else (logits[: self.num_rows], None)

    def take(self, tokens: Tensor) -> None:
        self.tokens.append(tokens)

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
        last = torch.cat([self.tokens[-1]] * (1 + self.has_null))
        if self.captured is not self.cache:  # the first step of these rows
            self.captured, self.graph = self.cache, graphed_step(self.generator, self.cache, self.mask)
        if self.graph is not None:
            return self.graph.extend(self.generator, last, self.cache)
        return self.generator.extend(last, self.cache, self._doubled(self.mask, self.has_null))

    def _add_null_rows(self) -> None:
        """Guidance begins in the middle: read everything up to the token before last into null rows, in one pass."""
        past = self.tokens[:-1]
        drop = torch.ones(self.num_rows, dtype=torch.bool, device=self.condition.device)
        _, null_cache = self.generator.start(self.condition, self.mask, drop, torch.stack(past, dim=1) if past else None)
        self.cache, self.has_null = self.cache.joined(null_cache), True
