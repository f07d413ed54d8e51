import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from genvision.errors import UserError
from genvision.training.config import DataConfig, LoopConfig, OptimConfig, ScoresConfig, TrainConfig
from genvision.training.loop import train
from genvision.training.stage import Observers


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))

    def forward(self, x):
        return x @ self.weight


class Regression:
    """The least stage: a linear model; a batch may carry a loss that is not finite."""

    def __init__(self):
        self.model, self.baselines, self.adversary, self.needs_average = Line(), {"loss": 1.0}, None, False

    def loss(self, model, batch):
        return {"loss": ((model(batch["x"]) - batch["y"]) ** 2).mean()}

    def held_out_loss(self, model, batch, averages):
        return self.loss(model, batch)

    def before_step(self, step, averages):
        pass

    def after_step(self, step, accelerator, averaged):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def config(output: Path, **loop) -> TrainConfig:
    options = {"num_steps": 20, "batch_size": 8, "ema_decays": (), "log_every": 5, "checkpoint_every": 10, "preview_every": 0} | loop
    return TrainConfig(
        stage="generator",
        output_dir=str(output),
        model={},
        data=DataConfig(spec="none"),
        optim=OptimConfig(lr=0.05, weight_decay=0.0),
        train=LoopConfig(**options),
    )


def stream(bad_steps=()):
    target = torch.tensor([[1.0], [2.0], [3.0], [4.0]])

    def batches(start_step, rank, world_size):
        for step in range(start_step, 1000):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            yield {"x": x, "y": x @ target * (float("nan") if step in bad_steps else 1.0)}

    return batches


def run(output, stage=None, bad_steps=(), **loop):
    stage = stage or Regression()
    output.mkdir(exist_ok=True)
    model = train(config(output, **loop), Accelerator(cpu=True), stage, stream(bad_steps))
    return stage, model is not None


def test_loss_falls_and_every_line_is_written(tmp_path):
    _, done = run(tmp_path, num_steps=100)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert done and [line["step"] for line in lines] == list(range(5, 101, 5))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[0]["loss_baseline"] == 1.0
    assert {"lr", "grad_norm", "images_per_second", "skipped_steps"} <= lines[0].keys()


def test_accumulated_parts_give_the_step_of_the_whole_batch(tmp_path):
    whole, _ = run(tmp_path / "a")
    parts, _ = run(tmp_path / "b", accumulation=4)
    torch.testing.assert_close(parts.model.weight, whole.model.weight, atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    clean, _ = run(tmp_path / "a", num_steps=3)
    stage, done = run(tmp_path / "b", num_steps=5, bad_steps=(3, 4))
    assert done and torch.equal(stage.model.weight, clean.model.weight)
    facts = json.loads((tmp_path / "b/checkpoints/step_00000005/state.json").read_text())
    assert facts["skipped_steps"] == 2


def test_too_many_of_them_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="checkpoint of step 10 is kept") as error:
        run(tmp_path, bad_steps=range(12, 1000), max_skipped_steps=3)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints/step_00000010/model.safetensors").is_file()


def test_more_steps_can_be_asked_of_a_finished_run(tmp_path):
    run(tmp_path, num_steps=10)
    longer, _ = run(tmp_path, num_steps=20)
    once, _ = run(tmp_path / "once", num_steps=20)
    assert torch.equal(longer.model.weight, once.model.weight)


def test_the_average_is_what_a_finished_run_leaves_in_the_model(tmp_path):
    stage, _ = run(tmp_path, ema_decays=(0.9, 0.5))
    from safetensors.torch import load_file

    folder = tmp_path / "checkpoints/step_00000020"
    assert torch.equal(stage.model.weight, load_file(folder / "ema_0.9.safetensors")["weight"])
    assert not torch.equal(stage.model.weight, load_file(folder / "model.safetensors")["weight"])


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of 3"):
        run(tmp_path, accumulation=3)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"batch_size": 0}, {"ema_decays": (1.0,)}])
