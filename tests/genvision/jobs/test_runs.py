"""`genvision runs`: what the files of runs say of them, in a table, as JSON and on a page."""

import json
import os
import sys
import time
from io import BytesIO, TextIOWrapper

import pytest
import yaml

from genvision.errors import UserError
from genvision.jobs.runs import find_runs, format_runs, show_runs, sparkline
from genvision.training.run_lock import RunLock

NOW = int(time.time())


def make_run(folder, *, model="maskgit", num_steps=400, lines=(), checkpoints=(), finished=False, age=0):
    folder.mkdir(parents=True)
    config = {"stage": "generator", "model": {"name": model}, "train": {"num_steps": num_steps}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in checkpoints:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    if finished:
        (folder / "model").mkdir()
    set_age(folder, age)


def set_age(folder, age):
    for path in folder.rglob("*"):
        os.utime(path, (NOW - age, NOW - age))


def lines_of(losses, **more):
    return [{"step": 100 * (i + 1), "loss": loss, "images_per_second": 1234.5, **more} for i, loss in enumerate(losses)]


@pytest.fixture
def folder(tmp_path):
    """Runs in every state, newest first."""
    make_run(tmp_path / "now", lines=lines_of([4, 3, None, 2]), checkpoints=[200], age=0)
    make_run(tmp_path / "deep/er/done", lines=lines_of([4, 1]), checkpoints=[200, 400], finished=True, age=3600)
    make_run(tmp_path / "stopped", lines=lines_of([4], skipped_steps=2.0), checkpoints=[100, 200], age=11000)
    make_run(tmp_path / "longer", num_steps=500, lines=lines_of([4] * 4), checkpoints=[400], finished=True, age=20000)
    make_run(tmp_path / "failed", lines=lines_of([4, float("nan")]), age=2 * 86400)
    make_run(tmp_path / "empty", num_steps=300_000, age=3 * 86400)
    (tmp_path / "stopped/checkpoints/step_00000300.part").mkdir()
    make_run(tmp_path / "stopped/checkpoints/step_00000200/copy")
    set_age(tmp_path / "stopped", 11000)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("service: web\n")
    return tmp_path


def test_the_state_of_a_run_follows_from_its_files_and_its_lock(folder):
    with RunLock(folder / "now"):
        runs = find_runs(folder)
    assert {run.name: run.state for run in runs} == {
        "now": "running",
        "deep/er/done": "finished",
        "stopped": "stopped",
        "longer": "stopped",  # it has a model, but more steps were asked for since
        "failed": "failed",
        "empty": "empty",
    }
    assert find_runs(folder / "now")[0].state == "stopped"
    assert [run.name for run in runs] == ["now", "deep/er/done", "stopped", "longer", "failed", "empty"]


def test_a_run_says_how_far_it_is(folder):
    (folder / "stopped/events.jsonl").write_text('{"event": "rewind", "step": 150, "to": 100}\n{"event": "rew')
    (folder / "stopped/metrics.jsonl").open("a").write('{"step": 100, "validation_loss": 3.5}\n{"step": 300, "lo')
    run = next(run for run in find_runs(folder) if run.name == "stopped")
    assert (run.model, run.step, run.num_steps, run.checkpoint_step, run.loss) == ("maskgit", 200, 400, 200, 4)
    assert (run.validation_loss, run.skipped_steps, run.num_rewinds, run.validation_losses) == (3.5, 2, 1, [(100, 3.5)])


def test_a_real_run_is_read(tiny_run):
    (run,) = find_runs(tiny_run)
    assert (run.name, run.stage, run.model, run.state) == (tiny_run.name, "generator", "llamagen", "finished")
    assert run.step == run.num_steps == run.checkpoint_step == 3


def test_the_table_fits_a_terminal(folder):
    make_run(folder / ("long_" * 20 + "end"), model="llamagen", num_steps=12_345_678, lines=lines_of([0.00001234]), checkpoints=[123_456])
    head, newest, *rest = format_runs(find_runs(folder)).splitlines()
    assert all(len(line) <= 80 for line in (head, newest, *rest))
    assert head.split() == ["run", "model", "state", "step", "loss", "img/s", "checkpoint"]
    assert newest.startswith("…") and "g_end llamagen stopped  123k/12.3M 1.234e-05 ▁     1234 123k, " in newest
    rows = {line.split()[0]: line.split()[2:] for line in rest}
    assert rows["stopped"] == ["stopped", "200/400", "4.000", "▁", "1234", "200,", "3", "h", "ago"]
    assert rows["failed"] == ["failed", "200/400", "-", "▁", "1234", "none"]
    assert rows["empty"] == ["empty", "0/300k", "-", "-", "none"] and "█▁" in rows["deep/er/done"]


def test_a_terminal_without_blocks_gets_a_table_too(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="ascii"))
    assert show_runs(folder).isascii()


def test_json_has_every_fact_and_no_curves(folder):
    runs = json.loads(show_runs(folder, as_json=True))
    assert runs[1]["folder"] == str(folder / "deep/er/done") and runs[1]["loss"] == 1 and "losses" not in runs[1]
    assert next(run for run in runs if run["name"] == "failed")["loss"] is None
    assert runs[1]["changed"] > runs[2]["changed"]


def test_a_page_has_a_chart_for_each_kind_of_model(folder):
    make_run(folder / "<vq>", model="vq", lines=[*lines_of([1, 0.5]), {"step": 200, "validation_loss": 0.75}])
    show_runs(folder, html=folder / "runs.html")
    page = (folder / "runs.html").read_text()
    assert page.count('<svg class="chart"') == 3 and "validation loss against steps, at last: &lt;vq&gt; 0.75" in page
    assert "<vq>" not in page and "<h2>maskgit</h2>" in page


def test_what_is_no_run_costs_a_line(folder, capsys):
    assert show_runs(folder / "other") == f"no training runs below {folder / 'other'}"
    with pytest.raises(UserError, match="no such folder"):
        show_runs(folder / "absent")
    (folder / "now/config.yaml").write_text("model: [")
    assert next(run for run in find_runs(folder / "now")).model is None
    assert "config.yaml: cannot be read" in capsys.readouterr().err


def test_a_sparkline_shows_the_means_of_equal_parts():
    assert sparkline([7, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([0, 2, 4, 6], width=2) == "▁█"
    assert (sparkline([]), sparkline([5.0, 5.0])) == ("", "▁▁")
