"""Every form of the draw against the formula, and against each other, token by token."""

import math

import numpy as np
import pytest
import torch
from ahead_of_time import Case, compile_ahead
from forced_backend import forced
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from genvision.kernels.draw import draw, draw_plainly, draw_tokens, filter_logits
from genvision.samplers.guidance import combine
from parity_fixtures import Fixture

EDGES = [0.0, 1 - 2**-53]


def uniforms(count, seed=0):
    """The ends of [0, 1) among others."""
    return torch.tensor(EDGES + np.random.default_rng(seed).random(count - 2).tolist(), dtype=torch.float64)


def logits_with_ties(rows, vocabulary, seed=0):
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4


def by_definition(logits, u, temperature, top_k, top_p):
    """One row in plain Python."""
    scaled = [x / temperature for x in logits]
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if 0 < top_k < len(scaled):
        ranked = [i for i in ranked if scaled[i] >= scaled[ranked[top_k - 1]]]
    weight = {i: math.exp(scaled[i] - scaled[ranked[0]]) for i in ranked}
    total, before, kept = sum(weight.values()), 0.0, []
    for i in ranked:
        if top_p < 1 and before > top_p * total:
            break
        kept.append(i)
        before += weight[i]
    reached, token, target = 0.0, None, u * sum(weight[i] for i in kept)
    for i in sorted(kept):
        reached += weight[i]
        if weight[i] > 0:
            token = i
        if reached > target:
            return i
    return token


def test_filters_equal_the_official_ones():
    fixture = Fixture("llamagen_topk_topp")
    for setting in fixture.config["settings"]:
        options = {name: setting[name] for name in ("temperature", "top_k", "top_p")}
        probabilities = filter_logits(fixture.inputs["logits"], **options).softmax(-1)
        torch.testing.assert_close(probabilities, fixture.outputs[f"{setting['name']}/probs"], atol=fixture.atol, rtol=0)
    for setting in fixture.config["ties"]:
        probabilities = filter_logits(fixture.inputs["logits_ties"], top_k=setting["top_k"]).softmax(-1)
        torch.testing.assert_close(probabilities, fixture.outputs[f"{setting['name']}/probs"], atol=fixture.atol, rtol=0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_the_forms_for_cpus_take_the_token_of_the_definition(data):
    vocabulary = data.draw(st.integers(1, 40))
    # quarters, of which many tie; divided by powers of two only, so that no form rounds
    quarters = st.one_of(st.integers(-30, 30).map(lambda x: x / 4), st.just(-math.inf))
    row = data.draw(st.lists(quarters, min_size=vocabulary, max_size=vocabulary).filter(lambda row: max(row) > -math.inf))
    top_k, top_p = data.draw(st.integers(0, vocabulary + 2)), data.draw(st.sampled_from([1.0, 0.95, 0.7, 0.31, 0.01]))
    options = {"temperature": data.draw(st.sampled_from([1.0, 0.5, 2.0])), "top_k": top_k, "top_p": top_p}
    u = uniforms(12, seed=vocabulary)
    logits = torch.tensor([row]).expand(12, -1)
    expected = [by_definition(row, float(x), **options) for x in u]
    assert draw_plainly(logits, u, **options).tolist() == expected
    assert draw_tokens(logits, u, **options).tolist() == expected


@pytest.mark.parametrize(("top_k", "top_p"), [(400, 1.0), (0, 1.0), (400, 0.9), (0, 0.9), (3000, 1.0)])
def test_the_fast_form_equals_the_plain_one_bit_by_bit(top_k, top_p):
    """At uniform numbers on the very borders between tokens, where the last bit of a sum decides."""
    row = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1)) * 3
    kept = filter_logits(row, temperature=0.9, top_k=top_k, top_p=top_p)
    cumulative = (kept.double() - kept.amax().double()).exp().cumsum(1)[0]
    borders = (cumulative / cumulative[-1])[kept[0] > -math.inf][::3].numpy()
    u = torch.from_numpy(np.concatenate([np.nextafter(borders, 0), borders, np.nextafter(borders, 1)]))
    u = u[u < 1]
    logits = row.expand(len(u), -1)
    plain = draw_plainly(logits, u, temperature=0.9, top_k=top_k, top_p=top_p)
    assert len(plain.unique()) > 40
    assert torch.equal(draw_tokens(logits, u, temperature=0.9, top_k=top_k, top_p=top_p), plain)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 900}, {"top_k": 900, "top_p": 0.8}, {"top_p": 0.8, "temperature": 0.7}, {"temperature": 0.0}]
)
def test_a_row_gets_the_same_token_alone_and_in_a_batch(options):
    logits, u = torch.randn(24, 4099), uniforms(12)
    together = draw_tokens(logits, u, guidance_scale=1.75, **options)
    alone = [draw_tokens(logits[[i, 12 + i]], u[i : i + 1], guidance_scale=1.75, **options) for i in range(12)]
    assert torch.equal(torch.cat(alone), together)
    mixed = combine(*logits.chunk(2), 1.75)
    plain = mixed.argmax(-1) if options.get("temperature") == 0 else draw_plainly(mixed, u, **({"temperature": 1.0} | options))
    assert torch.equal(together, plain)


