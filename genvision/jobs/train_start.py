"""The weights that a training begins with, and which of them it trains."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from genvision.errors import UserError
from genvision.processes import process_state
from genvision.training import rng
from genvision.training.config import TrainConfig
from genvision.training.lora import add_lora
from genvision.training.optim import freeze_all_but
from genvision.training.state import CheckpointFolder
from genvision.training.warm_start import WarmStart, warm_start


def start_weights(config: TrainConfig, model: nn.Module, *, label_names: Sequence[str] | None = None, tokenizer: Any = None) -> None:
    """Give a model that was just built the weights of `init_from`, adapters where they are wanted, and gradients where it is trained.

    Args:
        label_names: of the model's classes.
        tokenizer: of a generator.

    Raises:
        UserError: the folder cannot be read or does not fit, or a part is named that is not there.
    """
    start = None
    if config.init_from is not None and not CheckpointFolder(Path(config.output_dir) / "checkpoints", 1).steps():
        start = warm_start(model, config.init_from, label_names=label_names, tokenizer=tokenizer)
        _tell(start.summary())
    could_be_trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.lora.rank:
        if config.optim.train_only:
            raise UserError("optim.train_only: with lora.rank the adapters are trained; name what is trained besides in lora.also_train")
        with rng.seeded(config.seed):
            add_lora(model, config.lora)
    else:
        freeze_all_but(model, config.optim.train_only)
    if start is not None:
        _warn_of_frozen(start, could_be_trained, "lora.also_train" if config.lora.rank else "optim.train_only")


def _warn_of_frozen(start: WarmStart, could_be_trained: Mapping[str, nn.Parameter], option: str) -> None:
    """Name what neither the weights nor the training reach: it stays as it was drawn. Names are those before adapters were put in."""
    frozen = [name for name, parameter in could_be_trained.items() if not parameter.requires_grad]
    told = [name for name in frozen if name in start.new] + [f"{name} (new rows)" for name in frozen if name in start.with_new_rows]
    if told:
        listed = ", ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")
        _tell(f"warning: new here, but neither in init_from nor trained, so it stays random: {listed}; to train it, name it in {option}")


def _tell(text: str) -> None:
    if process_state().is_main_process:
        print(text, file=sys.stderr)
