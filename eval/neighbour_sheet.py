"""The picture of a neighbour search: generated images with their nearest training images, and how near they are beside held-out ones.

Shapes: R rows of the sheet, n neighbours, images uint8 [..., S, S, 3].
"""

import numpy as np
from PIL import Image, ImageDraw

from genvision.data.sources import ImageSource
from genvision.eval.neighbours import NeighbourSearch, shown_rows
from genvision.eval.plots import nice_ticks
from genvision.eval.sets import stream_batches

MIN_CELL, MAX_CELL, FIRST_COLUMN = 64, 128, 104
GAP, BLOCK_GAP, LINE, FONT, TITLE = 4, 20, 18, 13, 16
CHART_HEIGHT, NUM_BINS, MIN_WIDTH = 200, 40, 680
GENERATED, HELD_OUT = "#1c5d99", "#c4500f"
INK, SOFT = "#17191e", "#5d6470"


def neighbour_sheet(
    search: NeighbourSearch, generated: ImageSource, train: ImageSource, *, image_size: int | None = None, num_shown: int = 16
) -> Image.Image:
    """A row for each shown image (see `shown_rows`), one block of n neighbours for each space, nearest first, distances below.

    Args:
        generated, train: the sources that were searched, with the same `image_size`.
    """
    num = len(search.generated)
    rows = shown_rows(search.spaces, num, num_shown)
    side = search.result.image_size
    factor = max(1, -(-MIN_CELL // side))
    cell = min(side * factor, MAX_CELL)
    num_neighbours = search.result.num_neighbours
    block = num_neighbours * (cell + GAP) - GAP
    lefts = [BLOCK_GAP + max(cell, FIRST_COLUMN) + BLOCK_GAP + i * (block + BLOCK_GAP) for i in range(len(search.spaces))]
    width = lefts[-1] + block + BLOCK_GAP
    row_height = cell + LINE + GAP
    num_nearest = (len(rows) + 1) // 2
    groups = [("nearest to the training set", rows[:num_nearest]), (f"others of {num:,}", rows[num_nearest:])]
    groups = [(title, members) for title, members in groups if members]
    top = BLOCK_GAP + 2 * LINE
    height = (
        top + sum(2 * LINE + len(members) * row_height for _, members in groups) + len(search.spaces) * (CHART_HEIGHT + BLOCK_GAP) + GAP
    )
    sheet = Image.new("RGB", (max(width, MIN_WIDTH), height), "white")
    draw = ImageDraw.Draw(sheet)

    mine = _load(generated, search.generated[rows], image_size)
    theirs = _load(train, np.concatenate([found.indices[rows].ravel() for found in search.spaces.values()]), image_size)
    _heading(draw, BLOCK_GAP, "generated", f"{search.result.num_generated:,} searched")
    for left, space in zip(lefts, search.spaces, strict=True):
        _heading(draw, left, f"nearest of {search.result.num_train:,} training images by {space}", _metric(search, space))
    for title, members in groups:
        draw.text((BLOCK_GAP, top + LINE), title, fill=INK, anchor="lm", font_size=TITLE)
        top += 2 * LINE
        for row in members:
            place = int(search.generated[row])
            _paste(sheet, mine[place], BLOCK_GAP, top, cell)
            draw.text((BLOCK_GAP, top + cell + 2), f"image {place}", fill=SOFT, font_size=FONT)
            for left, found in zip(lefts, search.spaces.values(), strict=True):
                for i, (index, distance) in enumerate(zip(found.indices[row], found.distances[row], strict=True)):
                    x = left + i * (cell + GAP)
                    _paste(sheet, theirs[int(index)], x, top, cell)
                    draw.text((x, top + cell + 2), _number(distance), fill=INK if i == 0 else SOFT, font_size=FONT)
            top += row_height
    for space in search.spaces:
        top += BLOCK_GAP
        _histogram(draw, search, space, (BLOCK_GAP, top, sheet.width - BLOCK_GAP, top + CHART_HEIGHT))
        top += CHART_HEIGHT
    return sheet


def _histogram(draw: ImageDraw.ImageDraw, search: NeighbourSearch, space: str, box: tuple[int, int, int, int]) -> None:
    """Distances to the nearest training image: generated as bars, held-out as an outline, both as shares of their set."""
    generated, held_out = search.nearest_distances(space)
    left, top, right, bottom = box[0], box[1] + 3 * LINE, box[2], box[3] - 2 * LINE
    both = generated if held_out is None else np.concatenate([generated, held_out])
    low, high = float(both.min()), float(both.max())
    high = high if high > low else low + 1.0
    shares = [np.histogram(values, NUM_BINS, (low, high))[0] / len(values) for values in (generated, held_out) if values is not None]
    tallest = max(float(share.max()) for share in shares)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    def y_of(share: float) -> float:
        return bottom - share / tallest * (bottom - top)

    draw.text((left, box[1] + LINE // 2), f"distance to the nearest training image by {space}", fill=INK, anchor="lm", font_size=TITLE)
    edges = np.linspace(left, right, NUM_BINS + 1)
    for i, share in enumerate(shares[0]):
        if share:
            draw.rectangle((edges[i] + 1, y_of(share), edges[i + 1] - 1, bottom), fill="#9dbcd6")
    words = [("generated", GENERATED)]
    if held_out is not None:
        outline = [(x, y_of(share)) for i, share in enumerate(shares[1]) for x in (edges[i], edges[i + 1])]
        draw.line([(left, bottom), *outline, (right, bottom)], fill=HELD_OUT, width=2)
        words.append(("held-out real", HELD_OUT))
        for percent in (1, 5):
            x = x_of(float(np.percentile(held_out, percent)))
            draw.line((x, top - LINE + 4, x, bottom), fill=SOFT)
        x = x_of(float(np.percentile(held_out, 5)))
        draw.text((x + 4, top - LINE + 2), "1 % and 5 % of held-out", fill=SOFT, anchor="lt", font_size=FONT)
    x = float(left)
    for word, colour in words:
        draw.rectangle((x, box[1] + LINE + 4, x + 12, box[1] + LINE + 14), fill="#9dbcd6" if colour == GENERATED else colour)
        draw.text((x + 18, box[1] + LINE + 9), word, fill=SOFT, anchor="lm", font_size=FONT)
        x += 30 + draw.textlength(word, font_size=FONT)
    draw.text((x, box[1] + LINE + 9), _finding(search, space), fill=INK, anchor="lm", font_size=FONT)
    draw.line((left, bottom, right, bottom), fill=SOFT)
    for tick in nice_ticks(low, high, 8):
        draw.line((x_of(tick), bottom, x_of(tick), bottom + 4), fill=SOFT)
        draw.text((x_of(tick), bottom + 6), f"{tick:g}", fill=SOFT, anchor="mt", font_size=FONT)


def _finding(search: NeighbourSearch, space: str) -> str:
    result = search.result
    below = getattr(result, f"{space}_below_p5")
    if below is None:
        return "no held-out images to compare with"
    return f"{below:.1%} of generated images are nearer than the nearest 5 % of held-out ones"


def _metric(search: NeighbourSearch, space: str) -> str:
    result = search.result
    return f"{result.features_metric}, {result.extractor}" if space == "features" else "difference in levels (root mean square)"


def _heading(draw: ImageDraw.ImageDraw, left: int, title: str, below: str) -> None:
    draw.text((left, BLOCK_GAP // 2), title, fill=INK, font_size=TITLE)
    draw.text((left, BLOCK_GAP // 2 + LINE + 2), below, fill=SOFT, font_size=FONT)


def _load(source: ImageSource, indices: np.ndarray, image_size: int | None) -> dict[int, np.ndarray]:
    """Place in the set to the image."""
    loaded: dict[int, np.ndarray] = {}
    for batch in stream_batches(source, image_size, batch_size=64, indices=np.unique(indices)):
        loaded.update(zip(batch.indices.tolist(), batch.images, strict=True))
    return loaded


def _paste(sheet: Image.Image, image: np.ndarray, left: int, top: int, cell: int) -> None:
    picture = Image.fromarray(image)
    if picture.width != cell:
        picture = picture.resize((cell, cell), Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS)
    sheet.paste(picture, (left, top))


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"
