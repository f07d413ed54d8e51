"""The weights that a training begins with, and which of them it trains."""

import sys
from collections.abc import Sequence
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
from genvision.training.warm_start import warm_start


def start_weights(config: TrainConfig, model: nn.Module, *, label_names: Sequence[str] | None = None, tokenizer: Any = None) -> None:
    """Give a model that was just built the weights of `init_from`, adapters where they are wanted, and gradients where it is trained.

    Args:
        label_names: of the model's classes.
        tokenizer: of a generator.

    Raises:
        UserError: the folder cannot be read or does not fit, or a part is named that is not there.
    """
    if config.init_from is not None and not CheckpointFolder(Path(config.output_dir) / "checkpoints", 1).steps():
        summary = warm_start(model, config.init_from, label_names=label_names, tokenizer=tokenizer).summary()
        if process_state().is_main_process:
            print(summary, file=sys.stderr)
    if not config.lora.rank:
        freeze_all_but(model, config.optim.train_only)
        return
    if config.optim.train_only:
        raise UserError("optim.train_only: with lora.rank the adapters are trained; name what is trained besides in lora.also_train")
    with rng.seeded(config.seed):
        add_lora(model, config.lora)
