"""LPIPS: how different two images look to VGG16 (Zhang et al., arXiv:1801.03924; version 0.1, the linear layers learned on VGG16).

Five feature maps of VGG16 are normalised along the channels; their squared differences are weighed channel by channel, averaged over
positions and added up. The network is frozen and gradients reach the images. The dropout in front of the linear layers, with which these
were learned, is left out unless asked for: VQGAN and LlamaGen train with it by accident, and see a noisy distance.

Weights come from two published files, torchvision's VGG16 and the linear layers, or from one that holds both. Names that are understood:
`features.0.weight` (torchvision), `net.slice1.0.weight` (the official package, taming-transformers), `lin0.model.1.weight` (all of them).

Shapes: B images, C channels of a feature map, h, w its sides.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.weights import PublishedWeights

VGG = PublishedWeights(network="VGG16", url="https://download.pytorch.org/models/vgg16-397923af.pth", option="--vgg-weights")
LINEAR = PublishedWeights(
    network="LPIPS",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    option="--lpips-weights",
)
"""The five linear layers alone, the same tensors as https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth."""
LINEAR_HASH = "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"
"""sha256 over the values of the published linear layers."""

TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
"""Layer of VGG16's `features` to its channels: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
MIN_SIDE = 16
"""Four poolings halve the sides before the last feature map."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's channels for images in [-1, 1]."""
NORM_EPSILON = 1e-10


@dataclass(frozen=True, kw_only=True)
class LPIPSOptions:
    """Where the weights come from and where the network runs."""

    lpips_weights: Path | None = None
    """The linear layers, or all weights in one file; without it the file in torch hub's folder is used."""
    vgg_weights: Path | None = None
    """torchvision's VGG16; without it the file in torch hub's folder is used, where `lpips_weights` does not hold it."""
    download: bool = False
    """Fetch what is not there yet: 528 MB of VGG16 and 7 kB of linear layers."""
    device: str = "cpu"
    dropout: float = 0.0
    """As of `LPIPS`."""


class LPIPS(nn.Module):
    """Distance of image pairs; 0 for equal images, larger the less they look alike.

    Args:
        tensors: `features.{i}.weight`, `features.{i}.bias` and `linear.{k}`, as `read_weights` gives them.
        source: where they come from, for messages.
        dropout: probability of dropping an element of the squared differences, in train mode alone (a new one is in eval mode);
            VQGAN's and LlamaGen's tokenizers were trained at 0.5.

    Raises:
        UserError: tensors are missing, unknown, misshapen or not finite, or the dropout is no probability.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], source: str = "tensors", dropout: float = 0.0) -> None:
        from torchvision.models import vgg16  # 1 s

        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"dropout of LPIPS must be at least 0 and below 1, got {dropout}")
        self.dropout = dropout
        with torch.device("meta"):  # neither memory for the 500 MB of the classifier nor random numbers
            self.features = vgg16(weights=None, init_weights=False).features[: max(TAPS) + 1]
            self.linear = nn.ParameterList(torch.empty(1, channels, 1, 1) for channels in TAPS.values())
        checked = LINEAR.check(tensors, {name: tensor.shape for name, tensor in self.state_dict().items()}, source)
        self.load_state_dict({name: tensor.detach() for name, tensor in checked.items()}, assign=True)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W] in [-1, 1]; gradients reach both.

        Raises:
            UserError: the sides are shorter than 16 pixels.
        """
        assert a.shape == b.shape and a.ndim == 4 and a.shape[1] == 3, f"pairs must be [B, 3, H, W], got {a.shape} and {b.shape}"
        if min(a.shape[2:]) < MIN_SIDE:
            raise UserError(
                f"LPIPS needs images of at least {MIN_SIDE}x{MIN_SIDE} pixels, got {a.shape[2]}x{a.shape[3]}; use larger ones or omit it"
            )
        a, b = self.scaled(a), self.scaled(b)
        distances, weights = [], iter(self.linear)
        dropout = self.dropout if self.training else 0.0
        for number, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if number in TAPS:
                distances.append(layer_distance(a, b, next(weights), dropout))
        return torch.stack(distances).sum(dim=0)

    def scaled(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as VGG16 expects them."""
        return (images - self.shift) / self.scale

    @property
    def is_published(self) -> bool:
        """Whether the linear layers are those of version 0.1 (those of version 0.0 have the same names and shapes)."""
        digest = hashlib.sha256()
        for weight in self.linear:
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest() == LINEAR_HASH


def layer_distance(a: Tensor, b: Tensor, weight: Tensor, dropout: float = 0.0) -> Tensor:
    """What one feature map adds to the distance: [B, C, h, w] twice and weights [1, C, 1, 1] -> [B]."""
    difference = (unit(a.float()) - unit(b.float())).square()  # [B, C, h, w]
    if dropout > 0:
        difference = F.dropout(difference, dropout)
    return (difference * weight).sum(dim=1).mean(dim=(1, 2))


def load_lpips(options: LPIPSOptions | None = None) -> LPIPS:
    """The published metric, from files.

    Raises:
        UserError: a file is missing or damaged, or cannot be fetched.
    """
    options = options or LPIPSOptions()
    path = LINEAR.find(options.lpips_weights, options.download)
    tensors, source = read_weights(path, LINEAR), str(path)
    if options.vgg_weights is not None or not any(name.startswith("features.") for name in tensors):
        vgg = VGG.find(options.vgg_weights, options.download)
        tensors |= {name: tensor for name, tensor in read_weights(vgg, VGG).items() if name.startswith("features.")}
        source = f"{path} and {vgg}"
    network = LPIPS(tensors, source, options.dropout).to(options.device)
    # a fifth less time on CPUs
    return network.to(memory_format=torch.channels_last) if torch.device(options.device).type == "cpu" else network


def read_weights(path: Path, published: PublishedWeights = LINEAR) -> dict[str, Tensor]:
    """The tensors of a file under our names; what LPIPS does not use (VGG16's classifier) is left out. Nothing in it is executed.

    Raises:
        UserError: it cannot be read, or holds more than tensors.
    """
    tensors = {_our_name(name): tensor for name, tensor in published.read(path).items()}
    tensors.pop("", None)
    return tensors


def _our_name(name: str) -> str:
    """Name in `LPIPS.state_dict()`; "" for what it does not use, and an unknown name as it is."""
    if name.startswith(("classifier.", "scaling_layer.")):
        return ""
    if match := re.fullmatch(r"(?:net\.)?slice[1-5]\.(\d+\.(?:weight|bias))", name):
        return f"features.{match[1]}"
    # the official package has each layer twice, as lin0 and lins.0
    if match := re.fullmatch(r"lin(?:s\.)?([0-4])\.model\.[01]\.weight", name):
        return f"linear.{match[1]}"
    return name


def unit(x: Tensor) -> Tensor:
    """Feature maps [B, C, h, w] of length 1 along the channels; a vector of zeros stays one, with a finite gradient."""
    # vector_norm has gradient 0 at a vector of zeros, where the square root of a sum of squares has none
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPSILON)
