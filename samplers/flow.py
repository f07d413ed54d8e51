"""Samplers of flows: the probability flow as an ODE, or with noise as an SDE of the same marginals (SiT, arXiv:2401.08740, section 2).

Inside, t runs from 1 (noise) to 0 (data). The ODE is dx = v dt; the SDE adds noise of variance 2 D per unit of time and takes it out
again by the score: dx = (v - D score) dt + sqrt(2 D) dw. The paper's w_t is 2 D.

Shapes: B images, latents [B, c, h, w].
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.paths import Flow
from genvision.samplers.adaptive import dopri5
from genvision.samplers.continuous import ContinuousSampler
from genvision.samplers.flow_steps import LAST_STEPS, STEPS, Diffusion, Field, LastStep
from genvision.samplers.guided_network import GuidedNetwork

Method = Literal["euler", "heun", "midpoint", "euler-maruyama", "stochastic-heun", "dopri5"]
STOCHASTIC = ("euler-maruyama", "stochastic-heun")
CUT = 1e-3
"""Distance from an end of time at which a prediction says nothing or divides by zero."""


class FlowSampler(ContinuousSampler, SchedulerMixin):
    """Draws from flow models: SiT, LightningDiT, REPA, Model-guidance, and any DiT with path linear, gvp or vp.

    `num_steps` counts steps, the last one too, so that euler and euler-maruyama call the network num_steps times. Published protocols:

    - SiT's ODE with N grid points is num_steps N - 1 (its `heun2` is heun); its SDE with N grid points, 250 in the paper, is
      euler-maruyama with num_steps N. LightningDiT's 250 grid points with timestep_shift 0.3 are euler, num_steps 249, time_shift 1 / 0.3;
      its cfg_interval_start 0.125 is guidance_start 0.125. Both guide 3 channels.
    - REPA's and Model-guidance's SDE with N steps is euler-maruyama with num_steps N and diffusion `linear`; REPA's Heun has
      last_step `euler`. Guidance on [low, high] of REPA's time is guidance_start 1 - high, guidance_stop 1 - low.
    - dopri5 decides on its number of steps by itself; `calls` tells what each image cost.

    Guidance of a step is decided at its beginning; dopri5 follows the schedule within its steps, and begins anew at the interval's ends.

    Args:
        method: `euler`, `heun`, `midpoint`, `dopri5` (ODE); `euler-maruyama`, `stochastic-heun` (SDE).
        num_steps: steps; not of dopri5.
        time_shift: s in t' = s t / (1 + (s - 1) t), 1 or more: more steps at the noise (arXiv:2403.03206, section 5.3.2).
        diffusion: D of SDE methods: `sigma` is sigma_t, `linear` t, `decreasing` (1 - cos(pi t))^2 / 4, `sbdm` half of beta (vp only).
        last_step: of SDE methods, from `last_step_size` to the data: `mean` (a step without noise, the default), `tweedie` (the clean image
            as predicted), `euler` (the ODE), or `none`. Of heun: `euler` leaves out the correction of the last step.
        last_step_size: time of that step.
        rtol: relative error that dopri5 allows in each step.
        atol: absolute error that it allows.
        guidance_scale: 1 is off.
        guidance_schedule: `constant`, `linear` or `cosine` over progress 1 - t.
        guidance_start: progress at which guidance begins.
        guidance_stop: progress after which it ends; the second branch is only computed between the two.
        guidance_channels: guide only the first of them; the figures of SiT and LightningDiT guide 3.
        guidance_method: `cfg` or `apg` (arXiv:2410.02416).
        apg_eta: see genvision.samplers.guidance, as the next two.
        apg_norm: largest norm of the difference.
        apg_momentum: of the differences, from one network call to the next; not with dopri5.
        scale_condition: guidance scale that a scale-conditioned model is told.
        rows: conditional and null rows `together` in one batch, or `apart`.
        cache_interval: run the blocks at every so many network calls only, and guess what they add at the others; 1 is off. It changes
            images: see genvision.samplers.block_cache.
    """

    @register_to_config
    def __init__(
        self,
        method: str = "euler",
        num_steps: int = 50,
        time_shift: float = 1.0,
        diffusion: str = "sigma",
        last_step: str | None = None,
        last_step_size: float = 0.04,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_channels: int | None = None,
        guidance_method: str = "cfg",
        apg_eta: float = 0.0,
        apg_norm: float | None = None,
        apg_momentum: float = 0.0,
        scale_condition: float | None = None,
        rows: str = "together",
        cache_interval: int = 1,
    ) -> None:
        for name, value, choices in (("method", method, Method), ("diffusion", diffusion, Diffusion)):
            if value not in get_args(choices):
                raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(get_args(choices))}")
        self.is_stochastic = method in STOCHASTIC
        allowed = list(get_args(LastStep)) if self.is_stochastic else ["none", "euler"] if method == "heun" else ["none"]
        self.last_step = last_step if last_step is not None else allowed[0]
        if self.last_step not in allowed or (method, last_step) == ("stochastic-heun", "none"):
            raise UserError(f"last_step '{last_step}' does not go with method {method}; choose one of {', '.join(allowed)}")
        if num_steps < (fewest := 2 if self.is_stochastic else 1):
            raise UserError(f"num_steps must be at least {fewest} with method {method}, got {num_steps}")
        if not 1 <= time_shift < float("inf"):
            raise UserError(f"time_shift {time_shift} is not allowed; give 1 (off) or more; LightningDiT's 0.3 is 1 / 0.3 here")
        if not 0 < last_step_size < 1:
            raise UserError(f"last_step_size {last_step_size} is not allowed; give a part of the time between 0 and 1")
        if not (rtol > 0 and atol > 0):
            raise UserError(f"rtol {rtol} and atol {atol} must be above 0")
        if method == "dopri5" and (time_shift != 1 or apg_momentum):
            raise UserError("dopri5 chooses its own times and tries some of them twice; time_shift must be 1 and apg_momentum 0")
        if method == "dopri5" and cache_interval != 1:
            raise UserError(f"cache_interval {cache_interval}: dopri5 tells errors by all its network calls; choose 1, or another method")
        self._prepare()

    def check(self, generator: Any, guide: Any = None) -> None:
        super().check(generator, guide)
        path = generator.config.path
        if path == "ddpm":
            raise UserError("FlowSampler is for models with path linear, gvp or vp, and this one has path ddpm; use DiffusionSampler")
        if self.is_stochastic and self.config.diffusion == "sbdm" and path != "vp":
            raise UserError(f"diffusion sbdm is infinite at the noise of path {path}; choose sigma, linear or decreasing")

    def ends(self, generator: Any) -> tuple[float, float]:
        """Time of the noise and of the data: 1 and 0, cut where the network's prediction has no meaning there (SiT's `check_interval`)."""
        config = generator.config
        if config.path == "vp":
            return 1.0, CUT
        return (1.0, 0.0) if config.prediction == "velocity" else (1 - CUT, CUT)

    def grid(self, generator: Any) -> list[float]:
        """Falling times between the steps, num_steps + 1 of them."""
        begin, end = self.ends(generator)
        steps = self.config.num_steps
        has_last = self.is_stochastic and self.last_step != "none"
        if has_last:
            end, steps = self.config.last_step_size, steps - 1
        s, parts = self.config.time_shift, [1 - i / steps for i in range(steps + 1)]
        times = [min(end + (begin - end) * s * u / (1 + (s - 1) * u), begin) for u in parts]  # rounding never leaves the range
        return [*times, 0.0] if has_last else times

    def evaluations(self, generator: Any) -> list[tuple[float, float]] | None:
        if self.config.method == "dopri5":
            return None
        seconds: dict[str, Callable[[float, float], float]] = {
            "heun": lambda t, after: after,
            "stochastic-heun": lambda t, after: after,
            "midpoint": lambda t, after: (t + after) / 2,
        }
        pairs = []
        for i, (t, after) in enumerate(pairwise(self.grid(generator))):
            pairs.append((t, t))
            if self.config.method in seconds and not self._is_special(i):
                pairs.append((seconds[self.config.method](t, after), t))
        return pairs

    def _is_special(self, step: int) -> bool:
        """Is it the last step, taken in a way of its own?"""
        return self.last_step != "none" and step == self.config.num_steps - 1

    def _integrate(self, generator: Any, network: GuidedNetwork, x: Tensor, step_noise: Callable[[int], Tensor]) -> Tensor:
        flow = Flow.of(generator)
        if self.config.method == "dopri5":
            return self._integrate_adaptively(flow, network, x, *self.ends(generator))
        field = Field(network, flow, self.config.diffusion)
        grid, advance = self.grid(generator), STEPS[self.config.method]
        for i, (t, after) in enumerate(pairwise(grid)):
            field.begin(t)
            if self._is_special(i):
                x = LAST_STEPS[self.last_step](field, x, t, after)
            else:
                x = advance(field, x, t, after, partial(step_noise, i))
        return x

    def _integrate_adaptively(self, flow: Flow, network: GuidedNetwork, x: Tensor, begin: float, end: float) -> Tensor:
        """By dopri5, piece by piece, for the velocity jumps where guidance begins and ends."""
        jumps = {1 - self.guidance.start, 1 - self.guidance.stop} if self.guidance.scale != 1 else set()
        pieces = [begin, *sorted((t for t in jumps if end < t < begin), reverse=True), end]
        for before, after in pairwise(pieces):
            middle = torch.tensor([(before + after) / 2], dtype=torch.float64)
            is_guided = bool(self.guidance.scale_over(1 - middle) != 1)

            def velocity(x: Tensor, t: Tensor, images: Tensor, middle: Tensor = middle, is_guided: bool = is_guided) -> Tensor:
                guided_at = t if is_guided else middle.expand(len(t))  # both ends of the interval are guided
                return flow.velocity(x, t.to(x.device), network(x, t, guided_at=guided_at, images=images))

            x = dopri5(velocity, x, before, after, rtol=self.config.rtol, atol=self.config.atol)
        return x
