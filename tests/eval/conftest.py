import numpy as np
import pytest

from genvision.data.sources import open_source


def _half(name: str) -> tuple[np.ndarray, np.ndarray]:
    source = open_source(f"digits:{name}")
    return np.stack([np.asarray(source.load(i)) for i in range(len(source))]), source.labels


@pytest.fixture(scope="session")
def digits_first() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [898, 8, 8, 3] and labels of the half that generators and the extractor learn from."""
    return _half("first")


@pytest.fixture(scope="session")
def digits_second() -> tuple[np.ndarray, np.ndarray]:
    """The same of the other half, which taught the judge."""
    return _half("second")
