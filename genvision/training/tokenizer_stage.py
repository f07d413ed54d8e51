"""Training a tokenizer: reconstruction, the quantiser's own terms, and codes that are kept alive."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.base import TokenizerOutput
from genvision.tokenizers.quantizers import CodebookUsage, revive_dead_codes
from genvision.tokenizers.vq import VQTokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Terms of the tokenizer's loss. Perceptual and adversarial terms would stand here beside the reconstruction."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Mean squared or mean absolute error."""
    reconstruction_weight: float = 1.0
    """Its weight."""
    revive_every: int = 0
    """After this many steps, codes not used since the last time move onto encoder outputs; 0 never does it."""
    revive_until: float = 0.8
    """Part of the run after which codes are left in peace."""

    def __post_init__(self) -> None:
        if self.revive_every < 0 or not 0 <= self.revive_until <= 1:
            raise UserError("loss.revive_every must be 0 or more, and loss.revive_until must lie in 0 .. 1")


class TokenizerStage:
    """Loss of a VQ tokenizer on a batch of images; watches its codes over every whole pass through the data.

    Args:
        model: the tokenizer.
        config: weights of the terms.
        seed: of the choice of revived codes.
        num_steps: of the run.
        steps_per_pass: after how many steps all images were seen once.
    """

    def __init__(self, model: VQTokenizer, config: TokenizerLossConfig, *, seed: int, num_steps: int, steps_per_pass: int) -> None:
        self.model, self.config, self.seed, self.steps_per_pass = model, config, seed, steps_per_pass
        self.last_revival = int(config.revive_until * num_steps)
        self.baselines: dict[str, float] = {}
        codebook_size = model.spec.codebook_size or 0
        self.pass_usage = CodebookUsage(codebook_size)
        self.last_pass: dict[str, float] = {}
        self.counts_since_revival = torch.zeros(codebook_size, dtype=torch.int64)
        self.counts_of_step = torch.zeros(codebook_size, dtype=torch.int64)
        self.latest_z: Tensor | None = None

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch` has `images` [B, 3, H, W]. Terms: `loss`, `reconstruction` and the quantiser's.

        `reconstruction_blank` is what the best single colour for the whole batch would score: the mark to beat.
        """
        images = batch["images"]
        output: TokenizerOutput = model(images)
        distance = F.mse_loss if self.config.reconstruction == "l2" else F.l1_loss
        reconstruction = distance(output.reconstruction.float(), images)
        loss = self.config.reconstruction_weight * reconstruction + sum(output.losses.values())
        blank = distance(images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images), images)
        if output.codes is not None:
            self.counts_of_step += torch.bincount(output.codes.flatten().cpu(), minlength=len(self.counts_of_step))
        if output.z is not None:
            self.latest_z = output.z.detach()
        return {"loss": loss, "reconstruction": reconstruction, "reconstruction_blank": blank, **output.losses}

    @torch.no_grad()
    def after_step(self, step: int, accelerator: Accelerator) -> dict[str, float]:
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
            self._revive(step, accelerator)
        return self.last_pass

    def _revive(self, step: int, accelerator: Accelerator) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        assert self.latest_z is not None
        revive_dead_codes(self.model.quantize, self.counts_since_revival, self.latest_z, generator)
        if accelerator.num_processes > 1:  # each process chose from its own images; the first one's choice holds
            torch.distributed.broadcast(self.model.quantize.embedding.weight.data, 0)
        self.counts_since_revival.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"pass": self.pass_usage.counts, "since_revival": self.counts_since_revival, "last_pass": self.last_pass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pass_usage.counts.copy_(state["pass"])
        self.counts_since_revival.copy_(state["since_revival"])
        self.last_pass = state["last_pass"]
