"""Predicting masked tokens: MaskGIT (arXiv:2202.04200), MAGE (arXiv:2211.09117), Halton-MaskGIT, and nested networks (MaGNeTS).

Shapes: B samples, N tokens, M tokens with a loss, K codebook entries.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.layers.token_loss import TokenLosses, TokenTargets
from genvision.models.masked import MaskedGenerator
from genvision.objectives.base import Network, Objective
from genvision.objectives.contrastive import info_nce
from genvision.objectives.draws import TrainingDraws
from genvision.objectives.masking import MaskLaw
from genvision.objectives.nested import NestedLossConfig, NestedTraining
from genvision.streams import Purpose


@dataclass(frozen=True, kw_only=True)
class MaskedLossConfig(NestedLossConfig, MaskLaw):
    """Which tokens are masked, and what a prediction costs. Defaults are MaskGIT's, without the min_ratio of its code."""

    label_smoothing: float = 0.1
    """Part of the target that is spread over all codes."""
    visible_weight: float = 0.0
    """Weight of tokens that are not masked, beside the 1 of masked ones: 0.1 in 1d-tokenizer's MaskGIT, 1 in Halton-MaskGIT."""
    reduction: Literal["sample", "batch"] = "sample"
    """Mean over the tokens of each sample, then over samples; or over all tokens of a process's part of the batch at once (MAGE)."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss between two views of each image (0.1 in MAGE-C), for mage with contrastive_dim. Both views have the
    label, which gives them away where it is shown: MAGE-C has class_dropout 1. Its training was never released; this is derived anew."""
    contrastive_temperature: float = 0.2
    """Of that loss."""

    def __post_init__(self) -> None:
        MaskLaw.__post_init__(self)
        NestedLossConfig.__post_init__(self)
        for name in ("label_smoothing", "visible_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"loss.{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.contrastive_weight < 0:
            raise UserError(f"loss.contrastive_weight must be 0 or more, got {self.contrastive_weight}")
        if not self.contrastive_temperature > 0:
            raise UserError(f"loss.contrastive_temperature must be above 0, got {self.contrastive_temperature}")


class MaskedTokens(Objective):
    """Loss of a `MaskedGenerator` on codes and labels.

    Terms: `loss`; `accuracy`, the part of masked tokens whose best guess is right; `masked`, the part that is masked. With nested networks,
    `loss` is the mean of what the step trains, and `loss_p1`, `loss_p2` .. are the losses of each against labels. With two views,
    `reconstruction` is the loss without its `contrastive` part.

    Args:
        model: not wrapped; what is called may be a wrapper around it.
        seed: of the run; masks and dropped labels depend on it and on the position of the sample.
        num_steps: of the run.

    Raises:
        UserError: the model cannot do what the configuration asks for.
    """

    def __init__(self, config: MaskedLossConfig, model: Any, *, seed: int, num_steps: int) -> None:
        check(config, model)
        self.config, self.seed, self.step = config, seed, 0
        self.code_shape, self.num_tokens, self.mask_id = tuple(model.code_shape), model.num_tokens, model.mask_id
        self.label_dropout = model.config.class_dropout
        self.nested = NestedTraining(config, seed=seed, num_steps=num_steps)
        self.contrasts = config.contrastive_weight > 0
        # smoothed or not, and whatever the teacher, a uniform guess costs ln K
        self.baselines = {"reconstruction" if self.contrasts else "loss": math.log(model.codebook_size)}

    def begin_step(self, step: int, averaged: Network | None) -> None:
        self.step = step

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective`; codes are int64 [B, ...], or [B, 2, ...] for two views of each image."""
        task = self.task(batch)
        targets = self.targets(task)

        def predict(factor: int, teacher: Tensor | None, label_share: float) -> TokenLosses:
            taught = targets._replace(teacher=teacher, label_share=label_share)
            losses: TokenLosses = model(task.codes, task.labels, **task.told, nesting=factor, targets=taught)
            return losses

        options = {"with_features": True} if self.contrasts else {}
        output = model(task.codes, task.labels, **task.told, **options, targets=targets)
        losses, features = output if self.contrasts else (output, None)
        nested = self.nested.losses(self.step, losses, predict)
        loss = torch.stack([losses.loss, *(term.loss for term in nested.values())]).mean()
        terms = {"loss": loss, "accuracy": task.accuracy(losses.correct), "masked": task.share}
        if nested:
            terms |= {"loss_p1": losses.label_loss} | {f"loss_p{factor}": term.label_loss for factor, term in nested.items()}
        if features is not None:
            terms["reconstruction"] = loss.detach()
            terms["contrastive"] = info_nce(features, self.config.contrastive_temperature)
            terms["loss"] = loss + self.config.contrastive_weight * terms["contrastive"]
        return terms

    def task(self, batch: dict[str, Tensor]) -> "Task":
        """What the network is told about a batch, and what it should say; two views of B images are 2B rows, first views first."""
        codes, labels, positions = batch["codes"], batch["labels"], batch["positions"]
        views = 2 if self.contrasts else 1
        if self.contrasts:
            if codes.shape[1:] != (2, *self.code_shape):
                raise UserError(
                    f"loss.contrastive_weight needs codes of two views of each image, of shape {[2, *self.code_shape]}, "
                    f"got {list(codes.shape[1:])}; set it to 0, or give two views"
                )
            codes = codes.transpose(0, 1).flatten(0, 1)
        targets, device = codes.flatten(1), codes.device
        drop = TrainingDraws(self.seed, positions).uniform(Purpose.LABEL_DROPOUT) < self.label_dropout
        masks = self.config.draw(self.seed, positions, self.num_tokens, step=self.step, views=views)
        masked = masks.masked.to(device)
        told = {"drop": drop.repeat(views)}
        if masks.kept is not None:
            told["kept"] = masks.kept.to(device)
        weights = masked + self.config.visible_weight * ~masked
        hidden, share = torch.where(masked, self.mask_id, targets), masked.float().mean()
        if masks.where is not None and self.config.visible_weight == 0:  # no logits of tokens that cost nothing
            told["where"] = masks.where.to(device)
            targets, weights, masked = (tensor.gather(1, told["where"]) for tensor in (targets, weights, masked))
        return Task(hidden, labels.repeat(views), told, targets, weights, masked, share)

    def targets(self, task: "Task") -> TokenTargets:
        """What a network should say, and what a nested one must know of it to teach others."""
        distils = bool(self.nested.factors) and self.config.distillation
        return TokenTargets(task.targets, task.weights, self.config.reduction, self.config.label_smoothing, keep_hidden=distils)


class Task(NamedTuple):
    """A batch with masks in it. The last three are of the tokens that are predicted."""

    codes: Tensor
    """int64 [B, N], with the mask's id where a token is masked."""
    labels: Tensor
    """int64 [B]."""
    told: dict[str, Tensor]
    """Keyword arguments of the network: which labels are dropped, which tokens are kept and which are asked for."""
    targets: Tensor
    """int64 [B, M]."""
    weights: Tensor
    """Of the loss, [B, M]."""
    masked: Tensor
    """Boolean [B, M]."""
    share: Tensor
    """Of masked tokens among all."""

    def accuracy(self, correct: Tensor) -> Tensor:
        """Part of the masked tokens whose best guess is right, from where it is, boolean [B, M]."""
        return (correct & self.masked).sum() / self.masked.sum().clamp(min=1)


def check(config: MaskedLossConfig, model: Any) -> None:
    """Raises UserError where a generator cannot be trained as the configuration says."""
    from genvision.models.mage import MAGE

    if not isinstance(model, MaskedGenerator):
        raise UserError(f"{type(model).__name__} does not predict masked tokens; choose maskgit or mage")
    for factor in config.nested:
        try:
            model.check_nesting(factor)
        except UserError as error:
            raise UserError(f"loss.nested: {error}") from error
    if config.drop_ratio and not isinstance(model, MAGE):
        raise UserError(f"loss.drop_ratio {config.drop_ratio}: only mage can read an image of which tokens are dropped; set it to 0")
    projects = isinstance(model, MAGE) and model.projector is not None
    if config.contrastive_weight and not projects:
        weight = config.contrastive_weight
        raise UserError(f"loss.contrastive_weight {weight} is for mage with model.contrastive_dim above 0; set that, or the weight to 0")
    if projects and not config.contrastive_weight:
        raise UserError("model.contrastive_dim is trained by the contrastive loss alone; set loss.contrastive_weight above 0, or it to 0")
