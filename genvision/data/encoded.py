"""Encoded data sets: the codes or latents of every image and its views, computed once and memory-mapped in training.

A folder holds `codes-00000.npy` ([n, V, *code_shape], all V views of an image together; `ranks-` or `bytes-` where the codes in use
allow one byte each, see code_storage), `labels-00000.npy` (int64 [n]) and so on, and `index.json`, which is written last: a folder
without it is not finished. While a job runs, `job.json` says what it makes, and a `shard-00000.json` beside a shard says that the
shard is whole. `genvision.data.encoding` writes all this.

Beside latents, which are the means of a tokenizer's posterior, there may be its standard deviations, `deviations-00000.npy`; diffusion
transformers (DiT, arXiv:2212.09748; SiT) are trained on samples of it, drawn anew at every visit. And there may be a frozen network's
features of every view for REPA (genvision.data.alignment), `features-00000.npy`, float16 [n, V, T, Z].

A set is opened and read in memory that does not grow with its length, except for the order of its samples (see SampleOrder) and a few
hundred bytes and two open files a shard.

Shapes: codes [*places], (h, w) or (L,), int64; latents [c, *places] float32; B samples, V views of an image; T tokens of Z features.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from genvision.data.array_files import allow_open_files, open_array
from genvision.data.code_storage import ArrayShard, StoredAs, StreamShard, code_dtype
from genvision.data.datasets import BadImages, Batch
from genvision.data.order import Order, SampleOrder, uniform_choice, view_seed
from genvision.errors import UserError
from genvision.streams import IndexedStreams, Purpose

FORMAT_VERSION = 1
KINDS = ("codes", "latents")


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """Features of every view that a set holds beside its codes."""

    network: str
    """timm's name of the frozen network."""
    hash: str
    """FrozenFeatures.hash."""
    tokens_per_side: int
    """T is its square."""
    dim: int
    """Z."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, Z)"""
        return self.tokens_per_side**2, self.dim


class ClassCounts:
    """The classes of an encoded set, or of a mixture of some, and how many images there are of each."""

    label_names: list[str]
    class_counts: np.ndarray
    """int64, one for each name."""

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def highest_label(self) -> int:
        """That occurs."""
        return int(np.flatnonzero(self.class_counts)[-1])


