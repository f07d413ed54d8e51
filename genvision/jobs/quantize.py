"""`genvision quantize`: what rounding a model's weights changes, and a model folder with ternary weights of 2 bits.

float16 and int8 are made when a model is loaded (`genvision sample --weights int8`), so of these there is only the check.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from genvision.card import write_card
from genvision.errors import UserError
from genvision.eval.job import software_versions
from genvision.eval.report import write_json
from genvision.jobs.drawing_memory import drawing_memory
from genvision.jobs.output import check_one_process, check_output
from genvision.jobs.quantize_check import can_recognise, compare_pipelines, shows_digits
from genvision.jobs.quantize_report import Check, Memory, QuantizationResult, Storage, format_result
from genvision.kernels.linear import FEW_ROWS, Weights, choose_layout
from genvision.layers.full_precision import linears_to_round
from genvision.layers.packed_storage import is_packed, packed_layers, save_packed, tensor_bytes
from genvision.layers.ternarize import ternarize_linears
from genvision.layers.ternary import Measure
from genvision.pipeline import INDEX, ImagePipeline, read_index, save_parts
from genvision.processes import choose_device, fit_threads
from genvision.progress import Progress
from genvision.streams import MAX_SEED
from genvision.tokenizers.base import content_hash
from genvision.training.distill import distill_ternary
from genvision.training.state import PART, write_atomically

RoundedWeights = Literal["float16", "int8", "ternary"]
Scales = Literal["row", "matrix"]
FIRST_OF_POOL = 2**32
"""Number of the first image that is drawn for calibration: none of them is drawn for the check, too."""
BYTES = {"float16": 2, "int8": 1}
"""Layout to the bytes of a weight; others have four."""


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How weights are rounded, and on which images that is looked at."""

    weights: RoundedWeights
    """What they become."""
    measure: Measure = "mean"
    """ternary: what of |W| gives the scale."""
    scales: Scales = "row"
    """ternary: a scale for every output row, or one for each matrix."""
    exclude: tuple[str, ...] = ()
    """ternary: layers that stay floats besides those that always do."""
    distill_steps: int = 0
    """ternary: steps of calibration against the float model."""
    distill_lr: float = 1e-3
    """Its highest learning rate."""
    distill_images: int = 4096
    """Images that the float model draws for it, at most; with few of them weights learn these by heart."""
    num: int = 256
    """Images of the check."""
    seed: int = 0
    """Of the images."""
    batch_size: int = 64
    """Images at a time."""
    device: str | None = None
    """cuda, cpu, ...; for ternary weights the best there is unless told, for others the CPU."""

    def __post_init__(self) -> None:
        if self.weights not in get_args(RoundedWeights):
            raise UserError(f"weights '{self.weights}' is unknown; choose one of {', '.join(get_args(RoundedWeights))}")
        for name in ("num", "batch_size", "distill_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.distill_steps < 0:
            raise UserError(f"distill_steps must be at least 0, got {self.distill_steps}")
        if not self.distill_lr > 0:
            raise UserError(f"distill_lr must be above 0, got {self.distill_lr}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed} is outside 0 .. 2^64 - 1")
        if self.weights != "ternary" and (self.exclude or self.distill_steps):
            raise UserError(f"exclude and distill_steps are for ternary weights; leave them out with {self.weights}")


def quantize_folder(
    model: Path,
    options: QuantizationOptions,
    *,
    out: Path | None = None,
    check: bool = False,
    memory: bool = False,
    max_kl: float | None = None,
    max_error: float | None = None,
    json_file: Path | None = None,
) -> QuantizationResult:
    """Round, look, and write what was asked for; prints the table.

    Args:
        model: pipeline folder with float weights; it stays as it is.
        out: new pipeline folder for ternary weights; nothing is written where a limit is exceeded.
        check: compare predictions and images with those of the float model.
        memory: measure what drawing takes, in processes of their own.
        max_kl: highest mean KL in nats a token, for models of tokens; a limit says `check`.
        max_error: highest mean relative distance of predictions, for models of latents.
        json_file: file for the result.

    Raises:
        UserError: the folder or the options are impossible, `out` is occupied, or a limit is exceeded.
    """
    began = time.monotonic()
    check = check or max_kl is not None or max_error is not None
    _check_request(model, options, out=out, check=check, memory=memory, json_file=json_file)
    fit_threads()
    device = choose_device(options.device if options.device is not None or options.weights == "ternary" else "cpu")
    before, after = (ImagePipeline.from_pretrained(model).to(device) for _ in range(2))  # with a sampler each, which keeps tables
    _check_limits(before, max_kl, max_error)
    losses = _round(before, after, options)
    found = compare_pipelines(before, after, num=options.num, seed=options.seed, batch_size=options.batch_size) if check else None
    exceeded = _exceeded(found, max_kl, max_error) if found is not None else None
    if exceeded is not None:
        out = None
    if out is not None:
        _write(after, out, _provenance(before, options))
    ternary = options.weights == "ternary"
    result = QuantizationResult(
        model=str(model),
        weights=options.weights,
        measure=options.measure if ternary else None,
        scales=options.scales if ternary else None,
        exclude=list(options.exclude),
        distill_steps=options.distill_steps,
        distill_loss=_ends(losses),
        storage=_storage(before.generator, after.generator, options.weights),
        check=found,
        memory=_memory(model, out, options.weights) if memory and exceeded is None else None,
        out=str(out) if out is not None else None,
        seconds=round(time.monotonic() - began, 1),
        versions=software_versions(),
        notes=_notes(before, found),
    )
    print(format_result(result), flush=True)
    if json_file is not None:
        write_json(result, json_file)
    if exceeded is not None:
        raise UserError(exceeded)
    return result


def _check_request(
    model: Path, options: QuantizationOptions, *, out: Path | None, check: bool, memory: bool, json_file: Path | None
) -> None:
    """Raises UserError for what cannot be done, before anything is loaded."""
    check_one_process("genvision quantize")
    read_index(model)
    if is_packed(model / "generator"):
        raise UserError(f"{model}: its weights are ternary already; give the folder with float weights")
    if out is None and not check and not memory:
        raise UserError("nothing to do; give --check to see what rounding changes, or --out for a folder with ternary weights")
    if out is not None and options.weights != "ternary":
        raise UserError(
            f"--out: {options.weights} weights are made when a model is loaded and stored nowhere; leave it out, and draw with "
            f"genvision sample --weights {options.weights}"
        )
    if out is not None and out.resolve().is_relative_to(model.resolve()):
        raise UserError(f"{out}: lies within the model, which stays as it is; choose another --out")
    if out is not None:
        check_output(out)
    if options.weights != "ternary" and (options.measure, options.scales) != ("mean", "row"):
        raise UserError(f"--measure and --scales are for ternary weights, not for {options.weights}; leave them out")
    if memory and options.weights == "ternary" and out is None:
        raise UserError("--memory loads the folder with ternary weights; give --out, too")
    if json_file is not None and json_file.is_dir():
        raise UserError(f"{json_file}: is a folder; give the name of a file in it")


def _check_limits(pipeline: ImagePipeline, max_kl: float | None, max_error: float | None) -> None:
    in_tokens = pipeline.tokenizer.spec.discrete
    if max_kl is not None and not in_tokens:
        raise UserError("--max-kl is for models of tokens, and this one predicts latents; give --max-error")
    if max_error is not None and in_tokens:
        raise UserError("--max-error is for models of latents, and this one predicts tokens; give --max-kl")


def _exceeded(check: Check, max_kl: float | None, max_error: float | None) -> str | None:
    """What is above its limit, or cannot be compared with it."""
    if max_kl is not None and check.kl is not None and not check.kl <= max_kl:
        return f"mean KL {check.kl:.3g} nats a token is above --max-kl {max_kl:g}, so nothing was written"
    if max_error is not None and check.error is not None and not check.error <= max_error:
        return f"mean distance of predictions {check.error:.3g} is above --max-error {max_error:g}, so nothing was written"
    return None


def _round(before: ImagePipeline, after: ImagePipeline, options: QuantizationOptions) -> list[float]:
    """Round the weights of `after` in place; gives the losses of calibration."""
    if options.weights != "ternary":
        after.prepare(options.weights, batch_size=options.batch_size)
        return []
    losses: list[float] = []
    how: dict[str, Any] = {"measure": options.measure, "per_row": options.scales == "row", "exclude": options.exclude}
    if options.distill_steps:
        ternarize_linears(after.generator, **how, packed=False)
        progress = Progress(options.distill_steps, "calibrating", unit="steps")
        losses = distill_ternary(
            before.generator,
            after.generator,
            _batches(before, options),
            steps=options.distill_steps,
            lr=options.distill_lr,
            seed=options.seed,
            told=lambda _, loss: progress.advance(note=f"loss {loss:.4g}"),
        )
        progress.close()
    ternarize_linears(after.generator, **how)
    return losses


def _batches(pipeline: ImagePipeline, options: QuantizationOptions) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end of what the float model draws, in a new order each time it has been gone through."""
    labels = torch.arange(min(options.distill_images, options.distill_steps * options.batch_size)) % pipeline.generator.num_classes
    progress = Progress(len(labels), "drawing for calibration")
    parts = []
    for rows in torch.arange(len(labels)).split(options.batch_size):
        parts.append(pipeline.draw_codes(labels[rows], seed=options.seed, indices=(rows + FIRST_OF_POOL).tolist())[0])
        progress.advance(len(rows))
    progress.close()
    codes, labels = torch.cat(parts), labels.to(pipeline.device)  # a copy, since gradients refuse tensors made in inference mode
    shuffled = torch.Generator().manual_seed(options.seed % 2**63)
    size, position = min(options.batch_size, len(labels)), 0
    while True:
        for rows in torch.randperm(len(labels), generator=shuffled).split(size):
            if len(rows) == size:
                yield {
                    "codes": codes[rows],
                    "labels": labels[rows],
                    "positions": torch.arange(position, position + size, device=codes.device),
                }
                position += size


def _ends(losses: list[float]) -> tuple[float, float] | None:
    if not losses:
        return None
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def _storage(before: Any, after: Any, weights: RoundedWeights) -> Storage:
    total, num_weights = tensor_bytes(before), sum(parameter.numel() for parameter in before.parameters())
    layers: list[Any] = list((packed_layers(after) if weights == "ternary" else linears_to_round(before)).values())
    rounded = sum(layer.in_features * layer.out_features for layer in layers)
    left = tensor_bytes(after)
    if weights != "ternary":  # a product that a model was prepared with says nothing of its size
        scales = 4 * sum(layer.out_features for layer in layers) if weights == "int8" else 0
        left = total - rounded * (4 - BYTES.get(choose_layout(weights, FEW_ROWS), 4)) + scales
    return Storage(bytes_before=total, bytes_after=left, layers=len(layers), rounded_share=rounded / num_weights)


def _memory(model: Path, out: Path | None, weights: RoundedWeights) -> Memory:
    made_when_loaded: Weights = "float32" if weights == "ternary" else weights
    before, after = drawing_memory(model, "float32"), drawing_memory(out or model, made_when_loaded)
    return Memory(loaded_before=before.loaded, loaded_after=after.loaded, peak_before=before.peak, peak_after=after.peak)


def _notes(pipeline: ImagePipeline, check: Check | None) -> list[str]:
    if check is None or not shows_digits(pipeline) or can_recognise():
        return []
    return ["digits are recognised with scikit-learn only; pip install 'genvision[digits]'"]


def _provenance(before: ImagePipeline, options: QuantizationOptions) -> dict[str, Any]:
    """Facts for the model card."""
    facts: dict[str, Any] = {
        "weights": "ternary, 2 bits each; only ImagePipeline.from_pretrained reads them, not the generator's own from_pretrained",
        "made_of": f"generator {content_hash(before.generator)}",
        "measure": options.measure,
        "scales": options.scales,
        "distill_steps": options.distill_steps,
    }
    return facts | ({"exclude": list(options.exclude)} if options.exclude else {})


def _write(pipeline: ImagePipeline, out: Path, provenance: dict[str, Any]) -> None:
    """The pipeline folder; either all of it is there afterwards, or nothing."""
    part, generator = out.with_name(f".{out.name}{PART}"), pipeline.generator
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_parts(part, {"tokenizer": pipeline.tokenizer, "sampler": pipeline.sampler}, pipeline.label_names)
        save_packed(generator, part / "generator", **{name: provenance[name] for name in ("measure", "scales", "distill_steps")})
        index = read_index(part) | {"generator": [type(generator).__module__, type(generator).__name__]}
        write_atomically(part / INDEX, json.dumps(index, indent=2) + "\n")
        write_card(part / "README.md", generator, pipeline.tokenizer, pipeline.sampler, pipeline.label_names, provenance)
        if out.exists():  # and is empty
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
