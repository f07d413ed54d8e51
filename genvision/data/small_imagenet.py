"""Downsampled ImageNet at 32 x 32 or 64 x 64 pixels: two data sets of one name.

With labels (Chrabaszcz et al., arXiv:1707.08819), whole images squeezed to a square: `train_data_batch_1` .. `_10` and `val_data`, pickles
or npz, in the folder given or in folders inside it. A row is all red values, then green, then blue; the mean image is not read. Labels
are 1 .. 1000 in the order of the development kit's map_clsloc.txt (1 is n02119789, kit fox). With that file beside the data they become
indices of sorted WNIDs, as ImageNet folders and most checkpoints have them (0 is n01440764, tench); without it they stay in that order.

Without labels (van den Oord et al., arXiv:1601.06759), for likelihoods: PNG folders `train_32x32` and `valid_32x32`, `imgnet_32x32.npz`
(trainx, testx), or `imagenet32-train.npy` and `imagenet32-valid.npy`, [N, 3, 32, 32] or [N, 32, 32, 3]. One class. Bits/dim in the
literature are of this set; they are lower on the other one, and not comparable.

A part of the spec is `train`, or `val` for the validation images. Pickles, npy and uncompressed npz are memory-mapped; a compressed npz
is unpacked into memory (np.savez writes it as it should be).
"""

import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np

from genvision.data.image_arrays import ArrayFile, ArraySource, interleaved, planes
from genvision.data.image_files import FolderSource
from genvision.data.npz import DAMAGED_NPZ, open_member
from genvision.data.pickled_batches import check_range, checked_images, checked_labels, open_batch
from genvision.data.sources import ImageSource, one_line, path_and_part
from genvision.errors import UserError

NUM_CLASSES = 1000
NUM_TRAIN_FILES = 10
MAP_FILE = "map_clsloc.txt"


def open_small_imagenet(spec: str, rest: str) -> ImageSource:
    """The images that `imagenet32:PATH`, `imagenet64:PATH` or the same with `:val` names, of whichever of the two data sets lies there.

    Raises:
        UserError: neither is there, both are, or a file is damaged.
    """
    size = int(spec.partition(":")[0].removeprefix("imagenet"))
    folder, part = path_and_part(spec, rest, ("train", "val"))
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give {spec.partition(':')[0]}:DIR of the folder that holds the data")
    labelled, unlabelled = _find_labelled(folder, part), _find_unlabelled(folder, part, size)
    if labelled and unlabelled:
        raise UserError(f"{folder}: holds {labelled[0].name} (with labels) and {unlabelled.name} (without); put them into two folders")
    if labelled:
        return LabelledSmallImageNet(spec, labelled, size)
    if unlabelled is None:
        raise UserError(
            f"{folder}: no {part} images of {size} x {size} in it; expected {'train_data_batch_1' if part == 'train' else 'val_data'} "
            f"(with labels), or {'train' if part == 'train' else 'valid'}_{size}x{size}, imgnet_{size}x{size}.npz, "
            f"imagenet{size}-{'train' if part == 'train' else 'valid'}.npy (without)"
        )
    if unlabelled.is_dir():
        return FolderSource(spec, str(unlabelled))
    return _open_unlabelled(spec, unlabelled, part, size)


class LabelledSmallImageNet(ArraySource):
    """Chrabaszcz et al.'s images, in the order of the files (which is shuffled)."""

    def __init__(self, spec: str, paths: list[Path], size: int) -> None:
        opened = [_open_npz(path, size) if path.suffix == ".npz" else open_batch(path, size, "labels", _sibling(size)) for path in paths]
        for path, (_, labels) in zip(paths, opened, strict=True):
            check_range(f"{path}:", labels, 1, NUM_CLASSES)
        labels = np.concatenate([labels for _, labels in opened]) - 1
        map_file = next((folder / MAP_FILE for folder in (paths[0].parent, paths[0].parent.parent) if (folder / MAP_FILE).is_file()), None)
        if map_file is None:
            names = [f"clsloc {number}" for number in range(1, NUM_CLASSES + 1)]
            print(
                f"note: {spec}: labels stay in the order of {MAP_FILE} (0 is n02119789), not of sorted WNIDs as checkpoints have them; "
                f"put that file beside {paths[0].name} to have them sorted",
                file=sys.stderr,
                flush=True,
            )
        else:
            wnids = _read_map(map_file)
            names = sorted(wnids)
            labels = np.searchsorted(names, wnids)[labels]
        super().__init__(spec, [file for file, _ in opened], labels, names)


