"""`genvision benchmark`: the project's speed beside the packages that people use otherwise, row by row.

Imports torch late: genvision.bench.timing, which comes first here, sets the number of threads for it.
"""

from pathlib import Path

from genvision.bench.machine import describe_machine, describe_versions
from genvision.bench.page import BENCHMARK, format_page, format_result, marked_page, write_between
from genvision.bench.plan import Form, chosen_rows, run
from genvision.bench.store import Entry, entry_of, merged, read_entries, write_entries
from genvision.bench.timing import NUM_THREADS, machine_load
from genvision.errors import UserError

FORMS: dict[Form, str] = {
    "quick": "quick form: few rounds, 8 tokens, small images, few steps; it shows that all is well, and is nothing to publish",
    "long": "long form: at least 9 rounds of the full work; about an hour and a half in all",
}


def run_benchmark(rows: str | None = None, *, quick: bool, long: bool, out: Path | None, page: Path | None) -> None:
    """Measure rows, print each as it ends, and write them to a file of results and to a page.

    Args:
        rows: their names, separated by commas; all of them unless told.
        out: file of results, which are added to those that it holds.
        page: gets a table of the file's results, or of this run's.

    Raises:
        UserError: options do not go together; a row gave a wrong answer, which is told when all others are done.
    """
    if quick and long:
        raise UserError("--quick and --long are two forms; give one of them")
    form: Form = "long" if long else "quick"
    if page is not None:
        if form == "quick":
            raise UserError("--page: figures of the quick form are nothing to publish; add --long")
        if rows is not None and out is None:
            raise UserError("--page with some rows only: the table would lose the others; give --out FILE that holds them")
        marked_page(page, BENCHMARK)
    chosen = chosen_rows([name.strip() for name in rows.split(",")] if rows else [])
    entries: list[Entry] = read_entries(out, form) if out is not None else []

    import torch

    torch.set_num_threads(NUM_THREADS)
    if out is not None:
        write_entries(out, entries)  # a place that cannot be written is told now, not after the first row
    print(f"{FORMS[form]}\n{describe_machine()}; {machine_load()}\n{describe_versions()}\n", flush=True)
    wrong: list[str] = []
    for result in run(chosen, form):
        print(format_result(result), flush=True)
        entries = merged(entries, entry_of(result, form))
        if out is not None:
            write_entries(out, entries)
        if result.outcome == "wrong":
            wrong.append(result.row)
    if page is not None:
        write_between(page, BENCHMARK, format_page(entries))
    print(f"\n{machine_load()}")
    if wrong:
        raise UserError(f"rows {', '.join(wrong)} gave wrong answers and were not timed; what differs is told above")
