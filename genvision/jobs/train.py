"""`genvision train`: from a configuration to a finished model folder, for both stages."""

import shutil
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from genvision.config import flat_values, load_train_config, model_class, save_config
from genvision.data.datasets import BatchStream, bad_images_summary, batches
from genvision.data.mixture import is_encoded
from genvision.errors import UserError
from genvision.images import make_grid, save_png, to_uint8
from genvision.jobs.train_data import data_hashes, held_out_batches, held_out_images, image_dataset
from genvision.jobs.train_generator import PREVIEW_COLUMNS, GeneratorJob
from genvision.jobs.train_start import start_weights
from genvision.pipeline import save_parts
from genvision.processes import from_main, process_state
from genvision.tokenizers.lpips import LPIPSOptions, load_lpips
from genvision.tokenizers.perceptual import TimmPerceptual
from genvision.training import rng
from genvision.training.adversary import Discrimination
from genvision.training.config import TrainConfig
from genvision.training.loop import train
from genvision.training.run_lock import NAME as RUN_LOCK
from genvision.training.run_lock import RunLock
from genvision.training.stage import Identity, Observers
from genvision.training.throughput import training_flops
from genvision.training.tokenizer_loss import TokenizerLossConfig
from genvision.training.tokenizer_stage import TokenizerStage

FREE_TO_CHANGE = {
    "output_dir",
    "data.spec",
    "data.num_workers",
    "data.validation",
    "tokenizer",
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.preview_every",
    "train.validate_every",
    "train.validate_num",
    "train.max_skipped_steps",
    "train.rewind_after",
    "train.stall_seconds",
    "train.gradient_checkpointing",
    "train.tracker",
}
"""Options that may change when a run goes on, those of `scores` too. Data and tokenizer may lie elsewhere: their hashes are compared. All
but num_steps leave the weights of every step as they were; what follows the length of a run, a decay of the learning rate or the
distillation of nested networks, goes on along the new one."""


REMAINS = {RUN_LOCK, "config.yaml.part"}
"""What a start that went no further may leave."""
DECIDE_ORDER = {"data", "seed", "data.shuffle_window"}
"""What gives another order where it is allowed to change."""


def run_training(config: TrainConfig, *, allow_change: frozenset[str] = frozenset()) -> Path | None:
    """Train, or go on with the run in `config.output_dir`; returns the finished model's folder, or None if it was asked to stop before.

    Args:
        allow_change: dotted options, `data`, `order` and `tokenizer`, that may differ from what the run was started with.

    Raises:
        UserError: the configuration, the data, the output folder or a checkpoint cannot be used.
    """
    output = Path(config.output_dir)
    _check_tracker(config.train.tracker)
    process_state()
    try:
        accelerator = Accelerator(mixed_precision=config.train.precision, log_with=config.train.tracker, project_dir=str(output))
    except ValueError as error:
        raise UserError(f"train.precision {config.train.precision}: {' '.join(str(error).split())}") from error
    job = _TokenizerJob(config) if config.stage == "tokenizer" else GeneratorJob(config)
    with ExitStack() as stack:
        changes = from_main(lambda: _open_run(config, output, allow_change, stack))
        try:
            return _run(config, accelerator, job, output, allow_change, changes)
        except UserError:
            if accelerator.is_main_process:
                _forget_empty_run(output)
            raise


def _run(
    config: TrainConfig,
    accelerator: Accelerator,
    job: "_TokenizerJob | GeneratorJob",
    output: Path,
    allow_change: frozenset[str],
    changes: dict[str, Any],
) -> Path | None:
    if config.train.tracker:
        accelerator.init_trackers("genvision", config={"config": flat_values(config)})
    streams: list[BatchStream] = []

    def stream(start_step: int, rank: int, world_size: int) -> BatchStream:
        streams.append(
            batches(
                job.dataset,
                seed=config.seed,
                start_step=start_step,
                batch_size=config.train.batch_size,
                rank=rank,
                world_size=world_size,
                num_workers=job.num_workers,
                pin_memory=accelerator.device.type == "cuda",
            )
        )
        return streams[-1]

    may_change = allow_change | ({"order"} if allow_change & DECIDE_ORDER else set())
    accepted = partial(save_config, config, output / "config.yaml")
    identity = Identity(hashes=from_main(job.hashes), may_change=may_change, changes=changes, accepted=accepted)
    observers = Observers(
        preview=partial(job.preview, output / "previews"),
        held_out=job.held_out,
        scores=job.scores,
        flops_per_sample=from_main(job.flops_per_sample) if accelerator.device.type == "cuda" else None,
    )
    model = train(config, accelerator, job.stage, stream, observers=observers, identity=identity)
    if model is not None and accelerator.is_main_process:
        part = output / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        facts = {"data": config.data.spec, "steps": config.train.num_steps, "seed": config.seed, "torch": torch.__version__}
        job.export(part, model, facts)
        shutil.rmtree(output / "model", ignore_errors=True)
        part.replace(output / "model")
    accelerator.wait_for_everyone()
    bad_images = {index: why for stream in streams for index, why in stream.bad_images.items()}
    if bad_images:
        print(bad_images_summary(bad_images), file=sys.stderr)
    accelerator.end_training()
    return output / "model" if model is not None else None


def _open_run(config: TrainConfig, output: Path, allow_change: frozenset[str], stack: ExitStack) -> dict[str, Any]:
    """Lock the folder of a run, and write down the configuration of a new one; gives what changed since, see `_changes`."""
    saved = output / "config.yaml"
    if output.exists() and any(path.name not in REMAINS for path in output.iterdir()) and not saved.is_file():
        raise UserError(f"{output}: is not a run of genvision train (config.yaml is missing); choose another output_dir")
    stack.enter_context(RunLock(output))
    if saved.is_file():
        return _changes(saved, config, allow_change)
    save_config(config, saved)
    return {}


