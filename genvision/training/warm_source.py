"""Where a run's first weights come from: a model folder, a pipeline folder, or the folder of another run, finished or not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from genvision.errors import UserError
from genvision.models.base import GENERATORS
from genvision.tokenizers.base import TOKENIZERS, load_component
from genvision.training.saved_tensors import SavedTensors
from genvision.training.state import CheckpointFolder, DamagedCheckpoint

REGISTRIES = {"generator": GENERATORS, "tokenizer": TOKENIZERS}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights, and what is known of the model that they belong to."""

    path: Path
    """The folder that they were read from."""
    what: str
    """In words: `generator`, or `average 0.9999 of step 5000`."""
    class_name: str
    """Of the model; of a run that is not finished its `model.name`."""
    options: dict[str, Any]
    """Constructor arguments; those that came from the data are missing where a run is not finished."""
    tensors: dict[str, Tensor]
    label_names: list[str] | None = None
    """Of the classes, where the folder names them."""
    tokenizer: Path | None = None
    """Of a generator: the folder of its tokenizer, where that is known."""


def read_source(path: str | Path, kind: str) -> Source:
    """The weights of a `generator` or a `tokenizer`.

    Args:
        path: a pipeline folder (with `generator/`, `tokenizer/`), a folder of one model (`config.json`), the folder of a run (its finished
            `model/`, or the first average in its newest checkpoint), or one checkpoint of a run.

    Raises:
        UserError: there is nothing of the kind, or it is damaged.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"init_from {path}: no such folder; give one written by genvision train or import")
    if (folder / "checkpoints").is_dir() and (folder / "model").is_dir():
        folder = folder / "model"
    if (folder / kind / "config.json").is_file():
        return _of_component(folder / kind, kind, folder)
    if (folder / "config.json").is_file():
        return _of_component(folder, kind, None)
    if (folder / "checkpoints").is_dir():
        return _of_newest_checkpoint(folder, kind)
    if (folder / "state.json").is_file():
        return _of_checkpoint(folder.parents[1], folder, kind)
    raise UserError(f"init_from {path}: holds no {kind} and no run; give a folder written by genvision train or import")


def _of_component(folder: Path, kind: str, pipeline: Path | None) -> Source:
    module = load_component(folder, REGISTRIES[kind], kind)
    options = {name: value for name, value in dict(module.config).items() if not name.startswith("_")}
    beside = pipeline / "tokenizer" if pipeline is not None and kind == "generator" else None
    return Source(
        path=folder,
        what=kind,
        class_name=type(module).__name__,
        options=options,
        tensors=module.state_dict(),
        label_names=_label_names(pipeline) if pipeline is not None else None,
        tokenizer=beside if beside is not None and beside.is_dir() else None,
    )


def _label_names(pipeline: Path) -> list[str] | None:
    """In the order of the classes; None where the folder names none."""
    try:
        named = json.loads((pipeline / "model_index.json").read_text()).get("id2label") or {}
        return [named[str(i)] for i in range(len(named))] or None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"init_from {pipeline}: model_index.json is missing or damaged, so the names of the classes cannot be read; give the folder "
            "of the generator in it"
        ) from error


def _of_newest_checkpoint(run: Path, kind: str) -> Source:
    checkpoints = CheckpointFolder(run / "checkpoints", keep=1)
    for step in reversed(checkpoints.steps()):
        try:
            return _of_checkpoint(run, checkpoints.path(step), kind)
        except DamagedCheckpoint:  # the run itself sets it aside when it goes on
            continue
    raise UserError(f"init_from {run}: the run is not finished and has no whole checkpoint yet; wait for one")


def _of_checkpoint(run: Path, folder: Path, kind: str) -> Source:
    """The first average, or the plain weights where the run keeps none."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        stage, model, decays = config["stage"], dict(config["model"]), config["train"]["ema_decays"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"init_from {run}: config.yaml is missing or damaged, so its checkpoints cannot be read") from error
    if stage != kind:
        raise UserError(f"init_from {run}: is the run of a {stage}, a {kind} is needed")
    step = int(folder.name.removeprefix("step_"))
    CheckpointFolder(folder.parent, keep=1).read(step)
    saved = SavedTensors(folder, f"ema_{decays[0]}" if decays else "model")
    tensors = {name: saved.rows(name, 0, shape[0] if shape else 1) for name, shape in saved.shapes.items()}
    if any(".base_layer." in name for name in tensors):
        raise UserError(f"init_from {folder}: holds adapters (lora) beside their base; let that run finish, and give its folder")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"init_from {folder}: {len(broken)} tensors hold NaN or infinity, {broken[0]} first; take an earlier checkpoint")
    tokenizer = Path(config["tokenizer"]).expanduser() if config.get("tokenizer") is not None else None
    return Source(
        path=folder,
        what=f"average {decays[0]} of step {step}" if decays else f"weights of step {step}",
        class_name=model.pop("name"),
        options=model,
        tensors=tensors,
        tokenizer=tokenizer if tokenizer is not None and tokenizer.is_dir() else None,
    )
