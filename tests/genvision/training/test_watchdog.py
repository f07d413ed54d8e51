"""Stalled processes end and say where; those that go on, or were stopped as a whole, are left alone."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genvision.training.phases import Phases
from genvision.training.watchdog import STALLED, Watchdog

ROOT = Path(__file__).resolve().parents[3]
OPENING = """
import sys, time
from genvision.training.phases import Phases
from genvision.training.watchdog import Watchdog
phases = Phases()
"""
STALL = """
def read_a_hung_disk():
    time.sleep(60)
phases.step = 17
phases.enter(sys.argv[1])
with Watchdog(phases, rank=1, num_processes=int(sys.argv[2]), timeout=0.2, slow_factor=2):
    print(flush=True)
    read_a_hung_disk()
"""
STEPS = """
with Watchdog(phases, rank=0, num_processes=1, timeout=0.5):
    phases.enter("data")
    print(flush=True)
    sys.stdin.readline()
    for step in range(6):
        for name in ("data", "forward_backward"):
            phases.enter(name)
            time.sleep(0.05)
        phases.take()
    phases.enter("checkpoint")
    time.sleep(0.6)
"""


def start(program: str, *words: str) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", OPENING + program, *words], cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("phase", "num_processes", "cause"),
    [
        ("data", 2, "it waits for its data"),
        ("agreement", 2, "look for the rank that names another phase"),
        ("forward_backward", 1, "it computes;"),
        ("checkpoint", 2, "or waits for the process that does"),
    ],
)
def test_a_stall_ends_the_process_with_one_line_and_the_stacks(phase, num_processes, cause):
    process = start(STALL, phase, str(num_processes))
    started = time.monotonic()
    err = process.communicate(timeout=20)[1]
    waited = time.monotonic() - started
    assert process.returncode == STALLED
    assert waited > (0.35 if phase == "checkpoint" else 0.15)
    line, *stacks = err.splitlines()
    assert re.match(rf"genvision: rank 1 of {num_processes} processes: step 17 stalled in phase {phase} for \d+ s; ", line)
    assert cause in line and line.endswith("status 75")
    assert any("in read_a_hung_disk" in stack for stack in stacks)


def test_a_process_that_goes_on_is_left_alone():
    process = start(STEPS)
    err = process.communicate("\n", timeout=20)[1]
    assert process.returncode == 0, err


def test_time_in_which_the_whole_process_was_stopped_does_not_count():
    process = start(STEPS)
    time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.2)  # for some looks at a phase that began 1.3 s ago
    err = process.communicate("\n", timeout=20)[1]
    assert process.returncode == 0, err


def test_a_stall_is_noticed_though_the_process_was_stopped_meanwhile():
    process = start(STALL, "data", "1")
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == STALLED, err


def test_those_that_wait_for_others_have_more_patience_than_the_one_that_holds_them_up():
    watchdog = Watchdog(Phases(), rank=0, num_processes=2, timeout=100)
    assert watchdog.patience("data") == 100 < watchdog.patience("forward_backward") < 120 < watchdog.patience("checkpoint") == 1000
    assert Watchdog(Phases(), rank=0, num_processes=1, timeout=100).patience("forward_backward") == 100


def test_a_look_between_the_name_of_a_new_phase_and_its_beginning_raises_no_alarm():
    phases = Phases()
    watchdog = Watchdog(phases, rank=0, num_processes=1, timeout=10)
    phases.enter("checkpoint")
    began = phases.since
    assert not any(watchdog.look(began + second) for second in range(51))
    phases.current = "data"  # as Phases.enter does, and goes on to the other line
    assert watchdog.look(began + 51) is None
    phases.since = began + 51
    assert not any(watchdog.look(began + 51 + second) for second in range(11))
    assert watchdog.look(began + 62) == ("data", 11)


def test_time_is_forgiven_to_the_phase_in_which_the_process_was_stopped_alone():
    phases = Phases()
    watchdog = Watchdog(phases, rank=0, num_processes=1, timeout=10)
    phases.enter("data")
    began = phases.since
    assert not any(watchdog.look(began + second) for second in (1, 2, 103, 104))
    phases.current, phases.since = "agreement", began + 104
    assert not any(watchdog.look(began + 104 + second) for second in range(11))
    assert watchdog.look(began + 115) == ("agreement", 11)


def test_it_stops_watching_at_the_end():
    phases = Phases()
    with Watchdog(phases, rank=0, num_processes=1, timeout=0.1) as watchdog:
        phases.enter("data")
    assert not watchdog._thread.is_alive()
    time.sleep(0.2)  # this process would end
