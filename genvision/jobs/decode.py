"""`genvision decode`: an encoded data set through its tokenizer's decoder, to look at what was stored."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genvision.data.encoded import EncodedDataset
from genvision.errors import UserError
from genvision.images import Rounding, to_uint8
from genvision.jobs.image_writers import FolderWriter, open_writer
from genvision.jobs.output import check_one_process
from genvision.jobs.output_queue import OutputQueue
from genvision.processes import choose_device
from genvision.progress import Progress
from genvision.tokenizers.base import content_hash, load_tokenizer

GRID_IMAGES = 64


def decode_encoded(
    encoded: Path,
    out: Path,
    *,
    tokenizer: Path,
    num: int | None = None,
    view: int = 0,
    batch_size: int = 32,
    rounding: Rounding = "trunc127.5",
    device: str | None = None,
) -> np.ndarray:
    """Decode images of an encoded data set into `out`: a folder of PNG files named by place in the set, `*.npz` or `*.png` (a grid).

    Args:
        num: so many, the classes in turn; all of them unless told (of a grid, about 64).
        view: which of an image's crops and flips, from 0.

    Returns:
        The places in the set of what was decoded, int64 [num].

    Raises:
        UserError: the codes are another tokenizer's or damaged, there is no such view, or `out` holds another job's results.
    """
    check_one_process("genvision decode")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    network = load_tokenizer(tokenizer).to(choose_device(device))
    tokenizer_hash = content_hash(network)
    data = EncodedDataset(encoded, expected_tokenizer_hash=tokenizer_hash)
    if not 0 <= view < data.num_views:
        raise UserError(f"view {view}: {data.path} holds {data.num_views} of every image; choose 0 .. {data.num_views - 1}")
    if num is None:
        num = _grid_size(data.labels) if out.suffix == ".png" else len(data)
    if not 1 <= num <= len(data):
        raise UserError(f"num {num}: {data.path} holds {len(data)} images; choose 1 .. {len(data)}")
    wanted = _Stored(data.labels, classes_in_turn(data.labels, num))
    job = {"encoded": data.fingerprint(), "tokenizer_hash": tokenizer_hash, "num": num, "view": view, "rounding": rounding}
    writer = open_writer(out, job, data.label_names, wanted)
    if isinstance(writer, FolderWriter):
        writer = _ByPlace(out, job, wanted, data.label_names)
    writer.prepare()
    chunks = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
    todo = [chunk for chunk in chunks if not writer.has(chunk)]
    progress = Progress(sum(map(len, todo)), "decode")
    with OutputQueue(writer, progress.advance) as queue:
        for chunk in todo:
            codes = data.codes(wanted.places[chunk.start : chunk.stop], np.full(len(chunk), view))
            with torch.inference_mode():
                images = network.decode(codes.to(network.device))
            queue.put(chunk, to_uint8(images, rounding))
    progress.close()
    writer.finish(chunks)
    return wanted.places


def classes_in_turn(labels: np.ndarray, num: int) -> np.ndarray:
    """Places int64 [num], rising, of images, equally many of each class as far as they go; of too many classes, some evenly spread."""
    by_class = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - np.repeat(first, counts)  # how many of its class stand before an image
    order = np.lexsort((labels, turn))
    num_classes = len(first)
    chosen = order[np.arange(num) * num_classes // num] if num < num_classes else order[:num]
    return np.sort(chosen)


class _Stored:
    """What the writers ask of a job: how many images, and their labels."""

    def __init__(self, labels: np.ndarray, places: np.ndarray) -> None:
        self.labels, self.places, self.num = labels, places, len(places)

    def labels_of(self, numbers: Sequence[int]) -> Tensor:
        """int64 [B] of the decoded images of these numbers, 0 .. num - 1."""
        return torch.from_numpy(self.labels[self.places[list(numbers)]])


class _ByPlace(FolderWriter):
    """Files named by the place of an image in the set, not by its number in the job."""

    request: _Stored

    def _path(self, index: int) -> Path:
        return self.out / f"{self.request.places[index]:06d}.png"


def _grid_size(labels: np.ndarray) -> int:
    """About GRID_IMAGES, and equally many of each class where the classes are few: then each has a row with its name."""
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) > GRID_IMAGES:
        return GRID_IMAGES
    return min(GRID_IMAGES, len(labels)) if len(counts) == 1 else len(counts) * min(GRID_IMAGES // len(counts), int(counts.min()))
