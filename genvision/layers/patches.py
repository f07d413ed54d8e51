"""Patches of clips and images and back, by the matrices that convolutions with stride = kernel are.

Shapes: clips [B, 3, T, H, W] (images have T = 1); patches of q frames and p x p pixels on a grid t x h x w, P = t*h*w tokens of width D
in that order.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int, int]
"""Sides along time, rows and columns."""


class TubeletEmbed(nn.Module):
    """Clips [B, 3, T, H, W] -> patch tokens [B, P, D]. `proj` is a convolution whose stride is its kernel, computed as the matrix it is."""

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, dim, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))

    def forward(self, clips: Tensor) -> Tensor:
        q, p, r = self.patch
        patches = rearrange(clips, "b c (t q) (h p) (w r) -> b (t h w) (c q p r)", q=q, p=p, r=r)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TubeletDecode(nn.Module):
    """Patch tokens [B, P, D] -> clips [B, 3, T, H, W].

    `proj` is a transposed convolution whose stride is its kernel, computed as a matrix, too: forward and backward take less than half
    the time on a CPU.
    """

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.ConvTranspose3d(dim, 3, patch, stride=patch)  # starts as PyTorch has it

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        (q, p, r), (t, h, w) = self.patch, grid
        assert self.proj.bias is not None
        patches = F.linear(tokens, self.proj.weight.flatten(1).t(), self.proj.bias.repeat_interleave(q * p * r))
        return rearrange(patches, "b (t h w) (c q p r) -> b c (t q) (h p) (w r)", t=t, h=h, w=w, q=q, p=p, r=r)


class PatchEmbed(nn.Module):
    """Images or latents [B, c, H, W] -> tokens [B, N, D] in raster order. `proj` is a convolution, computed as the matrix it is."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(x, "b c (h p) (w r) -> b (h w) (c p r)", p=p, r=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
