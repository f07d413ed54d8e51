"""SeiT's byte stream: what it holds, and that damage is noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from genvision.data.token_codec import MAX_CODE, from_bytes, to_bytes
from genvision.errors import UserError
from parity_fixtures import Fixture


def test_the_authors_stream_is_read_and_written():
    fixture = Fixture("seit_tokens")
    stream, starts, tokens = fixture.inputs["bytes"].numpy(), fixture.inputs["starts"].numpy(), fixture.outputs["tokens"].numpy()
    np.testing.assert_array_equal(from_bytes(stream, starts), tokens)
    again, again_starts = to_bytes(tokens)
    np.testing.assert_array_equal(again, stream)
    np.testing.assert_array_equal(again_starts, starts)
    assert again.dtype == np.uint8
    for i in range(len(tokens)):
        one = stream[starts[i] : starts[i + 1]]
        np.testing.assert_array_equal(from_bytes(one, np.array([0, len(one)]))[0], tokens[i])


@given(arrays(np.int64, array_shapes(min_dims=2, max_dims=3, max_side=9), elements=st.integers(0, MAX_CODE)))
def test_every_code_up_to_509_comes_back(codes):
    stream, starts = to_bytes(codes)
    np.testing.assert_array_equal(from_bytes(stream, starts), codes.reshape(len(codes), -1))
    assert len(stream) == codes.size + (codes >= 255).sum()


def test_no_images_and_images_without_codes():
    for shape in [(0, 4), (3, 0)]:
        stream, starts = to_bytes(np.zeros(shape, dtype=np.int64))
        assert (len(stream), len(starts)) == (0, shape[0] + 1)
        assert len(from_bytes(stream, starts)) == shape[0]


@pytest.mark.parametrize(("code", "said"), [(510, r"0 \.\. 510"), (-1, r"-1 \.\. 0")])
def test_codes_outside_are_refused(code, said):
    with pytest.raises(UserError, match=f"{said}, but the byte stream holds 0 .. 509"):
        to_bytes(np.array([[0, code]]))


@pytest.mark.parametrize(
    ("stream", "starts", "said"),
    [
        ([1, 255], [0, 2], "must be followed by"),
        ([1, 255, 255, 3], [0, 4], "must be followed by"),
        ([1, 255, 3, 4], [0, 2, 4], "of the same image"),
        ([1, 2, 3], [0, 2, 3], "image 1 of the byte stream has 1 codes, image 0 has 2"),
        ([1, 2, 3], [0, 2], "must rise from 0 to its length 3"),
        ([1, 2, 3], [0, 4, 2, 3], "must rise"),
        ([1, 2, 3], [], "must rise"),
    ],
)
def test_damage_is_noticed(stream, starts, said):
    with pytest.raises(UserError, match=said) as caught:
        from_bytes(np.array(stream, dtype=np.uint8), np.array(starts, dtype=np.int64))
    assert "\n" not in str(caught.value)


def test_a_stream_of_other_numbers_is_refused():
    with pytest.raises(UserError, match="uint8"):
        from_bytes(np.array([1, 2]), np.array([0, 2]))
