"""Row E1: features of Inception of 2015-12-05, beside torch-fidelity's extractor with the same weights, from bytes to features.

Weights are random: nothing is downloaded, and the arithmetic is that of the real ones.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.floors import Floors, Work, counted_flops
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import by_turns
from genvision.eval.features import ExtractorOptions
from genvision.eval.inception import InceptionExtractor, inception_shapes

OWN, PEER = "genvision", "torch-fidelity"
Peers = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a batch, its images and the rounds."""

    rounds: int = 9
    batch_size: int = 8
    image_size: int = 256


LONG = Sizes()
QUICK = Sizes(rounds=3, batch_size=1)


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        weights = Path(folder) / "inception.pth"
        torch.save(random_inception(), weights)
        peers = inception_peers(weights, sizes.batch_size, sizes.image_size)
    for row in rows:
        with torch.inference_mode():
            result = features_result(row, f"Inception, {sizes.batch_size} image(s) of {sizes.image_size} px", peers, sizes.rounds)
        yield result


def features_result(row: Row, what: str, peers: Peers, rounds: int) -> Result:
    """Checks the features, then times both."""
    try:
        check = check_close("features", peers[OWN](), peers[PEER]())
    except WrongAnswer as error:
        return wrong(row, what, str(error))
    work = Work(counted_flops(peers[PEER]))  # ours saves some of its products
    floors = Floors(work)
    seconds = by_turns(peers | floors.calls, rounds, floors=list(floors.calls))
    floor = floors.floor(seconds, work)
    return measured(row, what, seconds, own=OWN, peer=PEER, floor=floor, check=f"{check} of torch-fidelity's")


def inception_peers(weights: Path, batch_size: int, size: int) -> Peers:
    """Features [B, 2048] of the same random pictures.

    Args:
        weights: file of Inception's weights under torch-fidelity's names.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = InceptionExtractor(ExtractorOptions(inception_weights=weights))
    peer = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)).eval()
    coarse = 255 * torch.rand(batch_size, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)  # smooth, as pictures are
    return {OWN: lambda: ours.forward(pixels, want_logits=False, want_spatial=False).features, PEER: lambda: peer(pixels)[0]}


def random_inception() -> dict[str, Tensor]:
    """All tensors of the official file by name: convolutions that keep the size of signals, batch norms that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in inception_shapes().items():
        normal = torch.randn(shape, generator=generator)
        if name.endswith("conv.weight"):
            tensors[name] = normal * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith("bn.weight"):
            tensors[name] = 1 + 0.1 * normal
        elif name.endswith("running_var"):
            tensors[name] = (0.2 * normal).exp()
        else:
            tensors[name] = 0.1 * normal
    return tensors
