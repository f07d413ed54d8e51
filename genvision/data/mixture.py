"""Mixtures: several data sets that are trained on together, each seen as often as its weight says.

    mix:WEIGHT*SPEC;WEIGHT*SPEC...      mix:0.7*folder:photos;0.3*parquet:art/*.parquet      mix:3*encoded:A;1*encoded:B

Weights are any numbers above 0; what counts is their ratio. A SPEC is whatever names a data set alone and holds no semicolon (a folder
with one in its name needs a link), so commas, braces and stars are its own. On a command line the whole needs quotes.

A weight is a share of the samples that training sees, not of the images: a part is gone through again and again in epochs of its own, and
of every 10,000 consecutive samples each part has exactly its share, in random turns (genvision.data.order.MixtureOrder).

Classes: parts with the same list of names share their labels. Otherwise classes are told apart by name: one of the same name in two parts
is the same class, and labels are numbered in the order in which the names come up, part by part.
"""

import hashlib
import json
from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from genvision.data.datasets import BadImages, Batch
from genvision.data.encoded import ClassCounts, EncodedDataset
from genvision.data.order import TURNS, MixtureOrder
from genvision.data.sources import ImageSource, open_source, path_errors
from genvision.errors import UserError

FORM = "mix:0.7*SPEC;0.3*SPEC"
ENCODED = "encoded:"


class Part(NamedTuple):
    weight: float
    spec: str


def parse_mixture(spec: str, rest: str) -> list[Part]:
    """The parts of a mixture; `rest` is what stands behind `mix:`.

    Raises:
        UserError: there are less than two, a weight is no number above 0, or a part would be seen less than once in 10,000 samples.
    """
    parts = []
    for text in rest.split(";"):
        weight, _, name = text.strip().partition("*")
        if not name.strip():
            raise UserError(f"{spec}: '{text.strip()}' is no part of a mixture; give a weight and a data set each: {FORM}")
        parts.append(Part(_weight(spec, weight.strip()), name.strip()))
        if parts[-1].spec.startswith("mix:"):
            raise UserError(f"{spec}: a mixture in a mixture; write all its parts side by side, with weights of the whole")
    if len(parts) == 1:
        raise UserError(f"{spec}: is a mixture of one; give {parts[0].spec} alone, or more parts: {FORM}")
    total = sum(part.weight for part in parts)
    for part in parts:
        if part.weight / total * TURNS < 1:
            raise UserError(
                f"{spec}: {part.spec} would be seen less than once in {TURNS:,} samples; raise its weight to {total / TURNS:g} or more"
            )
    return parts


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise UserError(f"{spec}: '{text}' is no weight; expected a number above 0 before each data set: {FORM}")
    return weight


class MergedClasses:
    """The classes of some parts together.

    Attributes:
        names: of all.
        new_labels: of each part an int64 array, from its own labels to those of the mixture.

    Raises:
        UserError: names differ between the parts, and one of them has a name twice.
    """

    def __init__(self, spec: str, parts: list[Part], names: list[list[str]]) -> None:
        if all(other == names[0] for other in names):
            self.names, self.new_labels = list(names[0]), [np.arange(len(names[0]))] * len(names)
            return
        for part, own in zip(parts, names, strict=True):
            twice = [name for name, count in Counter(own).items() if count > 1]
            if twice:
                raise UserError(
                    f"{spec}: classes are put together by name, but '{twice[0]}' names two classes of {part.spec}; rename one of them"
                )
        self.names = list(dict.fromkeys(name for own in names for name in own))
        place = {name: label for label, name in enumerate(self.names)}
        self.new_labels = [np.array([place[name] for name in own]) for own in names]


