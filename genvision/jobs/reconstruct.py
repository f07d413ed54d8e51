"""`genvision reconstruct`: how much of the user's own images a tokenizer keeps, in numbers and as a picture."""

from pathlib import Path

import torch

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions, load_extractor
from genvision.eval.reconstruction import ReconstructionResult, reconstruct
from genvision.eval.report import write_json
from genvision.images import save_png
from genvision.tokenizers.base import load_tokenizer


def reconstruct_data(
    tokenizer: Path,
    data: str,
    out: Path,
    *,
    image_size: int | None = None,
    extractor: str = "inception",
    options: ExtractorOptions,
    num: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> ReconstructionResult:
    """Measure, and write `results.json` and `reconstructions.png` into `out`.

    Raises:
        UserError: `out` is occupied; or see `reconstruct`.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {num_workers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already holds another job's results; choose another --out")
    network = load_tokenizer(tokenizer).to(options.device)
    size = network.spec.image_size if image_size is None else image_size
    network.check_image_size(size)
    outcome = reconstruct(
        network,
        open_source(data),
        image_size=size,
        extractor=None if extractor == "none" else load_extractor(extractor, options),
        batch_size=batch_size,
        num_workers=num_workers,
        device=options.device,
        num_images=num,
        show_progress=True,
    )
    write_json(outcome.result, out / "results.json")
    save_png(outcome.grid(), out / "reconstructions.png")
    return outcome.result


def choose_device(name: str | None) -> str:
    """The device of that name, or the best there is.

    Raises:
        UserError: there is none of that name.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used ({' '.join(str(error).split())[:120]}); try cpu") from error
    return name
