"""One token's attention in torch and as an interpreted Triton kernel; and the kernel compiled for cards that are not here."""

import pytest
import torch
from ahead_of_time import SHARED_MEMORY, Case, compile_ahead
from decode_examples import make_example
from forced_backend import forced
from torch.testing import assert_close

from genvision.kernels.decode import decode_backend

EXAMPLES = {
    "the first position": dict(rows=2, num_heads=2, groups=2, head_dim=8, position=0, length=3),
    "guided and unguided rows": dict(rows=2, num_heads=3, groups=3, head_dim=16, position=5, length=9),
    "the last position": dict(rows=1, num_heads=2, groups=2, head_dim=100, position=39, length=40),
    "grouped queries": dict(rows=2, num_heads=6, groups=2, head_dim=100, position=37, length=40),
    "no rotary positions": dict(rows=1, num_heads=2, groups=2, head_dim=72, position=33, length=40, rotary=False),
    "padded text": dict(rows=3, num_heads=2, groups=1, head_dim=20, position=19, length=20, padded=True),
}


@pytest.fixture
def triton_forced():
    pytest.importorskip("triton")
    with forced("triton"):
        yield


@pytest.mark.parametrize("name", EXAMPLES)
def test_torch_computes_the_formula_and_writes_nothing_but_the_new_position(name):
    example = make_example(**EXAMPLES[name])
    expected, cache = example.expected()
    assert decode_backend(example.heads, example.keys) == "sdpa"
    example.check(example.run(), expected, cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_computes_the_formula_in_half_precision(dtype):
    example = make_example(2, 4, 2, 16, 8, 10, dtype=dtype)
    expected, cache = example.expected()
    example.check(example.run(torch.tensor([8])), expected, cache)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kernel_computes_the_formula_and_writes_nothing_but_the_new_position(name, triton_forced):
    example = make_example(**EXAMPLES[name])
    expected, cache = example.expected()
    assert decode_backend(example.heads, example.keys) == "triton"
    example.check(example.run(), expected, cache)


@pytest.mark.parametrize(
    ("name", "dtype"), [("the first position", torch.float32), ("padded text", torch.float32), ("grouped queries", torch.float16)]
)
def test_splits_of_the_keys_join_to_the_same_answer(name, dtype):
    triton_decode = pytest.importorskip("genvision.kernels.triton_decode")
    example = make_example(**EXAMPLES[name], dtype=dtype)
    expected, cache = example.expected()
    position = torch.tensor([example.position])  # read by the kernel, as in a CUDA graph
    out = triton_decode.decode_attention_triton(
        example.heads, example.keys, example.values, position, rotary=example.rotary, first=example.first, splits=4
    )
    example.check(out, expected, cache)


def test_many_queries_of_one_key_are_shared_by_programs_of_which_one_writes(triton_forced):
    example = make_example(1, 18, 2, 8, 3, 4)  # nine queries a key, three a program
    expected, cache = example.expected()
    example.check(example.run(), expected, cache)


@pytest.mark.parametrize("backend", ["triton", "plain"])
def test_a_key_at_a_table_row_of_zeros_is_a_zero_vector(backend):
    pytest.importorskip("triton")
    example = make_example(1, 2, 2, 8, 0, 3)
    with forced(backend):
        example.run()
    assert torch.equal(example.keys[:, :, 0], torch.zeros(1, 2, 8))


def test_torch_computes_what_the_kernel_cannot(triton_forced):
    example = make_example(1, 2, 2, 8, 2, 6, dtype=torch.float64, rotary=False)
    assert decode_backend(example.heads, example.keys) == "sdpa"
    assert_close(example.run(), example.expected()[0])


@pytest.mark.parametrize(
    ("programs", "length", "num_sms", "splits"),
    [
        (24, 256, 132, 2),  # one guided image of GPT-B on an H100: a split has at least 128 positions
        (24, 1024, 132, 4),
        (24, 100, 132, 1),
        (66, 4096, 132, 2),
        (67, 4096, 132, 1),  # more than half of the card is busy
        (1, 65536, 132, 16),
    ],
)
def test_keys_are_split_only_while_half_of_the_card_is_idle(programs, length, num_sms, splits):
    triton_decode = pytest.importorskip("genvision.kernels.triton_decode")
    assert triton_decode.num_splits(programs, length, num_sms) == splits


def decode_case(head_dim: int, group: int, splits: int) -> Case:
    """The kernel in bfloat16 as a model with 8 query heads launches it on a cache of 256 positions, in a CUDA graph."""
    from genvision.kernels.triton_decode import NUM_WARPS, tile_constants

    strides = (8 // group * 256 * head_dim, 256 * head_dim)
    constants = {"HEADS": 8, "GROUP": group, "D": head_dim, "SPLITS": splits, "STRIDE": head_dim, "first": None}
    constants |= tile_constants(group, head_dim, 2, strides)
    pointers = dict.fromkeys(("heads", "keys", "values", "out"), "*bf16") | {"rotary": "*fp32", "position_at": "*i32"}
    if splits > 1:
        pointers |= {"partial": "*fp32", "statistics": "*fp32"}
    else:
        constants |= {"partial": None, "statistics": None}
    numbers = dict.fromkeys(("position", "heads_row", "heads_head", "cache_row", "cache_head"), "i32")
    divisible = (*pointers, "heads_row", "cache_row", "cache_head", *(["heads_head"] if head_dim % 16 == 0 else []))
    return Case("genvision.kernels.triton_decode:decode", pointers | numbers, constants, divisible, num_warps=NUM_WARPS)


def test_kernels_compile_for_three_generations_of_cards_without_spilling():
    pytest.importorskip("triton")
    signature = {"partial": "*fp32", "statistics": "*fp32", "out": "*bf16"}
    join = Case(
        "genvision.kernels.triton_decode:join_splits", signature, {"D": 100, "PADDED_D": 128, "SPLITS": 16}, tuple(signature), num_warps=1
    )
    # the last one needs most registers
    cases = [decode_case(64, 1, splits=2), decode_case(100, 1, splits=1), decode_case(128, 8, splits=1), join]
    for case, entries in zip(cases, compile_ahead(cases), strict=True):
        for entry in entries:
            assert entry.local == 0, (case, entry)
            # four programs and more find room in a multiprocessor at once
            assert 4 * entry.shared <= SHARED_MEMORY[entry.capability], (case, entry)
            # rows of 100 numbers are only aligned to 64 bits
            assert entry.vector_loads > 0 or case.constexprs["D"] == 100, (case, entry)
