"""The decode kernel on a real card, in every precision: against the formula, and replayed as a CUDA graph."""

import pytest
import torch
from decode_examples import Example, make_example
from forced_backend import forced

from genvision.kernels.decode import decode_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 100, 128])
def test_the_kernel_computes_the_formula_and_writes_nothing_but_the_new_position(head_dim, dtype):
    for rows in (1, 2, 64):
        for length in (1, 17, 256, 577):
            example = make_example(rows, 4, 4, head_dim, length - 1, length, dtype=dtype, device="cuda")
            expected, cache = example.expected()
            assert decode_backend(example.heads, example.keys) == "triton"
            example.check(example.run(), expected, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 16])
def test_grouped_queries_padded_rows_and_heads_without_rotary_positions(groups, dtype):
    for rows in (2, 64):
        for options in ({"padded": True}, {"rotary": False}):
            example = make_example(rows, 16, groups, 64, 300, 375, dtype=dtype, device="cuda", **options)
            expected, cache = example.expected()
            example.check(example.run(), expected, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_computes_the_formula_on_a_card(dtype):
    example = make_example(2, 12, 4, 64, 200, 256, dtype=dtype, device="cuda", padded=True)
    expected, cache = example.expected()
    with forced("sdpa"):
        example.check(example.run(), expected, cache)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_graph_serves_every_position(dtype, rows):
    """With one row the keys are split, with 64 they are not."""
    example = make_example(rows, 12, 12, 64, 510, 1024, dtype=dtype, device="cuda")
    position = torch.tensor([510], dtype=torch.int32, device="cuda")
    cache = example.cache.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        example.run(position)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = example.run(position)
    example.cache.copy_(cache)
    for place in range(510, 516):
        position.fill_(place)
        example.heads.normal_()
        now = Example(example.heads, example.cache, place, example.rotary, None)
        expected, after = now.expected()
        graph.replay()
        now.check(out, expected, after)
