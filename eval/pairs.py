"""Pairs of images that stand for a whole set of reconstructions: the first, the worst and the best; and their picture.

Shapes: k pairs that are kept, B pairs of a batch, images uint8 [..., H, W, 3].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from accelerate.utils import gather_object
from PIL import Image, ImageDraw

from genvision.processes import process_state

Measure = Literal["LPIPS", "distance", "PSNR"]

CELL_SIDE, GAP, LINE, FONT = 96, 4, 16, 13
ROW_NAMES = ("original", "reconstruction")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Some pairs of a set, with the value of each."""

    title: str
    indices: np.ndarray
    """int64 [k], places in the set."""
    values: np.ndarray
    """float64 [k]"""
    captions: list[str]
    originals: np.ndarray
    """uint8 [k, H, W, 3]"""
    reconstructions: np.ndarray


class PairKeeper:
    """Keeps the first, the worst and the best pairs of a set that arrives in batches, on any number of processes.

    Args:
        num: of each kind.
        measure: what decides; a high PSNR is good, a high LPIPS or other distance is bad. Of equal values the earlier image comes first.
    """

    def __init__(self, num: int, measure: Measure) -> None:
        self.num, self.measure = num, measure
        self.kept: dict[str, list[_Pair]] = {"first": [], "worst": [], "best": []}

    def update(self, indices: np.ndarray, values: np.ndarray, originals: np.ndarray, reconstructions: np.ndarray) -> None:
        """Consider pairs: indices int64 [B] into the set, values [B], images uint8 [B, H, W, 3]."""
        losses = -values if self.measure == "PSNR" else values
        for kind, ranks in (("first", np.zeros(len(values))), ("worst", -losses), ("best", losses)):
            # only the best few of a batch can stay, so that few images are copied
            chosen = np.lexsort((indices, ranks))[: self.num]
            new = [
                _Pair(float(ranks[i]), int(indices[i]), float(values[i]), originals[i].copy(), reconstructions[i].copy()) for i in chosen
            ]
            self.kept[kind] = self._choose(self.kept[kind] + new)

    def finish(self, num_images: int) -> list[Pairs]:
        """The pairs of the whole set, on every process; every process must call it."""
        together = process_state().num_processes > 1
        return [
            self._name(kind, self._choose(gather_object(kept) if together else kept), num_images)
            for kind, kept in self.kept.items()
            if self.num
        ]

    def _choose(self, pairs: "list[_Pair]") -> "list[_Pair]":
        return sorted(pairs, key=lambda pair: (pair.rank, pair.place))[: self.num]

    def _name(self, kind: str, pairs: "list[_Pair]", num_images: int) -> Pairs:
        count = f"{num_images:,} image{'s' * (num_images != 1)}"
        return Pairs(
            title=f"The first of {count}" if kind == "first" else f"The {kind} of {count} by {self.measure}",
            indices=np.array([pair.place for pair in pairs], dtype=np.int64),
            values=np.array([pair.value for pair in pairs]),
            captions=[self._caption(pair.value) for pair in pairs],
            originals=np.stack([pair.original for pair in pairs]),
            reconstructions=np.stack([pair.reconstruction for pair in pairs]),
        )

    def _caption(self, value: float) -> str:
        if self.measure != "PSNR":
            return f"{self.measure} {value:.3f}"
        return "no error" if np.isinf(value) else f"{value:.2f} dB"


def pair_sheet(groups: Sequence[Pairs], columns: int = 8) -> Image.Image:
    """A picture of all groups: under each title rows of originals, each with the row of its reconstructions and of their values below.

    Images shorter than 96 pixels are enlarged by a whole factor.
    """
    columns = min(columns, max(len(group.indices) for group in groups))
    height, width = groups[0].originals.shape[1:3]
    factor = max(1, -(-CELL_SIDE // min(height, width)))
    cell_h, cell_w = height * factor + GAP, width * factor + GAP
    row_h = 2 * cell_h + 2 * LINE + GAP  # a row of pairs: two pictures, the value, the place in the set
    heading_h = 2 * LINE
    num_rows = [-(-len(group.indices) // columns) for group in groups]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 12 + int(max(probe.textlength(name, font_size=FONT) for name in ROW_NAMES))
    title_w = int(max(probe.textlength(group.title, font_size=LINE) for group in groups)) + 2 * GAP
    sheet = Image.new("RGB", (max(margin + columns * cell_w, title_w), GAP + sum(heading_h + rows * row_h for rows in num_rows)), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for group, rows in zip(groups, num_rows, strict=True):
        draw.text((GAP, top + heading_h // 2), group.title, fill="black", anchor="lm", font_size=LINE)
        top += heading_h
        for number, (index, caption) in enumerate(zip(group.indices, group.captions, strict=True)):
            left, above = margin + number % columns * cell_w, top + number // columns * row_h
            for row, images in enumerate((group.originals, group.reconstructions)):
                picture = Image.fromarray(images[number]).resize((width * factor, height * factor), Image.Resampling.NEAREST)
                sheet.paste(picture, (left, above + row * cell_h))
            draw.text((left, above + 2 * cell_h), caption, fill="black", font_size=FONT)
            draw.text((left, above + 2 * cell_h + LINE), f"image {index}", fill="#666666", font_size=FONT)
        for row in range(rows):
            for side, name in enumerate(ROW_NAMES):
                middle = top + row * row_h + side * cell_h + cell_h // 2
                draw.text((6, middle), name, fill="black", anchor="lm", font_size=FONT)
        top += rows * row_h
    return sheet


class _Pair(NamedTuple):
    rank: float
    """The lowest are kept."""
    place: int
    """In the set."""
    value: float
    original: np.ndarray
    reconstruction: np.ndarray
