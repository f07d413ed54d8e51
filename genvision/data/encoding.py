"""Writing an encoded data set: every view of every image through a tokenizer, shard by shard, in the memory of one batch.

The folder is described in `genvision.data.encoded`. Whatever ends a job, the next one goes on after the finished shards.

Shapes: images [B, V, H, W, 3] of B images with V views; codes [B, V, *code_shape].
"""

import itertools
import json
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from genvision import __version__
from genvision.data.array_files import GrowingArray, write_json, write_whole
from genvision.data.code_storage import choose_storage, code_dtype, store_again
from genvision.data.datasets import BadImages, OrderedBatches
from genvision.data.encoded import FORMAT_VERSION, EncodedDataset, open_shard
from genvision.data.sources import BadImageError, ImageSource, OnBadImage
from genvision.data.transforms import ViewConfig
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.progress import Progress

LatentDtype = Literal["float32", "float16"]
Storage = Literal["auto", "bytes"]
_UNSAID = {"storage": "auto"}
"""What jobs mean that were begun before there was a choice."""


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
    dtype: LatentDtype = "float32",
    storage: Storage = "auto",
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
        dtype: of stored latents; float32 keeps every bit, float16 halves the space. Codes are whole numbers whatever it says.
        storage: of codes. `auto` takes one byte each where at most 256 occur in the set; `bytes` also where at most 510 do, as SeiT's
            byte stream, which is a little slower to read.
        batch_size: views that the tokenizer is given at once (at least those of one image).
        shard_size: images in a shard; what an interruption can cost. Every open shard takes a file handle in training.
        rank, world_size, barrier: each process takes every `world_size`-th shard; `barrier` waits for all of them.

    Returns:
        The index, on every process.

    Raises:
        UserError: the folder holds something else, an option does not fit the tokenizer, an image cannot be read, or its latents are NaN.
    """
    views = ViewConfig(crops=crops, flip=flip, enlarge=enlarge)
    folder = Path(out_dir)
    job = {
        "format_version": FORMAT_VERSION,
        **_kind(tokenizer.spec.codebook_size, dtype, storage),
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
        index = EncodedDataset(folder).index
        if rank == 0:
            _clean(folder, index)
        return index
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
    encoded = _encode_batches(tokenizer, stream, source, job, progress)
    try:
        for shard, parts in chunks.items():
            before = set(stream.bad_images)
            note = _write_arrays(folder, shard, itertools.islice(encoded, len(parts)), job)
            bad = {str(index): why for index, why in stream.bad_images.items() if index not in before}
            write_json(_note_file(folder, shard), {**note, "bad_images": bad})
    finally:
        encoded.close()
        progress.close()
    barrier()
    if rank == 0:
        index = _make_index(folder, job, num_shards, source)
        write_json(folder / "index.json", index)
        _clean(folder, index)
    barrier()
    return EncodedDataset(folder).index


def _kind(codebook_size: int | None, dtype: str, storage: str) -> dict[str, Any]:
    """The part of a job that says what is stored."""
    for name, value, choices in (("dtype", dtype, get_args(LatentDtype)), ("storage", storage, get_args(Storage))):
        if value not in choices:
            raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(choices)}")
    if codebook_size is None:
        if storage != "auto":
            raise UserError(f"storage {storage} is for discrete codes, but the tokenizer makes continuous latents; leave it at auto")
        return {"kind": "latents", "dtype": dtype}
    if dtype != "float32":
        raise UserError(f"dtype {dtype} is for continuous latents, but the tokenizer makes discrete codes; leave it at float32")
    return {"kind": "codes", "storage": storage}


def _check_folder(folder: Path, job: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this job."""
    started = folder / "job.json"
    if started.is_file():
        try:
            old = json.loads(started.read_text())
        except ValueError as error:
            raise UserError(f"{started}: cannot be read; delete {folder} and encode again") from error
        for key, value in job.items():
            before = old.get(key, _UNSAID.get(key))
            if before != value:
                raise UserError(
                    f"{folder}: was begun with {key} {_short(before)}, now it is {_short(value)}; "
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
        write_json(folder / "job.json", job)


def _note_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.json"


def _is_finished(folder: Path, shard: int, on_bad_image: OnBadImage) -> bool:
    note = _note_file(folder, shard)
    # a shard that lacks images is made again when none may be skipped any more
    return note.is_file() and (on_bad_image == "skip" or not json.loads(note.read_text())["bad_images"])


def _shard_length(shard: int, job: dict[str, Any]) -> int:
    return int(min(job["shard_size"], job["num_source_images"] - shard * job["shard_size"]))


def _chunks(first: int, length: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, first + length)) for start in range(first, first + length, size)]


