"""`genvision evaluate`: a set of images against a reference, with the result as table, JSON and page."""

from pathlib import Path

import numpy as np

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.cache import StatisticsCache
from genvision.eval.features import ExtractorOptions
from genvision.eval.job import EvaluationOptions
from genvision.eval.job import evaluate as run
from genvision.eval.page import page_indices, write_page
from genvision.eval.report import write_json
from genvision.eval.result import EvaluationResult
from genvision.eval.sets import stream_batches
from genvision.processes import choose_device, process_state


def evaluation_options(
    *,
    protocol: str | None,
    metrics: str | None,
    extractor: str | None,
    image_size: int | None,
    inception_weights: Path | None,
    dinov2_weights: Path | None,
    download: bool,
    cache: Path | None,
    no_cache: bool,
    batch_size: int,
    workers: int,
    device: str | None,
) -> EvaluationOptions:
    """Options as the command line gives them.

    Raises:
        UserError: two of them contradict each other, or the device is not there.
    """
    if no_cache and cache is not None:
        raise UserError("--cache and --no-cache contradict each other; give one of them")
    chosen = choose_device(device)
    state = process_state(chosen)
    digits = extractor == "digits" and protocol is None
    return EvaluationOptions(
        protocol="digits" if digits else protocol or "adm",
        metrics=tuple(name.strip() for name in metrics.split(",")) if metrics is not None else None,
        extractor=extractor,
        networks=ExtractorOptions(
            inception_weights=inception_weights,
            dinov2_weights=dinov2_weights,
            download=download,
            device=chosen if device is not None else str(state.device),
        ),
        image_size=image_size,
        batch_size=batch_size,
        num_workers=workers,
        cache=None if no_cache else StatisticsCache(cache),
    )


def evaluate_data(
    generated: str, reference: str | None, *, json: Path | None = None, html: Path | None = None, options: EvaluationOptions
) -> EvaluationResult:
    """Score, and write what was asked for.

    Raises:
        UserError: an output is a folder; or see `genvision.eval.job.evaluate`.
    """
    for file in (json, html):
        if file is not None and file.is_dir():
            raise UserError(f"{file}: is a folder; give the name of a file in it")
    source = open_source(generated)
    result = run(source, reference, options=options)
    if process_state().is_main_process:
        if json is not None:
            write_json(result, json)
        if html is not None:
            chosen = np.array(page_indices(source.labels, result.per_class))
            batches = stream_batches(source, options.image_size, batch_size=options.batch_size, indices=chosen)
            images = np.concatenate([batch.images for batch in batches])
            write_page(html, result, images, source.labels[chosen], source.label_names)
    process_state().wait_for_everyone()
    return result
