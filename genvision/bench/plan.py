"""Which rows there are, where their code is, and how they are run: the quick form, or the long one that is fit to be published.

A module of rows has `QUICK` and `LONG`, the sizes of both forms, and `measure(rows, sizes)`, which yields a result for each row.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from genvision.bench.row import Result, Row, skipped
from genvision.errors import UserError

Form = Literal["quick", "long"]
GENERATE = "transformers generate, static cache"
MERGED = "transformers forward, merged rows, static cache"
LLAMA = ("transformers",)
MODULES: dict[str, tuple[Row, ...]] = {
    "autoregressive": (
        Row(name="A1", peer=GENERATE, goal=1.6, packages=LLAMA),
        Row(name="A2", peer=GENERATE, goal=2.2, packages=LLAMA),
        Row(name="A2m", peer=MERGED, packages=LLAMA),
        Row(name="A3", peer=GENERATE, goal=2.4, packages=LLAMA),
        Row(name="A3m", peer=MERGED, packages=LLAMA),
        Row(name="A4", peer=GENERATE, goal=4, packages=LLAMA),
        Row(name="A5", peer=GENERATE, goal=3, packages=LLAMA),
    ),
    "diffusion": (
        Row(name="D1", peer="diffusers DiTTransformer2DModel", packages=("diffusers",), goal=1.1),
        Row(name="D1b", peer="diffusers DiTTransformer2DModel", packages=("diffusers",), goal=1),
        Row(name="D2", peer="diffusers DiTPipeline", packages=("diffusers",), goal=1.1),
        Row(name="D3", peer="diffusers DiTPipeline, guided throughout", packages=("diffusers",), goal=1.4, samples_differ=True),
    ),
    "block_caching": (
        Row(
            name="D3c",
            peer="cache-dit on DiTPipeline, no farther from uncached latents",
            packages=("diffusers", "cache-dit"),
            goal=1,
            samples_differ=True,
        ),
    ),
    "decoders": (
        Row(name="V1", peer="diffusers VQModel", packages=("diffusers",), goal=1.15),
        Row(name="V1k", peer="diffusers AutoencoderKL", packages=("diffusers",), goal=1),
    ),
    "inception": (Row(name="E1", peer="torch-fidelity", packages=("torch-fidelity",), goal=1.35),),
    "processes": (
        Row(name="I1", peer="import of diffusers' DiT and AutoencoderKL alone", packages=("diffusers",), goal=1.5),
        Row(name="I2", goal=0.15, goal_of="seconds"),
    ),
    "training": (
        Row(name="T1", peer="the same in a bare Accelerate loop", packages=("accelerate",), goal=1),
        Row(name="T1g", peer="the same in a bare Accelerate loop", packages=("accelerate",), goal=1),
    ),
    "masked": (Row(name="M1", goal=0.75, goal_of="fraction"),),
}
"""Modules of genvision.bench, in the order in which they run."""
ROWS: dict[str, Row] = {row.name: row for rows in MODULES.values() for row in rows}


def chosen_rows(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in the order of the plan; all if there are none.

    Raises:
        UserError: there is no such row.
    """
    for name in names:
        if name not in ROWS:
            raise UserError(f"there is no row '{name}'; choose from {', '.join(ROWS)}")
    return [row for row in ROWS.values() if not names or row.name in names]


def run(rows: Sequence[Row], form: Form) -> Iterator[Result]:
    """Measure the rows; one whose peer is not installed is skipped and says so."""
    for name, members in MODULES.items():
        wanted = []
        for row in (row for row in members if row in rows):
            if missing := missing_packages(row):
                yield skipped(row, f"{' and '.join(missing)} is missing: pip install {' '.join(missing)}")
            else:
                wanted.append(row)
        if wanted:
            module = import_module(f"genvision.bench.{name}")
            yield from module.measure(wanted, module.QUICK if form == "quick" else module.LONG)


def missing_packages(row: Row) -> list[str]:
    """Those that are not installed, as pip names them."""
    return [package for package in row.packages if find_spec(package.replace("-", "_")) is None]
