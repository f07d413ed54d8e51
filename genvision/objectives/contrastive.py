"""The contrastive loss between two views of each image (InfoNCE as in SimCLR, arXiv:2002.05709, equation 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError


def info_nce(features: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding the other view of an image among all other features of the batch, by cosine similarity.

    Only this process's part of a batch is compared, so that the number of negatives is 2B - 2 whatever the number of processes.

    Args:
        features: [2B, Z]; row i and row B + i are views of the same image.
        temperature: the similarities are divided by it.

    Raises:
        UserError: there is just one image, so that there is nothing to tell it from.
    """
    num_images = len(features) // 2
    if num_images < 2:
        raise UserError(
            "loss.contrastive_weight needs at least 2 images in each process's part of a batch, got 1; "
            "raise train.batch_size, lower train.accumulation, or set the weight to 0"
        )
    with torch.autocast(features.device.type, enabled=False):
        directions = F.normalize(features.float(), dim=-1)
        similarity = directions @ directions.T / temperature  # [2B, 2B]
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    other_view = torch.arange(len(features), device=features.device).roll(num_images)
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), other_view)
