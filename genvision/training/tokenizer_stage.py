"""Training a tokenizer: reconstruction, perceptual distance, the bottleneck's own terms, an adversary, and codes that are kept alive."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.base import TokenizerOutput
from genvision.tokenizers.codebook import CodebookUsage, revive_dead_codes
from genvision.training.adversary import Discrimination
from genvision.training.ema import EMA
from genvision.training.stage import AveragedModel
from genvision.training.tokenizer_loss import TokenizerLossConfig

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": partial(F.smooth_l1_loss, beta=0.05),
}


class TokenizerStage:
    """Loss of a tokenizer on a batch of images; watches discrete codes over every whole pass through the data.

    Args:
        model: the tokenizer.
        config: weights of the terms.
        perceptual: distances [B] of image pairs, where the loss has such a term.
        adversary: the discriminator, where there is one.
        seed: of the choice of revived codes.
        num_steps: of the run.
        steps_per_pass: after how many steps all images were seen once.
    """

    def __init__(
        self,
        model: Any,
        config: TokenizerLossConfig,
        *,
        perceptual: nn.Module | None = None,
        adversary: Discrimination | None = None,
        seed: int,
        num_steps: int,
        steps_per_pass: int,
    ) -> None:
        self.model, self.config, self.seed, self.steps_per_pass = model, config, seed, steps_per_pass
        self.perceptual, self.adversary = perceptual, adversary
        if perceptual is not None:
            perceptual.train()  # for the dropout inside LPIPS, if it is asked for
        if config.revive_every and not getattr(getattr(model, "quantize", None), "movable", False):
            raise UserError(
                f"loss.revive_every {config.revive_every}: this tokenizer has no codes that can be moved one by one; set it to 0"
            )
        self.last_revival = int(config.revive_until * num_steps)
        self.baselines: dict[str, float] = {}
        codebook_size = model.spec.codebook_size or 0
        self.pass_usage = CodebookUsage(codebook_size)
        self.last_pass: dict[str, float] = {}
        self.counts_since_revival = torch.zeros(codebook_size, dtype=torch.int64)
        self.counts_of_step = torch.zeros(codebook_size, dtype=torch.int64)
        self.latest_z: Tensor | None = None

    needs_average = False

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch` has `images` [B, 3, H, W]. Terms: `loss`, `reconstruction`, `perceptual`, the tokenizer's own and the adversary's.

        `reconstruction_blank` is what the best single colour for the whole batch would score: the mark to beat.
        """
        images = batch["images"]
        output: TokenizerOutput = model(images)
        terms, nll = self._reconstructed(output, images)
        if self.adversary is not None:
            told = self.adversary.tokenizer_terms(images, output.reconstruction.float(), nll, self.model.last_layer)
            terms = {**terms, **told, "loss": terms["loss"] + told.get("adversarial_loss", 0.0)}
        if output.codes is not None:
            self.counts_of_step += torch.bincount(output.codes.flatten().cpu(), minlength=len(self.counts_of_step))
        if output.z is not None:
            self.latest_z = output.z.detach()
        return terms

    def _reconstructed(self, output: TokenizerOutput, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All terms without an adversary, and the weighted sum of reconstruction and perceptual distance."""
        config, distance = self.config, DISTANCES[self.config.reconstruction]
        with torch.autocast(images.device.type, enabled=False):  # losses in float32 whatever the networks ran in
            reconstruction = output.reconstruction.float()
            terms = {"reconstruction": distance(reconstruction, images)}
            nll = config.reconstruction_weight * terms["reconstruction"]
            blank = distance(images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images), images)
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual.to(images.device)(images, reconstruction).mean()
                nll = nll + config.perceptual_weight * terms["perceptual"]
        return {"loss": nll + sum(output.losses.values()), "reconstruction_blank": blank, **terms, **output.losses}, nll

    def held_out_loss(self, model: nn.Module, batch: dict[str, Tensor], averages: EMA) -> dict[str, Tensor]:
        """Reconstruction, perceptual distance and the tokenizer's own terms; `loss` without the adversary's share.

        Nothing is drawn: the dropout inside LPIPS is for training alone.
        """
        if self.perceptual is not None:
            self.perceptual.eval()
        try:
            return self._reconstructed(model(batch["images"]), batch["images"])[0]
        finally:
            if self.perceptual is not None:
                self.perceptual.train()

    def before_step(self, step: int, averages: EMA) -> None:
        """What a bad step left behind is forgotten: only `after_step`, of a good one, takes it in."""
        self.counts_of_step.zero_()
        if self.adversary is not None:
            self.adversary.step = step

    @torch.no_grad()
    def after_step(self, step: int, accelerator: Accelerator, averaged: AveragedModel) -> dict[str, float]:
        if self.adversary is not None:
            self.adversary.step = step
        if self.model.spec.codebook_size is None:
            return {}
        counts = self.counts_of_step
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
        self.pass_usage.counts += counts
        self.counts_since_revival += counts
        self.counts_of_step.zero_()
        if step % self.steps_per_pass == 0:
            self.last_pass = {f"codebook_{name}": value for name, value in self.pass_usage.summary().items()}
            self.pass_usage.counts.zero_()
        every = self.config.revive_every
        if every and step % every == 0 and step <= self.last_revival:
            self._revive(step)
        return self.last_pass

    def _revive(self, step: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        assert self.latest_z is not None
        revive_dead_codes(self.model.quantize, self.counts_since_revival, self.latest_z, generator)
        self.counts_since_revival.zero_()

    def state_dict(self) -> dict[str, Any]:
        state = {"pass": self.pass_usage.counts, "since_revival": self.counts_since_revival, "last_pass": self.last_pass}
        return state if self.adversary is None else state | {"adversary": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pass_usage.counts.copy_(state["pass"])
        self.counts_since_revival.copy_(state["since_revival"])
        self.last_pass = state["last_pass"]
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
