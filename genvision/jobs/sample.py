"""`genvision sample`: a pipeline folder in, images out; resumable, and the same images from any number of processes.

The images are drawn in chunks; process r of w draws chunks r, r + w, ... A folder receives PNG files; for a single file
(.npz, .png) finished chunks wait in a folder beside it and are joined at the end.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.images import Rounding
from genvision.jobs.draw_ahead import draw_batches
from genvision.jobs.image_writers import open_writer
from genvision.jobs.known_tokens import known_tokens
from genvision.jobs.output_queue import OutputQueue
from genvision.kernels.linear import Weights
from genvision.pipeline import ImagePipeline
from genvision.processes import fit_threads, process_state
from genvision.progress import Progress
from genvision.samplers.guidance import llamagen_stop
from genvision.samplers.randomness import ImageStreams, draw_labels
from genvision.streams import MAX_SEED

LabelLaw = Literal["balanced", "random"]
CHECKED_IMAGES = 4
"""Drawn again without block caching."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which images are wanted."""

    num: int
    """How many."""
    classes: tuple[int, ...]
    """Class indices to draw from."""
    seed: int = 0
    """Of the job; image i depends on (seed, i) alone."""
    labels: LabelLaw = "balanced"
    """`balanced` goes through the classes in turn; `random` draws each label from the image's own stream."""
    rounding: Rounding = "trunc127.5"
    """How floats become bytes."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"num must be at least 1, got {self.num}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed} is outside 0 .. 2^64 - 1")
        if self.labels not in get_args(LabelLaw):
            raise UserError(f"labels '{self.labels}' is unknown; choose one of {', '.join(get_args(LabelLaw))}")

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """int64 [B]."""
        if self.labels == "random":
            return draw_labels(self.seed, indices, list(self.classes))
        return torch.tensor([self.classes[i % len(self.classes)] for i in indices])


def sample(
    pipeline: ImagePipeline,
    request: SampleRequest,
    out: Path,
    *,
    batch_size: int = 32,
    known: Tensor | None = None,
) -> None:
    """Draw the images and write them to `out`: a folder of PNG files, `*.npz` (ADM's layout) or `*.png` (one grid).

    Args:
        known: tokens that all images share, int64 [h, w], -1 where one is to be drawn.

    Raises:
        UserError: `out` holds another job's results, or the sampler cannot take the known tokens.
    """
    state = process_state()
    pipeline = pipeline.to(state.device)
    if known is not None:
        pipeline.sampler.read_known(pipeline.generator, known.unsqueeze(0), 1)  # refused before anything is written
    job = describe(pipeline, request, known)
    writer = open_writer(out, job, pipeline.label_names, request)
    if state.is_main_process:
        writer.prepare()
    state.wait_for_everyone()
    chunks = [range(start, min(start + batch_size, request.num)) for start in range(0, request.num, batch_size)]
    mine = [chunk for chunk in chunks[state.process_index :: state.num_processes] if not writer.has(chunk)]
    progress = Progress(sum(map(len, mine)), "sampling", show=state.is_main_process)
    with OutputQueue(writer, progress.advance) as queue:
        for chunk, images in draw_batches(pipeline, request, mine, known):
            queue.put(chunk, images)
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish(chunks)
        if known is None:
            _print_cost(pipeline)
            _print_cache_error(pipeline, request)
    state.wait_for_everyone()


def _print_cost(pipeline: ImagePipeline) -> None:
    multiply_adds = pipeline.sampler.multiply_adds(pipeline.generator)
    if multiply_adds is not None:
        calls = pipeline.sampler.network_calls(pipeline.generator)
        gflops = 2 * multiply_adds / 1e9
        shown = f"{gflops:,.2f}" if gflops >= 1 else f"{gflops:.2g}"
        print(f"{calls} network calls, {shown} GFLOPs an image", file=sys.stderr, flush=True)


def _print_cache_error(pipeline: ImagePipeline, request: SampleRequest) -> None:
    """What block caching changes in the first images of the job, which are drawn once more with it and without."""
    sampler = pipeline.sampler
    if sampler.config.get("cache_interval", 1) == 1:
        return
    images = range(min(CHECKED_IMAGES, request.num))
    noise, labels = ImageStreams(request.seed, images), request.labels_of(images).to(pipeline.device)
    print(sampler.cache_report(pipeline.generator, labels, noise, guide=pipeline.guide), file=sys.stderr, flush=True)


def sample_from_folder(
    model: Path,
    out: Path,
    *,
    complete: Path | None = None,
    keep: float | None = None,
    init: Path | None = None,
    mask: Path | None = None,
    batch_size: int = 32,
    **options: Any,
) -> None:
    """`sample` with everything as the command line gives it.

    Args:
        complete: an image whose upper part `keep` all images share.
        init: an image that all images share where `mask` is black.
        options: see `open_job`.

    Raises:
        UserError: the folder is no model, a class is unknown, an option or a picture is impossible, or `out` is occupied.
    """
    pipeline, request = open_job(model, batch_size=batch_size, **options)
    known = known_tokens(pipeline, complete=complete, keep=keep, init=init, mask=mask)
    sample(pipeline, request, out, batch_size=batch_size, known=known)


def open_job(
    model: Path,
    *,
    num: int = 16,
    classes: str = "all",
    seed: int = 0,
    labels: LabelLaw = "balanced",
    rounding: Rounding = "trunc127.5",
    sampler_options: dict[str, Any] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    cfg_interval: int | None = None,
    guide: Path | None = None,
    dtype: str = "float32",
    weights: Weights = "float32",
    batch_size: int = 1,
) -> tuple[ImagePipeline, SampleRequest]:
    """The pipeline with its sampler set as asked for, and the images that are wanted of it.

    Args:
        classes: indices or names, separated by commas, or `all`.
        sampler_options: changes of the model's default protocol; those given as None stay.
        guidance_interval: progress from noise to data, or parts of the tokens, between which guidance is on.
        cfg_interval: the same in LlamaGen's terms.
        guide: folder of a weaker model to guide with (autoguidance).
        dtype: of the generator.
        weights: see `ImagePipeline.prepare`; the pipeline is on its device and prepared.
        batch_size: images at a time.

    Raises:
        UserError: the folder is no model, a class is unknown, or an option is impossible.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    fit_threads()
    pipeline = ImagePipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    if classes != "all" and pipeline.generator.is_unconditional:
        raise UserError("--classes: this model is unconditional, so labels make no difference; leave it out")
    if classes == "all":
        chosen = list(range(len(pipeline.label_names)))
    else:
        chosen = pipeline.label_ids([name.strip() for name in classes.split(",")])
    options = dict(sampler_options or {})
    if guidance_interval is not None and cfg_interval is not None:
        raise UserError("guidance-interval and cfg-interval say the same thing in two ways; give one of them")
    if guidance_interval is not None:
        options["guidance_start"], options["guidance_stop"] = guidance_interval
    if cfg_interval is not None:
        if not pipeline.tokenizer.spec.discrete:
            raise UserError("cfg-interval counts tokens, and this model draws latents; give guidance-interval")
        options["guidance_stop"] = llamagen_stop(cfg_interval, pipeline.generator.num_tokens)
    if guide is not None:
        pipeline.guide = ImagePipeline.from_pretrained(guide, torch_dtype=getattr(torch, dtype)).generator
    pipeline.sampler = pipeline.sampler.with_options(**options)
    pipeline.sampler.check(pipeline.generator, pipeline.guide)
    pipeline.to(process_state().device).prepare(weights, batch_size=batch_size)
    return pipeline, SampleRequest(num=num, classes=tuple(chosen), seed=seed, labels=labels, rounding=rounding)


def describe(pipeline: ImagePipeline, request: SampleRequest, known: Tensor | None = None) -> dict[str, Any]:
    """Everything that determines the images; two jobs with equal descriptions draw equal images."""
    options = {name: value for name, value in dict(pipeline.sampler.config).items() if not name.startswith("_")}
    facts = {
        "num": request.num,
        "classes": list(request.classes),
        "labels": request.labels,
        "seed": request.seed,
        "rounding": request.rounding,
        "sampler": {"name": type(pipeline.sampler).__name__, **options},
        **{f"{name}_hash": value for name, value in pipeline.hashes().items()},
        "dtype": str(next(pipeline.generator.parameters()).dtype).removeprefix("torch."),
        "network_calls": pipeline.sampler.network_calls(pipeline.generator),
        "known": known.flatten().tolist() if known is not None else None,
    }
    if pipeline.sampler.config.get("cache_interval", 1) != 1:
        facts["block_runs"] = list(pipeline.sampler.block_runs(pipeline.generator, pipeline.guide))
    if pipeline.weights != "float32":
        facts["weights"] = pipeline.weights
    return facts
