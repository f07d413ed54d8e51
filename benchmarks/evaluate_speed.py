"""FID of two folders of PNGs by torch-fidelity and by genvision: is it one number, and how many images does each score per second?

Both peers run in this process, by turns, on one thread; the one that goes first changes every round. Each turn is the whole job as a
user starts it: read the weights, decode, resize, network, statistics, distance. What counts is CPU time, that of child processes
included, so that neither other programs nor loader processes move the ratio. Inception has random weights: no download, and the arithmetic
is that of the real ones. `genvision benchmark E1` measures the network alone (genvision.bench.inception).

torch-fidelity takes the root of the product of the covariances by way of its eigenvalues. With fewer images than the 2048 features that
loses 1e-5 to 1e-4 of the FID, whatever the FID is; the two sets are unlike enough for the rest to be seen.

    python benchmarks/evaluate_speed.py                          # 500 + 500 images, 2 rounds: about 20 minutes
    python benchmarks/evaluate_speed.py --images 50 --rounds 3
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from genvision.bench.timing import NUM_THREADS

# isort: split
import numpy as np
import torch
import torch_fidelity
from PIL import Image

from genvision.bench.inception import random_inception
from genvision.data.sources import open_source
from genvision.eval.features import ExtractorOptions
from genvision.eval.inception import InceptionExtractor
from genvision.eval.measurement import Networks, measure
from genvision.eval.moments import frechet_distance

SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="images in each of the two sets")
    parser.add_argument("--rounds", type=int, default=2, help="times that each peer scores the sets")
    parser.add_argument("--batch-size", type=int, default=64, help="of both peers; 64 is torch-fidelity's default")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = root / "inception.pth"
        torch.save(random_inception(), weights)
        write_images(root / "generated", arguments.images, seed=1, slope=1.8, brightness=90, contrast=30, tint=(1.2, 0.8, 0.6))
        write_images(root / "reference", arguments.images, seed=2, slope=1.0, brightness=140, contrast=50, tint=(1.0, 1.0, 1.0))
        peers: dict[str, Callable[[Path, Path, int], float]] = {"torch-fidelity": by_torch_fidelity, "genvision": by_genvision}
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        fids: dict[str, float] = {}
        for number in range(arguments.rounds):
            for name in list(peers)[:: 1 if number % 2 == 0 else -1]:
                began = cpu_seconds()
                fids[name] = peers[name](root, weights, arguments.batch_size)
                seconds[name].append(cpu_seconds() - began)
                print(f"round {number + 1}: {name:14} {seconds[name][-1]:8.1f} CPU s  FID {fids[name]:.9g}", flush=True)
    report(2 * arguments.images, seconds, fids)


def by_torch_fidelity(root: Path, weights: Path, batch_size: int) -> float:
    """FID as torch-fidelity's users ask for it."""
    result = torch_fidelity.calculate_metrics(
        input1=str(root / "generated"),
        input2=str(root / "reference"),
        fid=True,
        cuda=False,
        batch_size=batch_size,
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,  # decodes in this process, which costs less CPU time than its loader processes do
        verbose=False,
    )
    return float(result["frechet_inception_distance"])


def by_genvision(root: Path, weights: Path, batch_size: int) -> float:
    """The same by the pass that every `genvision` job makes over a set."""
    networks = Networks(extractor=InceptionExtractor(ExtractorOptions(inception_weights=weights)))
    generated, reference = (
        measure(open_source(f"folder:{root / name}"), networks, moments=frozenset({"pool"}), batch_size=batch_size).moments("pool")
        for name in ("generated", "reference")
    )
    return frechet_distance(generated, reference)


def write_images(
    folder: Path, num: int, *, seed: int, slope: float, brightness: float, contrast: float, tint: tuple[float, float, float]
) -> None:
    """PNGs of coloured noise whose amplitude falls with frequency like that of photographs; each varies slope, brightness and contrast."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    frequency[0, 0] = np.inf  # the mean is drawn apart
    for index in range(num):
        amplitude = frequency ** -rng.normal(slope, 0.1)
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, SIDE, SIDE))) * amplitude)
        mixed = np.einsum("ij,jyx->yxi", 0.6 + 0.4 * np.eye(3), noise / noise.std())  # the channels of photographs resemble each other
        image = rng.normal(brightness, 8) + rng.normal(contrast, contrast / 8) * mixed
        Image.fromarray((image * tint).clip(0, 255).astype(np.uint8)).save(folder / f"{index:06d}.png")


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def report(num: int, seconds: dict[str, list[float]], fids: dict[str, float]) -> None:
    rates = {name: num * len(spent) / sum(spent) for name, spent in seconds.items()}
    print(f"\n{'':14} {'images/s':>9} {'FID':>16}")
    for name, rate in rates.items():
        print(f"{name:14} {rate:9.3f} {fids[name]:16.9f}")
    difference = abs(fids["genvision"] - fids["torch-fidelity"])
    print(f"genvision is {rates['genvision'] / rates['torch-fidelity']:.2f} times as fast (one thread, CPU time)")
    print(f"the FIDs differ by {difference:.2e}, relatively by {difference / abs(fids['torch-fidelity']):.2e}")


if __name__ == "__main__":
    main()
