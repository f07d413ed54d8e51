"""Feature extractors: uint8 images -> what the metrics compare.

`inception` is torch-fidelity's port of the TensorFlow Inception of 2015-12-05, the network of every published FID: bilinear resize to
299 as TensorFlow 1 did it (no half-pixel centres, no antialiasing), features after the last pooling, logits without bias.
`digits` is a small network that is trained on the spot (genvision.eval.digits); it needs no file and suits digits only.

Shapes: B images, D features, K logits.
"""

import copy
import hashlib
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from genvision.errors import UserError

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class Features(NamedTuple):
    """What an extractor gives for B images, on the CPU."""

    features: Tensor
    """float32 [B, D]: compared by FID."""
    logits: Tensor
    """float32 [B, K]: scores of the classes, before the softmax; compared by the Inception Score."""


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """Where a network comes from and where it runs."""

    inception_weights: Path | None = None
    """Inception's weights (.pth or .safetensors); without it the file in torch hub's folder is used."""
    download: bool = False
    """Fetch Inception's weights when they are not there yet."""
    device: str = "cpu"
    """Where the network runs; features always come back to the CPU."""


class Extractor(ABC):
    """A frozen network in eval mode; call it with uint8 [B, H, W, 3] (numpy or torch) and get `Features`."""

    name: str
    feature_dim: int
    num_logits: int
    resize: str
    """How images are brought to the network's size, in words for the result file."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device
        self.weights_hash = tensors_hash(network.state_dict())

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> Features:
        assert not self.network.training, "an extractor in train mode gives wrong features"
        features, logits = self.forward(as_pixels(images).to(self.device))
        return Features(features.float().cpu(), logits.float().cpu())

    @abstractmethod
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> features [B, D], logits [B, K]."""


class InceptionExtractor(Extractor):
    """Inception of 2015-12-05: 2048 features after pooling, 1008 logits without bias."""

    name = "inception"
    feature_dim = 2048
    num_logits = 1008
    resize = "TensorFlow 1 bilinear to 299x299, no antialiasing"

    def __init__(self, options: ExtractorOptions | None = None) -> None:
        options = options or ExtractorOptions()
        path = _find_inception_weights(options)
        network = _build_inception(_read_tensors(path), path)
        # channels_last takes a quarter off the time on CPUs and moves features by 4e-6 of their deviation
        super().__init__(network.to(memory_format=torch.channels_last), options.device)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(pixels)
        return features, logits


class DigitsExtractor(Extractor):
    """The classifier of the first half of scikit-learn's digits: 64 features before its last layer, 10 logits."""

    name = "digits"
    feature_dim = 64
    num_logits = 10
    resize = "area to 8x8, mean of the three channels"

    def __init__(self, options: ExtractorOptions | None = None) -> None:
        from genvision.eval.digits import digits_classifier

        options = options or ExtractorOptions()
        super().__init__(copy.deepcopy(digits_classifier("first")), options.device)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(pixels)
        return features, logits


EXTRACTORS: dict[str, Callable[[ExtractorOptions], Extractor]] = {"inception": InceptionExtractor, "digits": DigitsExtractor}


def load_extractor(name: str, options: ExtractorOptions | None = None) -> Extractor:
    """Build the extractor called `name`.

    Raises:
        UserError: the name is unknown, the weights are missing or damaged, or the device is not there.
    """
    if name not in EXTRACTORS:
        raise UserError(f"extractor '{name}' is unknown; choose one of {', '.join(sorted(EXTRACTORS))}")
    options = options or ExtractorOptions()
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{options.device}' cannot be used ({' '.join(str(error).split())[:120]}); try --device cpu") from error
    return EXTRACTORS[name](options)


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
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _find_inception_weights(options: ExtractorOptions) -> Path:
    if options.inception_weights is not None:
        path = Path(options.inception_weights)
        if not path.is_file():
            raise UserError(f"{path}: no such file; --inception-weights wants the file {INCEPTION_URL}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name  # where torch-fidelity itself keeps it
    if path.is_file():
        return path
    if not options.download:
        raise UserError(f"no Inception weights; give `--inception-weights FILE` or `--download` ({INCEPTION_URL}, kept as {path})")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(path))
    except (URLError, OSError) as error:
        raise UserError(f"{INCEPTION_URL}: download failed ({error}); fetch it elsewhere and give `--inception-weights FILE`") from error
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file; nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types; whatever it is, this file cannot be used
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not readable as Inception weights ({reason}); fetch {INCEPTION_URL} again") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path}: Inception weights are a mapping of names to tensors, this is something else; fetch {INCEPTION_URL}")
    return dict(content)


def _build_inception(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's network with the given tensors.

    Its constructor unpickles a file without restraint, so it never sees the user's: it gets our own copy in memory of tensors that were
    read safely, and what it then loads is compared with the network name by name.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # 2 s

    class CheckedInception(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            _check_tensors(state_dict, self.state_dict(), path)
            return super().load_state_dict(state_dict, *args, **kwargs)

    copy_in_memory = io.BytesIO()
    torch.save(tensors, copy_in_memory)
    copy_in_memory.seek(0)
    with torch.random.fork_rng(devices=[]):  # the constructor first fills the layers with random numbers
        network = CheckedInception("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy_in_memory)
    return cast(nn.Module, network)


def _check_tensors(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    names = {name for name in wanted if not name.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(names - set(given)),
        "unexpected": sorted(set(given) - set(wanted)),
        "misshapen": [
            f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
            for name in sorted(names & set(given))
            if given[name].shape != wanted[name].shape
        ],
        "not finite": [name for name in sorted(names & set(given)) if not bool(torch.isfinite(given[name]).all())],
    }
    found = [f"{len(items)} {kind} ({_shorten(items)})" for kind, items in problems.items() if items]
    if found:
        raise UserError(f"{path}: not the {len(names)} tensors of Inception: {'; '.join(found)}; fetch {INCEPTION_URL}")


def _shorten(items: list[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")
