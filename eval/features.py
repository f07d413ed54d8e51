"""Feature extractors: uint8 images -> what the metrics compare. The contract, and the names by which extractors are chosen.

`inception` and `inception-clean` stand in genvision.eval.inception, `dinov2` in genvision.eval.dinov2, every extractor of torch-fidelity
(`fidelity:NAME`) in genvision.eval.fidelity_extractors. `digits`, here, is a small network that is trained on the spot
(genvision.eval.digits); it needs no file and suits digits only.

Shapes: B images, D features, K logits, S spatial features.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from genvision.errors import UserError

FIDELITY_PREFIX = "fidelity:"


class Features(NamedTuple):
    """What an extractor gives for B images, on the CPU."""

    features: Tensor
    """float32 [B, D]: compared by FID."""
    logits: Tensor | None
    """float32 [B, K]: scores of the classes, before the softmax; compared by the Inception Score. None: not asked for, or none."""
    spatial: Tensor | None = None
    """float32 [B, S]: features that still know places; compared by sFID. None: not asked for, or none."""


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """Where a network comes from and where it runs."""

    inception_weights: Path | None = None
    """Inception's weights (.pth or .safetensors); without it the file in torch hub's folder is used."""
    dinov2_weights: Path | None = None
    """The weights of DINOv2's ViT-L/14, likewise."""
    download: bool = False
    """Fetch weights when they are not there yet."""
    device: str = "cpu"
    """Where the network runs; features always come back to the CPU."""


class Extractor(ABC):
    """A frozen network in eval mode; call it with uint8 [B, H, W, 3] (numpy or torch) and get `Features`."""

    name: str
    feature_dim: int
    num_logits: int
    """0: it gives no logits."""
    spatial_dim: int = 0
    """0: it gives no spatial features."""
    resize: str
    """How images are brought to the network's size, in words for the result file."""

    def __init__(self, network: nn.Module, options: ExtractorOptions, weights_hash: str | None = None) -> None:
        self.device = options.device
        self.weights_hash = weights_hash or tensors_hash(network.state_dict())
        self.network = network.to(options.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor, *, want_logits: bool = True, want_spatial: bool = True) -> Features:
        """Look at images.

        Args:
            want_logits: False leaves the logits out.
            want_spatial: False leaves the spatial features out.

        Raises:
            UserError: the images are not uint8 [B, H, W, 3].
        """
        assert not self.network.training, "an extractor in train mode gives wrong features"
        with exact_float32():
            found = self.forward(self._upload(images), want_logits=want_logits, want_spatial=want_spatial)
        features, *others = (None if tensor is None else tensor.float().cpu() for tensor in found)
        assert features is not None
        return Features(features, *others)

    @abstractmethod
    def forward(self, pixels: Tensor, *, want_logits: bool, want_spatial: bool) -> Features:
        """uint8 [B, 3, H, W] on the device -> `Features` there."""

    def _upload(self, images: np.ndarray | Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> uint8 [B, 3, H, W] on the device."""
        pixels = as_pixels(images)
        if torch.device(self.device).type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.permute(0, 2, 3, 1).contiguous().pin_memory().to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.to(self.device)


class DigitsExtractor(Extractor):
    """The classifier of the first half of scikit-learn's digits: 64 features before its last layer, 10 logits."""

    name = "digits"
    feature_dim = 64
    num_logits = 10
    resize = "area to 8x8, mean of the three channels"

    def __init__(self, options: ExtractorOptions | None = None) -> None:
        from genvision.eval.digits import digits_classifier

        super().__init__(copy.deepcopy(digits_classifier("first")), options or ExtractorOptions())

    def forward(self, pixels: Tensor, *, want_logits: bool, want_spatial: bool) -> Features:
        features, logits = self.network(pixels)
        return Features(features, logits if want_logits else None)


def _inception(options: ExtractorOptions) -> Extractor:
    from genvision.eval.inception import InceptionExtractor

    return InceptionExtractor(options)


def _inception_clean(options: ExtractorOptions) -> Extractor:
    from genvision.eval.inception import CleanInceptionExtractor

    return CleanInceptionExtractor(options)


def _dinov2(options: ExtractorOptions) -> Extractor:
    from genvision.eval.dinov2 import DINOv2Extractor

    return DINOv2Extractor(options)


EXTRACTORS: dict[str, Callable[[ExtractorOptions], Extractor]] = {
    "inception": _inception,
    "inception-clean": _inception_clean,
    "dinov2": _dinov2,
    "digits": DigitsExtractor,
}
"""Beside these, `fidelity:NAME` takes any extractor that torch-fidelity knows."""


def load_extractor(name: str, options: ExtractorOptions | None = None) -> Extractor:
    """Build the extractor called `name`: one of EXTRACTORS, or `fidelity:NAME` for torch-fidelity's NAME.

    Raises:
        UserError: the name is unknown, the weights are missing or damaged, or the device is not there.
    """
    options = options or ExtractorOptions()
    if name not in EXTRACTORS and not name.startswith(FIDELITY_PREFIX):
        raise UserError(f"extractor '{name}' is unknown; choose one of {', '.join(sorted(EXTRACTORS))}, or {FIDELITY_PREFIX}NAME")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{options.device}' cannot be used ({' '.join(str(error).split())[:120]}); try --device cpu") from error
    if name in EXTRACTORS:
        return EXTRACTORS[name](options)
    from genvision.eval.fidelity_extractors import FidelityExtractor  # brings torch-fidelity: 2 s

    return FidelityExtractor(name.removeprefix(FIDELITY_PREFIX), options)


def as_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3], numpy or torch -> uint8 [B, 3, H, W]; refuses every other type and layout."""
    tensor = torch.from_numpy(np.require(images, requirements=["C", "W"])) if isinstance(images, np.ndarray) else images
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"images to be scored must be uint8 [B, H, W, 3], got {kind} {list(tensor.shape)}; convert them with to_uint8")
    return tensor.permute(0, 3, 1, 2)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values; the same whatever kind of file the tensors came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith("num_batches_tracked"):  # a counter of training, absent from the official file
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products without TF32 or bfloat16 inside, and the same ones every time, whatever the process has allowed for its models."""
    backends: Any = torch.backends
    switches: list[tuple[Any, str, Any]] = [(backends.cudnn, "benchmark", False), (backends.cudnn, "deterministic", True)]
    if hasattr(backends.cudnn, "conv"):  # since torch 2.9; a process that has used these must not touch the older switches
        products = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        switches += [(product, "fp32_precision", "ieee") for product in products]
    else:
        switches.append((backends.cudnn, "allow_tf32", False))
    before = [getattr(owner, switch) for owner, switch, _ in switches]
    matmul_precision = None if hasattr(backends.cudnn, "conv") else torch.get_float32_matmul_precision()
    try:
        for owner, switch, value in switches:
            setattr(owner, switch, value)
        if matmul_precision is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for (owner, switch, _), value in zip(switches, before, strict=True):
            setattr(owner, switch, value)
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
