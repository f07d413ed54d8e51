"""Orders of tokens."""

import pytest
import torch

from genvision.errors import UserError
from genvision.samplers.nesting import parse_nesting
from genvision.samplers.token_order import halton_order
from parity_fixtures import Fixture


@pytest.mark.parametrize("side", [8, 16, 24, 32])
def test_the_halton_order_equals_the_recorded_one(side):
    rows, columns = Fixture("halton_schedule").outputs[f"halton_order_{side}x{side}"].T
    assert torch.equal(halton_order(side), rows * side + columns)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 48])
def test_it_goes_through_every_cell_once(side):
    assert sorted(halton_order(side).tolist()) == list(range(side * side))


def test_nesting_is_read_from_text():
    assert parse_nesting("4", 3) == [4, 4, 4]
    assert parse_nesting("8x2, 2x1,1x3", 6) == [8, 8, 2, 1, 1, 1]


@pytest.mark.parametrize(("text", "word"), [("8x2,1x2", "for 4 steps"), ("0", "understood"), ("8x", "understood"), ("", "understood")])
def test_other_texts_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_nesting(text, 3)
