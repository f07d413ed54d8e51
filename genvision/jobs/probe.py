"""`genvision probe`: what the frozen features of a model folder's generator know of real images."""

from pathlib import Path
from typing import Any

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.probe import ProbeResult
from genvision.eval.probe import probe as run
from genvision.eval.probe_config import ProbeConfig
from genvision.eval.probe_report import probe_chart
from genvision.eval.report import write_json, write_text
from genvision.jobs.output import check_one_process, check_output
from genvision.pipeline import ImagePipeline
from genvision.processes import choose_device
from genvision.tokenizers.base import content_hash


def parse_layers(text: str) -> tuple[int, ...] | None:
    """`all` (None), one number, or numbers separated by commas.

    Raises:
        UserError: the text is neither.
    """
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"layer '{text}': expected all, a number, or numbers separated by commas") from None


def probe_config(*, layer: str, pooling: str, probe: str = "knn,linear", **options: Any) -> ProbeConfig:
    """Options as the command line gives them.

    Args:
        layer: see `parse_layers`.
        pooling, probe: names separated by commas.

    Raises:
        UserError: one of them is impossible.
    """
    poolings, probes = (tuple(name.strip() for name in names.split(",")) for names in (pooling, probe))
    return ProbeConfig(layers=parse_layers(layer), poolings=poolings, probes=probes, **options)  # type: ignore[arg-type]


def probe_folder(
    model: Path,
    train: str,
    test: str,
    out: Path,
    *,
    config: ProbeConfig,
    num_train: int | None = None,
    num_test: int | None = None,
    num_workers: int = 0,
    device: str | None = None,
    show_progress: bool = True,
) -> ProbeResult:
    """Probe, and write `results.json` and `probe.svg` into `out`.

    Raises:
        UserError: `out` is occupied; see `ImagePipeline.from_pretrained` and `genvision.eval.probe.probe`.
    """
    check_one_process("genvision probe")
    check_output(out)
    if num_workers < 0:
        raise UserError(f"workers must be at least 0, got {num_workers}")
    pipeline = ImagePipeline.from_pretrained(model)
    result = run(
        pipeline.generator,
        pipeline.tokenizer,
        open_source(train),
        open_source(test),
        config=config,
        num_train=num_train,
        num_test=num_test,
        model=str(model),
        hashes={"generator": content_hash(pipeline.generator), "tokenizer": content_hash(pipeline.tokenizer)},
        num_workers=num_workers,
        device=choose_device(device),
        show_progress=show_progress,
    )
    write_json(result, out / "results.json")
    write_text(out / "probe.svg", probe_chart(result))
    return result
