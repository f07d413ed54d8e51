"""What a classifier is fine-tuned on: mixtures of two images with mixed labels.

Shapes: B images, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mixer(mixup: float, cutmix: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [B, 3, H, W] and labels int64 [B] -> mixtures and shares of the classes, float [B, K].

    Every batch is mixed by mixup (arXiv:1710.09412) or by CutMix (arXiv:1905.04899), with equal chances where both are on. The draws are
    torch's own.

    Args:
        mixup, cutmix: both parameters of the Beta distribution of the shares; 0 turns one off.
    """
    from torchvision.transforms import v2

    kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not kinds:
            return images, F.one_hot(labels, num_classes).float()
        chosen: Any = kinds[int(torch.randint(len(kinds), ()))]
        mixed, shares = chosen(images, labels)
        return mixed, shares.float()

    return mix
