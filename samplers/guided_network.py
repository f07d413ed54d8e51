"""A diffusion transformer with its guidance as one function of x and t, which is all that a solver sees.

Conditional and base rows share one batch or go in two passes, and rows whose scale is exactly 1 have no base row. The base is the
null class of the model, or a weaker model that is told the label too (autoguidance, arXiv:2406.02507).

Shapes: B images, R rows (some of the images, in any order), c latent channels.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.gaussian import GaussianDiffusion
from genvision.objectives.paths import Flow
from genvision.samplers.block_cache import BlockCache, RunBlocks
from genvision.samplers.guidance import Guidance, combine
from genvision.samplers.modulation import Condition, LabelledNetwork, ModulationTables
from genvision.samplers.projected_guidance import ProjectedGuidance

Rows = Literal["together", "apart"]


class JobMemory:
    """What a sampler keeps from one batch of a job to the next."""

    def __init__(self) -> None:
        self.tables = ModulationTables()
        self.apart = False
        """Memory did not suffice for conditional and base rows in one batch."""


class Frame(Protocol):
    """What the time of a sampler means to its network. t is float64 [R]; x, outputs and clean images are [R, c, ...]."""

    noisiest: float
    """The largest t; the cleanest is 0."""

    def network_time(self, t: Tensor) -> Tensor: ...

    def progress(self, t: Tensor) -> Tensor: ...

    def clean(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor: ...

    def output_of_clean(self, x: Tensor, t: Tensor, clean: Tensor) -> Tensor: ...


class FlowFrame:
    """Time of a flow, from 1 (noise) to 0 (data)."""

    noisiest = 1.0

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def network_time(self, t: Tensor) -> Tensor:
        return self.flow.network_time(t)

    def progress(self, t: Tensor) -> Tensor:
        return 1 - t

    def clean(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return self.flow.clean(x, t.clamp(min=1e-3), output)  # at t = 0 the output says nothing of the data

    def output_of_clean(self, x: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        return self.flow.output_of_clean(x, t.clamp(min=1e-3), clean)


class StepFrame:
    """Training steps of a discrete diffusion, from 999 (noise) to 0."""

    def __init__(self, prediction: str) -> None:
        self.prediction, self.diffusion = prediction, GaussianDiffusion.linear()
        self.noisiest = float(len(self.diffusion.betas) - 1)

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def progress(self, t: Tensor) -> Tensor:
        return 1 - t / self.noisiest

    def clean(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return self.diffusion.clean(x, t.long(), output, self.prediction)

    def output_of_clean(self, x: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        return self.diffusion.target(clean, self.diffusion.noise(x, t.long(), clean), t.long(), self.prediction)


def frame_of(generator: Any) -> Frame:
    """How this generator counts its time."""
    return StepFrame(generator.config.prediction) if generator.config.path == "ddpm" else FlowFrame(Flow.of(generator))


class GuidedNetwork:
    """The guided prediction for the images of one batch.

    Args:
        generator: a DiT in eval mode; all rows of one call are asked in its type, answers come in the type of x.
        labels: int64 [B].
        guidance: scale, interval, channels and method.
        guide: a weaker model of the same path and prediction, the base instead of the null class.
        scale_condition: what a scale-conditioned model is told with a label; it is told 0 with the null label, as in training.
        rows: `together`, or `apart` where memory is scarce; running out of memory once changes to `apart` for the rest of the job.
        times: the t of all calls to come, where they are known; enables tables of modulation.
        memory: of the job.
        cache: of the batch; then all images must be at one time, and either all are guided or none.
    """

    def __init__(
        self,
        generator: Any,
        labels: Tensor,
        guidance: Guidance,
        *,
        guide: Any = None,
        scale_condition: float | None = None,
        rows: Rows = "together",
        times: Sequence[float] = (),
        memory: JobMemory | None = None,
        cache: BlockCache | None = None,
    ) -> None:
        self.frame = frame_of(generator)
        self.calls = torch.zeros(len(labels), dtype=torch.int64)
        """Evaluations that each image cost so far; a conditional and a base row count one each. int64 [B]."""
        self._guidance, self._rows, self._memory = guidance, rows, memory if memory is not None else JobMemory()
        self._channels, self._cache = generator.code_shape[0], cache
        self._projected = (
            ProjectedGuidance(guidance.apg_eta, guidance.apg_norm, guidance.apg_momentum) if guidance.method == "apg" else None
        )
        distinct, self._places = labels.to(generator.device).unique(return_inverse=True)  # [L], [B]
        conditions: list[Condition] = [(label, told_scale(generator, scale_condition)) for label in distinct.tolist()]
        self._null_place = len(conditions)
        t = torch.tensor(times, dtype=torch.float64)
        guided = t[guidance.scale_over(self.frame.progress(t)) != 1].tolist() if guidance.scale != 1 else []
        is_guided = guidance.scale != 1 and (not len(t) or len(guided) > 0)
        self._base: LabelledNetwork | None = None
        if is_guided and guide is None:
            conditions.append((generator.null_label, 0.0 if generator.config.scale_conditioned else None))
        self._network = LabelledNetwork(generator, conditions, self.frame.network_time(t).tolist(), self._memory.tables)
        if is_guided and guide is not None:
            told = [(label, told_scale(guide, None)) for label in distinct.tolist()]
            self._base = LabelledNetwork(guide, told, self.frame.network_time(t).tolist(), self._memory.tables)

    def __call__(self, x: Tensor, t: Tensor, *, guided_at: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        """The raw output of the network after guidance; variance channels are those of the conditional rows.

        Args:
            x: [R, c, ...].
            t: float64 [R] on the CPU, in the sampler's time: 1 (noise) .. 0 (data), or the step 999 .. 0 of a discrete diffusion.
            guided_at: the time that decides the scale, where this is not t.
            images: int64 [R] on the CPU, which images the rows are; all of them in order unless told.

        Returns:
            [R, out_channels, ...].
        """
        inside = (t >= 0) & (t <= self.frame.noisiest)
        if not bool(inside.all()):
            wrong = t[~inside][0].item()
            raise UserError(f"time {wrong} is outside 0 (data) .. {self.frame.noisiest:g} (noise)")
        places = self._places if images is None else self._places[images.to(x.device)]
        images = torch.arange(len(self.calls)) if images is None else images
        scales = self._guidance.scale_over(self.frame.progress(t if guided_at is None else guided_at))
        guided = (scales != 1).nonzero().squeeze(1)  # [G]
        self.calls[images] += 1
        self.calls[images[guided]] += 1
        times = self.frame.network_time(t)
        if self._cache is not None:
            self._cache.begin(float(t[0]))
        if not len(guided):
            return self._network(x, times, places, self._run_blocks(conditional=len(x))).to(x.dtype)
        output, base = self._both(x, times, places, guided)
        some = guided.to(x.device) if len(guided) < len(t) else slice(None)
        return self._guide(x, t, images, scales[guided].to(x.device, x.dtype), guided, some, output.to(x.dtype), base.to(x.dtype))

    def _both(self, x: Tensor, times: Tensor, places: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional outputs [R, ...] and those of the base [G, ...]."""
        some = guided.to(x.device)
        whole = len(guided) == len(times)
        x_base, t_base = (x, times) if whole else (x[some], times[guided])
        run, run_base = self._run_blocks(conditional=len(x)), self._run_blocks(base=len(guided))
        if self._base is not None:
            return self._network(x, times, places, run), self._base(x_base, t_base, places if whole else places[some], run_base)
        null_places = torch.full_like(some, self._null_place)
        if self._rows == "together" and not self._memory.apart:
            try:
                run_both = self._run_blocks(conditional=len(x), base=len(guided))
                rows = torch.cat([x, x_base]), torch.cat([times, t_base]), torch.cat([places, null_places])
                both = self._network(*rows, run_both)
                return both[: len(x)], both[len(x) :]
            except torch.OutOfMemoryError:
                self._memory.apart = True
        return self._network(x, times, places, run), self._network(x_base, t_base, null_places, run_base)

    def _run_blocks(self, **rows: int) -> RunBlocks | None:
        return None if self._cache is None else self._cache.run_blocks(rows)

    def _guide(
        self, x: Tensor, t: Tensor, images: Tensor, scales: Tensor, guided: Tensor, some: Tensor | slice, output: Tensor, base: Tensor
    ) -> Tensor:
        channels = self._guidance.channels or self._channels
        conditional = output[some]
        shape = (-1, *[1] * (x.dim() - 1))
        if self._projected is None:
            changed = combine(conditional[:, :channels], base[:, :channels], scales.view(shape))
        else:
            x, t = x[some], t[guided].to(x.device)
            clean = self.frame.clean(x, t, conditional[:, : self._channels])
            other = self.frame.clean(x, t, base[:, : self._channels])
            rows = images[guided].to(x.device)
            better = self._projected(clean[:, :channels], other[:, :channels], scales, rows, len(self.calls))
            whole = torch.cat([better, clean[:, channels:]], dim=1)
            changed = self.frame.output_of_clean(x, t, whole)[:, :channels]
        result = output.clone()
        result[some, :channels] = changed
        return result


def told_scale(generator: Any, scale_condition: float | None) -> float | None:
    """What a generator is told of the guidance scale: 1, the plain model, unless told otherwise; nothing if it is not scale-conditioned."""
    if not generator.config.scale_conditioned:
        return None
    return 1.0 if scale_condition is None else scale_condition
