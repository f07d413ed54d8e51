"""`genvision neighbours`: the training images that generated ones resemble most, as a picture, numbers and arrays."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions, load_extractor
from genvision.eval.neighbour_sheet import neighbour_sheet
from genvision.eval.neighbours import NeighbourConfig, NeighbourSearch, NeighboursResult, find_neighbours
from genvision.eval.report import write_json
from genvision.images import save_png
from genvision.jobs.output import check_one_process, check_output


def search_neighbours(
    generated: str,
    train: str,
    out: Path,
    *,
    held_out: str | None = None,
    extractor: str = "inception",
    options: ExtractorOptions,
    image_size: int | None = None,
    config: NeighbourConfig,
    num_shown: int = 16,
    num_workers: int = 0,
    show_progress: bool = True,
) -> NeighboursResult:
    """Search, and write `results.json`, `neighbours.png` and `neighbours.npz` into `out`.

    The arrays: `generated` [K] and `held_out` [M], places of the images that were taken; for each space `SPACE_indices` [K + M, n] into
    the training set and `SPACE_distances` [K + M, n].

    Args:
        extractor: see `load_extractor`; `none` compares pixels only.
        num_shown: rows of the picture.

    Raises:
        UserError: `out` is occupied; see `find_neighbours` and `load_extractor`.
    """
    check_one_process("genvision neighbours")
    check_output(out)
    if num_workers < 0 or num_shown < 1:
        raise UserError(f"workers must be at least 0 and rows at least 1, got {num_workers} and {num_shown}")
    sources = open_source(generated), open_source(train)
    search = find_neighbours(
        *sources,
        held_out=None if held_out is None else open_source(held_out),
        extractor=None if extractor == "none" else load_extractor(extractor, options),
        image_size=image_size,
        config=config,
        num_workers=num_workers,
        num_shown=num_shown,
        show_progress=show_progress,
    )
    save_png(neighbour_sheet(search, *sources, image_size=image_size, num_shown=num_shown), out / "neighbours.png")
    _save_arrays(search, out / "neighbours.npz")
    write_json(search.result, out / "results.json")
    return search.result


def _save_arrays(search: NeighbourSearch, path: Path) -> None:
    arrays: dict[str, Any] = {"generated": search.generated}
    if search.held_out is not None:
        arrays["held_out"] = search.held_out
    for space, found in search.spaces.items():
        arrays |= {f"{space}_indices": found.indices, f"{space}_distances": found.distances}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)
