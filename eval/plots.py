"""Charts as inline SVG: interval bars, lines with intervals, FID against the number of images, classes on a scale.

Colours come from the page's style sheet (`document.STYLE`), so that one chart serves a light, a dark and a printed page. Lengths are in
the units of the viewBox, which a page shows at about one pixel each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 16, 42
NUM_COLOURS = 6
"""Classes c0 .. c5 of the style sheet."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A score at a place of the horizontal axis."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    is_best: bool = False
    title: str = ""
    """What a reader sees who stays with the pointer."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line."""

    name: str
    points: Sequence[Point]


def interval_bar(
    value: float, interval: tuple[float, float] | None, low: float, high: float, band: tuple[float, float] | None = None
) -> str:
    """A thin line from `low` to `high` with an interval and its value upon it, as wide as its place.

    Args:
        band: an interval to compare with, drawn behind.
    """

    def place(number: float) -> float:
        return 1000 * min(max((number - low) / (high - low), 0.0), 1.0) if high > low else 500.0

    parts = ['<line class="rail" x1="0" x2="1000" y1="7" y2="7"/>']
    if band is not None:
        parts.append(
            f'<rect class="band" x="{place(band[0]):.1f}" width="{max(place(band[1]) - place(band[0]), 4):.1f}" y="0" height="14"/>'
        )
    if interval is not None:
        x = place(interval[0])
        parts.append(f'<rect class="interval" x="{x:.1f}" width="{max(place(interval[1]) - x, 4):.1f}" y="4" height="6"/>')
    parts.append(f'<line class="value" x1="{place(value):.1f}" x2="{place(value):.1f}" y1="0" y2="14"/>')
    return f'<svg class="bar" viewBox="0 0 1000 14" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def line_chart(series: Sequence[Series], x_title: str, y_title: str, *, x_ticks: Sequence[float] | None = None, described: str = "") -> str:
    """Lines with interval bars; points that are the best are ringed.

    Args:
        x_ticks: where the horizontal axis is named; round numbers unless told.
        described: the chart in words, for those who cannot see it.
    """
    points = [point for line in series for point in line.points]
    reach = [value for point in points for value in (point.y, *(point.interval or ()))]
    horizontal = _Scale.around([point.x for point in points], LEFT, WIDTH - RIGHT)
    vertical = _Scale.around(reach, HEIGHT - BOTTOM, TOP)
    parts = _frame(horizontal, vertical, x_ticks, x_title, y_title)
    for i, line in enumerate(series):
        colour = f"c{i % NUM_COLOURS}"
        dash = f' stroke-dasharray="{1 + 3 * (i // NUM_COLOURS)} {3 * (i // NUM_COLOURS)}"' if i >= NUM_COLOURS else ""
        path = " ".join(f"{horizontal(point.x):.1f},{vertical(point.y):.1f}" for point in line.points)
        if len(line.points) > 1:
            parts.append(f'<polyline class="line {colour}" points="{path}"{dash}/>')
        for point in line.points:
            parts += _mark(point, horizontal(point.x), vertical, colour)
    return _svg(parts, described)


