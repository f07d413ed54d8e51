"""A perceptual loss on the features of any timm model, for training where VGG16 cannot be fetched or another network is wanted.

As LPIPS (arXiv:1801.03924, eq. 1) with all channels counting alike; TiTok (arXiv:2406.07550) trains with ConvNeXt in this place.

Shapes: B images, C channels of a feature map, h, w its sides.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.lpips import unit
from genvision.weights import PublishedWeights

if TYPE_CHECKING:
    from typing import Self


class TimmPerceptual(nn.Module):
    """Distance of image pairs; 0 for equal images, larger the less alike they look to the network, which is frozen.

    At each stage the feature vectors are made unit vectors; their squared distance is averaged over positions, and the stages are added up.

    Args:
        name: of a timm model, such as `convnext_small` or `resnet50.a1_in1k`.
        weights: local file of its weights (.safetensors, .pth, .bin) under timm's names; what no chosen stage needs, it may lack.
        pretrained: without a file, fetch the weights that timm publishes (Hugging Face Hub, kept in its cache).
        stages: which feature maps count, by timm's numbers from 0; None takes all.
        image_size: images are resized to this side first (bilinear); None leaves them as they are.

    Raises:
        UserError: timm is not installed, the name or a stage is unknown, the weights are missing, do not fit or cannot be fetched,
            or the network takes one size alone and `image_size` is another.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        weights: Path | None = None,
        pretrained: bool = False,
        stages: Sequence[int] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        timm = _import_timm()
        if weights is None and not pretrained:
            raise UserError(f"the perceptual network '{name}' has no weights; give a file of them, or `pretrained` to fetch timm's")
        self.name, self.image_size = name, image_size
        self.network = _build(timm, name, pretrained=weights is None)
        infos = self.network.feature_info
        stages = list(range(len(infos)) if stages is None else stages)
        if not stages or not all(0 <= stage < len(infos) for stage in stages):
            raise UserError(f"timm model '{name}' has stages 0 .. {len(infos) - 1}, got {stages}")
        self.min_side = max(int(infos[stage]["reduction"]) for stage in stages)
        self.stages = self.network.prune_intermediate_layers(stages, prune_norm=True, prune_head=True)  # what no chosen map needs
        if weights is not None:
            _fill(self.network, Path(weights))
        data = timm.data.resolve_model_data_config(self.network)
        only_size = data["input_size"][-1] if self.network.pretrained_cfg.get("fixed_input_size") else None
        if only_size not in (None, image_size):
            raise UserError(f"timm model '{name}' takes images of {only_size}x{only_size} pixels alone; set image_size {only_size}")
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W] in [-1, 1], float32; gradients reach both.

        Raises:
            UserError: the images are smaller than a pixel of the last feature map.
        """
        assert a.shape == b.shape and a.ndim == 4 and a.shape[1] == 3, f"pairs must be [B, 3, H, W], got {a.shape} and {b.shape}"
        pairs = zip(self.features(a), self.features(b), strict=True)
        return torch.stack([(unit(p.float()) - unit(q.float())).square().sum(dim=1).mean(dim=(1, 2)) for p, q in pairs]).sum(dim=0)

    @property
    def description(self) -> str:
        """The network in words: what its distances depend on beside its weights."""
        size = "as they are" if self.image_size is None else f"resized to {self.image_size}"
        return f"timm {self.name}, stages {', '.join(map(str, self.stages))}, images {size}"

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] of images [B, 3, H, W] in [-1, 1], one for each stage."""
        images = ((images + 1) / 2 - self.mean) / self.std
        if self.image_size is not None:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        if min(images.shape[2:]) < self.min_side:
            raise UserError(
                f"the perceptual network '{self.name}' needs images of at least {self.min_side}x{self.min_side} pixels, "
                f"got {images.shape[2]}x{images.shape[3]}; set its image_size, or leave out its last stages"
            )
        maps: list[Tensor] = self.network.forward_intermediates(images, indices=self.stages, stop_early=True, intermediates_only=True)
        return maps

    def train(self, mode: bool = True) -> "Self":
        """Stays in eval mode: its BatchNorm must not follow the training images."""
        return super().train(False)


def _import_timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError("a perceptual loss on timm's models needs timm: pip install genvision[timm]") from error
    return timm


def _build(timm: Any, name: str, *, pretrained: bool) -> Any:
    """The model without its classifier; the global random state is left alone."""
    if not timm.is_model(name):
        similar = timm.list_models(f"{name.split('.')[0][:6]}*")[:5]
        raise UserError(f"timm has no model '{name}'; " + (f"similar: {', '.join(similar)}" if similar else "see timm.list_models()"))
    with torch.random.fork_rng(devices=[]):
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except Exception as error:  # timm, the Hub and the network raise many types; whatever it is, there is no model
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"timm model '{name}' cannot be made ({reason}); a local file of its weights needs no network") from error
    if not hasattr(model, "prune_intermediate_layers"):
        raise UserError(f"timm model '{name}' does not give feature maps; choose another, such as convnext_small or resnet50")
    return model


def _fill(network: Any, path: Path) -> None:
    """Weights from a file: all that the network has, but the counters of BatchNorm; what else the file holds, is left out."""
    config = network.pretrained_cfg
    name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
    published = PublishedWeights(network=f"timm's {name}", url=f"https://huggingface.co/timm/{name}", option="perceptual_weights")
    given = published.read(published.find(path, download=False))
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    network.load_state_dict(published.check({key: given[key] for key in wanted if key in given}, wanted, path), strict=False)