class EncodedDataset(ClassCounts):
    """An encoded data set, opened for training.

    Args:
        expected_tokenizer_hash: refuse codes of any other tokenizer.
        seed: which view of an image is taken at a position, and which sample of its posterior, depends on this and the position alone.
        with_features: batches hold the features, if there are any; at 0.4 MB a sample it costs time to read what nobody uses.
        views: of each image in a batch; 2 for a contrastive loss. The first is what one view would be, the second is another one.
        shuffle_window: images that are shuffled among each other, see SampleOrder.

    Attributes:
        image_size: side of the images that were encoded.
        class_counts: images of each class, int64 [num_classes].
        has_posterior: batches hold samples, as the set knows the deviations of its latents.
        features: what is stored of features, or None.

    Raises:
        UserError: it is not finished, is damaged, was made by another tokenizer, or has no two views.
    """

    def __init__(
        self,
        path: str | Path,
        expected_tokenizer_hash: str | None = None,
        *,
        seed: int = 0,
        with_features: bool = True,
        views: Literal[1, 2] = 1,
        shuffle_window: int | None = None,
    ) -> None:
        self.path, self.seed, self.with_features, self.batch_views = Path(path).expanduser(), seed, with_features, views
        self.index = _read_index(self.path)
        self.tokenizer_hash: str = self.index["tokenizer_hash"]
        if expected_tokenizer_hash is not None:
            self.check_tokenizer(expected_tokenizer_hash)
        self.image_size: int = self.index["image_size"]
        self.kind: str = self.index["kind"]
        self.code_shape: tuple[int, ...] = tuple(self.index["code_shape"])
        self.codebook_size: int | None = self.index["codebook_size"]
        self.num_views: int = self.index["views"]
        self.has_posterior: bool = self.index.get("posterior", False)  # sets that do not say so are older than the option
        self.features = stored_features(self.index)
        self._check_views()
        self.label_names: list[str] = self.index["label_names"]
        self.bad_images: BadImages = {}
        in_use = self.index.get("codes_in_use")
        self._in_use = None if in_use is None else np.array(in_use, dtype=np.int64)
        self._open()
        self.class_counts = self._count_labels()
        self.order: Order = SampleOrder(len(self), shuffle_window)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def labels(self) -> np.ndarray:
        """Of all images, int64 [N], read anew each time; `labels_of` some of them costs no memory."""
        return np.concatenate(self._labels)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """int64 [B]"""
        return self._gather(np.asarray(indices), np.empty(len(indices), dtype=np.int64), lambda shard, rows, _: self._labels[shard][rows])

    def check_tokenizer(self, expected_hash: str) -> None:
        """Raises UserError if the codes were made by any other tokenizer."""
        if self.tokenizer_hash != expected_hash:
            raise UserError(
                f"{self.path}: its codes were made by tokenizer {self.tokenizer_hash[:12]}, not by the given one ({expected_hash[:12]}); "
                "give that tokenizer, or run genvision encode again with this one into another folder"
            )

    def fingerprint(self) -> str:
        """sha256 that changes with the images, the views, the tokenizer, and what is stored beside the codes."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    def views(self, index: int) -> Tensor:
        """All views of one image, int64 or float32 [V, *code_shape]; of latents with a posterior its means."""
        return self.codes(np.full(self.num_views, index), np.arange(self.num_views))

    def codes(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """Of each image one view, by its number: codes int64 or latents (the means) float32, [B, *code_shape].

        Raises:
            UserError: a shard holds what is no code of the tokenizer.
        """
        return self._read("codes", np.asarray(indices), np.asarray(views), self.code_shape)

    def get(self, position: int, index: int) -> Batch:
        """One sample, as `get_batch` gives it without B."""
        return {key: value[0] for key, value in self.get_batch(np.array([position]), np.array([index])).items()}

    def get_batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """One view of each image, or two.

        Returns:
            `codes` int64 (float32 of latents) [B, *code_shape], a sample where the set knows the posterior, or [B, 2, *code_shape];
            `labels` and `positions` int64 [B]; `features` float32 [B, T, Z] if there are any.
        """
        indices = np.asarray(indices)
        views = uniform_choice(self.seed, positions, self.num_views)
        if self.batch_views == 2:
            others = 1 + uniform_choice(view_seed(self.seed, 1), positions, self.num_views - 1)
            both = np.stack([views, (views + others) % self.num_views], axis=1)
            codes = self.codes(indices.repeat(2), both.flatten()).unflatten(0, both.shape)
            return {"codes": codes} | self._places(positions, indices)
        batch = {"codes": self.codes(indices, views)}
        if self.has_posterior:
            deviations = self._read("deviations", indices, views, self.code_shape)
            batch["codes"] += deviations * IndexedStreams(self.seed, positions).normal(Purpose.POSTERIOR, self.code_shape)
        if self.features is not None and self.with_features:
            batch["features"] = self._read("features", indices, views, self.features.shape)
        return batch | self._places(positions, indices)

    def _places(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        return {"labels": torch.from_numpy(self.labels_of(indices)), "positions": torch.from_numpy(np.array(positions, dtype=np.int64))}

    def num_bytes(self) -> int:
        """What is stored takes on disk, without the labels."""
        return sum(part.nbytes for shard in self._shards for part in shard.values())

    def _read(self, part: str, indices: np.ndarray, views: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """`codes`, `deviations` or `features` of one view of each image, [B, *shape]."""
        is_code = part == "codes" and self.kind == "codes"
        values = np.empty((len(indices), *shape), dtype=np.int64 if is_code else np.float32)
        self._gather(indices, values, lambda shard, rows, chosen: self._shards[shard][part].take(rows, views[chosen]))
        return torch.from_numpy(self._decoded(values, indices) if is_code else values)

    def _gather(self, indices: np.ndarray, values: np.ndarray, read: Callable[[int, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Fill values[i] with what is stored of image indices[i], by read(shard, its rows, which i these are)."""
        shards = np.searchsorted(self._ends, indices, side="right")
        by_shard = np.argsort(shards, kind="stable")
        for chosen in np.split(by_shard, np.flatnonzero(np.diff(shards[by_shard])) + 1):
            if len(chosen):
                shard = int(shards[chosen[0]])
                values[chosen] = read(shard, indices[chosen] - self._starts[shard], chosen)
        return values

    def _decoded(self, stored: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Codes of what is stored of them, after a check."""
        limit = self.codebook_size if self._in_use is None else len(self._in_use)
        assert limit is not None
        if stored.size and not 0 <= stored.min() <= stored.max() < limit:
            is_wrong = (stored < 0) | (stored >= limit)
            row = int(np.argmax(is_wrong.reshape(len(stored), -1).any(1)))
            path = self._shards[np.searchsorted(self._ends, indices[row], side="right")]["codes"].path
            what = f"its codebook has codes 0 .. {limit - 1}" if self._in_use is None else f"{limit} codes are in use"
            raise UserError(f"{path}: holds {stored[row][is_wrong[row]][0]}, but {what}; restore it, or delete the folder and encode again")
        return stored if self._in_use is None else self._in_use[stored]

    def _check_views(self) -> None:
        if self.batch_views == 1:
            return
        if self.num_views < 2:
            raise UserError(
                f"data.views {self.batch_views}: {self.path} holds one view of each image; encode again with --flip or --crops ten"
            )
        if self.has_posterior or (self.features is not None and self.with_features):
            what = "samples of a posterior" if self.has_posterior else "features"
            raise UserError(f"data.views {self.batch_views}: {self.path} has {what}, which are for one view of each image; set it to 1")

    def _open(self) -> None:
        shards = self.index["shards"]
        counts = np.array([shard["count"] for shard in shards], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        allow_open_files(self.path, sum(len(shard) - 1 for shard in shards))  # names beside `count`
        self._shards = [open_shard(self.path, shard, self.index) for shard in shards]
        self._labels = [open_array(self.path / shard["labels"], (shard["count"],), np.dtype(np.int64)) for shard in shards]

    def _count_labels(self) -> np.ndarray:
        """Of each class, after a check that all labels have names; a shard at a time."""
        counts = np.zeros(self.num_classes, dtype=np.int64)
        low, high = min(int(labels.min()) for labels in self._labels), max(int(labels.max()) for labels in self._labels)
        if low < 0 or high >= self.num_classes:
            raise UserError(f"{self.path}: labels go from {low} to {high}, its index names {self.num_classes} classes; encode again")
        for labels in self._labels:
            counts += np.bincount(labels, minlength=self.num_classes)
        return counts

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_shards", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def open_shard(folder: Path, shard: dict[str, Any], index: dict[str, Any]) -> dict[str, ArrayShard | StreamShard]:
    """The parts of one shard, `codes` first, as its entry in the index says."""
    rows = (shard["count"], index["views"])
    parts: dict[str, ArrayShard | StreamShard] = {"codes": _open_codes(folder, shard, index)}
    if index.get("posterior"):
        parts["deviations"] = ArrayShard(folder / shard["deviations"], (*rows, *index["code_shape"]), np.dtype(index["dtype"]))
    if (features := stored_features(index)) is not None:
        parts["features"] = ArrayShard(folder / shard["features"], (*rows, *features.shape), np.dtype(np.float16))
    return parts


def _open_codes(folder: Path, shard: dict[str, Any], index: dict[str, Any]) -> ArrayShard | StreamShard:
    shape = (shard["count"], index["views"], *index["code_shape"])
    path = folder / shard["codes"]
    if index["kind"] == "latents":
        return ArrayShard(path, shape, np.dtype(index["dtype"]))
    stored_as = stored_form(index)
    if stored_as == "bytes":
        return StreamShard(path, folder / shard["starts"], shape)
    return ArrayShard(path, shape, np.dtype(np.uint8) if stored_as == "ranks" else code_dtype(index["codebook_size"]))


def stored_form(index: dict[str, Any]) -> StoredAs:
    """How the codes are stored; sets that do not say so are older than the choice."""
    form: StoredAs = index.get("stored_as", "numbers")
    return form


def stored_features(index: dict[str, Any]) -> StoredFeatures | None:
    """What an index says of features; sets that say nothing have none."""
    features = index.get("features")
    return None if features is None else StoredFeatures(**features)


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
        version, kind, form = index["format_version"], index["kind"], stored_form(index)
        stored_features(index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is not the index of encoded data ({error}); encode again into another folder") from error
    if version != FORMAT_VERSION or kind not in KINDS or form not in get_args(StoredAs):
        raise UserError(
            f"{file}: holds {kind} in format {version} ({form}), this genvision reads codes and latents in format {FORMAT_VERSION}; "
            "encode again"
        )
    return index
