"""Pickled batches of images (CIFAR, downsampled ImageNet): a dictionary of data uint8 [N, D], labels, and more that is not read."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genvision.data.image_arrays import ArrayFile, planes
from genvision.data.safe_pickle import load_pickle
from genvision.data.sources import one_line
from genvision.errors import UserError


def open_batch(path: Path, size: int, label_key: str, sibling: tuple[int, str] | None = None) -> tuple[ArrayFile, np.ndarray]:
    """Images of `size` x `size` pixels, each a row of all red values, then green, then blue; and their labels int64 [N] as they stand.

    Args:
        sibling: see checked_images.

    Raises:
        UserError: the file is missing, damaged or of another content, or its pickle wants to run something.
    """
    content = read_dictionary(path)
    for key in ("data", label_key):
        if key not in content:
            raise UserError(f"{path}: has no {key} but {', '.join(map(str, content))}; expected data and {label_key}")
    images = checked_images(f"{path}: data", content["data"], size, sibling)
    labels = checked_labels(f"{path}: {label_key}", content[label_key], len(images))
    return ArrayFile(path, images, partial(_data, path), partial(planes, size)), labels


def read_dictionary(path: Path) -> dict[str, Any]:
    """A pickled dictionary, read without running anything in it.

    Raises:
        UserError: see open_batch.
    """
    try:
        content = load_pickle(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; download the data set again, or extract all of its archive") from error
    except (pickle.UnpicklingError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a pickle of arrays ({one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, expected a dictionary with data and labels")
    return content


def checked_images(where: str, images: Any, size: int, sibling: tuple[int, str] | None = None) -> np.ndarray:
    """uint8 [N, 3 * size * size].

    Args:
        sibling: another size, and the kind of data that has it.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(images, np.ndarray):
        raise UserError(f"{where} is {type(images).__name__}, expected an array uint8 [N, {3 * size * size}]")
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * size * size or not len(images):
        expected = f"uint8 [N, {3 * size * size}] ({size} x {size} pixels)"
        mend = f"; give {sibling[1]}" if sibling is not None and images.shape[1:] == (3 * sibling[0] ** 2,) else ""
        raise UserError(f"{where} is {images.dtype} {list(images.shape)}, expected {expected}{mend}")
    return images


def checked_labels(where: str, labels: Any, num: int) -> np.ndarray:
    """int64 [num].

    Raises:
        UserError: they are no whole numbers, or more or fewer.
    """
    try:
        array = np.asarray(labels)
    except ValueError as error:  # a list of unequal lists
        raise UserError(f"{where} is no list of numbers; expected {num} whole numbers") from error
    if array.shape != (num,) or array.dtype.kind not in "iu":
        raise UserError(f"{where} is {array.dtype} {list(array.shape)}, expected {num} whole numbers, one for each image")
    return array.astype(np.int64)


def check_range(where: str, labels: np.ndarray, lowest: int, highest: int) -> None:
    """Whether all labels are what the data set may have.

    Raises:
        UserError: one is not.
    """
    wrong = labels[(labels < lowest) | (labels > highest)]
    if len(wrong):
        raise UserError(f"{where} has the label {wrong[0]}, expected {lowest} to {highest}; download it again")


def _data(path: Path) -> np.ndarray:
    data: np.ndarray = read_dictionary(path)["data"]
    return data
