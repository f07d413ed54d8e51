"""Accuracies of classifiers: matching the classes of two sets by name, and how sure a share is.

Shapes: N images, K classes.
"""

from collections.abc import Sequence

import numpy as np

from genvision.errors import UserError

NORMAL_QUANTILE = 1.959963984540054
"""Of 97.5 %: two-sided 95 % intervals."""
INTERVAL_METHOD = "95 %, Wilson's score interval of a share of images"


def match_classes(
    names: Sequence[str], wanted: Sequence[str], which: str = "the generated set", other: str = "the real set"
) -> tuple[np.ndarray, str | None]:
    """Where the classes of one set stand in another.

    Classes are matched by name. Where names differ but numbers agree (`0` .. `9` against `zero` .. `nine`), they are matched by place,
    unless a name stands in both sets at different places.

    Args:
        names: of the set that is translated; `which` is what to call it in a message.
        wanted: of the set whose numbering counts; `other` likewise.

    Returns:
        int64 [K] from a label of `names` to one of `wanted`, and one line of warning if they were matched by place.

    Raises:
        UserError: there are fewer than two classes, or neither names nor numbers agree.
    """
    for labels, who in ((names, which), (wanted, other)):
        if len(labels) < 2:
            raise UserError(f"{who} has {len(labels)} class ('{', '.join(labels)}'); at least 2 are needed, give images with labels")
        if len(set(labels)) < len(labels):
            twice = next(name for i, name in enumerate(labels) if name in labels[:i])
            raise UserError(f"{who} has two classes called '{twice}'; rename one of them")
    place = {name: i for i, name in enumerate(wanted)}
    missing = [name for name in names if name not in place]
    if not missing and len(names) == len(wanted):
        return np.array([place[name] for name in names], dtype=np.int64), None
    if len(names) != len(wanted):
        lacking = [name for name in wanted if name not in set(names)]
        gap = f"'{missing[0]}' is only in {which}" if missing else f"'{lacking[0]}' is only in {other}"
        raise UserError(f"{which} has {len(names)} classes, {other} has {len(wanted)} ({gap}); give sets of the same classes")
    moved = [name for i, name in enumerate(names) if name in place and place[name] != i]
    if moved:
        raise UserError(
            f"{which} and {other} share the class '{moved[0]}' at different places, but '{missing[0]}' is only in {which}; "
            "give sets of the same classes"
        )
    example = names.index(missing[0])
    return np.arange(len(names), dtype=np.int64), (
        f"the classes of {which} and {other} have different names ('{names[example]}' and '{wanted[example]}' stand at place {example}); "
        "they were matched by place"
    )


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score method; right at shares of 0 and 1, too.

    Args:
        total: at least 1.
    """
    assert 0 <= successes <= total and total > 0, f"{successes} of {total}"
    share, z2 = successes / total, NORMAL_QUANTILE**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_QUANTILE / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = centre - half, centre + half
    return (0.0 if successes == 0 else max(0.0, float(low))), (1.0 if successes == total else min(1.0, float(high)))
