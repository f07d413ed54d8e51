"""A row of the benchmark: what is measured against whom, how far it is to get, and what came out."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from genvision.bench.timing import Seconds, median_interval, ratios

Clock = Literal["cpu", "wall"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the plan."""

    name: str
    peer: str = ""
    """Whom it is measured against; empty where there is nobody."""
    packages: tuple[str, ...] = ()
    """What must be installed for that, as pip names it."""
    goal: float | None = None
    """What is to be reached; None: it is only told."""
    goal_of: Literal["ratio", "fraction", "seconds"] = "ratio"
    """How many times as fast as the peer, what part of the machine's floor, or in how many seconds at most."""
    samples_differ: bool = False
    """The images are other ones than the peer's, on purpose: the row saves work that the peer does."""

    def goal_text(self) -> str:
        if self.goal is None:
            return "told only"
        if self.goal_of == "ratio":
            return "no slower" if self.goal == 1 else f"{self.goal:g}x"
        return f"{self.goal:g} of the floor" if self.goal_of == "fraction" else f"{self.goal:g} s"


class Spread(NamedTuple):
    """Median over the rounds, and the order statistics that hold the distribution's median with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a row."""

    row: str
    peer: str
    goal: str
    outcome: Literal["measured", "skipped", "wrong"] = "measured"
    reason: str = ""
    """Why it was skipped, or what was wrong; then nothing was timed and the rest is empty."""
    what: str = ""
    """The work, with its sizes."""
    check: str = ""
    """What was compared before anything was timed, and how far it agreed."""
    samples_differ: bool = False
    clock: Clock = "cpu"
    rounds: int = 0
    own_ms: float | None = None
    peer_ms: float | None = None
    """Medians, of one `unit`."""
    unit: str = ""
    ratio: Spread | None = None
    """(time of the peer) / (our time), taken within each round."""
    wall_ratio: float | None = None
    """The same by wall time; median."""
    fraction: Spread | None = None
    """(time of the floor) / (our time in each round)."""
    floor: str = ""
    reached: bool | None = None
    """None where there is no goal."""
    notes: tuple[str, ...] = ()


def skipped(row: Row, reason: str) -> Result:
    return Result(row=row.name, peer=row.peer, goal=row.goal_text(), outcome="skipped", reason=reason)


def wrong(row: Row, what: str, reason: str) -> Result:
    return Result(row=row.name, peer=row.peer, goal=row.goal_text(), outcome="wrong", what=what, reason=reason)


def measured(
    row: Row,
    what: str,
    seconds: Seconds,
    *,
    own: str,
    peer: str | None = None,
    floor: tuple[str, float] | None = None,
    check: str = "",
    clock: Clock = "cpu",
    unit: str = "call",
    num_units: int = 1,
    notes: tuple[str, ...] = (),
) -> Result:
    """The figures of a row from the times of its rounds.

    Args:
        own, peer: names in `seconds`.
        floor: what the machine cannot do faster, and its seconds.
        num_units: how many of `unit` a timed call holds.
    """
    times: Mapping[str, Sequence[float]] = seconds.cpu if clock == "cpu" else seconds.wall
    ratio = spread(ratios(times, peer, own)) if peer is not None else None
    fraction = spread([floor[1] / spent for spent in times[own]]) if floor is not None else None
    own_seconds = statistics.median(times[own])
    return Result(
        row=row.name,
        peer=row.peer,
        goal=row.goal_text(),
        what=what,
        check=check,
        samples_differ=row.samples_differ,
        clock=clock,
        rounds=len(times[own]),
        own_ms=1e3 * own_seconds / num_units,
        peer_ms=1e3 * statistics.median(times[peer]) / num_units if peer is not None else None,
        unit=unit,
        ratio=ratio,
        wall_ratio=statistics.median(ratios(seconds.wall, peer, own)) if peer is not None else None,
        fraction=fraction,
        floor=floor[0] if floor is not None else "",
        reached=_reached(row, ratio, fraction, own_seconds),
        notes=notes,
    )


def spread(values: Sequence[float]) -> Spread:
    low, high, coverage = median_interval(values)
    return Spread(statistics.median(values), low, high, coverage)


def _reached(row: Row, ratio: Spread | None, fraction: Spread | None, seconds: float) -> bool | None:
    if row.goal is None:
        return None
    if row.goal_of == "seconds":
        return seconds <= row.goal
    figure = ratio if row.goal_of == "ratio" else fraction
    if figure is None:
        return False
    return (figure.high if row.goal == 1 else figure.median) >= row.goal  # "no slower": not shown to be slower
