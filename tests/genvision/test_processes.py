import os

import pytest
import torch

from genvision.processes import available_cores, fit_threads


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 64), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 64)])
def test_a_containers_share_of_time_limits_the_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores(tmp_path / "cpu.max") == cores
    assert available_cores(tmp_path / "no such file") == 64


def test_the_processes_of_a_job_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(32)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        fit_threads()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(32)
        monkeypatch.setenv("OMP_NUM_THREADS", "32")
        fit_threads()
        assert torch.get_num_threads() == 32
    finally:
        torch.set_num_threads(before)