def test_impossible_options_are_refused(tmp_path, options):
    with pytest.raises(UserError):
        config(tmp_path, **options)


def test_after_bad_steps_in_a_row_the_run_goes_back_and_on_with_later_data(tmp_path):
    """Steps 0 .. 11 are good; 12, 13 and 14 are bad. The checkpoint of step 10 is taken up with the data of step 15."""
    stage, done = run(tmp_path / "a", bad_steps=(12, 13, 14), rewind_after=3, num_steps=16, checkpoint_every=5)
    assert done

    def skipping(start_step, rank, world_size):
        every = list(stream()(0, 0, 1))
        yield from (every[:10] + every[15:])[start_step:]

    expected = Regression()
    (tmp_path / "b").mkdir()
    assert train(config(tmp_path / "b", num_steps=16, checkpoint_every=5), Accelerator(cpu=True), expected, skipping) is not None
    assert torch.equal(stage.model.weight, expected.model.weight)
    facts = json.loads((tmp_path / "a/checkpoints/step_00000016/state.json").read_text())
    assert (facts["rewinds"], facts["skipped_steps"], facts["data_shift"]) == (1, 3, 5)
    (event,) = [json.loads(line) for line in (tmp_path / "a/events.jsonl").read_text().splitlines()]
    assert (event["event"], event["to"]) == ("rewind", 10)
    longer, _ = run(tmp_path / "a", num_steps=20, rewind_after=3, checkpoint_every=5)  # the shift is in the checkpoint
    (tmp_path / "c").mkdir()
    once = Regression()
    train(config(tmp_path / "c", num_steps=20, checkpoint_every=5), Accelerator(cpu=True), once, skipping)
    assert torch.equal(longer.model.weight, once.model.weight)


def test_without_a_checkpoint_before_them_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(UserError, match="bad in 2 steps in a row, and there is no checkpoint to go back to"):
        run(tmp_path, bad_steps=(3, 4), rewind_after=2)


def test_a_loss_that_explodes_is_skipped_like_one_that_is_not_finite(tmp_path):
    def exploding(start_step, rank, world_size):
        for step, batch in enumerate(stream()(start_step, rank, world_size), start_step):
            yield {"x": batch["x"], "y": batch["y"] * (1000.0 if step == 120 else 1.0)}

    def trained(name, **options):
        stage = Regression()
        (tmp_path / name).mkdir()
        assert train(config(tmp_path / name, num_steps=125, **options), Accelerator(cpu=True), stage, exploding) is not None
        return json.loads((tmp_path / name / "checkpoints/step_00000125/state.json").read_text())

    assert trained("a", explode_factor=10.0)["skipped_steps"] == 1
    assert trained("b")["skipped_steps"] == 0


def test_held_out_loss_and_scores_come_from_the_average_and_change_nothing(tmp_path):
    def held_out(rank, world_size):
        return [next(iter(stream()(900, rank, world_size)))] * 2

    seen = []

    def scores(model):
        seen.append(model.weight.detach().clone())
        return {"fid": 1.5}

    options = config(tmp_path / "a", validate_every=10, ema_decays=(0.9,))
    options = dataclasses.replace(options, scores=ScoresConfig(every=20))
    stage = Regression()
    (tmp_path / "a").mkdir()
    train(options, Accelerator(cpu=True), stage, stream(), observers=Observers(held_out=held_out, scores=scores))
    plain, _ = run(tmp_path / "b", ema_decays=(0.9,))
    assert torch.equal(stage.model.weight, plain.model.weight) and torch.equal(seen[0], plain.model.weight)
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert set(told) == {10, 20} and told[20] < told[10]
    assert [line["online_fid"] for line in lines if "online_fid" in line] == [1.5]
    with torch.no_grad():
        batch = held_out(0, 1)[0]
        assert told[20] == pytest.approx(float(plain.loss(plain.model, batch)["loss"]))
