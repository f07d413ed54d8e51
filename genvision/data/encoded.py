"""Encoded data sets: the codes of every image and its views, computed once and memory-mapped in training.

A folder holds `codes-00000.npy` (unsigned [n, V, *code_shape], all V views of an image together), `labels-00000.npy`
(int64 [n]) and so on, and `index.json`, which is written last: a folder without it is not finished. While a job runs,
`job.json` says what it makes, and a `shard-00000.json` beside a shard says that the shard is whole.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from genvision import __version__
from genvision.data.datasets import BadImages, Batch, OrderedBatches
from genvision.data.order import uniform_choice
from genvision.data.sources import ImageSource, OnBadImage
from genvision.data.transforms import ViewConfig
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.progress import Progress

FORMAT_VERSION = 1


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def spec(self) -> Any: ...

    @property
    def device(self) -> Any: ...

    def encode(self, images: Tensor) -> Tensor: ...


def encode_dataset(
    tokenizer: Encoder,
    source: ImageSource,
    out_dir: str | Path,
    *,
    image_size: int,
    tokenizer_hash: str,
    crops: Literal["center", "ten"] = "center",
    flip: bool = True,
    enlarge: float = 1.1,
    batch_size: int = 64,
    num_workers: int = 0,
    on_bad_image: OnBadImage = "stop",
    shard_size: int = 8192,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Encode every image of `source` into `out_dir`; run again after an interruption, it goes on after the finished shards.

    Args:
        crops, flip, enlarge: the views, see ViewConfig; centre crop and flip make 2, ten crops 10.
        batch_size: views that the tokenizer is given at once (at least those of one image).
        shard_size: images in a shard; what an interruption can cost. Every open shard takes a file handle in training.
        rank, world_size, barrier: each process takes every `world_size`-th shard; `barrier` waits for all of them.

    Returns:
        The index, on every process.

    Raises:
        UserError: the folder holds something else, the tokenizer is continuous, or an image cannot be read.
    """
    if tokenizer.spec.codebook_size is None:
        raise UserError(
            "the tokenizer makes continuous latents; an encoded data set holds discrete codes, give a tokenizer with a codebook"
        )
    views = ViewConfig(crops=crops, flip=flip, enlarge=enlarge)
    folder = Path(out_dir)
    job = {
        "format_version": FORMAT_VERSION,
        "kind": "codes",
        "tokenizer_hash": tokenizer_hash,
        "codebook_size": tokenizer.spec.codebook_size,
        "image_size": image_size,
        "crops": crops,
        "flip": flip,
        "enlarge": enlarge if crops == "ten" else None,
        "views": views.num_views,
        "num_source_images": len(source),
        "source_fingerprint": source.fingerprint(),
        "shard_size": shard_size,
    }
    _check_folder(folder, job)
    if (folder / "index.json").is_file():
        return EncodedDataset(folder).index
    if rank == 0:
        _begin(folder, job)
    barrier()
    num_shards = -(-len(source) // shard_size)
    mine = range(rank, num_shards, world_size)
    todo = [shard for shard in mine if not _is_finished(folder, shard, on_bad_image)]
    done = sum(_shard_length(shard, job) for shard in mine if shard not in todo)
    progress = Progress(done + sum(_shard_length(shard, job) for shard in todo), "encode", start=done, show=rank == 0)
    per_batch = max(1, batch_size // views.num_views)
    chunks = {shard: _chunks(shard * shard_size, _shard_length(shard, job), per_batch) for shard in todo}
    stream = OrderedBatches(
        source, image_size, [c for parts in chunks.values() for c in parts], views=views, num_workers=num_workers, on_bad_image=on_bad_image
    )
    encoded = _encode_batches(tokenizer, stream, progress)
    try:
        for shard, parts in chunks.items():
            before = set(stream.bad_images)
            pairs = [next(encoded) for _ in parts]
            bad = {index: why for index, why in stream.bad_images.items() if index not in before}
            _write_shard(folder, shard, pairs, tokenizer.spec.codebook_size, bad)
    finally:
        encoded.close()
        progress.close()
    barrier()
    if rank == 0:
        _write_index(folder, job, num_shards, source)
    barrier()
    return EncodedDataset(folder).index


class EncodedDataset:
    """An encoded data set, opened for training.

    Args:
        expected_tokenizer_hash: refuse codes of any other tokenizer.
        seed: which view of an image is taken at a position depends on this and the position alone.

    Raises:
        UserError: it is not finished, is damaged, or was made by another tokenizer.
    """

    def __init__(self, path: str | Path, expected_tokenizer_hash: str | None = None, *, seed: int = 0) -> None:
        self.path, self.seed = Path(path).expanduser(), seed
        self.index = _read_index(self.path)
        made_by: str = self.index["tokenizer_hash"]
        if expected_tokenizer_hash is not None and made_by != expected_tokenizer_hash:
            raise UserError(
                f"{self.path}: its codes were made by tokenizer {made_by[:12]}, not by the given one ({expected_tokenizer_hash[:12]}); "
                "give that tokenizer, or run genvision encode again with this one into another folder"
            )
        self.code_shape: tuple[int, ...] = tuple(self.index["code_shape"])
        self.codebook_size: int = self.index["codebook_size"]
        self.num_views: int = self.index["views"]
        self.label_names: list[str] = self.index["label_names"]
        self.bad_images: BadImages = {}
        self._open()
        self.labels: np.ndarray = np.concatenate([self._read_labels(shard) for shard in self.index["shards"]])
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            low, high = self.labels.min(), self.labels.max()
            raise UserError(f"{self.path}: labels go from {low} to {high}, its index names {self.num_classes} classes; encode again")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    def fingerprint(self) -> str:
        """sha256 that changes with the images, the views and the tokenizer."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    def views(self, index: int) -> Tensor:
        """All views of one image, int64 [V, *code_shape]."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return torch.from_numpy(self._shards[shard][index - self._starts[shard]].astype(np.int64))

    def get(self, position: int, index: int) -> Batch:
        """One sample: `codes` int64 [*code_shape], `labels` and `positions` int64 []."""
        return {key: value[0] for key, value in self.get_batch(np.array([position]), np.array([index])).items()}

    def get_batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """`codes` int64 [B, *code_shape] of one view each, `labels` and `positions` int64 [B]."""
        indices = np.asarray(indices)
        view = uniform_choice(self.seed, positions, self.num_views)
        shards = np.searchsorted(self._ends, indices, side="right")
        codes = np.empty((len(indices), *self.code_shape), dtype=np.int64)
        for shard in np.unique(shards):
            rows = shards == shard
            codes[rows] = self._shards[shard][indices[rows] - self._starts[shard], view[rows]]
        labels = torch.from_numpy(self.labels[indices])
        return {"codes": torch.from_numpy(codes), "labels": labels, "positions": torch.from_numpy(np.array(positions, dtype=np.int64))}

    def _open(self) -> None:
        counts = np.array([shard["count"] for shard in self.index["shards"]], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        dtype = _code_dtype(self.codebook_size)
        self._shards = [
            _open_array(self.path / shard["codes"], (shard["count"], self.num_views, *self.code_shape), dtype)
            for shard in self.index["shards"]
        ]

    def _read_labels(self, shard: dict[str, Any]) -> np.ndarray:
        return np.array(_open_array(self.path / shard["labels"], (shard["count"],), np.dtype(np.int64)))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _check_folder(folder: Path, job: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this job."""
    started = folder / "job.json"
    if started.is_file():
        try:
            old = json.loads(started.read_text())
        except ValueError as error:
            raise UserError(f"{started}: cannot be read; delete {folder} and encode again") from error
        for key, value in job.items():
            if old.get(key) != value:
                raise UserError(
                    f"{folder}: was begun with {key} {_short(old.get(key))}, now it is {_short(value)}; "
                    "choose another folder, or delete this one to encode again"
                )
    elif folder.exists() and (not folder.is_dir() or any(_is_foreign(path.name) for path in folder.iterdir())):
        raise UserError(f"{folder}: is not empty and holds no encoded data; choose another folder")


def _is_foreign(name: str) -> bool:
    # another process of the same job may be writing job.json just now
    return name != "job.json" and not name.startswith(".")


def _begin(folder: Path, job: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()
    if not (folder / "job.json").is_file():
        _write(folder / "job.json", lambda file: file.write(_json(job)))


def _is_finished(folder: Path, shard: int, on_bad_image: OnBadImage) -> bool:
    note = folder / f"shard-{shard:05d}.json"
    # a shard that lacks images is made again when none may be skipped any more
    return note.is_file() and (on_bad_image == "skip" or not json.loads(note.read_text())["bad_images"])


def _shard_length(shard: int, job: dict[str, Any]) -> int:
    return int(min(job["shard_size"], job["num_source_images"] - shard * job["shard_size"]))


def _chunks(first: int, length: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, first + length)) for start in range(first, first + length, size)]


def _encode_batches(tokenizer: Encoder, stream: OrderedBatches, progress: Progress) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """(codes [B, V, *code_shape], labels [B]) of every chunk of the stream."""
    for chunk, batch in zip(stream.chunks, stream, strict=True):
        images = batch["images"]  # [B, V, H, W, 3]
        num, views = images.shape[:2]
        codes = np.empty((0, views), dtype=np.int64)
        if num:
            with torch.inference_mode():
                flat = tokenizer.encode(from_uint8(images.reshape(num * views, *images.shape[2:])).to(tokenizer.device))
            codes = flat.cpu().numpy().reshape(num, views, *flat.shape[1:])
        progress.advance(len(chunk))
        yield codes, batch["labels"]


def _write_shard(folder: Path, shard: int, pairs: list[tuple[np.ndarray, np.ndarray]], codebook_size: int, bad: BadImages) -> None:
    filled = [codes for codes, _ in pairs if len(codes)]
    codes = np.concatenate(filled) if filled else np.empty((0, 0), dtype=np.int64)
    labels = np.concatenate([labels for _, labels in pairs]).astype(np.int64)
    assert not codes.size or (codes.min() >= 0 and codes.max() < codebook_size), "the tokenizer made a code outside its codebook"
    names = {"codes": f"codes-{shard:05d}.npy", "labels": f"labels-{shard:05d}.npy"}
    _write(folder / names["codes"], lambda file: np.save(file, codes.astype(_code_dtype(codebook_size))))
    _write(folder / names["labels"], lambda file: np.save(file, labels))
    note = {
        **names,
        "count": len(codes),
        "code_shape": list(codes.shape[2:]),
        "bad_images": {str(index): why for index, why in bad.items()},
    }
    _write(folder / f"shard-{shard:05d}.json", lambda file: file.write(_json(note)))


def _write_index(folder: Path, job: dict[str, Any], num_shards: int, source: ImageSource) -> None:
    notes = [json.loads((folder / f"shard-{shard:05d}.json").read_text()) for shard in range(num_shards)]
    filled = [note for note in notes if note["count"]]
    if not filled:
        raise UserError(f"{source.spec}: not one of its {len(source)} images can be read; check the files")
    code_shape = filled[0]["code_shape"]
    assert all(note["code_shape"] == code_shape for note in filled), "the tokenizer made codes of several shapes"
    index = {
        **job,
        "code_shape": code_shape,
        "num_images": sum(note["count"] for note in filled),
        "label_names": source.label_names,
        "source": source.spec,
        "genvision": __version__,
        "shards": [{key: note[key] for key in ("codes", "labels", "count")} for note in filled],
        "bad_images": {index: why for note in notes for index, why in note["bad_images"].items()},
    }
    _write(folder / "index.json", lambda file: file.write(_json(index)))
    for shard in range(num_shards):
        (folder / f"shard-{shard:05d}.json").unlink()


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    if not file.is_file():
        if (folder / "job.json").is_file():
            raise UserError(
                f"{folder}: its encoding is not finished; run the same genvision encode command again, it goes on where it stopped"
            )
        raise UserError(f"{folder}: no encoded data here (index.json is missing); make it with genvision encode --out {folder}")
    try:
        index: dict[str, Any] = json.loads(file.read_text())
        version, kind = index["format_version"], index["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not the index of encoded data ({error}); encode again into another folder") from error
    if (version, kind) != (FORMAT_VERSION, "codes"):
        raise UserError(f"{file}: holds {kind} in format {version}, this genvision reads codes in format {FORMAT_VERSION}; encode again")
    return index


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: is missing, but index.json lists it; restore it, or delete the folder and encode again")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path}: is damaged ({' '.join(str(error).split())}); restore it, or delete the folder and encode again"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path}: is {array.dtype} {list(array.shape)}, index.json says {dtype} {list(shape)}; delete the folder and encode again"
        )
    return array


def _code_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest kind of number that holds every code."""
    return np.dtype(np.uint8 if codebook_size <= 1 << 8 else np.uint16 if codebook_size <= 1 << 16 else np.int32)


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file that is whole or not there: another name, sync, rename, sync the folder."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _short(value: Any) -> Any:
    """Hashes are told apart by their beginning."""
    return value[:12] if isinstance(value, str) else value
