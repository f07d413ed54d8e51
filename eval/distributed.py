"""Statistics of one set that several processes measured in shares: sums are added up, rows are put back in order.

Nothing here depends on how many processes there are, except the last bits of float64 sums. With one process both functions only pass
things on.
"""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import gather_object, reduce

from genvision.eval.moments import Moments
from genvision.processes import process_state


def sum_moments(moments: Moments) -> Moments:
    """Moments of everything that all processes have seen, on every process."""
    state = process_state()
    if state.num_processes == 1:
        return moments
    # raw sums in float64: the cancellation costs 1e-12 of a feature's square, as much as any other order of summation
    raw = moments.scatter + moments.count * np.outer(moments.mu, moments.mu)
    packed = np.concatenate([[moments.count], moments.count * moments.mu, raw.ravel()])
    total = reduce(torch.from_numpy(packed).to(state.device), reduction="sum").cpu().numpy()
    dim = len(moments.mu)
    merged = Moments(dim)
    if total[0] > 0:
        merged.count = round(total[0])
        merged.mu = total[1 : 1 + dim] / merged.count
        merged.scatter = total[1 + dim :].reshape(dim, dim) - merged.count * np.outer(merged.mu, merged.mu)
    return merged


def gather_rows(rows: Mapping[str, list[np.ndarray]], indices: list[np.ndarray], num: int) -> dict[str, np.ndarray]:
    """Rows of all processes in the order of their indices 0 .. num - 1: name -> array [num, ...], on every process.

    Args:
        rows: of this process: name -> arrays [b, ...], one for each array of `indices`; all processes use the same names.
        indices: int64 arrays [b].
    """
    places = np.concatenate(_gather(indices)) if indices or process_state().num_processes > 1 else np.zeros(0, dtype=np.int64)
    assert np.array_equal(np.sort(places), np.arange(num)), "every image must be measured exactly once"
    inverse = np.empty(num, dtype=np.int64)
    inverse[places] = np.arange(num)
    ordered = {}
    for name in sorted(rows):  # one name at a time, so that not all of them are held twice
        parts = _gather(rows[name])
        if len(parts) == 1 and np.array_equal(inverse, np.arange(num)):
            ordered[name] = parts[0]
            continue
        target = np.empty((num, *parts[0].shape[1:]), dtype=parts[0].dtype)
        start = 0
        for part in parts:
            target[places[start : start + len(part)]] = part
            start += len(part)
        ordered[name] = target
    return ordered


def sum_over_processes(value: int) -> int:
    """The sum of every process's value, on every process."""
    return sum(gather_object([value])) if process_state().num_processes > 1 else value


def _gather(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return list(gather_object(arrays)) if process_state().num_processes > 1 else arrays
