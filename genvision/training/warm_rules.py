"""What of a model may differ from the weights that it begins with, declared for each class in `FAMILIES`.

Shapes: N places of codes or patches behind P rows of a prefix (start, class), C width, K codes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.layers.embed import resize_position_table
from genvision.training.warm_source import Source

FREE = {
    *("image_size", "input_size", "grid_size", "sequence_length"),
    *("num_classes", "class_dropout", "class_slots", "null_slot"),
    *("dropout", "token_dropout", "attention_dropout", "residual_dropout", "mlp_dropout", "drop_path", "init_std"),
    *("commitment_beta", "codebook_weight", "entropy_weight", "kl_weight"),
    *("align_depth", "align_dims", "align_hidden", "contrastive_dim", "scale_conditioned", "code_lengths"),
}
"""Options that may differ: places, classes, what training alone sees, and parts that may be new or left out."""
TOLD = {"path", "prediction", "time_input", "time_scale", "latent_mean", "latent_std", "quantizer_options"}
"""Options that may differ, too, but change what the same weights mean, so that the run names them. All others must be equal."""


class ClassCount(NamedTuple):
    """Classes that the weights know, and the row or slot of their null class, if there is one."""

    num: int
    null: int | None


class Classes(NamedTuple):
    """To each class of the model its number in the weights, None for a new one."""

    rows: list[int | None]
    how: str


class Fit:
    """A model that was just built, and the weights that it begins with; what the rules need to know of both.

    Args:
        model: with its own start.
        source: the weights.
        label_names: of the model's classes, if they are known.
        given: how the user named the source.
    """

    def __init__(self, model: Any, source: Source, label_names: Sequence[str] | None, given: str) -> None:
        self.model, self.source, self.given = model, source, given
        self.family = FAMILIES[type(model).__name__]
        self.options: dict[str, Any] = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
        self.label_names = list(label_names) if label_names is not None else None

    @cached_property
    def count(self) -> ClassCount:
        return self.family.count_classes(self.source)

    @cached_property
    def classes(self) -> Classes:
        """By name where both sides know names and share some; else by number where there are equally many; else all new."""
        theirs, ours = self.source.label_names, self.label_names
        num = 0 if self.model.is_unconditional else self.model.num_classes
        shared = set(theirs or ()) & set(ours or ())
        if theirs is not None and ours is not None and shared and len(theirs) == self.count.num:
            row_of = {name: row for row, name in enumerate(_told_apart(theirs))}
            return Classes([row_of.get(name) for name in _told_apart(ours[:num])], "by name")
        return Classes([*range(num)], "by number") if num == self.count.num else Classes([None] * num, "new")

    def label_rows(self) -> list[int | None]:
        """Of a LabelEmbedding: its classes, then the null class where labels are dropped; None for a new one."""
        return [*self.classes.rows, *([self.count.null] if self.model.has_null_label else [])]

    def resized(self, table: Tensor, prefix: int, ours: tuple[int, int, int], name: str) -> Tensor:
        """[P + N, C] for a grid t x h x w: the first P rows stay, the others are interpolated over h x w (along w where t = h = 1)."""
        places = len(table) - prefix
        side = math.isqrt(max(places, 0) // ours[0])
        theirs = (1, 1, places) if ours[:2] == (1, 1) else (ours[0], side, side)
        if places < 1 or math.prod(theirs) != places:
            raise UserError(f"init_from {self.given}: {name} has {places} places, which are no square grid as they are here")
        if theirs == ours:
            return table
        grid = resize_position_table(table[prefix:].float().unsqueeze(0), theirs, ours)[0]
        return torch.cat([table[:prefix], grid.to(table.dtype)])


def _told_apart(names: Iterable[str]) -> list[tuple[str, int]]:
    """Each with its count among equal ones: ImageNet calls two classes `crane`, and the second is the second everywhere."""
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        told.append((name, seen[name]))
        seen[name] += 1
    return told


Rule = Callable[[Fit, str, Tensor, Tensor], Tensor]
"""From the name of a tensor, our own start of it and what the source has, to what the model begins with."""


def label_table(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """A row a class, and the null class behind them."""
    return _gathered(ours, theirs, fit.label_rows())


def vocabulary_bias(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """MaskGIT's head: codes and mask, and behind them the classes where it predicts those, too (`mlm`)."""
    if fit.options["head"] != "mlm":
        return theirs
    words = fit.model.codebook_size + 1
    return _gathered(ours, theirs, [*range(words), *(None if row is None else words + row for row in fit.label_rows())])