def _find_labelled(folder: Path, part: str) -> list[Path]:
    """Files of Chrabaszcz et al. in the folder or one below, in the order of their numbers."""
    pattern = re.compile(r"train_data_batch_(\d+)(\.npz)?" if part == "train" else r"val_data()(\.npz)?")
    # the folders of the other data set hold more than a million names
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not re.fullmatch(r"(train|valid)_\d+x\d+", entry.name))
    by_number: dict[int, Path] = {}
    for path in (path for place in (folder, *inside) for path in sorted(place.iterdir())):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        number = int(match[1] or 0)
        if number in by_number:
            raise UserError(f"{path}: is there twice, also as {by_number[number]}; keep one of the two")
        by_number[number] = path
    if part == "val":
        return list(by_number.values())
    numbers = sorted(by_number)
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    if missing:
        raise UserError(f"{folder}: train_data_batch_{missing[0]} is missing; download the data set again, or extract all of its archives")
    if numbers and len(numbers) < NUM_TRAIN_FILES:
        print(f"warning: {folder}: holds {len(numbers)} of the {NUM_TRAIN_FILES} training files", file=sys.stderr, flush=True)
    return [by_number[number] for number in numbers]


def _open_npz(path: Path, size: int) -> tuple[ArrayFile, np.ndarray]:
    open_data = partial(open_member, path, "data.npy")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = file["labels"]
        images = open_data()
    except DAMAGED_NPZ as error:
        raise UserError(f"{path}: cannot be read as an npz with data and labels ({one_line(error)}); download it again") from error
    checked_images(f"{path}: data", images, size, _sibling(size))
    labels = checked_labels(f"{path}: labels", stored, len(images))
    return ArrayFile(path, images, open_data, partial(planes, size)), labels


def _read_map(path: Path) -> list[str]:
    """WNIDs in the order of their numbers; lines such as `n02119789 1 kit_fox`."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        wnids = {int(number): wnid for wnid, number, *_ in rows}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected lines such as 'n02119789 1 kit_fox'") from error
    if sorted(wnids) != list(range(1, NUM_CLASSES + 1)) or len(set(wnids.values())) != NUM_CLASSES:
        raise UserError(
            f"{path}: has {len(rows)} lines, expected one for each of the numbers 1 to {NUM_CLASSES}; take it from the development kit"
        )
    return [wnids[number] for number in sorted(wnids)]


def _find_unlabelled(folder: Path, part: str, size: int) -> Path | None:
    name = "train" if part == "train" else "valid"
    names = (f"{name}_{size}x{size}", f"imgnet_{size}x{size}.npz", f"imagenet{size}-{name}.npy")
    found = [folder / name for name in names if (folder / name).exists()]
    return found[0] if found else None


def _open_unlabelled(spec: str, path: Path, part: str, size: int) -> ArraySource:
    key = "trainx" if part == "train" else "testx"
    whole_file = partial(np.load, path, mmap_mode="r", allow_pickle=False)
    open_array = partial(open_member, path, f"{key}.npy") if path.suffix == ".npz" else whole_file
    try:
        images = open_array()
    except DAMAGED_NPZ as error:
        raise UserError(f"{path}: cannot be read as an array of images ({one_line(error)}); download it again") from error
    flat = planes if size == 32 else interleaved  # as the dumps for distribution augmentation (Jun et al., 2020) were written
    arrange = {(size, size, 3): interleaved, (3, size, size): planes, (3 * size * size,): flat}.get(images.shape[1:])
    if images.dtype != np.uint8 or not images.size or arrange is None:
        found = f"{path}: is {images.dtype} {list(images.shape)}"
        other, kind = _sibling(size)
        mend = f"; give {kind}" if math.prod(images.shape[1:]) == 3 * other * other else ""
        raise UserError(f"{found}, expected uint8 [N, {size}, {size}, 3] or [N, 3, {size}, {size}]{mend}")
    files = [ArrayFile(path, images, open_array, partial(arrange, size))]
    return ArraySource(spec, files, np.zeros(len(images), dtype=np.int64), [f"{'train' if part == 'train' else 'valid'}_{size}x{size}"])


def _sibling(size: int) -> tuple[int, str]:
    """The other size, and the kind of data that has it."""
    return 96 - size, f"imagenet{96 - size}:"
