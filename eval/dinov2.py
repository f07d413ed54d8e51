"""DINOv2's ViT-L/14 (arXiv:2304.07193), whose class token FD-DINOv2 compares (arXiv:2306.04675), as in EDM2 (arXiv:2312.02696).

Images are resized to 224x224 with an antialiased bicubic filter. The position embeddings, learned for 37x37 patches, are resampled to
16x16 as the code in the authors' torch hub repository does it: bicubic, not antialiased, at the scale (16 + 0.1) / 37. Other ports
resample otherwise and give other features; the two sides of a distance must come from one of them.

Shapes: B images, N = 16 * 16 patches, C channels, H heads, D = C / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.eval.features import Extractor, ExtractorOptions, Features, tensors_hash
from genvision.kernels.attention import attention
from genvision.weights import PublishedWeights

DINOV2_WEIGHTS = PublishedWeights(
    network="DINOv2 ViT-L/14",
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    option="--dinov2-weights",
)
SIDE = 224
PATCH_SIZE = 14
POSITION_OFFSET = 0.1
"""Added by the official code to the target's side before it divides; part of the published features."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DINOv2Extractor(Extractor):
    """DINOv2 ViT-L/14: the normalised class token, 1024 features; no logits."""

    name = "dinov2"
    feature_dim = 1024
    num_logits = 0
    resize = "bicubic with antialiasing to 224x224 in float32"
    depth = 24
    num_heads = 16
    learned_side = 37
    """Patches along a side of the images it was trained on."""

    def __init__(self, options: ExtractorOptions | None = None) -> None:
        options = options or ExtractorOptions()
        path = DINOV2_WEIGHTS.find(options.dinov2_weights, options.download)
        with torch.device("meta"):  # neither time nor random numbers for weights that are replaced at once
            network = VisionTransformer(self.feature_dim, self.depth, self.num_heads, self.learned_side)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        tensors = DINOV2_WEIGHTS.check(DINOV2_WEIGHTS.read(path), shapes, path)
        network.load_state_dict(tensors, assign=True)
        network.resample_positions(SIDE // PATCH_SIZE)
        super().__init__(network, options, tensors_hash(tensors))

    def forward(self, pixels: Tensor, *, want_logits: bool, want_spatial: bool) -> Features:
        return Features(self.network(normalised(pixels)), None)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 224, 224] as the network wants it."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (resized(pixels) / 255 - mean) / std


def resized(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 224, 224], about [0, 255]: bicubic filters overshoot, and EDM2 does not clip."""
    return F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)


class VisionTransformer(nn.Module):
    """DINOv2's encoder: [B, 3, 14 h, 14 w] -> class token [B, C]; the state dict is that of the official file."""

    def __init__(self, dim: int, depth: int, num_heads: int, learned_side: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + learned_side**2, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))  # for training only
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)})
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # [B, N, C]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x[:, 0])
        return normed

    @torch.no_grad()
    def resample_positions(self, side: int) -> None:
        """Make the position embeddings fit side x side patches, for good."""
        learned_side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == learned_side:
            return
        for_class, for_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = for_patches.unflatten(1, (learned_side, learned_side)).permute(0, 3, 1, 2)  # [1, C, 37, 37]
        scale = (side + POSITION_OFFSET) / learned_side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # [1, C, 16, 16]
        assert grid.shape[2:] == (side, side)
        self.pos_embed = nn.Parameter(torch.cat([for_class, grid.flatten(2).transpose(1, 2)], dim=1))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel: [B, 1 + N, C] -> the same shape."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = ChannelScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.ls2 = ChannelScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # [B, 1 + N, 4 C]
        return x + self.ls2(self.mlp["fc2"](hidden))


class Attention(nn.Module):
    """Self-attention of every token with every other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, 1 + N, D]
        projected: Tensor = self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # [B, 1 + N, C]
        return projected


class ChannelScale(nn.Module):
    """A learned factor per channel (LayerScale, arXiv:2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
