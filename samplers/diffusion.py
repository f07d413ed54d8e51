"""Samplers of discrete diffusions: ancestral (DDPM, arXiv:2006.11239), DDIM (arXiv:2010.02502), DPM-Solver++ (arXiv:2211.01095).

Letters as in genvision.objectives.gaussian: steps i from noisy to 0, ab = alpha-bar, x_i. Shapes: B images, latents [B, c, h, w].
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.gaussian import GaussianDiffusion, Spacing, kept_steps
from genvision.samplers.continuous import ContinuousSampler
from genvision.samplers.guided_network import GuidedNetwork
from genvision.samplers.thresholding import Threshold, dynamic_threshold

Method = Literal["ddpm", "ddim", "dpm++"]


class DiffusionSampler(ContinuousSampler, SchedulerMixin):
    """Draws from models with `path: ddpm`, that know 1,000 steps of noise.

    Published protocols: DiT is ddpm, 250 steps, guidance_channels 3, guidance_scale 1.5; diffusers' DiTPipeline is ddim, spacing leading,
    50 steps, guidance_scale 4 on all channels; DiT's own "ddimN" is ddim with spacing ddim.

    Args:
        method: `ddpm` (with the model's variance if it learnt one, and else beta-tilde), `ddim`, or `dpm++` (second order, by diffusers).
        num_steps: steps, and network calls before guidance.
        spacing: which of the 1,000 steps are taken: `even` (both ends), `ddim` (whole stride from 0) or `leading` (diffusers' DDIM).
        eta: of ddim; 0 adds no noise, 1 as much as ddpm without a learned variance.
        threshold: of predicted clean images: `none`, `clip` to [-1, 1], or `dynamic` (genvision.samplers.thresholding); for pixel models.
        threshold_ratio: the quantile of `dynamic`.
        threshold_maximum: its largest range.
        guidance_scale: 1 is off.
        guidance_schedule: `constant`, `linear` or `cosine` over progress 1 - step / 999.
        guidance_start: progress at which guidance begins.
        guidance_stop: progress after which it ends; the second branch is only computed between the two.
        guidance_channels: guide only the first of them; DiT's figures guide 3.
        guidance_method: `cfg` or `apg` (arXiv:2410.02416).
        apg_eta: see genvision.samplers.guidance, as the next two.
        apg_norm: largest norm of the difference.
        apg_momentum: of differences.
        scale_condition: guidance scale that a scale-conditioned model is told.
        rows: conditional and null rows `together` in one batch, or `apart`.
        cache_interval: run the blocks at every so many network calls only, and guess what they add at the others; 1 is off. It changes
            images: see genvision.samplers.block_cache.
    """

    @register_to_config
    def __init__(
        self,
        method: str = "ddpm",
        num_steps: int = 250,
        spacing: str = "even",
        eta: float = 0.0,
        threshold: str = "none",
        threshold_ratio: float = 0.995,
        threshold_maximum: float = 1.0,
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
        for name, value, choices in (("method", method, Method), ("spacing", spacing, Spacing), ("threshold", threshold, Threshold)):
            if value not in get_args(choices):
                raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(get_args(choices))}")
        kept_steps(num_steps, 1000, spacing)  # type: ignore[arg-type]
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta} is not allowed; give 0 (no noise) to 1")
        if eta and method != "ddim":
            raise UserError(f"eta {eta} has no meaning for method {method}; it belongs to ddim")
        if not 0 < threshold_ratio <= 1:
            raise UserError(f"threshold_ratio {threshold_ratio} is not allowed; give a part in (0, 1]")
        if threshold_maximum < 1:
            raise UserError(f"threshold_maximum {threshold_maximum} is not allowed; give 1 (plain clipping) or more")
        self._prepare()

    def check(self, generator: Any, guide: Any = None) -> None:
        super().check(generator, guide)
        if generator.config.path != "ddpm":
            raise UserError(f"DiffusionSampler is for path ddpm, and this model has path {generator.config.path}; use FlowSampler")

    def evaluations(self, generator: Any) -> list[tuple[float, float]]:
        return [(float(step), float(step)) for step in self._diffusion().network_steps.flip(0)]

    def _diffusion(self) -> GaussianDiffusion:
        return GaussianDiffusion.linear().respaced(self.config.num_steps, self.config.spacing)

    def _integrate(self, generator: Any, network: GuidedNetwork, x: Tensor, step_noise: Callable[[int], Tensor]) -> Tensor:
        diffusion, channels = self._diffusion(), generator.code_shape[0]
        advance = self._multistep(diffusion) if self.config.method == "dpm++" else getattr(self, f"_{self.config.method}")
        for executed, i in enumerate(reversed(range(len(diffusion.betas)))):
            step = torch.tensor([i])  # all images are at the same
            output = network(x, diffusion.network_steps[step].double().expand(len(x)))
            clean = self._in_range(diffusion.clean(x, step, output[:, :channels], generator.config.prediction))
            variance = output[:, channels:] if output.shape[1] > channels else None
            x = advance(diffusion, x, step, clean, variance, lambda executed=executed: step_noise(executed))
        return x

    def _in_range(self, clean: Tensor) -> Tensor:
        if self.config.threshold == "dynamic":
            return dynamic_threshold(clean, self.config.threshold_ratio, self.config.threshold_maximum)
        return clean.clamp(-1, 1) if self.config.threshold == "clip" else clean

    def _ddpm(
        self, diffusion: GaussianDiffusion, x: Tensor, step: Tensor, clean: Tensor, variance: Tensor | None, noise: Callable[[], Tensor]
    ) -> Tensor:
        mean = diffusion.posterior_mean(x, step, clean)
        if not step:
            return mean
        if variance is not None:
            return mean + (diffusion.learned_log_variance(step, variance) / 2).exp() * noise()
        return mean + float(diffusion.posterior_variance[step].sqrt()) * noise()

    def _ddim(
        self, diffusion: GaussianDiffusion, x: Tensor, step: Tensor, clean: Tensor, variance: Tensor | None, noise: Callable[[], Tensor]
    ) -> Tensor:
        """Equation 12 of the paper."""
        before = float(diffusion.alpha_bars_before[step])
        sigma = self.config.eta * float(diffusion.posterior_variance[step].sqrt())
        x = before**0.5 * clean + (1 - before - sigma**2) ** 0.5 * diffusion.noise(x, step, clean)
        return x + sigma * noise() if sigma else x

    def _multistep(self, diffusion: GaussianDiffusion) -> Callable[..., Tensor]:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        betas = GaussianDiffusion.linear().betas.numpy()
        solver = DPMSolverMultistepScheduler(trained_betas=betas, prediction_type="sample")  # it is given clean images
        solver.set_timesteps(timesteps=diffusion.network_steps.flip(0).tolist())

        def advance(diffusion: GaussianDiffusion, x: Tensor, step: Tensor, clean: Tensor, *_: Any) -> Tensor:
            result: Tensor = solver.step(clean, int(diffusion.network_steps[step]), x).prev_sample
            return result

        return advance
