"""`genvision train`: from a configuration to a finished model folder, for both stages."""

import shutil
import sys
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
from genvision.convert.readers import fill
from genvision.data.datasets import BatchStream, bad_images_summary, batches
from genvision.errors import UserError
from genvision.images import make_grid, save_png, to_uint8
from genvision.jobs.train_generator import PREVIEW_COLUMNS, GeneratorJob, image_dataset
from genvision.pipeline import save_parts
from genvision.processes import process_state
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.lpips import LPIPSOptions, load_lpips
from genvision.tokenizers.perceptual import TimmPerceptual
from genvision.training import rng
from genvision.training.adversary import Discrimination
from genvision.training.config import TrainConfig
from genvision.training.loop import train
from genvision.training.optim import freeze_all_but
from genvision.training.tokenizer_loss import TokenizerLossConfig
from genvision.training.tokenizer_stage import TokenizerStage

FREE_TO_CHANGE = {
    "num_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "preview_every",
    "max_skipped_steps",
    "tracker",
    "num_workers",
}
"""Options that a resumed run may change. All but num_steps leave the weights of every step as they were; what follows the length of a run,
a cosine of the learning rate or the distillation of nested networks, goes on along the new one."""


def run_training(config: TrainConfig, *, resume: bool = False) -> Path | None:
    """Train; returns the finished model's folder, or None if the run was asked to stop before the end.

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
    if accelerator.is_main_process:
        _prepare_output(config, output, resume)
    accelerator.wait_for_everyone()
    try:
        return _run(config, accelerator, job, output, resume)
    except UserError:
        if accelerator.is_main_process:
            _forget_empty_run(output)
        raise


def _run(config: TrainConfig, accelerator: Accelerator, job: "_TokenizerJob | GeneratorJob", output: Path, resume: bool) -> Path | None:
    if config.train.tracker:
        accelerator.init_trackers("genvision", config={"config": yaml.safe_load((output / "config.yaml").read_text())})
    streams: list[BatchStream] = []

    def stream(start_step: int, rank: int, world_size: int) -> BatchStream:
        streams.append(
            batches(
                job.dataset,
                seed=config.seed,
                start_step=start_step,
                end_step=config.train.num_steps,
                batch_size=config.train.batch_size,
                rank=rank,
                world_size=world_size,
                num_workers=job.num_workers,
            )
        )
        return streams[-1]

    done = train(config, accelerator, job.stage, stream, resume=resume, preview=partial(job.preview, output / "previews"))
    if done and accelerator.is_main_process:
        part = output / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        job.export(part, {"data": config.data.spec, "steps": config.train.num_steps, "seed": config.seed, "torch": torch.__version__})
        shutil.rmtree(output / "model", ignore_errors=True)
        part.replace(output / "model")
    accelerator.wait_for_everyone()
    bad_images = {index: why for stream in streams for index, why in stream.bad_images.items()}
    if bad_images:
        print(bad_images_summary(bad_images), file=sys.stderr)
    accelerator.end_training()
    return output / "model" if done else None


def _prepare_output(config: TrainConfig, output: Path, resume: bool) -> None:
    saved = output / "config.yaml"
    if output.exists() and any(output.iterdir()):
        if not resume:
            raise UserError(f"{output}: already holds another run's results; choose another output_dir, or go on with that run by --resume")
        if not saved.is_file():
            raise UserError(f"{output}: is not a run of genvision train (config.yaml is missing); choose another output_dir")
        _check_same(saved, config)
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def _forget_empty_run(output: Path) -> None:
    """Leave no folder behind a run that failed before its first step."""
    if [path.name for path in output.iterdir()] == ["config.yaml"]:
        (output / "config.yaml").unlink()
        output.rmdir()


def _check_tracker(name: str | None) -> None:
    """Accelerate would leave out a tracker that is not installed with no more than a note in its log."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if name is not None and name not in available:
        raise UserError(f"train.tracker {name}: is unknown or not installed; installed are: {', '.join(available) or 'none'}")


def _check_same(saved: Path, config: TrainConfig) -> None:
    old, new = flat_values(yaml.safe_load(saved.read_text())), flat_values(config)
    if younger := new.keys() - old.keys():  # options that the run did not know yet: it did what their defaults do
        defaults = flat_values(load_train_config(["--config", str(saved)])[0])
        old |= {key: defaults.get(key) for key in younger}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key.split(".")[-1] not in FREE_TO_CHANGE:
            raise UserError(
                f"{saved}: the run was started with {key} {old.get(key)}, now it is {new.get(key)}; give the old value to resume, "
                "or choose another output_dir"
            )


class _TokenizerJob:
    """Images in, a tokenizer folder out."""

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        if data.spec.startswith("encoded:"):
            raise UserError(f"data.spec {data.spec}: a tokenizer is trained on images; give digits, folder:, parquet: or npz:")
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
        if config.init_from is not None:
            fill(self.model, load_tokenizer(config.init_from).state_dict(), f"init_from {config.init_from}")
        freeze_all_but(self.model, config.optim.train_only)
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

    def preview(self, folder: Path, step: int) -> None:
        """Originals in one row, what comes back below."""
        indices = np.linspace(0, len(self.dataset) - 1, PREVIEW_COLUMNS).astype(int)
        images = torch.stack([self.dataset.plain(int(i)) for i in indices]).to(self.model.device)
        pairs = np.concatenate([to_uint8(images), to_uint8(self.model.decode(self.model.encode(images)))])
        save_png(make_grid(pairs, PREVIEW_COLUMNS, row_names=["image", "decoded"]), folder / f"step_{step:08d}.png")

    def export(self, folder: Path, provenance: dict[str, Any]) -> None:
        save_parts(folder, {"tokenizer": self.model})


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