def test_tokens_follow_the_softmax():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.5, 1.0]])
    u = torch.from_numpy(np.random.default_rng(5).random(4000))
    for options in ({}, {"top_k": 4}, {"top_p": 0.8}):
        counts = torch.bincount(draw_tokens(logits.expand(4000, -1), u, **options), minlength=6)
        expected = filter_logits(logits, **options).softmax(-1)[0].double().numpy()
        assert (counts[expected == 0] == 0).all() and (expected == 0).any() == bool(options)
        possible = expected > 0
        assert chisquare(counts.numpy()[possible], 4000 * expected[possible] / expected.sum()).pvalue > 1e-3


def test_weights_need_not_sum_to_one_and_the_impossible_is_never_taken():
    weights = torch.tensor([[0.0, 2.0, 0.0, 5.0, 3.0, 0.0]])
    assert draw(weights.expand(2, -1), torch.tensor(EDGES, dtype=torch.float64)).tolist() == [1, 4]
    tokens = draw(weights.expand(10000, -1), torch.from_numpy(np.random.default_rng(0).random(10000)))
    torch.testing.assert_close(torch.bincount(tokens, minlength=6) / 10000, weights[0] / 10, atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_computed_with_in_float32(dtype):
    logits, u, options = torch.randn(8, 300).to(dtype), uniforms(4), {"guidance_scale": 2.0, "top_k": 50, "top_p": 0.9}
    assert torch.equal(draw_tokens(logits, u, **options), draw_tokens(logits.float(), u, **options))


def in_the_kernel(logits, u, block, **options):
    from genvision.kernels.triton_draw import draw_in_one_kernel

    return draw_in_one_kernel(logits, u, block=block, **({"guidance_scale": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | options))


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (12, {}),
        (4, {"guidance_scale": 1.7, "temperature": 0.0}),
        (4, {"guidance_scale": 1.7, "top_k": 9, "temperature": 0.7}),
        (2, {"top_p": 0.75}),
        (2, {"top_k": 20, "top_p": 0.6}),
    ],
    ids=str,
)
def test_the_kernel_takes_the_same_tokens(rows, options):
    """Two blocks, the second one partly beyond the vocabulary, and logits that tie at every border."""
    logits, u = logits_with_ties(rows, 100), uniforms(rows)[: rows // 2 if "guidance_scale" in options else rows]
    assert torch.equal(in_the_kernel(logits, u, 64, **options), draw_tokens(logits, u, **options))


@pytest.mark.parametrize(("u", "options"), [(EDGES[0], {}), (EDGES[1], {}), (0.7, {"top_k": 3}), (0.7, {"top_p": 0.5})], ids=str)
def test_the_kernel_takes_the_same_tokens_of_uncommon_logits(u, options):
    rows = torch.full((4, 40), -math.inf)
    rows[0, 39] = -3.0  # a single possible token
    rows[1, [2, 20, 21, 30]] = torch.tensor([3e38, 3e38, -3e38, 2e38])
    rows[2, ::5] = 0.0  # equal ones, of either sign
    rows[2, 1::5] = -0.0
    rows[3, 3:38:5] = torch.tensor([-700.0, -1000.0, 5.0, -740.0, 5.0, 4.0, 1.0])
    u = torch.full((4,), u, dtype=torch.float64)
    assert torch.equal(in_the_kernel(rows, u, 64 if options else 16, **options), draw_tokens(rows, u, **options))


def test_the_call_takes_the_kernel_where_it_is_forced():
    logits, noise = logits_with_ties(3, 50), torch.rand(3, 2, dtype=torch.float64)
    with forced("triton"):
        tokens = draw_tokens(logits, noise[:, 1])
    assert torch.equal(tokens, draw_tokens(logits, noise[:, 1].contiguous()))


def test_the_kernel_compiles_ahead_of_time_without_spills():
    from genvision.kernels.triton_draw import columns_at_once, warps_for

    types = {"uniform": "*fp64", "tokens": "*i64", "vocabulary": "i32", "uniform_stride": "i32", "top_k": "i32"}
    types |= {"scale": "fp32", "inverse_temperature": "fp32"}
    constants = {"GUIDED": True, "TOP_K": True, "TOP_P": 0.9, "BLOCK": columns_at_once(16384)}
    cases = [
        Case(
            "genvision.kernels.triton_draw:draw_kernel",
            {"logits": logits} | types,
            constants | {"GREEDY": greedy},
            divisible=("logits", "tokens", "vocabulary"),
            num_warps=warps_for(constants["BLOCK"]),
        )
        for logits, greedy in (("*fp32", False), ("*bf16", True))
    ]
    compiled = compile_ahead(cases)
    assert all(code.local == 0 and code.shared < 4096 for codes in compiled for code in codes)
    assert all(code.vector_loads > 0 for code in compiled[0])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.0}])
def test_a_diverged_model_draws_some_token(options):
    logits = torch.stack([torch.full((9,), torch.nan), torch.full((9,), -torch.inf), torch.randn(9)])
    tokens = draw_tokens(logits, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), **options)
    assert ((tokens >= 0) & (tokens < 9)).all()