def _encode_batches(
    tokenizer: Encoder, stream: OrderedBatches, source: ImageSource, job: dict[str, Any], progress: Progress
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """(codes [B, V, *code_shape] as they are stored, labels [B]) of every chunk of the stream; B may be 0."""
    for chunk, batch in zip(stream.chunks, stream, strict=True):
        images = batch["images"]  # [B, V, H, W, 3]
        num, views = images.shape[:2]
        codes = np.empty((0, views))
        if num:
            with torch.inference_mode():
                flat = tokenizer.encode(from_uint8(images.reshape(num * views, *images.shape[2:])).to(tokenizer.device))
            codes = _as_stored(flat, job).reshape(num, views, *flat.shape[1:])
            if job["kind"] == "latents" and not (finite := np.isfinite(codes.reshape(num, -1)).all(1)).all():
                name = source.name(int(batch["indices"][int(np.argmin(finite))]))
                mend = "encode with dtype float32" if job["dtype"] == "float16" else "the tokenizer is broken, take an earlier checkpoint"
                raise UserError(f"{name}: its latents are NaN, infinite or too large for {job['dtype']}; {mend}")
        progress.advance(len(chunk))
        yield codes, batch["labels"]


def _as_stored(codes: Tensor, job: dict[str, Any]) -> np.ndarray:
    array: np.ndarray
    if job["kind"] == "latents":
        array = codes.to(getattr(torch, job["dtype"])).cpu().numpy()
        return array
    array, size = codes.cpu().numpy(), job["codebook_size"]
    assert array.min() >= 0 and array.max() < size, "the tokenizer made a code outside its codebook"
    return array.astype(code_dtype(size))


def _write_arrays(folder: Path, shard: int, batches: Iterable[tuple[np.ndarray, np.ndarray]], job: dict[str, Any]) -> dict[str, Any]:
    """Codes and labels of one shard as they come; returns what its note says of them."""
    path = folder / f"codes-{shard:05d}.npy"
    is_used = np.zeros(job["codebook_size"] or 0, dtype=bool)
    array: GrowingArray | None = None
    labels = [np.empty(0, dtype=np.int64)]
    try:
        for codes, batch_labels in batches:
            labels.append(batch_labels)
            if not len(codes):
                continue
            if array is None:
                array = GrowingArray(path, codes.dtype, codes.shape[1:])
            array.append(codes)
            if job["kind"] == "codes":
                is_used[codes.ravel()] = True
    except BaseException:
        if array is not None:
            array.discard()
        raise
    if array is not None:
        array.finish()
    labels_path = folder / f"labels-{shard:05d}.npy"
    write_whole(labels_path, lambda file: np.save(file, np.concatenate(labels)))
    note = {
        "codes": path.name,
        "labels": labels_path.name,
        "count": array.count if array else 0,
        "code_shape": list(array.row_shape[1:]) if array else [],
    }
    return note | ({"used": np.packbits(is_used).tobytes().hex()} if job["kind"] == "codes" else {})


def _make_index(folder: Path, job: dict[str, Any], num_shards: int, source: ImageSource) -> dict[str, Any]:
    """The index of the finished shards, whose codes are stored again if there is a smaller way."""
    notes = [json.loads(_note_file(folder, shard).read_text()) for shard in range(num_shards)]
    filled = [note for note in notes if note["count"]]
    if not filled:
        raise UserError(f"{source.spec}: not one of its {len(source)} images can be read; check the files")
    code_shape = filled[0]["code_shape"]
    assert all(note["code_shape"] == code_shape for note in filled), "the tokenizer made codes of several shapes"
    bad: BadImages = {index: why for note in notes for index, why in note["bad_images"].items()}
    index = {
        **job,
        "code_shape": code_shape,
        "num_images": sum(note["count"] for note in filled),
        "label_names": source.label_names,
        "source": source.spec,
        "genvision": __version__,
        "shards": [{key: note[key] for key in ("codes", "labels", "count")} for note in filled],
        "bad_images": bad,
    }
    if job["kind"] == "codes" and all("used" in note for note in filled):  # shards of earlier versions do not say which codes they use
        index |= _stored_small(folder, index, [note["used"] for note in filled])
    num_bytes = sum(open_shard(folder, shard, index).nbytes for shard in index["shards"])
    original = source.encoded_bytes()
    return index | {
        "bytes_per_image": num_bytes / index["num_images"],
        "source_bytes_per_image": None if original is None else original / len(source),
        "source_formats": _formats(source),
    }


def _stored_small(folder: Path, index: dict[str, Any], used: list[str]) -> dict[str, Any]:
    """What the index says of codes in use and of how they are stored; the shards are stored again where that is smaller."""
    size = index["codebook_size"]
    bits = np.bitwise_or.reduce([np.frombuffer(bytes.fromhex(text), dtype=np.uint8) for text in used])
    in_use = np.flatnonzero(np.unpackbits(bits, count=size))
    how = choose_storage(size, len(in_use), index["storage"] == "bytes")
    facts: dict[str, Any] = {"num_codes_in_use": len(in_use), "stored_as": how}
    if how == "numbers":
        return facts
    shapes = [(shard["count"], index["views"], *index["code_shape"]) for shard in index["shards"]]
    shards = [store_again(folder, shard, shape, in_use, size, how) for shard, shape in zip(index["shards"], shapes, strict=True)]
    return {**facts, "codes_in_use": in_use.tolist(), "shards": shards}


def _formats(source: ImageSource) -> dict[str, int]:
    try:
        return source.stored_formats()
    except (BadImageError, OSError):  # an image that was skipped; only a word of the report depends on this
        return {}


def _clean(folder: Path, index: dict[str, Any]) -> None:
    """Remove what the finished set does not need, which a job leaves that ends between its last two steps."""
    listed = {name for shard in index["shards"] for name in shard.values()}
    for path in [*folder.glob("shard-*.json"), *folder.glob("*.npy")]:
        if path.name not in listed:
            path.unlink()


def _short(value: Any) -> Any:
    """Hashes are told apart by their beginning."""
    return value[:12] if isinstance(value, str) else value
