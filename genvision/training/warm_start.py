"""Weights-only start (`init_from`): a new run begins with the weights of a trained model, for other classes or at another resolution, too.

The model must be of the same class and the same sizes. What may differ is declared for each class in genvision.training.warm_rules:

- Classes. A class whose name both folders know keeps its row in label tables (and in the biases of heads that know classes). Without names
  on both sides, or without a single one in common, rows keep their numbers where there are equally many classes, and start new where not.
  The null class keeps its row; where one side has none it is new, or left out.
- Resolution. Learned position tables are interpolated bicubically over the grid, rows before it (start, class) stay. Tables of a sequence,
  RAR's places in an order too, are interpolated along it. Rotary and sine tables that a model computes are no weights and come out anew;
  the fixed tables that ViTok stores become what that model makes of them for images of other sizes.
- Parts that training adds or drops: projectors (REPA, MAGE-C), the embedding of a guidance scale, ViTok's mask token. They start new, or
  are left out.

Everything else is taken over bit for bit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.models.base import Generator
from genvision.tokenizers.base import load_tokenizer
from genvision.training.warm_rules import BY_CLASS, FREE, TOLD, Fit
from genvision.training.warm_source import read_source


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What became of a model's tensors and of those that it began with, by name."""

    source: str
    """Where the weights came from."""
    copied: tuple[str, ...]
    """Taken over as they are."""
    resized: tuple[str, ...]
    """Position tables for other places than the source has."""
    relabelled: tuple[str, ...]
    """Tables whose rows were put together class by class."""
    with_new_rows: tuple[str, ...]
    """Those of them in which a class, or the null class, has the model's own start."""
    new: tuple[str, ...]
    """With the model's own start."""
    dropped: tuple[str, ...]
    """Of the source, without a place in the model."""
    notes: tuple[str, ...]
    """On classes and options that differ."""

    def summary(self) -> str:
        """For people: one line, and one more on classes and options where these differ."""
        parts = [f"{len(self.copied)} tensors as they are"]
        for what, names in (("resized", self.resized), ("by class", self.relabelled), ("new", self.new), ("left out", self.dropped)):
            if names:
                parts.append(f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
        return "\n".join([f"init_from {self.source}: {'; '.join(parts)}", *(["; ".join(self.notes)] if self.notes else [])])


def warm_start(model: nn.Module, source: str | Path, *, label_names: Sequence[str] | None = None, tokenizer: Any = None) -> WarmStart:
    """Give a model that was just built the weights of a trained one.

    Args:
        model: a generator or a tokenizer, on the CPU; changed in place, and untouched where this fails.
        source: a pipeline folder, the folder of one model, of a run, or of a checkpoint: see `read_source`.
        label_names: of the model's classes, if they are known.
        tokenizer: of the run; where the source names its own, both must make the same codes.

    Raises:
        UserError: the source cannot be read, or is no start for this model; the message names the option that differs.
    """
    read = read_source(source, "generator" if isinstance(model, Generator) else "tokenizer")
    fit = Fit(model, read, label_names, str(source))
    if read.class_name not in (type(model).__name__, fit.family.model_name):
        raise UserError(
            f"init_from {source}: holds a {read.class_name}, this run trains a {type(model).__name__}; give a model of the same family"
        )
    _check_codes(fit)
    # an option that is None on one side follows from others there, so that the tensors tell
    _refuse(fit, [name for name in _differing(fit) if name not in TOLD and None not in (fit.options[name], read.options[name])])
    if tokenizer is not None and read.tokenizer is not None:
        _check_same_codes(fit, tokenizer, read.tokenizer)
    return _apply(fit)


def _apply(fit: Fit) -> WarmStart:
    own, given = fit.model.state_dict(), fit.source.tensors
    result: dict[str, Tensor] = {}
    became: dict[str, list[str]] = {"copied": [], "resized": [], "relabelled": [], "new": []}
    problems = [f"{name} is not in the model" for name in given if name not in own and not _is_optional(fit, name)]
    for name, ours in own.items():
        theirs = given[name].to(ours.dtype) if name in given else None
        rule = next((rule for pattern, rule in fit.family.tables.items() if fnmatchcase(name, pattern)), None)
        if theirs is None or not (theirs.shape == ours.shape if rule is None else _of_one_width(theirs, ours)):
            result[name] = ours
            became["new"].append(name)
            if not _is_optional(fit, name):
                problems.append(f"{name} is {_shape(theirs)} in the weights, {_shape(ours)} here")
            continue
        result[name] = theirs if rule is None else rule(fit, name, ours, theirs)
        same = theirs.shape == ours.shape and result[name].equal(theirs)
        became["copied" if same else "relabelled" if rule in BY_CLASS else "resized"].append(name)
    if problems:
        _refuse(fit, [name for name in _differing(fit) if name not in TOLD])
        raise UserError(f"init_from {fit.given}: {len(problems)} tensors do not fit, {problems[0]}; give a model of the same build")
    fit.model.load_state_dict(result)
    return WarmStart(
        source=f"{fit.given} ({fit.source.what})",
        **{what: tuple(names) for what, names in became.items()},
        with_new_rows=tuple(became["relabelled"]) if became["relabelled"] and None in fit.label_rows() else (),
        dropped=tuple(name for name in given if name not in own),
        notes=_notes(fit, bool(became["relabelled"])),
    )


def _check_codes(fit: Fit) -> None:
    """Raises UserError where the weights are for other codes than the run's tokenizer makes."""
    mend = "give the tokenizer that they were trained with"
    if (codes := fit.family.codes) is not None and codes.tensor in fit.source.tensors:
        tensors = (fit.source.tensors[codes.tensor], fit.model.state_dict()[codes.tensor])
        theirs, ours = (tensor.shape[codes.axis] - codes.extra for tensor in tensors)
        if theirs != ours:
            raise UserError(f"init_from {fit.given}: the weights are for {theirs} {codes.what}, the tokenizer has {ours}; {mend}")
    if isinstance(fit.model, Generator) and {"sequence_length"} <= fit.source.options.keys():
        theirs, ours = ("a sequence" if options.get("sequence_length") else "a grid" for options in (fit.source.options, fit.options))
        if theirs != ours:
            raise UserError(f"init_from {fit.given}: the weights are for codes that are {theirs}, the tokenizer makes {ours}; {mend}")


@torch.no_grad()
def _check_same_codes(fit: Fit, tokenizer: Any, folder: Path) -> None:
    """Raises UserError where two tokenizers make different things of one image: codes of equal numbers would mean other images.

    Decoders may differ. The run's size of images decides; a tokenizer that cannot read it is another one.
    """
    theirs, size = load_tokenizer(folder), fit.model.image_size(tokenizer.spec.downsample, tokenizer.spec.image_size)
    image = 2 * torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1
    try:
        ours_made, theirs_made = tokenizer.encode(image), theirs.encode(image)
        if tokenizer.spec.discrete:
            same = ours_made.shape == theirs_made.shape and float((ours_made == theirs_made).float().mean()) > 0.95  # near ties may fall
        else:
            same = ours_made.shape == theirs_made.shape and float((ours_made - theirs_made).norm() / theirs_made.norm()) < 0.02
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"init_from {fit.given}: was trained on the codes of {folder}, which makes others than this run's tokenizer; give that one, or "
            "the folder of the generator alone to take its weights all the same"
        )


