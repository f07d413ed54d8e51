"""What a run writes about itself, and that neither a full disk nor a rewind costs a line."""

import json
import math
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from small_disk import small_disk

from genvision.training import json_lines, phases
from genvision.training.json_lines import JsonLines
from genvision.training.log import MetricLog
from genvision.training.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    """What phases take for the time."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def spend(clock, phases, **seconds):
    for name, duration in seconds.items():
        phases.enter(name)
        clock.now += duration


def open_log(folder, phases=None, accelerator=None, **options):
    options = {"start_step": 0, "num_steps": 8, "baselines": {"loss": 2.0}, "every": 2} | options
    return MetricLog(folder / "metrics.jsonl", accelerator or Accelerator(cpu=True), phases or Phases(), **options)


def step(log, number, loss=1.0, **extra):
    log.add({"loss": torch.tensor(loss)}, samples=4)
    log.step_done(number, {"lr": 0.1, "skipped_steps": 0.0, **extra})


def read(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_line_accounts_for_the_steps_since_the_last(tmp_path, clock):
    times = Phases()
    log = open_log(tmp_path, times)
    spend(clock, times, data=0.1, forward_backward=0.9)
    step(log, 1, loss=3.0, grad_norm=1.0)
    spend(clock, times, checkpoint=5.0, data=0.5, forward_backward=1.5, optimizer=1.0)
    step(log, 2, loss=1.0, grad_norm=3.0)
    spend(clock, times, forward_backward=2.0)
    step(log, 3, loss=7.0, grad_norm=math.inf)
    spend(clock, times, forward_backward=2.0)
    step(log, 4, loss=9.0, grad_norm=4.0)
    first, second = read(tmp_path)
    memory = first.pop("memory_gb"), second.pop("memory_gb")
    assert 0.05 < memory[0] <= memory[1] < 50
    percentiles = {f"step_seconds_{name}": 1 + 2 * part for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))}
    assert first == pytest.approx(
        {"step": 2, "loss": 2.0, "loss_baseline": 2.0, "lr": 0.1, "skipped_steps": 0.0, "grad_norm": 2.0, "grad_norm_max": 3.0}
        | {"images_per_second": 8 / 4, "data_wait": 0.6 / 4, "checkpoint_seconds": 5.0, **percentiles}
    )
    assert (second["step"], second["loss"], second["grad_norm"], second["data_wait"]) == (4, 8.0, 4.0, 0.0)
    assert "checkpoint_seconds" not in second


def test_skipped_steps_have_a_line_and_what_is_not_finite_is_null(tmp_path):
    log = open_log(tmp_path)
    for number in (1, 2):
        log.step_done(number, {"skipped_steps": float(number), "grad_norm": math.nan})
    step(log, 3, loss=math.nan)
    step(log, 4)
    log.record({"validation_loss": 1.5})
    first, second, third = read(tmp_path)
    assert first["skipped_steps"] == 2 and first["images_per_second"] == 0 and not {"loss", "grad_norm"} & first.keys()
    assert second["loss"] is None
    assert third == {"step": 4, "validation_loss": 1.5}


def test_the_screen_tells_what_matters(tmp_path, clock, capsys):
    times = Phases()
    log = open_log(tmp_path, times, every=1, num_steps=2)
    spend(clock, times, data=0.04, forward_backward=0.96)
    step(log, 1)
    spend(clock, times, data=0.2, forward_backward=0.8)
    step(log, 2, loss=1.25, skipped_steps=3.0)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("loss 1.2500 (guessing 2.0000), 4 images/s, 20 % waiting for data, 3 steps skipped")
    assert log._note({"loss": 1.0, "images_per_second": 4.0, "data_wait": 0.05, "mfu": 0.412}) == (
        "loss 1.0000 (guessing 2.0000), 4 images/s, MFU 41.2 %"
    )


def test_lines_of_a_killed_run_behind_its_checkpoint_are_removed_on_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 3}\n{"st\n{"step": 2, "loss": 2}\n'
    path.write_text(kept + '{"step": 3, "loss": 1}\n{"step": 4, "lo')
    log = open_log(tmp_path, start_step=2)
    assert path.read_text() == kept
    step(log, 4)
    assert json.loads(path.read_text().removeprefix(kept))["step"] == 4


def test_half_a_line_at_the_end_is_removed_on_start(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    open_log(tmp_path, start_step=2)
    assert read(tmp_path) == [{"step": 1}]


def test_a_rewind_moves_later_lines_to_the_events(tmp_path, capsys):
    log = open_log(tmp_path, every=1)
    for number in range(1, 5):
        step(log, number, loss=float(number))
    log.add({"loss": torch.tensor(1e9)}, samples=4)  # of a step that is not done
    before = read(tmp_path)
    log.rewind(2)
    assert log.progress.count == 2
    step(log, 3, loss=0.5)
    log.close()
    lines = read(tmp_path)
    assert lines[:2] == before[:2] and [(line["step"], line["loss"]) for line in lines[2:]] == [(3, 0.5)]
    (event,) = read(tmp_path, "events.jsonl")
    assert (event["event"], event["step"], event["to"]) == ("rewind", 4, 2) and event["lines"] == before[2:]


def test_a_full_disk_delays_lines_and_loses_none(tmp_path, capsys):
    with small_disk(1 << 16, tmp_path / "disk") as disk:
        log = open_log(disk, every=1, num_steps=60)
        step(log, 1)
        (disk / "ballast").write_bytes(bytes((1 << 16) - 2 * 4096))  # one page is left, which ends within a line
        for number in range(2, 31):
            step(log, number)
        assert len(read_whole(disk)) < 30
        (disk / "ballast").unlink()
        for number in range(31, 61):
            step(log, number)
        log.close()
        assert [line["step"] for line in read(disk)] == list(range(1, 61))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and "metrics.jsonl" in warnings[0]


def read_whole(folder):
    return [line for line in (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True) if json_lines.parsed_line(line)]


class FullTracker(GeneralTracker):
    name, requires_logging_directory, tracker = "full", False, None

    def log(self, values, step=None, **options):
        Path("/dev/full").write_text(str(values))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_tracker_without_room_ends_nothing(tmp_path, capsys):
    accelerator = Accelerator(cpu=True, log_with=FullTracker())
    accelerator.init_trackers("run")
    log = open_log(tmp_path, accelerator=accelerator, every=1)
    for number in (1, 2):
        step(log, number)
    assert len(read(tmp_path)) == 2
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "misses lines from step 1 on ([Errno 28] No space left on device)" in warning


def test_a_disk_that_never_takes_a_line_costs_bounded_memory_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(json_lines, "MAX_WAITING", 3)
    file = JsonLines(tmp_path / "missing" / "metrics.jsonl")
    for number in range(5):
        file.append({"step": number})
    assert [content["step"] for content in file.later(3)] == [4]
    file.cut(3)
    file.close()
    first, last = capsys.readouterr().err.splitlines()
    assert "lines are kept in memory" in first and "4 lines could not be written and are lost" in last
    (tmp_path / "missing").mkdir()
    file.append({"step": 5})
    assert [line["step"] for line in read(tmp_path / "missing")] == [2, 3, 5]


def test_two_processes_write_one_line_with_means_of_terms_and_the_longest_wait(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_log_as, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (line,) = read(tmp_path)
    assert line["loss"] == 1.5 and line["images_per_second"] == 2.0 and line["data_wait"] == pytest.approx(0.5)


def _log_as(rank, port, folder):
    from accelerate.state import AcceleratorState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)
    clock = SimpleNamespace(now=0.0)
    phases.time = SimpleNamespace(monotonic=lambda: clock.now)
    times = Phases()
    log = open_log(folder, times, Accelerator(cpu=True), every=1)
    spend(clock, times, data=float(rank), forward_backward=2.0 - rank)
    step(log, 1, loss=1.0 + rank)
    log.close()