class MixedSource(ImageSource):
    """Images of several sources, one behind the other; training takes them as the weights say, all else takes each once."""

    def __init__(self, spec: str, rest: str) -> None:
        self.spec = spec
        self.described = parse_mixture(spec, rest)
        if any(part.spec.startswith(ENCODED) for part in self.described):
            raise UserError(f"{spec}: holds codes, not images; give the images that they were made from")
        self.parts = [open_source(part.spec) for part in self.described]
        classes = MergedClasses(spec, self.described, [part.label_names for part in self.parts])
        self.label_names = classes.names
        self.labels = np.concatenate([new[part.labels] for new, part in zip(classes.new_labels, self.parts, strict=True)])
        self._ends = np.cumsum([len(part) for part in self.parts])

    def load(self, index: int) -> Image.Image:
        part, own = self._find(index)
        return part.load(own)

    def name(self, index: int) -> str:
        part, own = self._find(index)
        return part.name(own)

    def order(self, window: int | None = None) -> MixtureOrder:
        return MixtureOrder(tuple(part.order(window) for part in self.parts), tuple(part.weight for part in self.described))

    def fingerprint(self) -> str:
        return _digest(self.order().shares, self.label_names, [part.fingerprint() for part in self.parts])

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(b"mix")
        for part in self.parts:
            digest.update(part.content_hash(show_progress).encode())
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts.update(part.stored_formats())
        return dict(counts)

    def encoded_bytes(self) -> int | None:
        sizes = [part.encoded_bytes() for part in self.parts]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def _find(self, index: int) -> tuple[ImageSource, int]:
        """The part that an image belongs to, and its index there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], int(index - (self._ends[number] - len(self.parts[number])))


def is_encoded(spec: str) -> bool:
    """Whether it names codes: `encoded:DIR`, or a mixture with such a part."""
    if spec.startswith("mix:"):
        return any(part.spec.startswith(ENCODED) for part in parse_mixture(spec, spec.removeprefix("mix:")))
    return spec.startswith(ENCODED)


def open_encoded(
    spec: str, *, seed: int = 0, with_features: bool = True, views: Literal[1, 2] = 1, shuffle_window: int | None = None
) -> "EncodedDataset | EncodedMixture":
    """Open `encoded:DIR`, or a mixture of such; the options are those of EncodedDataset.

    Raises:
        UserError: see EncodedDataset and EncodedMixture.
    """
    options: Any = {"seed": seed, "with_features": with_features, "views": views, "shuffle_window": shuffle_window}
    described = parse_mixture(spec, spec.removeprefix("mix:")) if spec.startswith("mix:") else [Part(1.0, spec)]
    for part in described:
        if not part.spec.startswith(ENCODED):
            raise UserError(f"{spec}: {part.spec} holds images, other parts hold codes; encode it with the same tokenizer first")
    with path_errors(spec):
        parts = [EncodedDataset(part.spec.removeprefix(ENCODED), **options) for part in described]
    return EncodedMixture(spec, described, parts) if spec.startswith("mix:") else parts[0]


class EncodedMixture(ClassCounts):
    """Encoded data sets of one tokenizer as one, for training.

    Attributes:
        tokenizer_hash, image_size, kind, code_shape, codebook_size, has_posterior, features: what they agree in, see EncodedDataset.

    Raises:
        UserError: they do not agree, or their classes cannot be put together.
    """

    def __init__(self, spec: str, described: list[Part], parts: list[EncodedDataset]) -> None:
        self.spec, self.described, self.parts = spec, described, parts
        first = parts[0]
        self.tokenizer_hash, self.image_size, self.kind = first.tokenizer_hash, first.image_size, first.kind
        self.code_shape, self.codebook_size, self.has_posterior = first.code_shape, first.codebook_size, first.has_posterior
        self.features, self.with_features = first.features, first.with_features
        for part in parts[1:]:
            self._check_agreement(part)
        classes = MergedClasses(spec, described, [part.label_names for part in parts])
        self.label_names, self._new_labels = classes.names, classes.new_labels
        self.class_counts = np.zeros(len(self.label_names), dtype=np.int64)
        for new, part in zip(self._new_labels, parts, strict=True):
            self.class_counts[new] += part.class_counts
        self._ends = np.cumsum([len(part) for part in parts])
        self.order = MixtureOrder(tuple(part.order for part in parts), tuple(part.weight for part in described))
        self.bad_images: BadImages = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check_tokenizer(self, expected_hash: str) -> None:
        """Raises UserError if the codes were made by any other tokenizer."""
        self.parts[0].check_tokenizer(expected_hash)

    def fingerprint(self) -> str:
        """sha256 that changes with the parts and their weights."""
        return _digest(self.order.shares, self.label_names, [part.fingerprint() for part in self.parts])

    def get_batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """What EncodedDataset.get_batch gives, with the labels of the mixture."""
        positions, indices = np.asarray(positions), np.asarray(indices)
        owners = np.searchsorted(self._ends, indices, side="right")
        batch: Batch = {}
        for number in np.unique(owners).tolist():
            rows, part = np.flatnonzero(owners == number), self.parts[number]
            values = part.get_batch(positions[rows], indices[rows] - (self._ends[number] - len(part)))
            values["labels"] = torch.from_numpy(self._new_labels[number][values["labels"].numpy()])
            for key, value in values.items():
                batch.setdefault(key, value.new_empty(len(indices), *value.shape[1:]))[torch.from_numpy(rows)] = value
        return batch

    def _check_agreement(self, other: EncodedDataset) -> None:
        first = self.parts[0]
        facts: dict[str, tuple[Any, Any]] = {
            "tokenizer": (first.tokenizer_hash[:12], other.tokenizer_hash[:12]),
            "kind": (first.kind, other.kind),
            "code shape": (list(first.code_shape), list(other.code_shape)),
            "image size": (first.image_size, other.image_size),
            "posterior": (first.has_posterior, other.has_posterior),
        }
        if self.with_features:
            facts["features"] = (first.features, other.features)
        for what, (mine, its) in facts.items():
            if mine != its:
                raise UserError(
                    f"{self.spec}: {first.path} has {what} {mine}, {other.path} has {its}; encode one of them again, as the other was"
                )


def _digest(shares: tuple[int, ...], names: list[str], fingerprints: list[str]) -> str:
    return hashlib.sha256(json.dumps([shares, names, fingerprints]).encode()).hexdigest()
