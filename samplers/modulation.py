"""A diffusion transformer asked for rows of a few conditions: what depends on time and condition alone is computed once.

The modulation of all blocks is most of a small batch's linear algebra (a third of DiT's weights), and every image of a job meets the same
times and often the same classes. Shapes: T times, L conditions, R rows, M modulation values a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genvision.samplers.block_cache import RunBlocks

Condition = tuple[int, float | None]
"""A label, and the guidance scale that a scale-conditioned model is told."""

TABLE_BYTES = 2**30
"""The largest table that is kept; DiT-XL/2 fits in for 250 steps of 5 conditions."""
ROWS_AT_ONCE = 256


@dataclass
class _Table:
    times: tuple[float, ...]
    conditions: list[Condition]
    rows: Tensor
    """[T, L, M]."""
    probe: Tensor
    """[L, M], those of the middle time, to notice changed weights."""


class ModulationTables:
    """Modulation of all times and conditions of a job, kept from one batch to the next, for each generator.

    Weights may change between two batches, as in a preview during training. So the rows of one time are always computed again and
    compared, which notices every way of changing them; only a table that is still right is used again.
    """

    def __init__(self, max_bytes: int = TABLE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._tables: WeakKeyDictionary[Any, _Table] = WeakKeyDictionary()

    def of(self, generator: Any, times: Sequence[float], conditions: Sequence[Condition]) -> tuple[Tensor, Tensor] | None:
        """Rows [T, L', M] and the place of each condition among the L', int64 [L]; None where they would not fit."""
        table = self._current(generator, tuple(times))
        missing = [condition for condition in conditions if table is None or condition not in table.conditions]
        if missing:
            row = modulation_rows(generator, times[0], missing[:1])
            row_bytes = len(times) * row.numel() * row.element_size()
            if table is not None and (len(table.conditions) + len(missing)) * row_bytes > self.max_bytes:
                del self._tables[generator]
                table, missing = None, list(conditions)
            if table is None and len(missing) * row_bytes > self.max_bytes:
                return None
            table = self._tables[generator] = _grown(generator, table, tuple(times), missing)
        assert table is not None
        return table.rows, torch.tensor([table.conditions.index(condition) for condition in conditions], device=table.rows.device)

    def _current(self, generator: Any, times: tuple[float, ...]) -> _Table | None:
        table = self._tables.get(generator)
        if table is None:
            return None
        same_place = table.rows.device == generator.device and table.rows.dtype == generator.dtype
        middle = times[len(times) // 2]
        if table.times == times and same_place and torch.equal(table.probe, modulation_rows(generator, middle, table.conditions)):
            return table
        del self._tables[generator]
        return None


def _grown(generator: Any, table: _Table | None, times: tuple[float, ...], missing: list[Condition]) -> _Table:
    pairs = [(time, condition) for time in times for condition in missing]
    parts = []
    for begin in range(0, len(pairs), ROWS_AT_ONCE):
        some = pairs[begin : begin + ROWS_AT_ONCE]
        parts.append(modulation_rows(generator, [time for time, _ in some], [condition for _, condition in some]))
    rows = torch.cat(parts).view(len(times), len(missing), -1)
    known = [] if table is None else table.conditions
    if table is not None:
        rows = torch.cat([table.rows, rows], dim=1)
    conditions = known + missing
    return _Table(times, conditions, rows, modulation_rows(generator, times[len(times) // 2], conditions))


def modulation_rows(generator: Any, time: float | list[float], conditions: Sequence[Condition]) -> Tensor:
    """[L, M], of one time or of one for each condition."""
    times = time if isinstance(time, list) else [time] * len(conditions)
    t = torch.tensor(times, dtype=time_type(generator), device=generator.device)
    labels, scales = as_tensors(generator, conditions)
    rows: Tensor = generator.modulation_rows(t, labels, scale=scales)
    return rows


class LabelledNetwork:
    """One generator and the conditions that a batch asks it for.

    Args:
        generator: a DiT, or what has its `forward` (and perhaps its `modulation_rows`), in eval mode.
        conditions: all that will be asked for.
        times: that the network will be told, where they are known.
        tables: of the job.
    """

    def __init__(self, generator: Any, conditions: Sequence[Condition], times: Sequence[float], tables: ModulationTables) -> None:
        self.generator, self.conditions = generator, list(conditions)
        self._labels, self._scales = as_tensors(generator, conditions)
        self._dtype, self._time_type = generator.dtype, time_type(generator)
        self._has_rows = hasattr(generator, "modulation_rows")
        distinct = sorted(set(times))
        self._table = tables.of(generator, distinct, self.conditions) if self._has_rows and distinct else None
        self._steps = {time: step for step, time in enumerate(distinct)}
        self._latest: tuple[float, Tensor] | None = None

    def __call__(self, x: Tensor, times: Tensor, places: Tensor, run_blocks: RunBlocks | None = None) -> Tensor:
        """The network's output for R rows, [R, out_channels, ...], in its own type.

        Args:
            x: [R, c, ...].
            times: what the network is told, float64 [R] on the CPU.
            places: which condition each row has, int64 [R] on the generator's device.
            run_blocks: what to do in place of running all blocks.
        """
        t = times.to(self._time_type).to(x.device, non_blocking=True)
        rows = self._rows(times, places)
        scales = None if self._scales is None else self._scales[places]
        options: dict[str, Any] = {} if rows is None else {"modulation": rows}
        if run_blocks is not None:
            options["run_blocks"] = run_blocks
        output: Tensor = self.generator(x.to(self._dtype), t, self._labels[places], scale=scales, **options)
        return output

    def _rows(self, times: Tensor, places: Tensor) -> Tensor | None:
        """[R, M], or None where computing them inside the network costs no more."""
        time = float(times[0])
        if not self._has_rows or not bool((times == time).all()):
            return None
        if self._table is not None and time in self._steps:
            rows, in_table = self._table
            return rows[self._steps[time]].index_select(0, in_table[places])
        if self._latest is None or self._latest[0] != time:
            if len(self.conditions) >= len(places):
                return None
            self._latest = (time, modulation_rows(self.generator, time, self.conditions))
        return self._latest[1].index_select(0, places)


def as_tensors(generator: Any, conditions: Sequence[Condition]) -> tuple[Tensor, Tensor | None]:
    """Labels int64 [L] and scales [L] on the generator's device."""
    labels = torch.tensor([label for label, _ in conditions], dtype=torch.int64, device=generator.device)
    scales = [scale for _, scale in conditions if scale is not None]
    if not scales:
        return labels, None
    return labels, torch.tensor(scales, dtype=time_type(generator), device=generator.device)


def time_type(generator: Any) -> torch.dtype:
    """Of times and scales: float32, or float64 in a float64 network, whatever shorter type the weights have."""
    return torch.promote_types(generator.dtype, torch.float32)
