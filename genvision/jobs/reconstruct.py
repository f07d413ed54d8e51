"""`genvision reconstruct`: how much of the user's own images a tokenizer keeps, in numbers and as a picture, on one or many processes."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions, load_extractor
from genvision.eval.reconstruction import ReconstructionResult, reconstruct
from genvision.eval.report import write_json
from genvision.images import save_png
from genvision.jobs.output import check_output
from genvision.processes import process_state
from genvision.tokenizers.base import content_hash, load_tokenizer
from genvision.tokenizers.lpips import LPIPSOptions, load_lpips
from genvision.tokenizers.perceptual import TimmPerceptual


def reconstruct_data(
    tokenizer: Path,
    data: str,
    out: Path,
    *,
    image_size: int | None = None,
    extractor: str = "inception",
    options: ExtractorOptions,
    lpips: bool = False,
    lpips_weights: Path | None = None,
    vgg_weights: Path | None = None,
    perceptual: str | None = None,
    perceptual_weights: Path | None = None,
    perceptual_size: int | None = None,
    num: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> ReconstructionResult:
    """Measure, and write `results.json`, `reconstructions.png` and, for discrete codes, `codes.npz` (`counts` [K]) into `out`.

    Args:
        options: its device and leave to download also hold for LPIPS.
        lpips: measure LPIPS, too; a weights file says so as well.
        perceptual: measure the distance on the features of this timm model, too; `perceptual_weights` is a file of its weights, and images
            are resized to `perceptual_size` for it.

    Returns:
        The result, on every process; the main one writes.

    Raises:
        UserError: `out` is occupied; or see `reconstruct`, `load_extractor` and `load_lpips`.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {num_workers}")
    check_output(out)
    on_cpu = torch.device(options.device).type == "cpu"
    state = process_state(options.device)
    device = options.device if on_cpu or state.num_processes == 1 else str(state.device)
    network = load_tokenizer(tokenizer).to(device)
    size = network.spec.image_size if image_size is None else image_size
    network.check_image_size(size)
    with state.main_process_first():  # it alone fetches what is missing
        features = None if extractor == "none" else load_extractor(extractor, replace(options, device=device))
        metric = None
        if lpips or lpips_weights is not None or vgg_weights is not None:
            files = LPIPSOptions(lpips_weights=lpips_weights, vgg_weights=vgg_weights, download=options.download, device=device)
            metric = load_lpips(files)
        distance = None
        if perceptual is not None:
            distance = TimmPerceptual(perceptual, weights=perceptual_weights, pretrained=options.download, image_size=perceptual_size).to(
                device
            )
    outcome = reconstruct(
        network,
        open_source(data),
        image_size=size,
        extractor=features,
        lpips=metric,
        perceptual=distance,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        num_images=num,
        tokenizer_name=str(tokenizer),
        tokenizer_hash=content_hash(network),
        show_progress=True,
    )
    if state.is_main_process:
        write_json(outcome.result, out / "results.json")
        save_png(outcome.grid(), out / "reconstructions.png")
        if outcome.code_counts is not None:
            _save_counts(outcome.code_counts, out / "codes.npz")
    return outcome.result


def _save_counts(counts: np.ndarray, path: Path) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, counts=counts)
    part.replace(path)
