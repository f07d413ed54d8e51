"""The plan, the figures that follow from times, and how they are written down."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from genvision.bench.floors import PRODUCT, READ, Floors, Work
from genvision.bench.page import BENCHMARK, GPU, format_page, format_result, marked_page, write_between
from genvision.bench.plan import MODULES, ROWS, chosen_rows, missing_packages
from genvision.bench.row import Row, measured, skipped, wrong
from genvision.bench.store import entry_of, merged, read_entries, write_entries
from genvision.bench.timing import Seconds, by_turns, median_interval
from genvision.errors import UserError
from genvision.jobs.benchmark import run_benchmark

PAGE = Path(__file__).resolve().parents[3] / "docs" / "performance.md"
TIMES = Seconds(
    cpu={"own": [1.0, 2.0, 4.0], "peer": [2.0, 3.0, 4.0]},
    wall={"own": [1.0, 1.0, 1.0], "peer": [3.0, 3.0, 3.0]},
)
ROW = Row(name="A1", peer="somebody", goal=1.5)


def result(**changes):
    row = replace(ROW, **changes)
    return measured(row, "work", TIMES, own="own", peer="peer", floor=("bytes", 0.5), check="equal", notes=("a note",))


def test_ratios_are_taken_within_rounds_and_fractions_of_one_floor():
    figures = result()
    assert figures.ratio[:3] == (1.5, 1.0, 2.0) and figures.ratio.coverage == 0.75
    assert figures.fraction[:3] == (0.25, 0.125, 0.5)
    assert (figures.own_ms, figures.peer_ms, figures.wall_ratio, figures.rounds) == (2000, 3000, 3, 3)


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"goal": 1.5}, True),
        ({"goal": 1.6}, False),
        ({"goal": None}, None),
        ({"goal": 0.25, "goal_of": "fraction"}, True),
        ({"goal": 1.9, "goal_of": "seconds"}, False),
    ],
)
def test_a_goal_is_reached_by_the_median(changes, reached):
    assert result(**changes).reached is reached


def test_no_slower_is_missed_only_where_the_interval_lies_below_one():
    slow = Seconds({"own": [1.0] * 3, "peer": [0.9, 0.95, 1.01]}, {"own": [1.0] * 3, "peer": [1.0] * 3})
    row = replace(ROW, goal=1)
    assert measured(row, "work", slow, own="own", peer="peer").reached is True
    slow.cpu["peer"][2] = 0.99
    assert measured(row, "work", slow, own="own", peer="peer").reached is False


def test_nine_rounds_hold_the_median_between_the_second_and_the_last_but_one():
    low, high, coverage = median_interval([float(i) for i in range(9)])
    assert (low, high) == (1, 7) and coverage == pytest.approx(0.961, abs=1e-3)


def test_peers_take_turns_and_floors_run_three_times_in_one():
    calls = []
    seconds = by_turns({name: lambda name=name: calls.append(name) for name in "abf"}, 2, floors="f")
    assert calls == [*"abfff", *"bfffa", *"fffab"]
    assert {len(times) for times in seconds.cpu.values()} == {2}


def test_the_floor_is_the_longer_of_reading_and_products():
    floors = Floors(Work(flops=16 * 64**3, bytes=4096))
    assert floors.side in (63, 64) and floors.bytes == 4096
    seconds = Seconds({PRODUCT: [1.0, 2.0], READ: [3.0, 3.0]}, {})
    assert floors.floor(seconds, Work(flops=0, bytes=8192)) == (READ, 6.0)
    assert floors.floor(seconds, Work(flops=20 * floors.side**3, bytes=1024)) == (PRODUCT, 10.0)


def test_both_forms_of_every_row_are_planned():
    assert len(ROWS) == sum(len(rows) for rows in MODULES.values()) == 20
    for name in MODULES:
        if name == "autoregressive":
            pytest.importorskip("transformers")
        module = import_module(f"genvision.bench.{name}")
        assert module.LONG.rounds >= 9 > module.QUICK.rounds
    quick = import_module("genvision.bench.autoregressive").QUICK
    assert (quick.num_tokens, quick.rounds, quick.hidden_dim, quick.depth) == (8, 3, 768, 12)


def test_rows_are_chosen_by_name_in_the_order_of_the_plan():
    assert chosen_rows([]) == list(ROWS.values())
    assert [row.name for row in chosen_rows(["M1", "A2m"])] == ["A2m", "M1"]
    with pytest.raises(UserError, match="there is no row 'A9'; choose from A1, A2"):
        chosen_rows(["A9"])


def test_a_missing_peer_is_named_as_pip_names_it():
    assert missing_packages(Row(name="X", packages=("torch", "no-such-peer"))) == ["no-such-peer"]


def test_a_page_changes_between_its_markers_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- benchmark: begin -->\nold | row\n<!-- benchmark: end -->\nafter\n<!-- gpu: begin -->\n<!-- gpu: end -->\n"
    )
    for _ in range(2):
        write_between(page, BENCHMARK, "| new |\n")
    expected = "before\n<!-- benchmark: begin -->\n\n| new |\n\n<!-- benchmark: end -->\nafter\n<!-- gpu: begin -->\n<!-- gpu: end -->\n"
    assert page.read_text() == expected


@pytest.mark.parametrize("text", ["", "<!-- benchmark: end --><!-- benchmark: begin -->", "<!-- benchmark: begin -->"])
def test_a_page_without_markers_is_refused(tmp_path, text):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(UserError, match="must stand there once"):
        marked_page(tmp_path / "page.md", BENCHMARK)
    with pytest.raises(UserError, match="is not there"):
        marked_page(tmp_path / "other.md", BENCHMARK)


def test_the_table_shows_what_was_measured_skipped_and_wrong():
    results = [result(samples_differ=True), skipped(ROWS["D3c"], "pip install cache-dit"), wrong(ROWS["V1"], "work", "images differ")]
    text = format_page([entry_of(each, "long") for each in results])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1
    assert "**samples differ**" in rows[1] and "**1.50** [1.00, 2.00]" in rows[1] and "0.25 [0.12, 0.50], bytes" in rows[1]
    assert "1.5x: reached" in rows[1] and "call: 2,000 / 3,000" in rows[1]
    assert "skipped: pip install cache-dit" in rows[2] and "**wrong, not timed**: images differ" in rows[3]
    assert "- A1: a note." in text and "all rows" not in text
    assert "SAMPLES DIFFER" in format_result(results[0]) and "WRONG, not timed" in format_result(results[2])


def test_results_are_kept_and_replaced_row_by_row(tmp_path):
    file = tmp_path / "results.json"
    old, new = entry_of(result(), "long"), entry_of(replace(result(), what="other work"), "long")
    entries = merged(merged([], entry_of(skipped(ROWS["V1"], "why"), "long")), old)
    assert [entry.result.row for entry in entries] == ["A1", "V1"]
    write_entries(file, entries)
    assert read_entries(file, "long") == entries
    assert [entry.result.what for entry in merged(read_entries(file, "long"), new)] == ["other work", ""]
    assert json.loads(file.read_text())["results"][0]["ratio"] == {"median": 1.5, "low": 1.0, "high": 2.0, "coverage": 0.75}
    with pytest.raises(UserError, match="holds results of the long form, and this is the quick one"):
        read_entries(file, "quick")
    file.write_text("{}")
    with pytest.raises(UserError, match="not a file of results"):
        read_entries(file, "long")


def test_the_command_prints_and_keeps_a_row(tmp_path, capsys):
    run_benchmark("I2", quick=True, long=False, out=tmp_path / "results.json", page=None)
    printed = capsys.readouterr().out
    assert printed.startswith("quick form: few rounds, 8 tokens") and "load of the machine" in printed
    assert "I2   import genvision" in printed
    assert [entry.result.row for entry in read_entries(tmp_path / "results.json", "quick")] == ["I2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quick": True, "long": True, "page": None}, "give one of them"),
        ({"quick": False, "long": False, "page": PAGE}, "nothing to publish; add --long"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        run_benchmark("I2", out=None, **options)


def test_the_page_explains_every_row_and_has_room_for_both_tables():
    text = PAGE.read_text()
    for name in ROWS:
        assert f"| `{name}` |" in text
    for place in (BENCHMARK, GPU):
        marked_page(PAGE, place)