def word_table(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """MAGE's words: codes, class slots (one of them the null class, some unused), mask."""
    codes, (num, null), rows = fit.model.codebook_size, fit.count, list(fit.classes.rows)
    slots = len(theirs) - codes - 1
    # a slot that no class has in either keeps its row, so that nothing changes where nothing differs
    rows += [i if num <= i < slots and i != null else None for i in range(len(rows), len(ours) - codes - 1)]
    rows[fit.model.null_word - codes] = null
    return _gathered(ours, theirs, [*range(codes), *(None if row is None else codes + row for row in rows), codes + slots])


def code_positions(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """Of a generator, where its codes stand: a grid, or a sequence where they are none."""
    shape = fit.model.code_shape
    return fit.resized(theirs, len(ours) - math.prod(shape), (1, *shape) if len(shape) == 2 else (1, 1, *shape), name)


def places_in_order(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """RAR's first, second, ... place in whatever order: a sequence."""
    num = math.prod(fit.model.code_shape)
    return fit.resized(theirs, len(ours) - num, (1, 1, num), name)


def titok_positions(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """A class token, then a square of patches."""
    side = fit.options["image_size"] // fit.options["patch_size"]
    return fit.resized(theirs, 1, (1, side, side), name)


def vitok_positions(fit: Fit, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """[1, N, C] as the model itself sees other sizes than its own: `sincos1d` goes on counting, all others are interpolated."""
    if ours.shape != theirs.shape and fit.model.table_axes == 1:
        return ours
    return fit.resized(theirs[0], 0, fit.model.grid, name).unsqueeze(0)


BY_CLASS: tuple[Rule, ...] = (label_table, vocabulary_bias, word_table)


def _gathered(ours: Tensor, theirs: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Row i is row rows[i] of the source, or our own where that is None."""
    kept = [(i, row) for i, row in enumerate(rows) if row is not None]
    result = ours.clone()
    result[[i for i, _ in kept]] = theirs[[row for _, row in kept]]
    return result


def _labels_in(table: str) -> Callable[[Source], ClassCount]:
    def count(source: Source) -> ClassCount:
        rows = len(source.tensors[table])
        return ClassCount(rows - 1, rows - 1) if source.options["class_dropout"] > 0 else ClassCount(rows, None)

    return count


def _mage_slots(source: Source) -> ClassCount:
    slots = len(source.tensors["words.weight"]) - len(source.tensors["head.bias"]) - 1
    num = source.options.get("num_classes")
    if num is None:  # a run that is not finished: from its data
        if source.options["class_slots"] is not None:
            raise UserError(f"init_from {source.path}: model.class_slots is set and the classes are not known; let that run finish")
        num = slots - 1
    null = num if source.options["null_slot"] is None else source.options["null_slot"]
    return ClassCount(0 if source.options["class_dropout"] == 1 else num, null)  # at 1 no label was ever shown


def _no_classes(source: Source) -> ClassCount:
    return ClassCount(0, None)


class Codes(NamedTuple):
    """Which axis of which tensor counts what a generator's tokenizer makes; `extra` entries count nothing."""

    tensor: str
    axis: int = 0
    extra: int = 0
    what: str = "codes"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model class."""

    model_name: str
    """`model.name` in configurations."""
    tables: dict[str, Rule] = field(default_factory=dict)
    """Patterns of tensor names to rules; all other tensors are taken over as they are."""
    optional: tuple[str, ...] = ()
    """Patterns of tensors that one side may lack, or have in other shapes."""
    codes: Codes | None = None
    count_classes: Callable[[Source], ClassCount] = _no_classes


FAMILIES: dict[str, Family] = {
    "LlamaGen": Family(
        model_name="llamagen",
        tables={"condition_embed.table.weight": label_table},
        codes=Codes("token_embed.weight"),
        count_classes=_labels_in("condition_embed.table.weight"),
    ),
    "RAR": Family(
        model_name="rar",
        tables={
            "label_embed.table.weight": label_table,
            "position_table": code_positions,
            "next_position_table": code_positions,
            "place_table": places_in_order,
        },
        codes=Codes("token_embed.weight"),
        count_classes=_labels_in("label_embed.table.weight"),
    ),
    "MaskGIT": Family(
        model_name="maskgit",
        tables={"label_embed.table.weight": label_table, "position_embed": code_positions, "to_logits.bias": vocabulary_bias},
        codes=Codes("token_embed.weight", extra=1),
        count_classes=_labels_in("label_embed.table.weight"),
    ),
    "MAGE": Family(
        model_name="mage",
        tables={"words.weight": word_table, "positions": code_positions, "decoder_positions": code_positions},
        optional=("projector.*",),
        codes=Codes("head.bias"),
        count_classes=_mage_slots,
    ),
    "DiT": Family(
        model_name="dit",
        tables={"label_embed.table.weight": label_table},
        optional=("projectors.*", "scale_embed.*"),
        codes=Codes("patch_embed.proj.weight", axis=1, what="channels"),
        count_classes=_labels_in("label_embed.table.weight"),
    ),
    "VQTokenizer": Family(model_name="vq"),
    "KLTokenizer": Family(model_name="kl"),
    "ViTok": Family(model_name="vitok", tables={"posemb": vitok_positions, "dec_posemb": vitok_positions}, optional=("mask_token",)),
    "TiTok": Family(model_name="titok", tables={"*coder.position_embed": titok_positions}),
}
"""Class name to what may differ."""
