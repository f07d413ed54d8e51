"""Importing a package as if others, which it would take along, were not installed.

diffusers takes along what it finds: transformers for configurations of its pipelines, peft for its adapters, torch's compiler for a
decorator. Sampling uses none of them, and they cost more than torch itself. Each is optional to diffusers, so a process that does nothing
but sample has it imported without them. A process that others share must not: diffusers' text pipelines, say, would be missing there.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module

UNUSED_BY_SAMPLING = ("transformers", "peft", "torch._dynamo")
"""What diffusers can do without where nobody encodes text, trains adapters or compiles its own blocks; importable again afterwards."""


def without_unused(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with diffusers imported lean before it; for a process that runs it and ends."""

    @wraps(command)
    def lean(*words: object, **options: object) -> None:
        import torch  # noqa: F401  before its compiler is hidden, since the parts of torch look for one another

        import_without("diffusers.models.modeling_utils", UNUSED_BY_SAMPLING)
        command(*words, **options)

    return lean


def import_without(module: str, hidden: Sequence[str]) -> None:
    """Import a module while the `hidden` ones cannot be found, except those that are imported already.

    A package that is imported already stays as it is. One that cannot do without a hidden module is left to be imported in full.
    """
    package = module.split(".")[0]
    if package in sys.modules:
        return
    names = [name for name in hidden if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None is Python's own mark of a module that is not to be found
    try:
        import_module(module)
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
    finally:
        for name in names:
            del sys.modules[name]
