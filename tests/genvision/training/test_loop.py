import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
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


class Line2(Line):
    """With a running statistic, a code that moves by averages, and dropout."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean().view(1), 0.1)
            self.code.data.copy_(1 + self.mean)
        return super().forward(self.dropout(x)) * self.code


class Regression:
    """The least stage: a linear model; a batch may carry a loss that is not finite."""

    def __init__(self, model=None):
        self.model, self.baselines, self.adversary, self.needs_average = model or Line(), {"loss": 1.0}, None, False

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


@pytest.mark.parametrize("decays", [(), (0.9,)])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, decays):
    clean, _ = run(tmp_path / "a", num_steps=3, ema_decays=decays)
    stage, done = run(tmp_path / "b", num_steps=5, bad_steps=(3, 4), ema_decays=decays)
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
    assert (facts["rewinds"], facts["skipped_steps"], facts["data_position"]) == (1, 3, (16 + 5) * 8)
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
    stage = Regression(Line2())
    (tmp_path / "a").mkdir()
    train(options, Accelerator(cpu=True), stage, stream(), observers=Observers(held_out=held_out, scores=scores))
    plain, _ = run(tmp_path / "b", Regression(Line2()), ema_decays=(0.9,))
    plain.model.eval()
    assert torch.equal(stage.model.weight, plain.model.weight) and torch.equal(seen[0], plain.model.weight)
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert set(told) == {10, 20} and told[20] < told[10]
    assert [line["online_fid"] for line in lines if "online_fid" in line] == [1.5]
    with torch.no_grad():
        batch = held_out(0, 1)[0]
        assert told[20] == pytest.approx(float(plain.loss(plain.model, batch)["loss"]))


def test_what_one_bad_batch_moved_is_put_back(tmp_path):
    """Running statistics, and codes without a gradient; the weights would stay, but no later step would be good."""

    def with_nan(start_step, rank, world_size):
        for step, batch in enumerate(stream()(start_step, rank, world_size), start_step):
            yield {"x": batch["x"] * (float("nan") if step == 5 else 1.0), "y": batch["y"]}

    stage = Regression(Line2())
    train(config(tmp_path, num_steps=10), Accelerator(cpu=True), stage, with_nan)
    assert all(tensor.isfinite().all() for tensor in stage.model.state_dict().values())
    assert json.loads((tmp_path / "checkpoints/step_00000010/state.json").read_text())["skipped_steps"] == 1


def test_gradients_are_watched_where_they_are_not_clipped(tmp_path):
    class Hooked(Line):
        def forward(self, x):
            out = super().forward(x)
            if x[0, 0] == 7.0:
                out.register_hook(lambda gradient: gradient * float("nan"))
            return out

    def marked(start_step, rank, world_size):
        for step, batch in enumerate(stream()(start_step, rank, world_size), start_step):
            if step == 5:
                batch["x"][0, 0] = 7.0
            yield batch

    stage, options = Regression(Hooked()), config(tmp_path, num_steps=10)
    options = dataclasses.replace(options, optim=dataclasses.replace(options.optim, max_grad_norm=None))
    train(options, Accelerator(cpu=True), stage, marked)
    assert stage.model.weight.isfinite().all()
    assert json.loads((tmp_path / "checkpoints/step_00000010/state.json").read_text())["skipped_steps"] == 1


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_may_go_back_keeps_the_checkpoint_that_it_goes_back_to(tmp_path, keep):
    """Steps 9, 10, 11 are bad; a checkpoint of step 10 would drive out that of 5, and one of 10 must not outlive the way back."""
    _, done = run(tmp_path, bad_steps=(9, 10, 11), rewind_after=3, num_steps=9 + 4, checkpoint_every=5, keep_checkpoints=keep)
    assert done
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["to"] == 5
    assert max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) == 13


def test_an_average_that_is_new_begins_with_the_weights(tmp_path):
    run(tmp_path, num_steps=10, ema_decays=(0.5,))
    stage, _ = run(tmp_path, num_steps=11, ema_decays=(0.9, 0.5))
    averages = [load_file(tmp_path / f"checkpoints/step_00000011/ema_{decay}.safetensors")["weight"] for decay in (0.9, 0.5)]
    before = load_file(tmp_path / "checkpoints/step_00000010/model.safetensors")["weight"]
    after = load_file(tmp_path / "checkpoints/step_00000011/model.safetensors")["weight"]
    decay = min(0.9, 12 / 21)
    torch.testing.assert_close(averages[0], decay * before + (1 - decay) * after)
    assert not torch.equal(*averages) and torch.equal(stage.model.weight, averages[0])


def test_fewer_steps_than_were_made_are_refused(tmp_path):
    run(tmp_path, num_steps=10)
    with pytest.raises(UserError, match=r"train\.num_steps 5: the run is at step 10 already"):
        run(tmp_path, num_steps=5)


def test_a_failing_look_at_the_model_costs_no_checkpoint(tmp_path):
    def held_out(rank, world_size):
        raise UserError("no such images")

    def preview(step, model):
        raise UserError("no such classes")

    tmp_path.mkdir(exist_ok=True)
    for observers, name in ((Observers(preview=preview), "preview_every"), (Observers(held_out=held_out), "validate_every")):
        with pytest.raises(UserError, match="no such"):
            train(config(tmp_path / name, **{name: 10}), Accelerator(cpu=True), Regression(), stream(), observers=observers)
    assert [path.name for path in (tmp_path / "preview_every/checkpoints").iterdir()] == ["step_00000010"]
