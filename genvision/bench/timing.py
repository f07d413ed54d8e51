"""Fair timing of peers on a machine that others use, too: one process, by turns, ratios within a round.

Import it before torch: it sets the number of threads, which libraries read when they are imported.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_parser.add_argument("--threads", type=int, default=1)
NUM_THREADS: int = _parser.parse_known_args()[0].threads
"""Of the whole run: 1 unless `--threads N` stands on the command line."""
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = str(NUM_THREADS)

REPEATS = 3
"""Of a floor in a turn; the least counts, so that a neighbour cannot make the floor look high."""


@dataclass
class Seconds:
    """What each peer took in each round."""

    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Time of all threads: the fairer measure where other programs run beside."""
    wall: dict[str, list[float]] = field(default_factory=dict)


def by_turns(peers: Mapping[str, Callable[[], Any]], rounds: int, floors: Collection[str] = ()) -> Seconds:
    """Every peer once a round, the order turned on by one each round; one more round, the first, is not counted.

    Args:
        floors: names of peers that measure the machine: they run `REPEATS` times a turn and the least time counts.
    """
    names = list(peers)
    seconds = Seconds({name: [] for name in names}, {name: [] for name in names})
    for number in range(rounds + 1):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            spent = [_timed(peers[name]) for _ in range(REPEATS if name in floors else 1)]
            if number > 0:
                seconds.cpu[name].append(min(cpu for cpu, _ in spent))
                seconds.wall[name].append(min(wall for _, wall in spent))
    return seconds


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this process, and wall seconds."""
    began_wall, began_cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - began_cpu, time.perf_counter() - began_wall


def ratios(seconds: Mapping[str, Sequence[float]], peer: str, own: str) -> list[float]:
    """How many times as fast as `peer` the peer `own` was in each round."""
    return [theirs / ours for theirs, ours in zip(seconds[peer], seconds[own], strict=True)]


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The narrowest pair of order statistics that holds the median of the distribution with at least `level`, or the widest there is.

    Returns:
        Lower end, upper end, and their probability 1 - 2 P(Binomial(n, 1/2) < k), which few rounds keep below `level`.
    """
    ordered, n = sorted(values), len(values)
    outside, best = 0.0, (ordered[0], ordered[-1], 1 - 2 * 0.5**n)
    for k in range(1, n // 2 + 1):  # the k-th from either end
        outside += math.comb(n, k - 1) * 0.5**n
        if k > 1 and 1 - 2 * outside < level:
            break
        best = (ordered[k - 1], ordered[-k], 1 - 2 * outside)
    return best


def print_comparison(title: str, seconds: Seconds, peer: str) -> None:
    """Each peer's median times, and how many times as fast as `peer` it was: the median over the rounds with its interval."""
    rounds = len(seconds.cpu[peer])
    print(f"\n{title}, {NUM_THREADS} thread{'s' if NUM_THREADS > 1 else ''}, {rounds} rounds; {machine_load()}")
    print(f"{'':34} {'CPU s':>8} {'least':>8} {'wall s':>8}   times as fast as {peer} by CPU time, least, wall time")
    coverage = 0.0
    for name, spent in seconds.cpu.items():
        low, high, coverage = median_interval(ratios(seconds.cpu, peer, name))
        by_cpu, by_wall = (statistics.median(ratios(kind, peer, name)) for kind in (seconds.cpu, seconds.wall))
        least = min(seconds.cpu[peer]) / min(spent)
        print(
            f"{name:34} {statistics.median(spent):8.3f} {min(spent):8.3f} {statistics.median(seconds.wall[name]):8.3f}   "
            f"{by_cpu:.3f} [{low:.3f}, {high:.3f}], {least:.3f}, {by_wall:.3f}",
            flush=True,
        )
    print(f"[..]: interval of the median by order statistics, {coverage:.0%}; least: of the least times, which others disturbed least")


def machine_load() -> str:
    return f"load of the machine {', '.join(f'{load:.2f}' for load in os.getloadavg())} (1, 5, 15 minutes) on {os.cpu_count()} cores"
