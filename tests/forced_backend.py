"""GENVISION_ATTENTION for a part of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from genvision.kernels import backends


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """The variable holds `name` within, or is unset."""
    with pytest.MonkeyPatch.context() as patch:
        if name is None:
            patch.delenv(backends.VARIABLE, raising=False)
        else:
            patch.setenv(backends.VARIABLE, name)
        backends.read_once.cache_clear()
        try:
            yield
        finally:
            backends.read_once.cache_clear()