def convergence_chart(
    curve: Sequence[tuple[int, float]],
    infinity: float | None = None,
    infinity_interval: tuple[float, float] | None = None,
    whole_interval: tuple[float, float] | None = None,
) -> str:
    """FID against 1 / N with N named below the axis, and the line that ends at infinitely many images.

    Args:
        curve: (number of images, FID), growing; the last is the whole set.
        whole_interval: of the last point.
    """
    counts = [count for count, _ in curve]
    values = [value for _, value in curve]
    reach = [*values, *([] if infinity is None else [infinity]), *(infinity_interval or ()), *(whole_interval or ())]
    horizontal = _Scale(low=0, high=1.06 / min(counts), start=LEFT + 14, stop=WIDTH - RIGHT)
    vertical = _Scale.around(reach, HEIGHT - BOTTOM, TOP)
    parts = _frame(horizontal, vertical, [], "number of images N, on a scale of 1/N", "FID")
    labels = [(0.0, "∞")] + [(1 / count, _short_count(count)) for count in reversed(counts)]
    last_x = -math.inf
    for x, label in labels:
        place = horizontal(x)
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        if place - last_x > 30:  # otherwise the names would touch
            parts.append(_text(place, HEIGHT - BOTTOM + 17, label))
            last_x = place
    if infinity is not None:
        slope = (values[-1] - infinity) * counts[-1]
        end = min(1.0 / min(counts), (vertical.high - infinity) / slope) if slope > 0 else 1.0 / min(counts)
        ends = horizontal(0), vertical(infinity), horizontal(end), vertical(infinity + slope * end)
        parts.append('<line class="fit c0" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*ends))
    for i, (count, value) in enumerate(curve):
        is_whole = i == len(curve) - 1
        point = Point(x=1 / count, y=value, interval=whole_interval if is_whole else None, title=f"FID {value:.4f} with {count:,} images")
        parts += _mark(point, horizontal(1 / count), vertical, "c0" if is_whole else "c0 hollow")
    if infinity is not None:
        point = Point(x=0, y=infinity, interval=infinity_interval, title=f"FID {infinity:.4f}, extrapolated")
        parts += _mark(point, horizontal(0), vertical, "c1", is_diamond=True)
    end_text = "" if infinity is None else f"; {infinity:.4f} extrapolated to infinitely many images"
    return _svg(parts, "; ".join(f"FID {value:.4f} with {count:,} images" for count, value in curve) + end_text)


def class_ticks(values: Sequence[float], whole: float | None, title: str) -> str:
    """One thin mark for each class on a scale from 0 to 1, and one for the whole set."""
    horizontal = _Scale(low=0, high=1, start=14, stop=WIDTH - 14)
    parts = [f'<line class="axis" x1="14" x2="{WIDTH - 14}" y1="44" y2="44"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="axis" x1="{horizontal(tick):.1f}" x2="{horizontal(tick):.1f}" y1="44" y2="48"/>')
        parts.append(_text(horizontal(tick), 62, f"{tick:g}"))
    opacity = min(0.9, max(0.12, 12 / max(len(values), 1)))
    for value in values:
        parts.append(
            f'<line class="tick c0" opacity="{opacity:.2f}" x1="{horizontal(value):.1f}" x2="{horizontal(value):.1f}" y1="14" y2="42"/>'
        )
    if whole is not None:
        parts.append(f'<line class="tick c1 strong" x1="{horizontal(whole):.1f}" x2="{horizontal(whole):.1f}" y1="6" y2="50"/>')
    return _svg(parts, title, height=70)


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round numbers (1, 2 or 5 times a power of ten apart) in [low, high], low < high."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.8 * rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """A straight map of [low, high] to [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    @classmethod
    def around(cls, values: Sequence[float], start: float, stop: float) -> "_Scale":
        """Room for all values and a little more on both sides."""
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low=low - room, high=high + room, start=start, stop=stop)


def _frame(horizontal: _Scale, vertical: _Scale, x_ticks: Sequence[float] | None, x_title: str, y_title: str) -> list[str]:
    """Axes, faint lines at round heights, and names."""
    parts = []
    y_marks = nice_ticks(vertical.low, vertical.high)
    for mark, label in zip(y_marks, _labels(y_marks), strict=True):
        y = vertical(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, label, anchor="end"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    x_marks = nice_ticks(horizontal.low, horizontal.high) if x_ticks is None else x_ticks
    for mark, label in zip(x_marks, _labels(x_marks), strict=True):
        x = horizontal(mark)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 17, label))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title, style="name"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="name" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">{escape(y_title)}</text>')
    return parts


def _mark(point: Point, x: float, vertical: _Scale, colour: str, *, is_diamond: bool = False) -> list[str]:
    y = vertical(point.y)
    parts = []
    if point.interval is not None:
        low, high = vertical(point.interval[0]), vertical(point.interval[1])
        parts.append(f'<path class="whisker {colour}" d="M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8M{x:.1f} {low:.1f}V{high:.1f}"/>')
    if point.is_best:
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
    title = f"<title>{escape(point.title)}</title>" if point.title else ""
    if is_diamond:
        parts.append(f'<path class="dot {colour}" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z">{title}</path>')
    else:
        parts.append(f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.6">{title}</circle>')
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle", style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _labels(marks: Sequence[float]) -> list[str]:
    """All marks of an axis with as many decimals as the finest needs."""
    for decimals in range(7):
        texts = [f"{mark + 0.0:,.{decimals}f}" for mark in marks]
        if all(
            math.isclose(float(text.replace(",", "")), mark, rel_tol=1e-6, abs_tol=1e-9) for text, mark in zip(texts, marks, strict=True)
        ):
            return texts
    return [f"{mark:g}" for mark in marks]


def _short_count(count: int) -> str:
    return f"{count / 1000:g}k" if count >= 1000 and count % 100 == 0 else f"{count:,}"


def _svg(parts: Sequence[str], described: str, height: int = HEIGHT) -> str:
    text = escape(described)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text}">{"".join(parts)}</svg>'
