"""The discriminator in a tokenizer's training: its own loss, and what it tells the tokenizer."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genvision.tokenizers.adversarial import (
    LeCam,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    feature_matching,
    generator_loss,
    r1_penalty,
    ramp,
)
from genvision.tokenizers.discriminators import make_discriminator
from genvision.training.config import OptimConfig
from genvision.training.tokenizer_loss import AdversarialConfig


class Discrimination:
    """A discriminator and its place in the steps of a run; the loop trains it as the tokenizer stage's adversary.

    Args:
        config: which discriminator, and the weights of its terms.
        optim: of the tokenizer; the discriminator's own learning rate and betas replace those.
        image_size: side of the training images.
    """

    def __init__(self, config: AdversarialConfig, optim: OptimConfig, image_size: int) -> None:
        assert config.discriminator != "none"
        self.config = config
        self.optim = replace(optim, lr=optim.lr if config.lr is None else config.lr, betas=config.betas or optim.betas, train_only=())
        self.network: nn.Module = make_discriminator(config.discriminator, image_size, config.width, config.num_layers, blur=config.blur)
        self.lecam = LeCam()
        self.statistics = (self.lecam,)
        self.step = 0
        self.reconstruction: Tensor | None = None

    def tokenizer_terms(self, images: Tensor, reconstruction: Tensor, nll: Tensor, last_layer: Tensor) -> dict[str, Tensor]:
        """What the tokenizer adds to its loss, `adversarial_loss`, and figures to watch; nothing before `start`.

        Args:
            images, reconstruction: [B, 3, H, W]; the reconstruction is kept for the discriminator's own loss.
            nll: reconstruction and perceptual terms, weighted, which the adaptive weight compares with.
        """
        config = self.config
        self.reconstruction = reconstruction.detach()
        rise = ramp(self.step, config.start, config.ramp)
        if rise == 0:
            return {}
        self.network.requires_grad_(False)  # this pass is for the tokenizer alone
        matching = config.feature_matching_weight > 0
        if matching:
            with torch.no_grad():
                _, real = self.network(images, return_features=True)
            logits, fake = self.network(reconstruction, return_features=True)
        else:
            logits = self.network(reconstruction)
        g_loss = generator_loss(config.loss, logits)
        weight = torch.tensor(config.weight * rise, device=images.device)
        if config.adaptive:
            weight = weight * adaptive_weight(nll, g_loss, last_layer)
        terms = {"adversarial": g_loss, "adversarial_weight": weight, "adversarial_loss": weight * g_loss}
        if matching:
            terms["feature_matching"] = rise * config.feature_matching_weight * feature_matching(real, fake)
            terms["adversarial_loss"] = terms["adversarial_loss"] + terms["feature_matching"]
        self.network.requires_grad_(True)
        return terms

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The discriminator's loss on the images of `batch` and the reconstruction that `tokenizer_terms` has just seen."""
        config = self.config
        if self.step < config.discriminator_start:
            return None
        assert self.reconstruction is not None
        images = batch["images"]
        if config.r1_weight:
            images = images.detach().requires_grad_()
        real, fake = self.network(images), self.network(self.reconstruction)
        terms = {"discriminator": discriminator_loss(config.loss, real, fake)}
        if config.r1_weight:
            terms["r1"] = config.r1_weight * r1_penalty(real, images)
        if config.lecam_weight:
            terms["lecam"] = config.lecam_weight * self.lecam.to(images.device)(real, fake)
        accuracy = discriminator_accuracy(real.detach(), fake.detach())
        return {"adversary_loss": torch.stack(list(terms.values())).sum(), "discriminator_accuracy": accuracy, **terms}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "lecam": self.lecam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.lecam.load_state_dict(state["lecam"])
