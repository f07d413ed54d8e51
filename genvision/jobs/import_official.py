"""`genvision import`: an official checkpoint becomes a component of a pipeline folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from genvision.card import write_card
from genvision.convert import load_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from genvision.pipeline import INDEX, ImagePipeline, read_index, save_parts
from genvision.presets import find_preset
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.training.state import write_atomically


def import_checkpoint(name: str, file: Path, out: Path, *, weights: str | None = None) -> list[str]:
    """Convert one file; run twice into one folder (tokenizer, generator), it makes a complete pipeline.

    Args:
        name: of a preset.
        file: the official checkpoint.
        out: pipeline folder, new or with other components in it.
        weights: which weights of a training checkpoint to take (`model`, `ema`).

    Returns:
        The components that are still missing.

    Raises:
        UserError: unknown preset; unreadable or unfitting file; the component is already there.
    """
    preset = find_preset(name)
    if (out / preset.component).exists():
        raise UserError(f"{out / preset.component}: already there; choose another --out, or delete it first")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / INDEX).is_file():
        raise UserError(f"{out}: already holds something that is no model; choose another --out")
    module: Any = load_official(preset.family, read_state_dict(file, weights), preset.config, source=str(file))
    parts: dict[str, Any] = {preset.component: module}
    label_names = None
    if preset.component == "generator":
        parts["sampler"] = AutoregressiveSampler(**preset.sampler)
        label_names = imagenet_label_names() if module.num_classes == 1000 else None
    fresh, index = not out.exists(), read_index(out) if (out / INDEX).is_file() else None
    try:
        save_parts(out, parts, label_names)
        missing = [part for part in ("tokenizer", "generator", "sampler") if not (out / part).is_dir()]
        if not missing:
            pipeline = ImagePipeline.from_pretrained(out)
            facts = {"imported": f"{name} from {file.name}", "source": preset.source}
            write_card(out / "README.md", pipeline.generator, pipeline.tokenizer, pipeline.sampler, pipeline.label_names, facts)
    except BaseException:
        _undo(out, list(parts), fresh, index)
        raise
    return missing


def _undo(out: Path, parts: list[str], fresh: bool, index: dict[str, Any] | None) -> None:
    """Leave the folder as it was found."""
    for path in [out] if fresh else [out / part for part in parts]:
        shutil.rmtree(path, ignore_errors=True)
    if index is not None:
        write_atomically(out / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (out / INDEX).unlink(missing_ok=True)


def imagenet_label_names() -> list[str]:
    """The 1,000 ImageNet class names by index, that is, in the order of sorted WordNet ids."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)
