"""One training loop for every stage, on Accelerate: steps, accumulation, clipping, averages, checkpoints, stop and resume.

A run killed at any moment and started again ends with bit-identical weights on the same hardware: data order, augmentation and learning
rate are functions of the step, everything else is in the checkpoint. On another number of processes it keeps the order of samples.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genvision import __version__
from genvision.errors import UserError
from genvision.layers.checkpointing import set_checkpointing
from genvision.processes import from_main
from genvision.training import rng
from genvision.training.config import TrainConfig
from genvision.training.ema import EMA
from genvision.training.feed import Feed
from genvision.training.interrupt import Interrupt
from genvision.training.log import MetricLog
from genvision.training.peers import lost_contact
from genvision.training.phases import Phases
from genvision.training.saved_tensors import SavedTensors, saved_files
from genvision.training.sharding import forget_gathered, place, requested_sharding, whole
from genvision.training.stage import Batch, Identity, Observers, Stage, Stream
from genvision.training.state import CheckpointFolder
from genvision.training.step import Stepper
from genvision.training.trainee import Trainee
from genvision.training.validation import validate
from genvision.training.watchdog import Watchdog
from genvision.training.writer import CheckpointWriter, Files


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    stage: Stage,
    stream: Stream,
    *,
    observers: Observers | None = None,
    identity: Identity | None = None,
) -> nn.Module | None:
    """Run, or go on with, the training that `config` describes; it begins at the newest checkpoint in the run's folder, if there is one.

    Args:
        accelerator: made with the precision of `config.train`.
        stream: gives this process its part of every global batch.

    Returns:
        The finished model, whole and with the first average in it (`stage.model` itself, unless that is split over processes); None after
        SIGTERM, SIGINT or SIGUSR1, with a checkpoint written.

    Raises:
        UserError: no checkpoint can be read or written, data cannot be read, or too many steps were not finite.
    """
    with Interrupt() as interrupt:
        run = _Run(config, accelerator, stage, observers or Observers(), identity or Identity())
        try:
            run.restore_newest()
            return run.finished_model() if run.steps(stream, interrupt) else None
        except RuntimeError as error:
            if not lost_contact(error):
                raise
            raise UserError(run.told_alone()) from error
        finally:
            run.writer.finish()  # a checkpoint that was begun is worth more than an early end


class _Run:
    def __init__(self, config: TrainConfig, accelerator: Accelerator, stage: Stage, observers: Observers, identity: Identity) -> None:
        self.config, self.accelerator, self.stage = config, accelerator, stage
        self.observers, self.identity = observers, identity
        loop = config.train
        share = accelerator.num_processes * loop.accumulation
        if loop.batch_size % share:
            raise UserError(
                f"train.batch_size {loop.batch_size} does not divide into {accelerator.num_processes} processes x "
                f"{loop.accumulation} parts; choose a multiple of {share}"
            )
        self.output = Path(config.output_dir)
        self.checkpoints = CheckpointFolder(self.output / "checkpoints", loop.keep_checkpoints)
        self.phases = Phases()
        self.sharding = requested_sharding(accelerator)
        set_checkpointing(stage.model, loop.gradient_checkpointing)
        self.whole_model = copy.deepcopy(stage.model) if self.sharding is not None else stage.model
        average = copy.deepcopy(stage.model) if stage.needs_average and loop.ema_decays else None
        steps = loop.num_steps
        if loop.compile:
            stage.model.compile()
        self.main = Trainee(stage.model, config.optim, steps, accelerator, names=("model", "optimizer"), sharding=self.sharding)
        trainees = [self.main]
        if stage.adversary is not None:
            names = ("adversary", "adversary_optimizer")
            trainees.append(Trainee(stage.adversary.network, stage.adversary.optim, steps, accelerator, names=names, wrap=False))
        self.stepper = Stepper(accelerator, stage, trainees, loop.accumulation, loop.explode_factor)
        if average is not None:
            place(average, accelerator, self.sharding)
        self.ema = EMA(stage.model, loop.ema_decays, warmup=loop.ema_warmup, network=average)
        self.writer = CheckpointWriter(self.checkpoints, accelerator)
        self.held_out: Iterable[Batch] | None = None
        if observers.held_out is not None and loop.validate_every:
            self.held_out = observers.held_out(accelerator.process_index, accelerator.num_processes)
        self.step = self.skipped = self.bad_in_a_row = self.rewinds = 0
        self.save_due = False
        self.data_shift = 0  # by how many steps the data is ahead, after a run was wound back
        rng.start(config.seed, 0, accelerator.process_index)

    def steps(self, stream: Stream, interrupt: Interrupt) -> bool:
        loop, accelerator, phases = self.config.train, self.accelerator, self.phases
        if self.step >= loop.num_steps:
            return True
        log = MetricLog(
            self.output / "metrics.jsonl",
            accelerator,
            phases,
            start_step=self.step,
            num_steps=loop.num_steps,
            baselines=self.stage.baselines,
            every=loop.log_every,
            flops_per_sample=self.observers.flops_per_sample,
        )
        with ExitStack() as stack:
            if loop.stall_seconds:
                stack.enter_context(Watchdog(phases, accelerator.process_index, accelerator.num_processes, loop.stall_seconds))
            stack.callback(log.close)
            if self.identity.changes:
                log.event("changed", options=dict(self.identity.changes))
            feed = self._feed(stream)
            while self.step < loop.num_steps:
                phases.step = self.step
                self.stage.before_step(self.step, self.ema)
                rates = [trainee.set_learning_rate(self.step) for trainee in self.stepper.trainees]
                phases.enter("forward_backward")
                gradients = self.stepper.passes(feed.batch)
                last = self.step + 1 == loop.num_steps
                if not last:  # read now, so that a failure is known when the processes agree
                    feed.advance()
                phases.enter("agreement")
                verdict = self.stepper.agree(gradients, stop=interrupt.asked, data_failed=feed.error is not None)
                phases.enter("optimizer")
                self.stepper.update(gradients, verdict)
                phases.enter("after_step")
                self.step += 1
                told: dict[str, float] = {}
                if verdict.is_good:
                    log.add(gradients.terms, loop.batch_size)
                    told = self.stage.after_step(self.step, accelerator, self.averaged_model)
                    self.ema.update(self.step)
                    self.bad_in_a_row = 0
                elif not verdict.is_overflow:
                    self._count_skipped()
                log.step_done(self.step, {"lr": rates[0], **gradients.norms, **told, "skipped_steps": float(self.skipped)})
                ends = last or verdict.stop or verdict.data_failed
                if loop.rewind_after and self.bad_in_a_row >= loop.rewind_after and not ends:
                    self._rewind(log)
                    feed.close()
                    feed = self._feed(stream)
                    continue
                self.save_due |= self.step % loop.checkpoint_every == 0
                may_rewind = bool(loop.rewind_after and self.bad_in_a_row)  # then the last good checkpoint must not be pruned
                if (self.save_due and not may_rewind) or ends:
                    self.save()
                if last or not verdict.stop:
                    self._observe(log, last)
                if ends:
                    phases.enter("checkpoint")
                    self.writer.wait(must_succeed=True)
                if verdict.stop and not last:
                    return False
                if verdict.data_failed:
                    raise feed.error or UserError(f"step {self.step}: another process could not read its data; its message says why")
        return True

    def _feed(self, stream: Stream) -> Feed:
        return Feed(stream, self.step + self.data_shift, self.accelerator, self.phases)

    def told_alone(self) -> str:
        """What to say when another process is gone."""
        steps = self.checkpoints.steps()
        place = f"from the checkpoint of step {steps[-1]}" if steps else "from its beginning"
        return (
            f"rank {self.accelerator.process_index}, step {self.step}, phase {self.phases.current}: lost contact with another process; its "
            f"own message or the system's log (out of memory?) says why; the same command goes on {place}"
        )

    def _count_skipped(self) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.skipped > self.config.train.max_skipped_steps:
            self.writer.wait()
            steps = self.checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written yet"
            what = "not finite" if self.config.train.explode_factor is None else "not finite or exploded"
            raise UserError(
                f"step {self.step}: loss or gradient was {what} in {self.skipped} steps, so the run stops ({kept}); "
                "lower optim.lr, set optim.max_grad_norm, or use train.precision no"
            )

    def _rewind(self, log: MetricLog) -> None:
        """Go back to the last checkpoint before some bad steps, and on from there with data that comes after them."""
        self.writer.wait()
        data_step, skipped, rewinds = self.step + self.data_shift, self.skipped, self.rewinds + 1
        failed_at, first_bad = self.step, self.step - self.bad_in_a_row
        if not self._restore(at_most=first_bad) and not self._restore():
            raise UserError(
                f"step {failed_at}: loss or gradient was bad in {failed_at - first_bad} steps in a row, and there is no checkpoint to go "
                "back to; set train.checkpoint_every lower, or lower optim.lr"
            )
        self.data_shift, self.skipped, self.rewinds, self.bad_in_a_row = data_step - self.step, skipped, rewinds, 0
        from_main(lambda: self.checkpoints.forget_after(self.step))
        log.rewind(self.step)
        if self.accelerator.is_main_process:
            why = f"loss or gradient was bad in {failed_at - first_bad} steps in a row"
            print(f"step {failed_at}: {why}; going on from step {self.step} with the data behind them", file=sys.stderr, flush=True)

    def _observe(self, log: MetricLog, last: bool) -> None:
        """Previews, validation and scores, where it is time."""
        loop, observers = self.config.train, self.observers

        def due(every: int) -> bool:
            return bool(every) and (self.step % every == 0 or last)

        if self.held_out is not None and due(loop.validate_every):
            self.phases.enter("validation")
            log.record(self._validation(self.held_out))
        if observers.preview is not None and due(loop.preview_every):
            self.phases.enter("preview")
            with self.averaged_model(everywhere=False) as model, torch.inference_mode():
                if self.accelerator.is_main_process:
                    try:
                        observers.preview(self.step, model)
                    except OSError as error:  # a full disk
                        print(f"warning: step {self.step}: the preview was not written ({error})", file=sys.stderr, flush=True)
            self.accelerator.wait_for_everyone()
        if observers.scores is not None and due(self.config.scores.every):
            self.phases.enter("scores")
            with self.averaged_model() as model:
                log.record({f"online_{name}": value for name, value in observers.scores(model).items()})

    def _validation(self, held_out: Iterable[Batch]) -> dict[str, float]:
        model, stage = self.main.model, self.stage
        before = rng.state()
        stage.model.eval()

        def loss(batch: Batch) -> dict[str, Tensor]:
            return stage.held_out_loss(model, batch, self.ema)

        with self.ema.applied(), torch.no_grad():
            terms = validate(loss, held_out, self.accelerator)
        stage.model.train()
        rng.restore(before)
        return terms

    @contextmanager
    def averaged_model(self, *, everywhere: bool = True) -> Iterator[nn.Module]:
        """The whole model with the first average, in eval mode; `everywhere`, or in the main process alone."""
        model = self.whole_model
        if self.sharding is not None:
            self._gather()
        with nullcontext() if self.sharding is not None or not (everywhere or self.accelerator.is_main_process) else self.ema.applied():
            model.to(self.accelerator.device).eval()
            yield model
        if self.sharding is not None:
            model.to("cpu")
        else:
            model.train()

    @torch.no_grad()
    def _gather(self) -> None:
        """Fill the whole model with the first average of a split one."""
        average = self.ema.averages[self.ema.decays[0]] if self.ema.decays else self.stage.model.state_dict()
        for name, tensor in self.whole_model.state_dict().items():
            tensor.copy_(whole(average[name]))

    def finished_model(self) -> nn.Module:
        if self.sharding is not None:
            self._gather()
        elif self.ema.decays:
            self.stage.model.load_state_dict(self.ema.averages[self.ema.decays[0]])
        return self.whole_model

    def save(self) -> None:
        """Copy the state of this step and begin to write it."""
        self.save_due = False
        self.phases.enter("checkpoint")
        self.writer.wait()  # now, or there would be two copies
        accelerator = self.accelerator
        rank, world_size = accelerator.process_index, accelerator.num_processes
        files: Files = {}
        for trainee in self.stepper.trainees:
            files |= trainee.files()
        gather = self.sharding is not None and self.sharding.full_checkpoints
        for decay in self.ema.decays:
            files |= saved_files(f"ema_{decay}", self.ema.state_dict(decay), rank, world_size, gather=gather)
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            files["stage.pt"] = _pickled({"stage": self.stage.state_dict(), "scaler": scaler})
        files[f"rng_{rank}.pt"] = _pickled(rng.state())
        facts = {
            "data_position": (self.step + self.data_shift) * self.config.train.batch_size,
            "skipped_steps": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "rewinds": self.rewinds,
            "num_processes": world_size,
            "hashes": dict(self.identity.hashes),
            "stepper": self.stepper.state_dict(),
            "genvision": __version__,
            "torch": torch.__version__,
        }
        self.writer.write(self.step, files, facts)

    def restore_newest(self) -> None:
        restored, wanted = self._restore(), self.config.train.num_steps
        if self.step > wanted:
            raise UserError(f"train.num_steps {wanted}: the run is at step {self.step} already; give more, or choose another output_dir")
        if self.accelerator.is_main_process and self.identity.accepted is not None:
            self.identity.accepted()
        if restored and self.accelerator.is_main_process and self.step < wanted:
            print(f"going on from step {self.step} ({self.checkpoints.path(self.step)})", file=sys.stderr, flush=True)

    def _restore(self, at_most: int | None = None) -> bool:
        """Go to the newest whole checkpoint; whether there is one."""
        accelerator = self.accelerator
        found = from_main(lambda: self.checkpoints.newest(at_most))
        if found is None:
            return False
        step, facts = found
        self._check_identity(step, facts["hashes"])
        folder = self.checkpoints.path(step)
        for trainee in self.stepper.trainees:
            trainee.restore(folder)
        for decay in self.ema.decays:  # one that is new begins with the weights
            name = f"ema_{decay}" if any(folder.glob(f"ema_{decay}.*")) else "model"
            SavedTensors(folder, name).load_into(self.ema.state_dict(decay))
        if self.ema.network is not None:
            forget_gathered(self.ema.network)
        rest = self.checkpoints.load_object(step, "stage.pt")
        self.stage.load_state_dict(rest["stage"])
        if accelerator.scaler is not None and rest["scaler"]:
            accelerator.scaler.load_state_dict(rest["scaler"])
        self.stepper.load_state_dict(facts["stepper"])
        rank = accelerator.process_index
        if rank < facts["num_processes"]:
            rng.restore(self.checkpoints.load_object(step, f"rng_{rank}.pt"))
        else:
            rng.start(self.config.seed, step, rank)
        self.step, self.skipped, self.bad_in_a_row = step, facts["skipped_steps"], facts["bad_in_a_row"]
        self.rewinds = facts["rewinds"]
        # with another batch size, should that be allowed, the data goes on at the next whole batch
        self.data_shift = -(-facts["data_position"] // self.config.train.batch_size) - step
        return True

    def _check_identity(self, step: int, saved: dict[str, str]) -> None:
        for name, value in self.identity.hashes.items():
            if name in saved and saved[name] != value and name not in self.identity.may_change:
                raise UserError(
                    f"{self.checkpoints.path(step)}: was trained with another {name} ({saved[name][:12]}, now {value[:12]}); give the old "
                    f"one, choose another output_dir, or accept the change by --allow-change {name}"
                )


def _pickled(value: Any) -> Callable[[Path], Any]:
    buffer = BytesIO()
    torch.save(value, buffer)
    return lambda path: path.write_bytes(buffer.getbuffer())
