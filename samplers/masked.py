"""Masked tokens revealed step by step: by confidence (MaskGIT, arXiv:2202.04200, section 3.2; MAGE, arXiv:2211.09117), or in an order.

Early steps may use a smaller network nested in the generator, and keys and values of tokens that are long known may be kept (MaGNeTS,
arXiv:2502.00382; its cache by our own reading of the paper's abstract).

Shapes: B images, N tokens, M of them masked, K codebook entries.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.kernels.draw import filter_logits
from genvision.models.masked import MaskedGenerator
from genvision.objectives.mask_schedules import check_schedule, masked_after_steps
from genvision.samplers.base import Sampler, check_labels
from genvision.samplers.guidance import Guidance
from genvision.samplers.masked_network import MaskedNetwork, Step
from genvision.samplers.nesting import parse_nesting
from genvision.samplers.randomness import ImageStreams
from genvision.samplers.token_draws import TokenDraws
from genvision.samplers.token_order import halton_order

Order = Literal["confidence", "halton", "random"]
Form = Literal["probability", "logit"]


class MaskedSampler(Sampler, SchedulerMixin):
    """All tokens begin masked; each step predicts them together and keeps some; conditional and null rows share one batch.

    Args:
        num_steps: network calls an image, twice as many while guidance is on.
        schedule: part of the tokens still masked as a function of progress: cosine, arccos, linear, square, root, pow<X>, exp or log.
        order: which tokens are kept: `confidence`, those that the model is surest of, with noise; `halton`, far apart from one another;
            `random`, an order for each image.
        choice_temperature: of the noise on confidences, falling linearly to 0 at the last step.
        confidence: `probability` is log p of the drawn token, drawn at temperature 1 (MaskGIT, MAGE); `logit` is its logit, and tokens are
            drawn at the temperature of the choice, so the last ones are the most likely (TiTok's generators).
        temperature: divides the logits of the draw; 0 takes the most likely token, in every step.
        final_temperature: where it comes to at the last step, its inverse linearly; `temperature` unless told.
        warmup_steps: so many first steps are drawn at twice the temperature.
        softmax_annealing: logits are divided by 0.5 + 0.8 (1 - progress) before all else.
        top_k: draw from the k most likely tokens; 0 keeps all.
        top_p: draw from the smallest set of tokens with at least this probability; 1 keeps all.
        guidance_scale: 1 is off.
        guidance_schedule: `constant`, `linear`, `cosine` or `power-cosine`, over the steps.
        guidance_power: of `power-cosine`.
        guidance_start: part of the steps before guidance begins.
        guidance_stop: part of the steps after which it ends.
        nesting: which nested network each step uses: `8x3,4x3,2x3,1x3` is three steps with an eighth of heads and hidden units each, and so
            on; one number is for all steps.
        use_cache: read only what is masked or was revealed last, and keep keys and values of the rest until the nested network changes.
        refresh_every: steps after which everything is read anew all the same; 0 is never.
        shift_order: roll the Halton order by a random number for each image.
        schedule_dtype: `float32` is for equal numbers of tokens as the original MaskGIT's, see `masked_after_steps`.
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int = 12,
        schedule: str = "cosine",
        order: str = "confidence",
        choice_temperature: float = 4.5,
        confidence: str = "probability",
        temperature: float = 1.0,
        final_temperature: float | None = None,
        warmup_steps: int = 0,
        softmax_annealing: bool = False,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 1.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        nesting: str | int = "1",
        use_cache: bool = False,
        refresh_every: int = 0,
        shift_order: bool = False,
        schedule_dtype: str = "float64",
    ) -> None:
        interval = {"start": guidance_start, "stop": guidance_stop}
        self.guidance = Guidance(scale=guidance_scale, schedule=guidance_schedule, power=guidance_power, **interval)  # type: ignore[arg-type]
        if num_steps < 1:
            raise UserError(f"num_steps must be at least 1, got {num_steps}")
        check_schedule(schedule)
        choices = {"order": (order, Order), "confidence": (confidence, Form)}
        for name, (value, known) in choices.items():
            if value not in get_args(known):
                raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(get_args(known))}")
        if schedule_dtype not in ("float64", "float32"):
            raise UserError(f"schedule_dtype '{schedule_dtype}' is unknown; choose float64 or float32")
        numbers = {"choice_temperature": choice_temperature, "temperature": temperature, "final_temperature": final_temperature or 0}
        for name, number in (numbers | {"top_k": top_k, "warmup_steps": warmup_steps, "refresh_every": refresh_every}).items():
            if not number >= 0:
                raise UserError(f"{name} {number} is not allowed; give 0 or more")
        if final_temperature == 0 < temperature:
            raise UserError("final_temperature must be above 0; temperature 0 takes the most likely token in every step")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p} is not allowed; give a probability in (0, 1], 1 is off")
        self.nestings = parse_nesting(str(nesting), num_steps)

    def check(self, generator: Any, guide: Any = None) -> None:
        if guide is not None:
            raise UserError("a guide is for samplers of latents; tokens are guided by the null class, so leave it out")
        if not isinstance(generator, MaskedGenerator):
            raise UserError(f"MaskedSampler needs a model of masked tokens, and {type(generator).__name__} is none; use another sampler")
        if self.config.num_steps > generator.num_tokens:
            raise UserError(
                f"num_steps {self.config.num_steps} is more than the {generator.num_tokens} tokens of an image; give at most as many"
            )
        for nesting in set(self.nestings):
            generator.check_nesting(nesting)
        guided = any(scale != 1 for scale in self.guidance.scales(self.config.num_steps))
        if guided and generator.is_unconditional:
            raise UserError("this model is unconditional, so there is nothing to guide with; set guidance to 1")
        if guided and not generator.has_null_label:
            raise UserError("this model was trained without class_dropout, so it has no null class to guide with; set guidance to 1")
        shape = generator.code_shape
        if self.config.order == "halton" and (len(shape) != 2 or shape[0] != shape[1]):
            raise UserError(f"order halton is for square grids, and this model has tokens of shape {list(shape)}; choose another")

    def plan(self, num_tokens: int, num_unknown: int | None = None) -> list[Step]:
        """The steps of an image with `num_unknown` tokens to draw, all unless told; never more steps than these."""
        unknown = num_tokens if num_unknown is None else num_unknown
        num_steps = min(self.config.num_steps, unknown)
        dtype = torch.float64 if self.config.schedule_dtype == "float64" else torch.float32
        round_up = self.config.order == "halton"
        after = masked_after_steps(self.config.schedule, unknown, num_steps, dtype=dtype, round_up=round_up) if unknown else []
        scales = self.guidance.scales(num_steps)
        steps: list[Step] = []
        num_masked, since_full = unknown, 0
        for i in range(num_steps):
            nesting = self.nestings[-(-(i + 1) * self.config.num_steps // num_steps) - 1]  # the last step has the last of them
            is_full = not self.config.use_cache or i == 0 or since_full + 1 == self.config.refresh_every
            if not is_full:
                last = steps[-1]
                is_full = last.nesting != nesting or (last.scale != 1) != (scales[i] != 1)
            since_full = 0 if is_full else since_full + 1
            num_read = num_tokens if is_full else num_masked + steps[-1].num_revealed
            steps.append(Step((i + 1) / num_steps, num_masked, num_masked - after[i], scales[i], nesting, is_full, num_read))
            num_masked = after[i]
        return steps

    def network_calls(self, generator: Any) -> int:
        return sum(1 + (step.scale != 1) for step in self.plan(generator.num_tokens))

    def multiply_adds(self, generator: Any) -> int:
        total = 0
        for step in self.plan(generator.num_tokens):
            predicted = step.num_masked if self.config.order == "confidence" else step.num_revealed
            total += (1 + (step.scale != 1)) * generator.multiply_adds(step.num_read, predicted, step.nesting)
        return total

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
            generator: a `MaskedGenerator` in eval mode.
            condition: labels int64 [B].
            noise: the streams of the B images.
            condition_mask: not for classes.
            known: int64 [B, ...] as codes are, -1 where a token is to be drawn; the same places in every image. The others are kept.
            guide: not for tokens.

        Returns:
            int64 [B, h, w], or [B, L] where codes are no grid.
        """
        self.check(generator, guide)
        check_labels(condition, generator.num_classes)
        return self.decode(generator, condition, TokenDraws(noise, generator.num_tokens, condition.device), known)

    def decode(self, generator: Any, labels: Tensor, draws: TokenDraws, known: Tensor | None = None) -> Tensor:
        """`sample` with its random numbers given."""
        rows, device = len(labels), labels.device
        codes = torch.full((rows, generator.num_tokens), -1, device=device)
        if known is not None:
            codes = self.read_known(generator, known, rows).to(device).clone()
        unknown = codes < 0
        codes[unknown] = generator.mask_id
        masked = unknown.nonzero()[:, 1].view(rows, -1)  # [B, M], ascending
        order = self._order(generator, draws, masked)
        network = MaskedNetwork(generator, labels, keeps=self.config.use_cache)
        revealed = masked[:, :0]
        steps = self.plan(generator.num_tokens, masked.shape[1])
        for i, step in enumerate(steps):
            where = masked if order is None else order[:, : step.num_revealed].sort(dim=1).values
            fresh = None if step.is_full else torch.cat([masked, revealed], dim=1).sort(dim=1).values
            logits = network(codes, where, step, fresh)  # [B, M, K]
            ids, confidence = self._draw(i, step, logits, where, draws)
            if order is None:
                kept = confidence.topk(step.num_revealed, dim=1).indices
                ids, revealed = ids.gather(1, kept), where.gather(1, kept)
                codes.scatter_(1, revealed, ids)
                masked = (codes == generator.mask_id).nonzero()[:, 1].view(rows, -1)
            else:
                codes.scatter_(1, where, ids)
                revealed, order = where, order[:, step.num_revealed :]
                masked = order.sort(dim=1).values
        self.calls = torch.full((rows,), sum(1 + (step.scale != 1) for step in steps))
        return codes.view(rows, *generator.code_shape)

    def _draw(self, i: int, step: Step, logits: Tensor, where: Tensor, draws: TokenDraws) -> tuple[Tensor, Tensor]:
        """Tokens [B, M] and how sure they are, [B, M]."""
        config, left = self.config, 1 - step.progress
        if config.softmax_annealing:
            logits = logits / (0.5 + 0.8 * left)
        noise_scale = config.choice_temperature * left
        temperature = self._temperature(i, step)
        if config.confidence == "logit" and config.order == "confidence":
            temperature = temperature * noise_scale
        if temperature == 0:
            ids = logits.argmax(-1)
        else:
            kept = filter_logits(logits.flatten(0, 1), temperature=temperature, top_k=config.top_k, top_p=config.top_p)
            ids = draws.ids(i, kept.view(logits.shape), where)
        if config.order != "confidence":
            return ids, logits[..., 0]
        scores = logits if config.confidence == "logit" else F.log_softmax(logits, dim=-1)
        confidence = scores.gather(2, ids.unsqueeze(2)).squeeze(2)
        return ids, confidence if noise_scale == 0 else confidence + noise_scale * draws.gumbel(i).gather(1, where)

    def _temperature(self, i: int, step: Step) -> float:
        config = self.config
        temperature: float = config.temperature
        if config.final_temperature is not None and config.num_steps > 1 and temperature > 0:
            part = (step.progress * config.num_steps - 1) / (config.num_steps - 1)
            temperature = 1 / ((1 - part) / temperature + part / config.final_temperature)
        return 2 * temperature if i < config.warmup_steps else temperature

    def _order(self, generator: Any, draws: TokenDraws, masked: Tensor) -> Tensor | None:
        """The masked positions in the order in which they are revealed, int64 [B, M]; None where confidence decides."""
        if self.config.order == "confidence":
            return None
        if self.config.order == "random":
            order = draws.order()
        else:
            order = halton_order(generator.code_shape[0]).to(masked.device).expand(len(masked), -1)
            if self.config.shift_order:
                places = torch.arange(order.shape[1], device=order.device)
                order = order.gather(1, (places - draws.shift().unsqueeze(1)) % order.shape[1])
        is_masked = torch.zeros_like(order, dtype=torch.bool).scatter_(1, masked, True)
        return order[is_masked.gather(1, order)].view(masked.shape)
