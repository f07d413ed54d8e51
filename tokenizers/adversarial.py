"""Losses of adversarial training: VQGAN (arXiv:2012.09841 section 3.1), R1 (arXiv:1801.04406), LeCam (arXiv:2104.03310),
feature matching (Improved GAN, arXiv:1606.03498 section 3.1).

Every loss is computed in float32 whatever the networks ran in. D are logits, high for what looks real; x images, xhat reconstructions.
Shapes: B images, logits of any shape [B, ...].
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, a number.

    `hinge` is (E relu(1 - D(x)) + E relu(1 + D(xhat))) / 2; `vanilla` and `non_saturating` are the cross-entropy
    (E softplus(-D(x)) + E softplus(D(xhat))) / 2, they differ in the generator's loss alone.

    Raises:
        UserError: the name is unknown.
    """
    cost = _look_up(_DISCRIMINATOR, kind)
    return 0.5 * (cost(real.float()).mean() + cost(-fake.float()).mean())


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """What the tokenizer minimises, a number, of logits D(xhat).

    -E D(xhat) beside the `hinge` and the `vanilla` discriminator (as VQGAN has it), -E log sigmoid(D(xhat)) for `non_saturating`
    (Goodfellow et al., arXiv:1406.2661 section 3).

    Raises:
        UserError: the name is unknown.
    """
    return _look_up(_GENERATOR, kind)(fake.float()).mean()


def _look_up(costs: Mapping[str, Callable[[Tensor], Tensor]], kind: str) -> Callable[[Tensor], Tensor]:
    if kind not in costs:
        raise UserError(f"adversarial loss '{kind}' is unknown; choose one of {', '.join(costs)}")
    return costs[kind]


def _hinge(logits: Tensor) -> Tensor:
    return F.relu(1 - logits)


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.softplus(-logits)


_DISCRIMINATOR = {"hinge": _hinge, "vanilla": _cross_entropy, "non_saturating": _cross_entropy}
"""Cost of logits that should be high; of those that should be low it is the cost of their negative."""
_GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {"hinge": torch.neg, "vanilla": torch.neg, "non_saturating": _cross_entropy}


def discriminator_accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Fraction of logits on the right side of 0, images and reconstructions counting half each; 0.5 knows nothing."""
    return 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor, *, max_weight: float = 1e4, eps: float = 1e-4) -> Tensor:
    """Factor of `g_loss` at which both losses pull equally hard at the last layer: |d nll| / (|d g_loss| + eps), detached.

    The graph is kept, so that the whole loss can be differentiated afterwards. Each process has its own weight.

    Args:
        nll: reconstruction and perceptual loss, weighted, a number.
        g_loss: `generator_loss`, a number, which must depend on the reconstruction.
        last_layer: weight of the layer that makes pixels.
        max_weight: what the factor is clamped to.
        eps: keeps it finite where the discriminator gives no gradient.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (nll, g_loss)]
    return (norms[0] / (norms[1] + eps)).clamp(0, max_weight).detach()


def ramp(step: int, start: int, length: int = 0) -> float:
    """0 before step `start`, 1 from step `start + length` on, a line between; so that the discriminator is trained when its word counts."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / length) if length > 0 else 1.0


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """E |d D(x) / d x|^2 of real images (arXiv:1801.04406, eq. 9); its usual weight is gamma / 2 with gamma about 10.

    Args:
        logits: of real images; patches of an image are added up.
        images: [B, 3, H, W] that required gradients before `logits` were computed of them.
    """
    assert images.requires_grad, "images must require gradients before the discriminator sees them"
    [gradient] = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1).mean()


def feature_matching(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """|E f(x) - E f(xhat)|^2 of features f of the discriminator, E over the batch (arXiv:1606.03498, section 3.1), a number.

    Averaged over the elements of a map, so that its weight does not depend on sizes (the paper has a sum), then over the maps.

    Args:
        real: maps [B, ...] of images, which get no gradient.
        fake: maps [B', ...] of reconstructions, of the same layers.
    """
    distances = [(f.float().mean(dim=0) - r.detach().float().mean(dim=0)).square().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(distances).mean()


class LeCam(nn.Module):
    """Regulariser for little data: D(x) may not rise far above what D(xhat) was on average, nor D(xhat) fall far below what D(x) was.

    relu(E D(x) - F)^2 + relu(R - E D(xhat))^2 with R and F moving averages of E D(x) and E D(xhat), both 0 at the start;
    mean logits as in ViTok and TiTok (arXiv:2104.03310, eq. 4, has it for each image and without the relu). The averages are buffers,
    which `state_dict` holds. A call uses them, then adds its own logits to them, those of all processes.

    Args:
        decay: of the averages, a call.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty, a number, of logits of images and of reconstructions."""
        real_mean, fake_mean = real.float().mean(), fake.float().mean()
        penalty = F.relu(real_mean - self.fake).square() + F.relu(self.real - fake_mean).square()
        means = torch.stack([real_mean, fake_mean]).detach()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        self.real.lerp_(means[0], 1 - self.decay)
        self.fake.lerp_(means[1], 1 - self.decay)
        return penalty
