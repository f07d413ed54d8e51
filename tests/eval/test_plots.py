import re

import numpy as np
import pytest

from genvision.eval.plots import Point, Series, class_ticks, convergence_chart, interval_bar, line_chart, nice_ticks


def numbers(svg: str, pattern: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, svg)]


def test_bar_puts_value_and_interval_where_they_belong_on_its_scale():
    svg = interval_bar(2.0, (1.5, 3.0), 1.0, 5.0)
    assert numbers(svg, r'class="value" x1="([\d.]+)"') == [250.0]
    assert numbers(svg, r'class="interval" x="([\d.]+)"') == [125.0]
    assert numbers(svg, r'class="interval" x="[\d.]+" width="([\d.]+)"') == [375.0]


def test_bar_ends_where_its_scale_ends_and_has_a_middle_without_one():
    svg = interval_bar(9.0, (-3.0, 20.0), 0.0, 10.0)
    assert numbers(svg, r'class="interval" x="([\d.]+)"') == [0.0] and numbers(svg, r'width="([\d.]+)"') == [1000.0]
    assert numbers(interval_bar(3.0, None, 3.0, 3.0), r'class="value" x1="([\d.]+)"') == [500.0]


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_evenly_spaced_and_within_the_range(seed):
    rng = np.random.default_rng(seed)
    low = rng.normal() * 10.0 ** rng.integers(-4, 5)
    high = low + abs(rng.normal()) * 10.0 ** rng.integers(-4, 5) + 1e-6
    ticks = nice_ticks(low, high)
    gaps = np.diff(ticks)
    span = high - low
    assert 2 <= len(ticks) <= 8
    assert ticks[0] >= low - 1e-6 * span and ticks[-1] <= high + 1e-6 * span
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)
    mantissa = gaps[0] / 10 ** np.floor(np.log10(gaps[0]) + 1e-9)
    assert min(abs(mantissa - 1), abs(mantissa - 2), abs(mantissa - 5)) < 1e-6


def test_lines_rise_upwards_and_run_to_the_right():
    svg = line_chart([Series(name="a", points=[Point(x=1, y=1), Point(x=2, y=3)])], "x", "y")
    first, second = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', svg).group(1).split()]
    assert second[0] > first[0] and second[1] < first[1]


def test_names_and_titles_are_text():
    hostile = "<script>\"'&"
    svg = line_chart([Series(name=hostile, points=[Point(x=1, y=1, title=hostile)])], hostile, hostile, described=hostile)
    svg += class_ticks([0.5], None, hostile)
    assert "<script>" not in svg and "&lt;script&gt;" in svg


def test_convergence_is_drawn_over_one_over_n_and_meets_infinity_at_its_left_end():
    svg = convergence_chart([(1000, 5.0), (2000, 4.0), (4000, 3.5)], 3.0, (2.9, 3.1))
    whole, half, quarter = sorted(numbers(svg, r'<circle class="dot c0[^"]*" cx="([\d.]+)"'))
    infinity = numbers(svg, r'<path class="dot c1" d="M([\d.]+)')[0]
    assert quarter - infinity == pytest.approx(4 * (whole - infinity), abs=0.3)
    assert half - infinity == pytest.approx(2 * (whole - infinity), abs=0.3)
    assert numbers(svg, r'class="fit c0" x1="([\d.]+)"') == [infinity]
    assert "∞" in svg and ">4k<" in svg
    assert "fit" not in convergence_chart([(1000, 5.0), (2000, 4.0)]) and "dot c1" not in convergence_chart([(1000, 5.0)])


def test_every_class_has_a_mark_and_the_whole_set_another():
    svg = class_ticks([0.0, 0.5, 1.0], 0.75, "precision")
    marks = numbers(svg, r'class="tick c0" opacity="[\d.]+" x1="([\d.]+)"')
    whole = numbers(svg, r'class="tick c1 strong" x1="([\d.]+)"')
    assert marks[1] == pytest.approx((marks[0] + marks[2]) / 2)
    assert whole[0] == pytest.approx((marks[1] + marks[2]) / 2)
