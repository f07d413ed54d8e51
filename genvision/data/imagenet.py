"""ILSVRC2012, the ImageNet of 1,000 classes, as it is handed out.

`imagenet:ROOT` reads ROOT/train/WNID/*.JPEG, `imagenet:ROOT:val` ROOT/val, in either of two forms: class folders, or the 50,000 images side
by side with their ground truth in a file. Kaggle's ROOT/ILSVRC/Data/CLS-LOC/{train,val} is found as well.

Labels are indices of the sorted WNIDs of the train folder (all of them: 0 is n01440764), which may be a subset; validation images of other
classes are then left out. Without a train folder the classes are those of the validation set itself.

Ground truth of flat validation images, looked for in ROOT and beside the images:
`LOC_val_solution.csv`, `val_labels.csv`, `val_labels.txt`   lines that begin with the name of an image and its WNID
`ILSVRC2012_devkit_t12/data` or the files in it             one number of 1 .. 1000 for each image; meta.mat says which WNID has it, and
                                                            this is not the order of sorted WNIDs
"""

import os
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from genvision.data.image_files import FolderSource, images_below, is_image, visible
from genvision.data.sources import one_line, path_and_part
from genvision.errors import UserError

K = TypeVar("K")
V = TypeVar("V")
WNID = re.compile(r"n\d{8}")
PLACES = (".", "ILSVRC/Data/CLS-LOC")
LABEL_FILES = ("LOC_val_solution.csv", "val_labels.csv", "val_labels.txt")
KIT_FOLDERS = (".", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12")
NUMBERS_FILE, META_FILE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


class ImageNetSource(FolderSource):
    """Training images by class and name, or validation images by name."""

    def __init__(self, spec: str, rest: str) -> None:
        self.spec = spec
        top, part = path_and_part(spec, rest, ("train", "val"))
        self.root = _find(top, part)
        names, wnids = _labelled_images(self.root, top, part)
        train = self.root if part == "train" else self.root.with_name("train")
        self.label_names = _class_folders(train) if train.is_dir() else sorted(set(wnids))
        index = {wnid: label for label, wnid in enumerate(self.label_names)}
        kept = [place for place, wnid in enumerate(wnids) if wnid in index]
        if not kept:
            raise UserError(f"{self.root}: none of its classes is among those of {train}; the two folders do not belong together")
        if len(kept) < len(names):
            left_out = f"{len(names) - len(kept):,} of {len(names):,} images are of classes that {train} lacks, and are left out"
            print(f"note: {spec}: {left_out}", file=sys.stderr, flush=True)
        self.labels = np.array([index[wnids[place]] for place in kept], dtype=np.int64)
        self._names = np.array([os.fsencode(names[place]) for place in kept])


def _find(top: Path, part: str) -> Path:
    for place in PLACES:
        if (top / place / part).is_dir():
            return top / place / part
    if top.is_dir() and any(WNID.fullmatch(entry.name) for entry in visible(top)):
        raise UserError(f"{top}: is the folder of the classes itself; give imagenet:{top.resolve().parent}, or folder:{top}")
    raise UserError(f"{top}: no folder {part} in it; expected {part}/n01440764/*.JPEG or ILSVRC/Data/CLS-LOC/{part}")


def _labelled_images(folder: Path, top: Path, part: str) -> tuple[list[str], list[str]]:
    """Names relative to the folder, and the WNID of each."""
    entries = visible(folder)
    flat = sorted(entry.name for entry in entries if is_image(entry))
    folders = any(entry.is_dir() for entry in entries)
    if flat and folders:
        mend = "put every image into the folder of its class" if part == "train" else "keep either form of the validation set"
        raise UserError(f"{folder}: holds images ({flat[0]}) beside sub-folders; {mend}")
    if flat and part == "train":
        raise UserError(f"{folder}: holds images ({flat[0]}), expected one folder of images for each WNID, such as n01440764")
    if flat:
        return flat, _ground_truth(flat, folder, top)
    names, wnids = [], []
    for wnid in _class_folders(folder):
        below = images_below(folder / wnid, wnid)
        if not below:
            what = f"{wnid}.tar is to be extracted into it" if (folder / f"{wnid}.tar").is_file() else "fill or remove it"
            raise UserError(f"{folder / wnid}: is the folder of a class but holds no images; {what}")
        names += below
        wnids += [wnid] * len(below)
    return names, wnids


def _class_folders(folder: Path) -> list[str]:
    """Sorted WNIDs."""
    entries = visible(folder)
    names = sorted(entry.name for entry in entries if entry.is_dir())
    others = [name for name in names if not WNID.fullmatch(name)]
    if others:
        raise UserError(f"{folder / others[0]}: its name is no WNID such as n01440764; for classes of other names give folder:{folder}")
    if not names:
        tars = sorted(entry.name for entry in entries if entry.name.endswith(".tar"))
        what = f"extract {tars[0]} and the like, each into a folder of its name" if tars else "expected n01440764/*.JPEG and the like"
        raise UserError(f"{folder}: no images in it; {what}")
    return names


def _ground_truth(images: list[str], folder: Path, top: Path) -> list[str]:
    """WNIDs of flat images."""
    for place in (top, folder.parent, folder):
        for name in LABEL_FILES:
            if (place / name).is_file():
                return _from_list(images, place / name)
        for kit in KIT_FOLDERS:
            if (place / kit / NUMBERS_FILE).is_file():
                return _from_kit(images, place / kit / NUMBERS_FILE, place / kit / META_FILE)
    raise UserError(
        f"{folder}: no ground truth for its images; put the extracted development kit (ILSVRC2012_devkit_t12) "
        f"or Kaggle's {LABEL_FILES[0]} into {top}"
    )


def _from_list(images: list[str], file: Path) -> list[str]:
    """Lines such as `ILSVRC2012_val_00000001.JPEG n01751748` or `ILSVRC2012_val_00000001,n01751748 1 2 3 4`."""
    wnid_of: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name, *rest = re.split(r"[,;\s]+", line.strip())
        if rest and WNID.fullmatch(rest[0]):
            wnid_of[Path(name).stem] = rest[0]
        elif name and number > 1:  # the first line may be a title
            raise UserError(f"{file}: line {number} is '{line[:60]}', expected the name of an image and a WNID such as n01440764")
    return [_looked_up(wnid_of, Path(image).stem, image, file) for image in images]


def _from_kit(images: list[str], numbers_file: Path, meta_file: Path) -> list[str]:
    if not meta_file.is_file():
        raise UserError(f"{meta_file}: is missing, but {numbers_file.name} counts classes in its order; take it from the development kit")
    wnid_of = _read_meta(meta_file)
    try:
        numbers = [int(line) for line in numbers_file.read_text().split()]
    except ValueError as error:
        raise UserError(f"{numbers_file}: cannot be read ({one_line(error)}); expected one number of a class on each line") from error
    truth = {f"ILSVRC2012_val_{place:08d}": number for place, number in enumerate(numbers, start=1)}
    found = [_looked_up(truth, Path(image).stem, image, numbers_file) for image in images]
    return [_looked_up(wnid_of, number, f"class {number}", meta_file) for number in found]


def _looked_up(table: Mapping[K, V], key: K, what: str, file: Path) -> V:
    if key not in table:
        raise UserError(f"{file}: says nothing of {what} ({len(table):,} entries); take both from the same data set")
    return table[key]


def _read_meta(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID to WNID."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"])
        return {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
    except (MatReadError, zlib.error, OSError, EOFError, KeyError, IndexError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{path}: cannot be read as the kit's meta.mat ({one_line(error)}); take it from the development kit again"
        ) from error