def _forget_empty_run(output: Path) -> None:
    """Leave no folder behind a run that failed before its first step."""
    names = {path.name for path in output.iterdir()}
    if names <= {"config.yaml", *REMAINS}:
        for name in names:
            (output / name).unlink()
        if not output.is_symlink():
            output.rmdir()


def _check_tracker(name: str | None) -> None:
    """Accelerate would leave out a tracker that is not installed with no more than a note in its log."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if name is not None and name not in available:
        raise UserError(f"train.tracker {name}: is unknown or not installed; installed are: {', '.join(available) or 'none'}")


def _changes(saved: Path, config: TrainConfig, allow_change: frozenset[str]) -> dict[str, Any]:
    """Options that differ from what the run was started with, to their old and new values.

    Raises:
        UserError: one of them would change the result, and that is not allowed.
    """
    try:
        content = yaml.safe_load(saved.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{saved}: is damaged ({' '.join(str(error).split())[:120]}); restore it, or choose another output_dir") from error
    if not isinstance(content, dict):
        raise UserError(f"{saved}: holds no options; restore it, or choose another output_dir")
    old, new = flat_values(content), flat_values(config)
    if younger := new.keys() - old.keys():  # options that the run did not know yet: it did what their defaults do
        defaults = flat_values(load_train_config(["--config", str(saved)])[0])
        old |= {key: defaults.get(key) for key in younger}
    changed = {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
    for key, (before, now) in changed.items():
        if key not in FREE_TO_CHANGE | allow_change and not key.startswith("scores."):
            raise UserError(
                f"{saved}: the run was started with {key} {before}, now it is {now}; give the old value to go on, choose another "
                f"output_dir, or accept another result by --allow-change {key}"
            )
    return changed


class _TokenizerJob:
    """Images in, a tokenizer folder out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, data = config, config.data
        if is_encoded(data.spec):
            raise UserError(f"data.spec {data.spec}: a tokenizer is trained on images; give those that these were made from")
        if data.image_size is None:
            raise UserError("data.image_size is missing; a tokenizer needs the side of its training images")
        if data.posterior != "mean" or data.features is not None:
            raise UserError("data.posterior and data.features are for training generators; a tokenizer sees images only, leave them out")
        options = {name: value for name, value in config.model.items() if name != "name"}
        loss = TokenizerLossConfig(**config.loss)
        with rng.seeded(config.seed):
            self.model = model_class(config.model["name"])(image_size=data.image_size, **options)
            adversary = None
            if loss.adversarial.discriminator != "none":
                adversary = Discrimination(loss.adversarial, config.optim, data.image_size)
        self.model.check_image_size(data.image_size)
        if config.lora.rank:
            raise UserError(f"lora.rank {config.lora.rank}: adapters are for generators; train parts of a tokenizer by optim.train_only")
        start_weights(config, self.model)
        if loss.adversarial.adaptive and not self.model.last_layer.requires_grad:
            raise UserError(
                "loss.adversarial.adaptive compares gradients at the last layer, which optim.train_only leaves out; add decoder to it"
            )
        self.dataset = image_dataset(config, data.image_size)
        self.num_workers = data.num_workers
        loop = config.train
        self.stage = TokenizerStage(
            self.model,
            loss,
            perceptual=load_perceptual(loss),
            adversary=adversary,
            seed=config.seed,
            num_steps=loop.num_steps,
            steps_per_pass=-(-len(self.dataset) // loop.batch_size),
        )

        self.held_out = held_out_batches(config, held_out_images(config, data.image_size), data.num_workers)
        self.scores = None
        if config.scores.every:
            raise UserError("scores.every: samples are drawn by a generator; a tokenizer is measured by genvision reconstruct, set it to 0")

    def flops_per_sample(self) -> float:
        """Of forward and backward pass of the tokenizer, without an adversary's."""
        images = self.dataset.plain(0)[None]
        self.model.eval()  # moving averages of a codebook must not move
        try:
            return training_flops(lambda: self.model(images))
        finally:
            self.model.train()

    def hashes(self) -> dict[str, str]:
        return data_hashes(self.config, self.dataset)

    def preview(self, folder: Path, step: int, model: Any) -> None:
        """Originals in one row, what comes back below."""
        indices = np.linspace(0, len(self.dataset) - 1, PREVIEW_COLUMNS).astype(int)
        images = torch.stack([self.dataset.plain(int(i)) for i in indices]).to(model.device)
        pairs = np.concatenate([to_uint8(images), to_uint8(model.decode(model.encode(images)))])
        save_png(make_grid(pairs, PREVIEW_COLUMNS, row_names=["image", "decoded"]), folder / f"step_{step:08d}.png")

    def export(self, folder: Path, model: Any, provenance: dict[str, Any]) -> None:
        save_parts(folder, {"tokenizer": model})


def load_perceptual(loss: TokenizerLossConfig) -> nn.Module | None:
    """The frozen network of the loss, distances [B] of image pairs; None where the loss has none.

    Raises:
        UserError: its weights are missing or damaged.
    """
    weights = Path(loss.perceptual_weights) if loss.perceptual_weights is not None else None
    if loss.perceptual == "lpips":
        vgg = Path(loss.vgg_weights) if loss.vgg_weights is not None else None
        options = LPIPSOptions(lpips_weights=weights, vgg_weights=vgg, download=loss.perceptual_download, dropout=loss.lpips_dropout)
        return load_lpips(options)
    if loss.perceptual == "timm":
        size = loss.perceptual_image_size
        return TimmPerceptual(loss.perceptual_model, weights=weights, pretrained=loss.perceptual_download, image_size=size)
    return None
