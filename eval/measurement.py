"""One pass over a set of images: every network sees every image once, and what the metrics need comes home.

Rows are what the networks say of each image, by name: `pool` (features [N, D] of the protocol's extractor), `spatial` (ADM's features for
sFID, [N, 2023]), `logits` [N, K], `dinov2` [N, 1024] and `judged` (the digit that the judge sees, [N]). Of the first, second and fourth
the moments are enough for a Frechet distance; rows themselves are kept only where a metric compares images one by one.

Moments are taken in blocks of images, for the jackknife. The block of an image follows from its pixels, so neither the order of the
images nor the number of processes moves anything but the last bits of a sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from genvision.data.sources import ImageSource
from genvision.eval.digits import DigitsJudge
from genvision.eval.distributed import gather_rows, sum_moments
from genvision.eval.features import Extractor
from genvision.eval.hygiene import hash_images
from genvision.eval.moments import Moments, merged
from genvision.eval.sets import stream_batches
from genvision.processes import process_state

NUM_BLOCKS = 10
FLUSH_ROWS = 1024
"""Rows that wait before they enter the moments: each entry costs a pass over a D x D matrix."""
GAUSSIAN_ROWS = ("pool", "spatial", "dinov2")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks that look at every image."""

    extractor: Extractor
    """Gives `pool`, `spatial` and `logits`."""
    dinov2: Extractor | None = None
    judge: DigitsJudge | None = None

    def of(self, name: str) -> Extractor:
        """The extractor that gives the rows of that name."""
        network = self.dinov2 if name == "dinov2" else self.extractor
        assert network is not None, f"no network gives {name}"
        return network

    def dim(self, name: str) -> int:
        """Length of a row of GAUSSIAN_ROWS."""
        return self.of(name).spatial_dim if name == "spatial" else self.of(name).feature_dim

    def identities(self, names: frozenset[str]) -> dict[str, str]:
        """Name of rows to the network behind it: its name, which stands for the resize, too, and the hash of its weights."""
        judge = f"judge {self.judge.weights_hash}" if self.judge else ""
        return {name: judge if name == "judged" else f"{self.of(name).name} {self.of(name).weights_hash}" for name in sorted(names)}

    def rows(self, images: np.ndarray, wanted: frozenset[str]) -> dict[str, np.ndarray]:
        """What is wanted of uint8 images [B, H, W, 3], by name; arrays [B, ...]."""
        found = {}
        if wanted & {"pool", "spatial", "logits"}:
            features = self.extractor(images, want_logits="logits" in wanted, want_spatial="spatial" in wanted)
            found = {"pool": features.features, "spatial": features.spatial, "logits": features.logits}
        rows = {name: tensor.numpy() for name, tensor in found.items() if name in wanted and tensor is not None}
        if "dinov2" in wanted:
            assert self.dinov2 is not None
            rows["dinov2"] = self.dinov2(images).features.numpy()
        if "judged" in wanted:
            assert self.judge is not None
            rows["judged"] = self.judge(images)
        assert rows.keys() == wanted, f"wanted {sorted(wanted)}, the networks give {sorted(rows)}"
        return rows


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a pass over N images found."""

    blocks: dict[str, list[Moments]] = field(repr=False)
    """Name of rows to the moments of each of the NUM_BLOCKS blocks (some may be empty)."""
    rows: dict[str, np.ndarray] = field(repr=False)
    """Name to the rows that were kept, [N, ...], in the order of the images."""
    hashes: np.ndarray = field(repr=False)
    """uint8 [N, 16]: identity of each image's pixels."""

    def __len__(self) -> int:
        return len(self.hashes)

    @cached_property
    def block_of(self) -> np.ndarray:
        """Block of each image, int64 [N]."""
        return block_of(self.hashes)

    def moments(self, name: str) -> Moments:
        """Of all images together."""
        return merged(self.blocks[name])

    def reordered(self, order: np.ndarray) -> "Measured":
        """The same images in another order: image i of the result is image order[i]."""
        return Measured(blocks=self.blocks, rows={name: rows[order] for name, rows in self.rows.items()}, hashes=self.hashes[order])


