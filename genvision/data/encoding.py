"""Writing an encoded data set: every view of every image through a tokenizer, shard by shard, in the memory of one batch.

The folder is described in `genvision.data.encoded`. Whatever ends a job, the next one goes on after the finished shards.

Shapes: codes and deviations [n, V, *code_shape] of n images with V views; features [n, V, T, Z].
"""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from genvision import __version__
from genvision.data.array_files import GrowingArray, write_json, write_whole
from genvision.data.code_storage import choose_storage, store_again
from genvision.data.datasets import BadImages, OrderedBatches
from genvision.data.encoded import FORMAT_VERSION, EncodedDataset, StoredFeatures, open_shard
from genvision.data.encoded_batches import EncodedBatch, Encoder, FeatureNetwork, encode_batches
from genvision.data.sources import BadImageError, ImageSource, OnBadImage
from genvision.data.transforms import ViewConfig
from genvision.errors import UserError
from genvision.progress import Progress

LatentDtype = Literal["float32", "float16"]
Storage = Literal["auto", "bytes"]
HASH_LENGTH = 64
"""Hexadecimal digits of a sha256."""
_UNSAID = {"storage": "auto", "posterior": False, "features": None}
"""What jobs mean that were begun before there was a choice."""


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
    posterior: bool = False,
    features: FeatureNetwork | None = None,
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
        dtype: of stored latents and deviations; float32 keeps every bit, float16 halves the space. Codes are whole numbers whatever
            it says.
        storage: of codes. `auto` takes one byte each where at most 256 occur in the set; `bytes` also where at most 510 do, as SeiT's
            byte stream, which is a little slower to read.
        posterior: store the standard deviations of the latents, too, so that training draws samples; of a ContinuousTokenizer.
        features: store what this network, on the tokenizer's device, makes of every view, as float16.
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
        **_kind(tokenizer.spec.codebook_size, dtype, storage, posterior),
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
        "features": None if features is None else _describe(features),
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
    encoded = encode_batches(tokenizer, features, stream, source, job, progress)
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


def _kind(codebook_size: int | None, dtype: str, storage: str, posterior: bool) -> dict[str, Any]:
    """The part of a job that says what is stored."""
    for name, value, choices in (("dtype", dtype, get_args(LatentDtype)), ("storage", storage, get_args(Storage))):
        if value not in choices:
            raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(choices)}")
    if codebook_size is None:
        if storage != "auto":
            raise UserError(f"storage {storage} is for discrete codes, but the tokenizer makes continuous latents; leave it at auto")
        return {"kind": "latents", "dtype": dtype, "posterior": posterior}
    if posterior:
        raise UserError("posterior is of continuous latents, but the tokenizer makes discrete codes; leave it out")
    if dtype != "float32":
        raise UserError(f"dtype {dtype} is for continuous latents, but the tokenizer makes discrete codes; leave it at float32")
    return {"kind": "codes", "storage": storage}


def _describe(features: FeatureNetwork) -> dict[str, Any]:
    return asdict(StoredFeatures(network=features.name, hash=features.hash, tokens_per_side=features.tokens_per_side, dim=features.dim))


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


def _write_arrays(folder: Path, shard: int, batches: Iterable[EncodedBatch], job: dict[str, Any]) -> dict[str, Any]:
    """All parts and labels of one shard as they come; returns what its note says of them."""
    is_used = np.zeros(job["codebook_size"] or 0, dtype=bool)
    arrays: dict[str, GrowingArray] = {}
    labels = [np.empty(0, dtype=np.int64)]
    try:
        for batch in batches:
            labels.append(batch.labels)
            for part, rows in batch.parts.items():
                if part not in arrays:
                    arrays[part] = GrowingArray(folder / f"{part}-{shard:05d}.npy", rows.dtype, rows.shape[1:])
                arrays[part].append(rows)
            if job["kind"] == "codes" and "codes" in batch.parts:
                is_used[batch.parts["codes"].ravel()] = True
    except BaseException:
        for array in arrays.values():
            array.discard()
        raise
    for array in arrays.values():
        array.finish()
    labels_path = folder / f"labels-{shard:05d}.npy"
    write_whole(labels_path, lambda file: np.save(file, np.concatenate(labels)))
    note = {
        **{part: f"{part}-{shard:05d}.npy" for part in _parts(job)},
        "labels": labels_path.name,
        "count": arrays["codes"].count if arrays else 0,
        "code_shape": list(arrays["codes"].row_shape[1:]) if arrays else [],
    }
    return note | ({"used": np.packbits(is_used).tobytes().hex()} if job["kind"] == "codes" else {})


def _parts(job: dict[str, Any]) -> list[str]:
    """The files that a shard has, beside its labels."""
    return ["codes", *(["deviations"] if job.get("posterior") else []), *(["features"] if job["features"] else [])]


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
        "shards": [{key: note[key] for key in (*_parts(job), "labels", "count")} for note in filled],
        "bad_images": bad,
    }
    if job["kind"] == "codes" and all("used" in note for note in filled):  # shards of earlier versions do not say which codes they use
        index |= _stored_small(folder, index, [note["used"] for note in filled])
    num_bytes = sum(part.nbytes for shard in index["shards"] for part in open_shard(folder, shard, index).values())
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
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items())
    return value[:12] if isinstance(value, str) and len(value) == HASH_LENGTH else value