def _differing(fit: Fit) -> list[str]:
    """Options that are known on both sides, not free, and not equal."""
    ours, theirs = fit.options, fit.source.options
    known = [name for name in ours if name in theirs and name not in FREE]
    return [name for name in known if json.dumps(ours[name], sort_keys=True) != json.dumps(theirs[name], sort_keys=True)]


def _refuse(fit: Fit, differing: list[str]) -> None:
    """Raises UserError where there are options that must not differ."""
    if differing:
        ours, theirs = ({name: _shown(options[name]) for name in differing} for options in (fit.options, fit.source.options))
        listed = ", ".join(f"model.{name} {theirs[name]} where here it is {ours[name]}" for name in differing)
        raise UserError(
            f"init_from {fit.given}: the weights were trained with other options, {listed}; set them so, or leave init_from out"
        )


def _shown(value: Any) -> str:
    """As YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _is_optional(fit: Fit, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in fit.family.optional)


def _notes(fit: Fit, relabelled: bool) -> tuple[str, ...]:
    notes = []
    if relabelled or (fit.label_names is not None and fit.source.label_names not in (None, fit.label_names)):
        rows, how = fit.classes
        kept = sum(row is not None for row in rows)
        notes.append(
            {
                "by name": f"classes: {kept} of {len(rows)} are known by name and keep their rows, {len(rows) - kept} are new",
                "by number": f"classes: {len(rows)}, each with the row of its number, as no names tell more",
                "new": f"classes: {len(rows)} new ones in place of {fit.count.num}",
            }[how]
        )
    told = [name for name in _differing(fit) if name in TOLD]
    return (*notes, *(f"model.{name} was {_shown(fit.source.options[name])}, now it is {_shown(fit.options[name])}" for name in told))


def _of_one_width(one: Tensor, other: Tensor) -> bool:
    return one.dim() == other.dim() and (one.dim() == 1 or one.shape[-1] == other.shape[-1])


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "one value"