class Measurement:
    """Gathers the rows of one set in batches of any order and size.

    Args:
        dims: rows whose moments are taken: name to length.
        kept: names of rows that are kept image by image.
    """

    def __init__(self, dims: Mapping[str, int], kept: frozenset[str]) -> None:
        self.indices: list[np.ndarray] = []
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in sorted(kept | {"hashes"})}
        self.blocks = {name: [Moments(dim) for _ in range(NUM_BLOCKS)] for name, dim in sorted(dims.items())}
        self.waiting: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in range(NUM_BLOCKS)] for name in dims}

    def add(self, indices: np.ndarray, rows: Mapping[str, np.ndarray], hashes: np.ndarray) -> None:
        """Add images.

        Args:
            indices: int64 [B], place of each image in the set.
            rows: name to array [B, ...], at least those that are wanted.
            hashes: uint8 [B, 16].
        """
        self.indices.append(np.asarray(indices, dtype=np.int64))
        for name, parts in self.kept.items():
            parts.append(hashes if name == "hashes" else rows[name])
        blocks = block_of(hashes)
        for name, waiting in self.waiting.items():
            for block in np.unique(blocks).tolist():
                waiting[block].append(rows[name][blocks == block])
                if sum(map(len, waiting[block])) >= FLUSH_ROWS:
                    self._flush(name, block)

    def finish(self, num: int) -> Measured:
        """What all processes found together, on every process; images 0 .. num - 1 must each have been added once."""
        for name in self.waiting:
            for block in range(NUM_BLOCKS):
                self._flush(name, block)
        blocks = {name: [sum_moments(block) for block in self.blocks[name]] for name in self.blocks}
        rows = gather_rows(self.kept, self.indices, num)
        return Measured(blocks=blocks, hashes=rows.pop("hashes"), rows=rows)

    def _flush(self, name: str, block: int) -> None:
        waiting = self.waiting[name][block]
        if waiting:
            self.blocks[name][block].update(np.concatenate(waiting))
            waiting.clear()


def measure(
    source: ImageSource,
    networks: Networks,
    *,
    moments: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    show_progress: bool = False,
    description: str = "images",
) -> Measured:
    """Look at every image of a source once; every process takes its share of the batches and all get the whole result.

    Args:
        moments: names of rows whose moments are wanted, of GAUSSIAN_ROWS.
        kept: names of rows that are wanted image by image.
        image_size: side of ADM's centre crop; None takes images as they are, and they must all have one size.

    Raises:
        UserError: an image cannot be read or has another size, or features are not finite.
    """
    state = process_state()
    share = shares(len(source), batch_size)[state.process_index :: state.num_processes]
    indices = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in share]) if share else np.zeros(0, dtype=np.int64)
    measurement = Measurement({name: networks.dim(name) for name in moments}, kept)
    for batch in stream_batches(
        source,
        image_size,
        indices=indices,
        batch_size=batch_size,
        num_workers=num_workers,
        show_progress=show_progress and state.is_main_process,
        description=description,
    ):
        measurement.add(batch.indices, networks.rows(batch.images, moments | kept), hash_images(batch.images))
    return measurement.finish(len(source))


def shares(num: int, batch_size: int) -> list[range]:
    """Indices 0 .. num - 1 in batches; the same whatever the number of processes."""
    return [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]


def block_of(hashes: np.ndarray) -> np.ndarray:
    """Block of each image from the hash of its pixels, uint8 [N, 16] -> int64 [N]."""
    first = np.ascontiguousarray(hashes[:, :8]).view("<u8")[:, 0]
    blocks: np.ndarray = (first % NUM_BLOCKS).astype(np.int64)
    return blocks
