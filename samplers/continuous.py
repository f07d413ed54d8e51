"""What the samplers of diffusion transformers share: guidance options, checks, the memory of a job and the count of network calls."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.samplers.base import Sampler, check_labels
from genvision.samplers.block_cache import ENDS, BlockCache, CacheReport, full_evaluations, relative_distances
from genvision.samplers.guidance import Guidance
from genvision.samplers.guided_network import GuidedNetwork, JobMemory
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose

Self = TypeVar("Self", bound="ContinuousSampler")


class ContinuousSampler(Sampler):
    """Draws latents from noise. A subclass says which times it goes through and how, and has the options that `_prepare` reads."""

    def _prepare(self) -> None:
        """Check the options of guidance and begin a job; the last call of a constructor."""
        config = self.config
        self.guidance = Guidance(
            scale=config.guidance_scale,
            schedule=config.guidance_schedule,
            start=config.guidance_start,
            stop=config.guidance_stop,
            channels=config.guidance_channels,
            method=config.guidance_method,
            apg_eta=config.apg_eta,
            apg_norm=config.apg_norm,
            apg_momentum=config.apg_momentum,
        )
        if config.rows not in ("together", "apart"):
            raise UserError(f"rows '{config.rows}' is unknown; choose together or apart")
        if config.cache_interval < 1:
            raise UserError(f"cache_interval {config.cache_interval} is not allowed; give 1 (off) or more evaluations")
        self.memory = JobMemory()

    def with_options(self: Self, **options: Any) -> Self:
        changed = super().with_options(**options)
        changed.memory = self.memory  # one job calls many samplers that differ in nothing
        return changed

    def check(self, generator: Any, guide: Any = None) -> None:
        """See `Sampler.check`; `guide` is the weaker model of autoguidance."""
        config = dict(generator.config)
        if "path" not in config:
            raise UserError(f"{type(self).__name__} draws latents, and {type(generator).__name__} predicts tokens; use another sampler")
        if self.guidance.scale != 1 and guide is None and not generator.has_null_label:
            raise UserError("this model was trained without class_dropout, so it has no null class to guide with; set guidance to 1")
        channels = generator.code_shape[0]
        if self.guidance.channels is not None and self.guidance.channels > channels:
            raise UserError(f"guidance_channels {self.guidance.channels} is not possible; the latents have {channels} channels")
        if self.config.scale_condition is not None and not generator.config.scale_conditioned:
            raise UserError("scale_condition is for scale-conditioned models, and this one is not; leave it out, or use guidance_scale")
        if self.config.cache_interval > 1 and all(self._full_evaluations(generator)):
            steps = f"all blocks run at the first and last {ENDS} evaluations and where guidance begins"
            raise UserError(
                f"cache_interval {self.config.cache_interval} leaves nothing out, since {steps}; raise num_steps, or set it to 1"
            )
        if guide is not None:
            for name in ("path", "prediction", "time_input"):
                if guide.config.get(name) != config[name]:
                    raise UserError(f"the guide has {name} {guide.config.get(name)}, the model {config[name]}; both must be of one kind")
            if (guide.code_shape, guide.num_classes) != (generator.code_shape, generator.num_classes):
                raise UserError("the guide has other latents or classes than the model; it must be trained on the same data")

    def read_known(self, generator: Any, known: Tensor, num_images: int) -> Tensor:
        raise UserError(f"{type(self).__name__} draws latents, which have no known tokens; leave known out, it is for models of tokens")

    @abstractmethod
    def evaluations(self, generator: Any) -> Sequence[tuple[float, float]] | None:
        """For each call of the network its t, and the t that decides on guidance; None where they are not known in advance."""

    def network_calls(self, generator: Any) -> int | None:
        evaluations = self.evaluations(generator)
        if evaluations is None:
            return None
        return len(evaluations) + sum(self._guided(generator, evaluations))

    def block_runs(self, generator: Any, guide: Any = None) -> tuple[int, int] | None:
        """Blocks that one image runs in the network, conditional and base rows together, and how many it would without caching."""
        evaluations = self.evaluations(generator)
        if evaluations is None:
            return None
        depth, base = generator.config.depth, (generator if guide is None else guide).config.depth
        runs = [depth + base * has_base for has_base in self._guided(generator, evaluations)]
        return sum(n for n, is_full in zip(runs, self._full_evaluations(generator), strict=True) if is_full), sum(runs)

    def cache_report(self, generator: Any, condition: Tensor, noise: ImageStreams, *, guide: Any = None) -> CacheReport:
        """Draw a few images with block caching and without; the arguments are those of `sample`."""
        runs = self.block_runs(generator, guide)
        assert runs is not None  # methods whose evaluations are not known in advance refuse caching
        plain = self.with_options(cache_interval=1)
        latents, expected = (sampler.sample(generator, condition, noise, guide=guide) for sampler in (self, plain))
        return CacheReport(runs[1] - runs[0], runs[1], relative_distances(latents, expected))

    def _full_evaluations(self, generator: Any) -> list[bool]:
        evaluations = self.evaluations(generator)
        assert evaluations is not None
        return full_evaluations(self._guided(generator, evaluations), self.config.cache_interval)

    def _guided(self, generator: Any, evaluations: Sequence[tuple[float, float]]) -> list[bool]:
        guided: list[bool] = (self._scales(generator, [decides for _, decides in evaluations]) != 1).tolist()
        return guided

    def _scales(self, generator: Any, times: Sequence[float]) -> Tensor:
        from genvision.samplers.guided_network import frame_of

        return self.guidance.scale_over(frame_of(generator).progress(torch.tensor(times, dtype=torch.float64)))

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
        """Draw the latents of B images.

        Args:
            generator: a DiT in eval mode.
            condition: labels int64 [B].
            noise: the streams of the B images.
            condition_mask: not for labels.
            known: not for latents.
            guide: a weaker model whose prediction is the base of guidance instead of the null class (autoguidance, arXiv:2406.02507).

        Returns:
            float32 [B, c, h, w] or [B, c, L]. What each image cost is in `calls`.

        Raises:
            UserError: the options, labels and models do not go together.
        """
        if known is not None:
            self.read_known(generator, known, len(noise))
        if condition_mask is not None or condition.dtype != torch.int64:
            raise UserError("this model takes class labels (int64) and no text features")
        if len(condition) != len(noise):
            raise UserError(f"{len(condition)} labels and {len(noise)} images were given; each image needs one label")
        check_labels(condition, generator.num_classes)
        self.check(generator, guide)
        evaluations = self.evaluations(generator)
        network = GuidedNetwork(
            generator,
            condition,
            self.guidance,
            guide=guide,
            scale_condition=self.config.scale_condition,
            rows=self.config.rows,
            times=[t for t, _ in evaluations] if evaluations is not None else (),
            memory=self.memory,
            cache=BlockCache(self._full_evaluations(generator)) if self.config.cache_interval > 1 else None,
        )
        device = torch.device(generator.device)
        # solvers add many small steps: their state is float64 wherever the device has it, and the network gets its own type
        state_type = torch.float32 if device.type == "mps" else torch.float64

        def draw(purpose: Purpose, step: int = 0) -> Tensor:
            return noise.normal(purpose, generator.code_shape, step=step).to(device, non_blocking=True).to(state_type)

        x = self._integrate(generator, network, draw(Purpose.START_NOISE), lambda step: draw(Purpose.STEP_NOISE, step))
        self.calls = network.calls
        return x.float()

    @abstractmethod
    def _integrate(self, generator: Any, network: GuidedNetwork, x: Tensor, step_noise: Any) -> Tensor:
        """From noise x [B, c, ...] to latents; `step_noise(i)` is what step i may add, of the same shape."""
