"""`genvision cas`: what a classifier that has seen only generated images knows of real ones."""

from pathlib import Path

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.classification_accuracy import CASResult, classification_accuracy_score
from genvision.eval.classifier import ClassifierConfig
from genvision.eval.report import write_json
from genvision.jobs.output import check_one_process, check_output
from genvision.processes import choose_device


def score_by_classifier(
    generated: str,
    real: str,
    out: Path,
    *,
    baseline: str | None = None,
    image_size: int | None = None,
    config: ClassifierConfig,
    num_workers: int = 0,
    device: str | None = None,
    show_progress: bool = True,
) -> CASResult:
    """Train, test, and write `results.json` into `out`.

    Raises:
        UserError: `out` is occupied; or see `classification_accuracy_score`.
    """
    check_one_process("genvision cas")
    check_output(out)
    if num_workers < 0:
        raise UserError(f"workers must be at least 0, got {num_workers}")
    result = classification_accuracy_score(
        open_source(generated),
        open_source(real),
        baseline=None if baseline is None else open_source(baseline),
        image_size=image_size,
        config=config,
        num_workers=num_workers,
        device=choose_device(device),
        show_progress=show_progress,
    )
    write_json(result, out / "results.json")
    return result
