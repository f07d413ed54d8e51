"""Training a generator: its objective on codes, from an encoded data set or through a frozen tokenizer."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genvision.objectives.base import Objective
from genvision.streams import IndexedStreams, Purpose
from genvision.training.ema import EMA
from genvision.training.stage import AveragedModel


class GeneratorStage:
    """An objective on batches of codes and labels.

    Args:
        model: the generator.
        objective: gives named terms, `loss` among them; its `baselines` are shown beside them.
        tokenizer: makes codes of batches that hold images; it stays as it is.
        features: makes a frozen network's features of such images [B, N, Z], where the objective wants them.
        sample_posterior: of batches that hold images: draw latents from the posterior instead of taking its mean.
        seed: of those samples.
        fid: draws samples from a model and scores them, for an objective whose guidance follows that.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        tokenizer: nn.Module,
        *,
        features: nn.Module | None = None,
        sample_posterior: bool = False,
        seed: int = 0,
        fid: Callable[[nn.Module], float] | None = None,
    ) -> None:
        self.model, self.objective, self.tokenizer = model, objective, tokenizer.requires_grad_(False).eval()
        self.features = features.requires_grad_(False).eval() if features is not None else None
        self.sample_posterior, self.seed = sample_posterior, seed
        self.baselines: dict[str, float] = objective.baselines
        self.adversary = None
        self.needs_average = objective.needs_average
        self.fid = fid

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.objective(model, self.coded(batch))

    def coded(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with `codes`, and with `features` where they are wanted, from its images if it has only those."""
        if "codes" not in batch:
            images = batch["images"]
            # codes are made in float32 whatever the generator's precision, as `genvision encode` makes them
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                self.tokenizer.to(images.device)
                batch = {**batch, "codes": self._codes(images, batch["positions"])}
                if self.features is not None:
                    batch["features"] = self.features.to(images.device)(images)
        return batch

    def held_out_loss(self, model: nn.Module, batch: dict[str, Tensor], averages: EMA) -> dict[str, Tensor]:
        self._begin(self.objective.validation_step, averages)  # the next before_step sets the right one again
        return self.loss(model, batch)

    def _codes(self, images: Tensor, positions: Tensor) -> Tensor:
        """Of images [B, 3, H, W], or of views [B, V, 3, H, W]: [B, V, ...]."""
        if images.ndim == 5:
            views: Tensor = self.tokenizer.encode(images.flatten(0, 1))  # type: ignore[operator]
            return views.unflatten(0, images.shape[:2])
        if not self.sample_posterior:
            codes: Tensor = self.tokenizer.encode(images)  # type: ignore[operator]
            return codes
        mean, std = self.tokenizer.posterior(images)  # type: ignore[operator]
        noise = IndexedStreams(self.seed, positions.tolist()).normal(Purpose.POSTERIOR, mean.shape[1:])
        return torch.addcmul(mean, std, noise.to(mean.device))

    def before_step(self, step: int, averages: EMA) -> None:
        self._begin(step, averages)

    def _begin(self, step: int, averages: EMA) -> None:
        self.objective.begin_step(step, averages if averages.network is not None else None)

    def after_step(self, step: int, accelerator: Accelerator, averaged: AveragedModel) -> dict[str, float]:
        """Samples are drawn with the averaged weights and scored, by all processes together, where guidance follows that."""
        guidance = self.objective.guidance
        if guidance is None or not guidance.config.auto_every:
            return {}
        if step % guidance.config.auto_every == 0:
            assert self.fid is not None
            with averaged() as model:
                guidance.adapt(self.fid(model))
        known = guidance.last_fid < float("inf")
        return {"guidance_scale": guidance.scale} | ({"guidance_fid": guidance.last_fid} if known else {})

    def state_dict(self) -> dict[str, Any]:
        guidance = self.objective.guidance
        return {} if guidance is None else {"guidance_scale": guidance.scale, "guidance_fid": guidance.last_fid}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.objective.guidance is not None and "guidance_scale" in state:
            self.objective.guidance.scale, self.objective.guidance.last_fid = state["guidance_scale"], state["guidance_fid"]
