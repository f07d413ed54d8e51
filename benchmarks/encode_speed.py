"""What bounds `genvision encode`: reading JPEGs or the network? And does its memory grow with the data set?

Three things are timed on the first images of a folder: reading alone (JPEG to centre crop, by W worker processes as `encode` does it), the
network alone (crops to codes), and the command itself as a user starts it. The command runs on two sets, a quarter of the images and all
of them, and the rate is that of the difference: so the start, which is paid once, stands apart. CPU time counts child processes.

Peak memory is that of the command's main process. It is measured on these two sets and, with a network of the same codes that is tiny and
so fast, on `--memory-images`: the same pictures under more names. All links are symbolic and temporary.

    python benchmarks/encode_speed.py --data DIR                              # 100 images through a random VQ-16 network
    python benchmarks/encode_speed.py --data DIR --images 1000 --tokenizer DIR
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from genvision.data.datasets import ordered_batches
from genvision.data.sources import ImageSource, open_source
from genvision.data.transforms import ViewConfig
from genvision.images import from_uint8
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.vq import VQTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images, or of class folders of images")
    parser.add_argument("--images", type=int, default=100, help="images to encode")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; a random VQ-16 unless told")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images; 2 is the command's default")
    parser.add_argument("--batch-size", type=int, default=8, help="of the network; the fastest on small machines is small")
    parser.add_argument("--rounds", type=int, default=3, help="batches that the network alone is timed on")
    parser.add_argument("--memory-images", type=int, nargs=2, default=(500, 2000), help="sizes of the sets for peak memory alone")
    arguments = parser.parse_args()
    source = open_source(f"folder:{arguments.data}")
    num = min(arguments.images, len(source))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = arguments.tokenizer
        if tokenizer is None:
            tokenizer = random_tokenizer(root / "tokenizer", arguments.size)
        sets = [link_images(source, root / f"set-{count}", count) for count in (num // 4, num)]
        for workers in sorted({0, arguments.workers}):
            print_rate(f"reading alone, {workers} workers", num, read(sets[1], arguments.size, arguments.batch_size, workers))
        print_rate(
            f"network alone, {torch.get_num_threads()} threads",
            arguments.batch_size,
            network(tokenizer, sets[1], arguments.size, arguments.batch_size, arguments.rounds),
        )
        options = ["--image-size", arguments.size, "--batch-size", arguments.batch_size, "--workers", arguments.workers]
        few, all_of_them = (encode(tokenizer, folder, root / f"{folder.name}-codes", options) for folder in sets)
        difference = Cost(wall=all_of_them.wall - few.wall, cpu=all_of_them.cpu - few.cpu)
        print_rate(f"encode, {arguments.workers} workers", num - num // 4, difference)
        start = few.wall - difference.wall * (num // 4) / (num - num // 4)
        print(f"encode starts in {start:.0f} s; peak memory: {few.peak:.0f} MB for {num // 4} images, {all_of_them.peak:.0f} MB for {num}")
        tiny = random_tokenizer(root / "tiny", arguments.size, base_channels=8, norm_groups=8, z_channels=32, num_res_blocks=1)
        for count in arguments.memory_images:
            folder = link_images(source, root / f"memory-{count}", count)
            peak = encode(tiny, folder, root / f"{folder.name}-codes", options).peak
            print(f"peak memory with a tiny network: {peak:.0f} MB for {count} images", flush=True)


@dataclass(frozen=True)
class Cost:
    """Seconds and megabytes."""

    wall: float
    cpu: float
    """Of all threads and of child processes that have ended."""
    peak: float = 0.0
    """Resident memory of the main process."""


def random_tokenizer(folder: Path, size: int, **changes: int) -> Path:
    """LlamaGen's VQ-16, or with `changes`."""
    torch.manual_seed(0)
    VQTokenizer(image_size=size, **changes).save_pretrained(folder)
    return folder


def link_images(source: ImageSource, folder: Path, count: int) -> Path:
    """An ImageFolder of `count` images in classes of 100: the first of the source, again from the first where it has fewer."""
    for index in range(count):
        image = Path(source.name(index % len(source))).resolve()
        link = folder / f"{index // 100:05d}" / f"{index:07d}{image.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    return folder


def read(folder: Path, size: int, batch_size: int, num_workers: int) -> Cost:
    """Every image once, as `encode` reads it."""
    source = open_source(f"folder:{folder}")
    began, before = time.perf_counter(), cpu_seconds()
    for _ in ordered_batches(source, size, batch_size=batch_size, views=ViewConfig(), num_workers=num_workers):
        pass
    return Cost(wall=time.perf_counter() - began, cpu=cpu_seconds() - before)


def network(tokenizer: Path, folder: Path, size: int, batch_size: int, rounds: int) -> Cost:
    """Median for one batch, after one batch to warm up."""
    model = load_tokenizer(tokenizer)
    batch = next(iter(ordered_batches(open_source(f"folder:{folder}"), size, batch_size=batch_size)))
    images = from_uint8(batch["images"])
    costs = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            began, before = time.perf_counter(), cpu_seconds()
            model.encode(images)
            costs.append(Cost(wall=time.perf_counter() - began, cpu=cpu_seconds() - before))
    counted = costs[1:]
    return Cost(wall=statistics.median(cost.wall for cost in counted), cpu=statistics.median(cost.cpu for cost in counted))


def encode(tokenizer: Path, folder: Path, out: Path, options: list[object]) -> Cost:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "genvision", "encode", "--tokenizer", tokenizer, "--data", f"folder:{folder}", "--out", out, *options]
    began, before = time.perf_counter(), cpu_seconds()
    peak_file = out.with_suffix(".peak")
    program = (  # the parent of the command waits for nothing else, so the largest of its children is the command
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[2:], stdout=subprocess.DEVNULL); "
        "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", program, str(peak_file), *map(str, command)], check=True, stderr=subprocess.DEVNULL)
    return Cost(wall=time.perf_counter() - began, cpu=cpu_seconds() - before, peak=int(peak_file.read_text()) / 1024)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def print_rate(what: str, num: int, cost: Cost) -> None:
    print(f"{what:28} {num / cost.wall:8.2f} images/s {1000 * cost.cpu / num:8.1f} ms of CPU an image", flush=True)


if __name__ == "__main__":
    main()
