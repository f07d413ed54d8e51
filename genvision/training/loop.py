"""One training loop for every stage, on Accelerate: steps, accumulation, clipping, averages, checkpoints, stop and resume.

A run killed at any moment and resumed ends with bit-identical weights on the same hardware: data order, augmentation and
learning rate are functions of the step, everything else is in the checkpoint.
"""

import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genvision import __version__
from genvision.errors import UserError
from genvision.training import rng
from genvision.training.config import OptimConfig, TrainConfig
from genvision.training.ema import EMA
from genvision.training.log import MetricLog
from genvision.training.state import CheckpointFolder, save_tensors
from genvision.training.trainee import Trainee

Batch = dict[str, Tensor]


class Stage(Protocol):
    """What differs between training a tokenizer and training a generator."""

    @property
    def model(self) -> nn.Module: ...

    baselines: dict[str, float]
    """Values to read terms against: the `loss` of guessing, say."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named terms; `loss` is what is minimised. `model` is the wrapped form of `self.model`."""

    @property
    def adversary(self) -> "Adversary | None":
        """A second network with an optimiser of its own, trained on the same batches right behind the model; None where there is none."""

    def before_step(self, step: int, averages: EMA) -> None:
        """Called when `step` steps are done, before the next one's batch; `averages` calls the model with its averaged weights."""

    def after_step(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        """Called when `step` steps are done, before averages are taken; returns values to log."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beyond model and optimiser: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Adversary(Protocol):
    """A network that is trained against the model: a discriminator."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def optim(self) -> OptimConfig: ...

    def loss(self, batch: Batch) -> dict[str, Tensor] | None:
        """Named terms, `adversary_loss` is what is minimised, of the batch that the stage's `loss` has just seen; None: not trained now."""


class Stream(Protocol):
    """Batches of this process from a step on."""

    def __call__(self, start_step: int, rank: int, world_size: int) -> Iterable[Batch]: ...


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    stage: Stage,
    stream: Stream,
    *,
    resume: bool = False,
    preview: Callable[[int], None] | None = None,
) -> bool:
    """Run, or go on with, the training that `config` describes; leaves `stage.model` holding the first average.

    Args:
        accelerator: made with the precision of `config.train`.
        stream: gives this process its part of every global batch.
        resume: start from the newest checkpoint in the run's folder, if there is one.
        preview: called on the main process every `preview_every` steps while the model holds its averaged weights.

    Returns:
        Whether all steps are done; False after SIGTERM or SIGINT, with a checkpoint written.

    Raises:
        UserError: a checkpoint is damaged, or too many steps were not finite.
    """
    run = _Run(config, accelerator, stage)
    if resume:
        run.restore_newest()
    done = run.steps(stream, preview)
    if done:
        average = run.ema.averages.get(config.train.ema_decays[0]) if config.train.ema_decays else None
        if average is not None:
            stage.model.load_state_dict(average)
    return done


