"""`genvision fid`: draw images from a model and score them in one job, on any number of processes.

What the networks say of each batch goes to the disk as soon as it is known (genvision.eval.chunks), so a killed job goes on where it was,
a longer job takes over what a shorter one has drawn, and the feature sums are those of one undisturbed process. Pictures themselves
are kept only with `keep`.

Image i is the image i of `genvision sample` with the same options. Before anything that depends on the order is computed, images are put
in an order drawn from the seed, so that no score sees them sorted by class.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genvision.errors import UserError
from genvision.eval.chunks import CALLS, ChunkFolder
from genvision.eval.distributed import sum_over_processes
from genvision.eval.hygiene import hash_images, hash_of_set
from genvision.eval.job import EvaluationOptions, Plan, plan_evaluation
from genvision.eval.measurement import Measurement, shares
from genvision.eval.page import page_indices, write_page
from genvision.eval.report import write_json
from genvision.eval.result import EvaluationResult
from genvision.eval.scores import SetFacts
from genvision.jobs.image_writers import FolderWriter
from genvision.jobs.output_queue import OutputQueue
from genvision.jobs.sample import SampleRequest, describe, open_job
from genvision.pipeline import ImagePipeline
from genvision.processes import process_state
from genvision.progress import Progress


@dataclass(frozen=True, kw_only=True)
class SampledSet:
    """A sampling job as a set to be scored."""

    pipeline: ImagePipeline
    request: SampleRequest
    model: str
    """Name of the model in the result."""

    def description(self) -> dict[str, Any]:
        """What decides the images, but not how many there are."""
        return {key: value for key, value in describe(self.pipeline, self.request).items() if key not in ("num", "known")}

    def draw(self, indices: range | list[int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W, 3], and the network calls that each cost, int64 [B]."""
        labels = self.request.labels_of(indices)
        output = self.pipeline(labels, seed=self.request.seed, indices=indices, output_type="np", rounding=self.request.rounding)
        return output.images, output.network_calls.numpy()


def fid_from_folder(
    model: Path,
    reference: str | None,
    out: Path,
    *,
    batch_size: int = 64,
    keep: bool = False,
    page: bool = True,
    options: EvaluationOptions,
    **sampling: Any,
) -> EvaluationResult:
    """`fid` with everything as the command line gives it.

    Args:
        sampling: see `genvision.jobs.sample.open_job`.

    Raises:
        UserError: see `open_job`, `plan_evaluation` and `fid`.
    """
    pipeline, request = open_job(model, batch_size=batch_size, **sampling)
    sampled = SampledSet(pipeline=pipeline, request=request, model=str(model))
    return fid(sampled, plan_sampled(sampled, reference, options), out, batch_size=batch_size, keep=keep, page=page)


def plan_sampled(sampled: SampledSet, reference: str | None, options: EvaluationOptions) -> Plan:
    """How the images of a sampling job are to be scored; the reference is measured now.

    Raises:
        UserError: see `plan_evaluation`.
    """
    return plan_evaluation(
        reference,
        num=sampled.request.num,
        image_size=sampled.pipeline.image_size,
        label_names=sampled.pipeline.label_names,
        options=replace(options, image_size=sampled.pipeline.image_size),
    )


def fid(sampled: SampledSet, plan: Plan, out: Path, *, batch_size: int = 64, keep: bool = False, page: bool = True) -> EvaluationResult:
    """Draw and score; `out` gets results.json, page.html, chunks/ and, with `keep`, images/ (which `genvision evaluate` reads).

    Args:
        batch_size: images drawn at a time; part of the job, since another one moves features in the sixth digit.
        page: write page.html, too.

    Returns:
        The result, on every process.

    Raises:
        UserError: `out` holds another job.
    """
    began = time.monotonic()
    state = process_state()
    request = sampled.request
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    sampled.pipeline.to(state.device)
    chunks = ChunkFolder(out / "chunks", {**sampled.description(), "batch_size": batch_size})
    images = FolderWriter(out / "images", sampled.description(), request, sampled.pipeline.label_names) if keep else None
    if state.is_main_process:
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "chunks").is_dir()):
            raise UserError(f"{out}: already holds something else; choose another --out")
        chunks.prepare()
        if images is not None:
            images.prepare()
    state.wait_for_everyone()

    measurement, network_calls = _draw_all(sampled, plan, chunks, images, batch_size)
    measured = measurement.finish(request.num)
    order = np.random.default_rng(request.seed).permutation(request.num)
    labels = request.labels_of(range(request.num)).numpy()
    facts = SetFacts(
        name=sampled.model,
        content_hash=hash_of_set(measured.hashes),
        labels=labels[order],
        label_names=sampled.pipeline.label_names,
        label_law=request.labels,
        image_size=sampled.pipeline.image_size,
        crop="none",
        formats={},
        order=f"permuted with seed {request.seed}",
        numbers=order,
    )
    sampling = describe(sampled.pipeline, request) | {"network_calls": network_calls}
    result = plan.score(
        measured.reordered(order), facts, kind="fid", began=began, model=sampled.model, sampling=sampling, warnings=chunks.warnings
    )
    if state.is_main_process:
        write_json(result, out / "results.json")
        if page:
            indices = page_indices(labels, result.per_class)
            shown = np.concatenate([sampled.draw(indices[i : i + batch_size])[0] for i in range(0, len(indices), batch_size)])
            write_page(out / "page.html", result, shown, labels[indices], sampled.pipeline.label_names)
    state.wait_for_everyone()
    return result


def _draw_all(
    sampled: SampledSet, plan: Plan, chunks: ChunkFolder, images: FolderWriter | None, batch_size: int
) -> tuple[Measurement, float]:
    """This process's share of the images, read from the chunks that are there and drawn otherwise; and the network calls of an image,
    in the mean over all processes."""
    state = process_state()
    made_by = plan.networks.identities(plan.rows)
    everything = shares(sampled.request.num, batch_size)
    share = everything[state.process_index :: state.num_processes]
    measurement, calls = plan.measurement(), 0
    progress = Progress(sum(map(len, share)), "sampling and scoring", show=plan.options.show_progress and state.is_main_process)
    with OutputQueue(images, lambda num: None) if images is not None else nullcontext() as queue:
        for chunk in share:
            rows = chunks.load(chunk, plan.rows, made_by) if images is None or images.has(chunk) else None
            if rows is None:
                drawn, cost = sampled.draw(chunk)
                if queue is not None:
                    queue.put(chunk, drawn)
                rows = {**plan.networks.rows(drawn, plan.rows), "hashes": hash_images(drawn), CALLS: cost}
                chunks.store(chunk, rows, made_by)
            calls += int(rows.pop(CALLS).sum())
            measurement.add(np.arange(chunk.start, chunk.stop), rows, rows["hashes"])
            progress.advance(len(chunk))
    progress.close()
    state.wait_for_everyone()
    if images is not None and state.is_main_process:
        images.finish(everything)
    mean = sum_over_processes(calls) / sampled.request.num
    return measurement, int(mean) if mean == int(mean) else mean
