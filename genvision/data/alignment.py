"""Features of a frozen vision transformer, which REPA aligns a generator's hidden states with (arXiv:2410.06940, section 3.2).

The transformer is one of timm's. Images are standardised by the mean and deviation that it was trained with (DINOv2: ImageNet's) and
resized, bicubic and without antialiasing as REPA's code does it, to the side that gives the wanted number of patches: 256 pixels become
224, 16 x 16 patches of 14 pixels. Its position table is resampled to that grid once (timm's bicubic filter, antialiased; REPA calls the
same function). The features are the patch tokens after the network's last norm, DINOv2's `x_norm_patchtokens`: class and register
tokens are left out.

Shapes: images [B, 3, H, W] in [-1, 1]; T = tokens_per_side^2 patch tokens in row-major order, Z channels.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.weights import PublishedWeights

if TYPE_CHECKING:
    from typing import Self

FEATURE_NETWORKS = {
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vitg14": "vit_giant_patch14_dinov2.lvd142m",
}
"""The names of the authors' torch hub repository, and timm's."""


class FrozenFeatures(nn.Module):
    """Patch tokens of a frozen vision transformer.

    Args:
        name: one of FEATURE_NETWORKS, or of any vision transformer of timm's, such as `vit_base_patch16_224.mae`.
        weights: local file of its weights (.safetensors, or .pth with nothing but tensors) under timm's names.
        download: without a file, fetch the weights that timm publishes (Hugging Face Hub, kept in its cache).
        tokens_per_side: T is its square.

    Attributes:
        name: timm's name with the tag of the weights.
        hash: sha256 of the architecture's name and of every weight as it was published, whatever the number of tokens.
        dim: Z.

    Raises:
        UserError: timm is not installed, the name is none of a vision transformer, or the weights are missing, do not fit or cannot be
            fetched.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str | Path | None = None, download: bool = False, tokens_per_side: int = 16) -> None:
        super().__init__()
        if tokens_per_side < 1:
            raise UserError(f"the grid of feature tokens must have at least 1 a side, got {tokens_per_side}")
        timm = _import_timm()
        name = FEATURE_NETWORKS.get(name, name)
        if weights is None and not download:
            raise UserError(f"the feature network '{name}' has no weights; give a file of them (features_weights), or download them")
        self.network = _build(timm, name, pretrained=weights is None)
        config = self.network.pretrained_cfg
        self.name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
        if weights is not None:
            _fill(self.network, self.name, Path(weights))
        self.hash = _hash(config["architecture"], self.network.state_dict())
        self.tokens_per_side = tokens_per_side
        self.side = tokens_per_side * self.network.patch_embed.patch_size[0]
        self.network.set_input_size(img_size=(self.side, self.side))
        self.dim = int(self.network.num_features)
        data = timm.data.resolve_model_data_config(self.network)
        for statistic in ("mean", "std"):
            self.register_buffer(statistic, torch.tensor(data[statistic]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens_per_side**2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] of any size -> float32 [B, T, Z]; autocast reaches the network, as in REPA's training."""
        images = ((images.float() + 1) / 2 - self.mean) / self.std
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic")
        tokens: Tensor = self.network.forward_features(images)  # [B, prefix + T, Z]
        return tokens[:, self.network.num_prefix_tokens :].float()

    def train(self, mode: bool = True) -> "Self":
        """Stays in eval mode, whatever the module that holds it does."""
        return super().train(False)


def _import_timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError("features of a frozen network need timm: pip install genvision[timm]") from error
    return timm


def _build(timm: Any, name: str, *, pretrained: bool) -> Any:
    """The transformer without a classifier; the global random state is left alone."""
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'; choose one of {', '.join(FEATURE_NETWORKS)}, or see timm.list_models('vit_*')")
    with torch.random.fork_rng(devices=[]):
        try:
            network = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except Exception as error:  # timm, the Hub and the network raise many types; whatever it is, there is no model
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"timm model '{name}' cannot be made ({reason}); a local file of its weights needs no network") from error
    if not all(hasattr(network, part) for part in ("num_prefix_tokens", "patch_embed", "set_input_size")):
        raise UserError(f"timm model '{name}' has no patch tokens; choose a vision transformer, such as dinov2_vitb14")
    return network


def _fill(network: Any, name: str, path: Path) -> None:
    """Weights from a file: all that the network has and no others, but a classifier or mask token, which features do not need."""
    published = PublishedWeights(network=f"timm's {name}", url=f"https://huggingface.co/timm/{name}", option="features_weights")
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    needless = (f"{network.pretrained_cfg['classifier']}.", "mask_token")
    given = published.read(published.find(path, download=False))
    given = {key: tensor for key, tensor in given.items() if key in wanted or not key.startswith(needless)}
    network.load_state_dict(published.check(given, wanted, path))


def _hash(architecture: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(architecture.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