class _Run:
    def __init__(self, config: TrainConfig, accelerator: Accelerator, stage: Stage) -> None:
        self.config, self.accelerator, self.stage = config, accelerator, stage
        loop = config.train
        share = accelerator.num_processes * loop.accumulation
        if loop.batch_size % share:
            raise UserError(
                f"train.batch_size {loop.batch_size} does not divide into {accelerator.num_processes} processes x "
                f"{loop.accumulation} parts; choose a multiple of {share}"
            )
        self.output = Path(config.output_dir)
        self.checkpoints = CheckpointFolder(self.output / "checkpoints", loop.keep_checkpoints)
        if loop.gradient_checkpointing:
            stage.model.enable_gradient_checkpointing()  # type: ignore[operator]
        if loop.compile:
            stage.model.compile()
        steps = loop.num_steps
        self.main = Trainee(stage.model, config.optim, steps, accelerator, files=("model.safetensors", "optimizer.pt"))
        self.trainees = [self.main]
        if stage.adversary is not None:
            files = ("adversary.safetensors", "adversary_optimizer.pt")
            self.trainees.append(Trainee(stage.adversary.network, stage.adversary.optim, steps, accelerator, files=files, wrap=False))
        self.ema = EMA(stage.model, loop.ema_decays, warmup=loop.ema_warmup)
        self.step = self.skipped = 0
        rng.start(config.seed, 0, accelerator.process_index)

    def steps(self, stream: Stream, preview: Callable[[int], None] | None) -> bool:
        loop, accelerator = self.config.train, self.accelerator
        log = MetricLog(
            self.output / "metrics.jsonl",
            accelerator,
            start_step=self.step,
            num_steps=loop.num_steps,
            baselines=self.stage.baselines,
            every=loop.log_every,
        )
        batches = iter(stream(self.step, accelerator.process_index, accelerator.num_processes))
        with _Interrupt() as interrupt:
            while self.step < loop.num_steps:
                self.stage.before_step(self.step, self.ema)
                extra = self._one_step(next(batches), log)
                self.step += 1
                extra |= self.stage.after_step(self.step, accelerator)
                self.ema.update(self.step)
                log.step_done(self.step, extra)
                last = self.step == loop.num_steps
                stop = self._agree(interrupt.asked) if accelerator.num_processes > 1 else interrupt.asked
                if self.step % loop.checkpoint_every == 0 or last or stop:
                    self.save()
                if preview is not None and loop.preview_every and (self.step % loop.preview_every == 0 or last):
                    self._preview(preview)
                if stop and not last:
                    log.close()
                    return False
        log.close()
        return True

    def _one_step(self, batch: Batch, log: MetricLog) -> dict[str, float]:
        loop, accelerator = self.config.train, self.accelerator
        rates = [trainee.set_learning_rate(self.step) for trainee in self.trainees]
        extra = {"lr": rates[0]}
        totals: dict[str, Tensor] = {}
        parts = [
            dict(zip(batch, values, strict=True)) for values in zip(*(v.chunk(loop.accumulation) for v in batch.values()), strict=True)
        ]
        for i, part in enumerate(parts):
            part = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in part.items()}
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.main.model):
                with accelerator.autocast():
                    terms = self.stage.loss(self.main.model, part)
                accelerator.backward(terms["loss"] / len(parts))
            terms |= self._adversary_terms(part, len(parts))
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=accelerator.device)) + value.detach() / len(parts)
        active = [trainee for trainee in self.trainees if trainee is self.main or "adversary_loss" in totals]
        finite = all(bool(torch.isfinite(totals[name])) for name in ("loss", "adversary_loss") if name in totals)
        for trainee in active:
            if trainee is not self.main:
                trainee.average_gradients()
            # an averaged gradient is the same everywhere, so the norm is, and so every process skips the same steps
            norm = trainee.clip_gradients()
            if norm is not None:
                extra["grad_norm" if trainee is self.main else "adversary_grad_norm"] = norm
                finite = finite and norm < float("inf")
        if accelerator.num_processes > 1:
            finite = not self._agree(not finite)
        if finite or accelerator.scaler is not None:  # fp16's gradient scaler finds infinities itself and must see every step
            for trainee in active:
                trainee.optimizer.step()
        if finite and not accelerator.optimizer_step_was_skipped:
            log.add(totals, loop.batch_size)
        else:
            self._skip()
        for trainee in self.trainees:
            trainee.optimizer.zero_grad(set_to_none=True)
        return extra | {"skipped_steps": float(self.skipped)}

    def _adversary_terms(self, part: Batch, num_parts: int) -> dict[str, Tensor]:
        """Backward pass of the adversary, while both networks still have the weights with which the step began."""
        if self.stage.adversary is None:
            return {}
        with self.accelerator.autocast():
            terms = self.stage.adversary.loss(part)
        if terms is None:
            return {}
        self.accelerator.backward(terms["adversary_loss"] / num_parts)
        return terms

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped > self.config.train.max_skipped_steps:
            steps = self.checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written yet"
            raise UserError(
                f"step {self.step}: loss or gradient was not finite in {self.skipped} steps, so the run stops ({kept}); "
                "lower optim.lr, set optim.max_grad_norm, or use train.precision no"
            )

    def _agree(self, mine: bool) -> bool:
        """Whether it is true in any process."""
        flag = torch.tensor(float(mine), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _preview(self, preview: Callable[[int], None]) -> None:
        if self.accelerator.is_main_process:
            self.stage.model.eval()
            with self.ema.applied(), torch.inference_mode():
                preview(self.step)
            self.stage.model.train()
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        accelerator = self.accelerator
        if accelerator.is_main_process:
            part = self.checkpoints.begin(self.step)
            for trainee in self.trainees:
                trainee.save(part)
            for decay in self.ema.decays:
                save_tensors(part / f"ema_{decay}.safetensors", self.ema.state_dict(decay))
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            torch.save({"stage": self.stage.state_dict(), "scaler": scaler}, part / "stage.pt")
        accelerator.wait_for_everyone()
        part = self.checkpoints.part(self.step)
        torch.save(rng.state(), part / f"rng_{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            facts = {
                "format": 1,
                "step": self.step,
                "num_samples": self.step * self.config.train.batch_size,
                "skipped_steps": self.skipped,
                "num_processes": accelerator.num_processes,
                "genvision": __version__,
                "torch": torch.__version__,
            }
            self.checkpoints.finish(part, facts)
        accelerator.wait_for_everyone()

    def restore_newest(self) -> None:
        steps = self.checkpoints.steps()
        if not steps:
            return
        step = steps[-1]
        facts = self.checkpoints.read(step)
        for trainee in self.trainees:
            trainee.restore(self.checkpoints, step)
        for decay in self.ema.decays:
            self.ema.load_state_dict(decay, self.checkpoints.load_tensors(step, f"ema_{decay}.safetensors"))
        rest = self.checkpoints.load_object(step, "stage.pt")
        self.stage.load_state_dict(rest["stage"])
        if self.accelerator.scaler is not None and rest["scaler"]:
            self.accelerator.scaler.load_state_dict(rest["scaler"])
        rank = self.accelerator.process_index
        if rank < facts["num_processes"]:
            rng.restore(self.checkpoints.load_object(step, f"rng_{rank}.pt"))
        else:
            rng.start(self.config.seed, step, rank)
        self.step, self.skipped = step, facts["skipped_steps"]


class _Interrupt:
    """Notes SIGTERM and the first SIGINT, so that the loop can end between two steps; a second SIGINT acts as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Interrupt":
        self.old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
