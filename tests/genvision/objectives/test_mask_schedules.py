"""Mask schedules against the recorded values of MaskGIT, MAGE and Halton-MaskGIT."""

from itertools import pairwise

import pytest
import torch

from genvision.errors import UserError
from genvision.objectives.mask_schedules import masked_after_steps, masked_fraction
from parity_fixtures import Fixture

RECORDED = Fixture("mask_schedules").outputs
NAMES = {"uniform": "linear"}


def facts(key: str) -> tuple[str, int, int]:
    """Schedule, number of tokens and number of steps of `ratio_cosine_N256_T8`, say."""
    *words, tokens, steps = key.split("_")
    name = next(word for word in words if word not in ("ratio", "mask", "len"))
    return NAMES.get(name, name), int(tokens[1:]), int(steps[1:])


def test_parts_equal_the_recorded_ones():
    checked = set()
    for key, expected in RECORDED.items():
        if key.startswith("ratio_"):
            name, num_tokens, num_steps = facts(key)
            progress = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
            torch.testing.assert_close(masked_fraction(name, progress, num_tokens).float(), expected, atol=1e-6, rtol=0)
            checked.add(name)
    assert checked >= {"cosine", "arccos", "linear", "pow0.5", "pow2", "pow3", "exp", "log"}


def test_counts_equal_the_recorded_ones():
    """All but the last, which is the original samplers' mask behind the image that they give."""
    checked = 0
    for key, expected in RECORDED.items():
        if key.startswith("mask_len_"):
            name, num_tokens, num_steps = facts(key)
            dtype = torch.float64 if "float64" in key else torch.float32
            counts = masked_after_steps(name, num_tokens, num_steps, dtype=dtype)
            assert (counts[:-1], counts[-1]) == (expected.tolist()[:-1], 0), key
            checked += 1
    assert checked > 50


def test_halton_maskgit_rounds_the_other_way():
    for key, expected in Fixture("halton_schedule").outputs.items():
        if key.startswith("halton_cum_"):
            _, _, grid, steps = key.split("_")
            num_tokens = int(grid.split("x")[0]) ** 2
            counts = masked_after_steps("arccos", num_tokens, int(steps[1:]), round_up=True)
            assert [num_tokens - count for count in counts] == expected.tolist()


@pytest.mark.parametrize("name", ["cosine", "arccos", "linear", "root", "pow3", "exp", "log"])
def test_each_step_reveals_a_token_at_least_and_the_last_all(name):
    counts = [16, *masked_after_steps(name, 16, 16)]
    assert all(before > after or before == after == 1 for before, after in pairwise(counts)) and counts[-1] == 0
    assert masked_after_steps(name, 5, 1) == [0]


@pytest.mark.parametrize("name", ["quadratic", "pow", "pow0", "pow-1", ""])
def test_an_unknown_schedule_is_refused(name):
    with pytest.raises(UserError, match="is unknown; choose cosine, arccos"):
        masked_fraction(name, torch.zeros(1), 4)
