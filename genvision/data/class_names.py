"""Names of classes, and whether they go with the labels."""

from typing import Any

import numpy as np

from genvision.errors import UserError

MAX_UNNAMED = 1_000_000
"""Classes that need no names; a higher number is no number of a class."""


def names_of_labels(where: str, labels: np.ndarray, names: Any) -> list[str]:
    """The names, after a check that every label has one; numbers where no names are known."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise UserError(f"{where}: has the label {lowest}, labels start at 0 (is it an unlabelled split?); leave such images out")
    if names is None:
        if highest >= MAX_UNNAMED:
            mend = "number the classes from 0"
            raise UserError(f"{where}: has the label {highest}, which is no number of a class (are these ids of images?); {mend}")
        return [str(label) for label in range(highest + 1)]
    if highest >= len(names):
        raise UserError(f"{where}: has the label {highest}, but names for {len(names)} classes only; add the names or mend the label")
    return [str(name) for name in names]


def list_of_names(names: Any) -> list[str]:
    """Names of classes as a file has them.

    Raises:
        ValueError: they are something else, such as numbers with their names.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('the names of the classes are no list of texts such as ["cat", "dog"]')
    return names
