"""Files of reference statistics: ADM's and MAR's npz, EDM2's pickles, and our own.

ADM's `VIRTUAL_imagenet*_labeled.npz`   mu, sigma (2048), mu_s, sigma_s (2023), and 10,000 images in arr_0
MAR's `adm_in256_stats.npz`             mu, sigma
EDM2's `img512.pkl`, `img64.pkl`        {"fid": {"mu", "sigma"}, "fd_dinov2": {...}}, read without running anything in them
`genvision statistics`                  NAME.safetensors with all statistics and their provenance

Statistics have the names of the rows that they are of (genvision.eval.measurement): pool, spatial, dinov2. Everything becomes float64.
"""

import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genvision.data.npz import NpzSource
from genvision.data.safe_pickle import load_pickle
from genvision.data.sources import ImageSource, file_hash, open_source
from genvision.errors import UserError
from genvision.eval.moments import Gaussian
from genvision.training.state import sync

NPZ_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
PICKLE_KEYS = {"fid": "pool", "fd_dinov2": "dinov2"}
SCHEMA = "genvision.statistics/1"


@dataclass(frozen=True, kw_only=True)
class ReferenceFile:
    """Statistics that somebody has measured, and perhaps images."""

    path: Path
    content_hash: str
    """sha256 of the file."""
    statistics: dict[str, Gaussian] = field(repr=False)
    images: ImageSource | None = field(repr=False, default=None)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the file says of itself: protocol, extractor hashes, image size, data; empty for files of other codes."""


def open_reference(spec: str) -> ReferenceFile | ImageSource:
    """A file of statistics, or else a set of images.

    Raises:
        UserError: there is no such file or data, or it is damaged, or its arrays are not what they should be.
    """
    path = Path(spec.removeprefix("npz:")).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, spec)
    if path.suffix in (".safetensors", ".pkl"):
        if not path.is_file():
            raise UserError(f"{path}: no such file; give statistics or images")
        return _open_own(path) if path.suffix == ".safetensors" else _open_pickle(path)
    return open_source(spec)


def write_statistics(path: Path, statistics: Mapping[str, Gaussian], facts: Mapping[str, Any]) -> None:
    """Write a file that `open_reference` reads; no half-written file ever bears the name `path`.

    Args:
        statistics: name of rows to their mean and covariance, each with a count.
        facts: plain values.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, gaussian in statistics.items():
        arrays |= {f"{name}/mu": gaussian.mu, f"{name}/sigma": gaussian.sigma, f"{name}/count": np.array([gaussian.count or 0])}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(
        save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"schema": SCHEMA, "facts": json.dumps(facts)})
    )
    sync(part)
    part.replace(path)


def _open_npz(path: Path, spec: str) -> ReferenceFile | ImageSource:
    """Statistics if there are any; an npz of images alone is an ordinary set."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "mu" not in names and "sigma" not in names:
            if "arr_0" not in names:
                raise UserError(f"{path}: has {', '.join(names) or 'nothing'}; expected statistics mu and sigma, or images under arr_0")
            return NpzSource(spec, str(path))
        with np.load(path) as file:
            arrays = {key: file[key] for pair in NPZ_KEYS.values() for key in pair if key in names}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not an npz file, or damaged ({_one_line(error)}); download or copy it again") from error
    statistics = {}
    for name, (mu, sigma) in NPZ_KEYS.items():
        if (mu in arrays) != (sigma in arrays):
            there, missing = (mu, sigma) if mu in arrays else (sigma, mu)
            raise UserError(f"{path}: has {there} but no {missing}; expected both; download or write it again")
        if mu in arrays:
            statistics[name] = _gaussian(path, mu, arrays[mu], arrays[sigma], None)
    images = NpzSource(spec, str(path)) if "arr_0" in names else None
    return ReferenceFile(path=path, content_hash=file_hash(path), statistics=statistics, images=images)


def _open_own(path: Path) -> ReferenceFile:
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a file of statistics, or damaged ({_one_line(error)}); write it again with genvision statistics"
        ) from error
    if facts.get("schema") != SCHEMA:
        raise UserError(f"{path}: is no '{SCHEMA}' but {facts.get('schema') or 'something else'}; write it with genvision statistics")
    names = sorted({name.partition("/")[0] for name in arrays})
    statistics = {
        name: _gaussian(path, name, arrays[f"{name}/mu"], arrays[f"{name}/sigma"], int(arrays[f"{name}/count"][0]) or None)
        for name in names
    }
    return ReferenceFile(path=path, content_hash=file_hash(path), statistics=statistics, facts=json.loads(facts["facts"]))


def _open_pickle(path: Path) -> ReferenceFile:
    try:
        content = load_pickle(path)
        entries = {key: content[key] for key in PICKLE_KEYS if key in content}
        arrays = {PICKLE_KEYS[key]: (_array_of(entry["mu"]), _array_of(entry["sigma"])) for key, entry in entries.items()}
    except (pickle.UnpicklingError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not EDM2's statistics ({_one_line(error)}); expected NumPy arrays as {{'fid': {{'mu': ..., 'sigma': ...}}}}"
        ) from error
    if not arrays:
        raise UserError(f"{path}: holds {', '.join(map(str, content)) or 'nothing'}; expected statistics under fid or fd_dinov2")
    count = content.get("num_images")
    statistics = {
        name: _gaussian(path, name, mu, sigma, count if isinstance(count, int) and count > 0 else None)
        for name, (mu, sigma) in arrays.items()
    }
    return ReferenceFile(path=path, content_hash=file_hash(path), statistics=statistics)


def _gaussian(path: Path, name: str, mu: np.ndarray, sigma: np.ndarray, count: int | None) -> Gaussian:
    for which, array in ((name, mu), (f"covariance of {name}", sigma)):
        if array.dtype not in (np.float32, np.float64):
            raise UserError(f"{path}: {which} is {array.dtype}, expected float32 or float64; download or write it again")
    try:
        return Gaussian(mu.astype(np.float64), sigma.astype(np.float64), count).check()
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from error


def _array_of(entry: Any) -> np.ndarray:
    if not isinstance(entry, np.ndarray):
        raise ValueError("its entries are no NumPy arrays")
    return entry


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
