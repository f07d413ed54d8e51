"""What the environment forces, and when our Triton kernels take a call."""

import pytest
import torch
from forced_backend import forced

from genvision.errors import UserError
from genvision.kernels.backends import forced_backend, fuses, needs_gradient, triton_runs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "expected"), [(None, None), ("", None), ("sdpa", "sdpa"), ("triton", "triton")])
def test_the_variable_forces_a_back_end(name, expected):
    with forced(name):
        assert forced_backend() == expected


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with forced("flsah"), pytest.raises(UserError, match="GENVISION_ATTENTION 'flsah' is unknown; choose one of plain, sdpa, flash,"):
        forced_backend()


def test_the_environment_is_read_once_and_traced_without_a_break(monkeypatch):
    with forced("sdpa"):
        assert forced_backend() == "sdpa"
        monkeypatch.setenv("GENVISION_ATTENTION", "plain")
        assert forced_backend() == "sdpa"
    with forced("plain"):
        told = torch.compile(lambda x: x + 1 if forced_backend() == "plain" else x, backend="eager", fullgraph=True)
        assert told(torch.zeros(1)).item() == 1


def test_triton_runs_where_it_is_interpreted_or_on_cuda(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runs(CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not triton_runs(CPU)


def test_fused_kernels_take_a_call_on_a_cpu_only_when_forced_and_never_one_with_gradients(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight = torch.zeros(2), torch.zeros(2, requires_grad=True)
    with forced(None):
        assert not fuses(x)
    with forced("sdpa"):
        assert not fuses(x)
    with forced("triton"):
        assert fuses(x, None) and not fuses(x, weight)
        with torch.no_grad():
            assert fuses(x, weight)
            with torch.autocast("cpu"):
                assert not fuses(x, weight)


def test_a_gradient_is_needed_where_autograd_would_record():
    x = torch.zeros(2, requires_grad=True)
    assert needs_gradient(None, x) and not needs_gradient(x.detach(), None)
    with torch.no_grad():
        assert not needs_gradient(x)
