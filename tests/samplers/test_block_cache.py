import pytest
import torch
from tiny_models import tiny

from genvision.errors import UserError
from genvision.samplers.block_cache import ENDS, BlockCache, CacheReport, full_evaluations, relative_distances
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.flow import FlowSampler
from genvision.samplers.guided_network import JobMemory
from genvision.samplers.randomness import ImageStreams

LABELS = torch.tensor([1, 0, 4])
DIFFUSION, FLOW = {"path": "ddpm", "prediction": "noise"}, {"path": "linear", "prediction": "velocity"}
INTERVAL = {"guidance_scale": 3.0, "guidance_start": 0.35, "guidance_stop": 0.8}
SAMPLERS = {
    "ddim": (DIFFUSION, DiffusionSampler, dict(method="ddim", num_steps=20)),
    "ddim, guided": (DIFFUSION, DiffusionSampler, dict(method="ddim", num_steps=20, guidance_scale=3.0)),
    "ddpm, guided": (DIFFUSION | {"learn_sigma": True}, DiffusionSampler, dict(method="ddpm", num_steps=20, guidance_scale=3.0)),
    "dpm++, guided in an interval": (DIFFUSION, DiffusionSampler, dict(method="dpm++", num_steps=20) | INTERVAL),
    "euler, guided in an interval": (FLOW, FlowSampler, dict(method="euler", num_steps=20) | INTERVAL),
    "euler, apart": (FLOW, FlowSampler, dict(method="euler", num_steps=20, rows="apart") | INTERVAL),
    "heun, guided": (FLOW, FlowSampler, dict(method="heun", num_steps=10, guidance_scale=3.0, guidance_schedule="linear")),
    "stochastic heun": (FLOW, FlowSampler, dict(method="stochastic-heun", num_steps=10)),
}


def model_of(options, *, seed=0, depth=3):
    return tiny("dit", seed=seed, depth=depth, **options).eval()


def draw(model, sampler, images=(0, 1, 2), guide=None):
    images = list(images)
    return sampler.sample(model, LABELS[images], ImageStreams(0, images), guide=guide)


class BlockRuns:
    """Rows that went through blocks of a model."""

    def __init__(self, model):
        self.rows = 0
        for block in model.blocks:
            block.register_forward_hook(self._count)

    def _count(self, block, arguments, output):
        self.rows += len(output)


def errors(model, sampler, intervals, guide=None):
    """Relative distances to the latents of all blocks, the largest of the images."""
    plain = draw(model, sampler, guide=guide)
    return [max(relative_distances(draw(model, sampler.with_options(cache_interval=k), guide=guide), plain)) for k in intervals]


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_alone_and_in_a_batch(name):
    options, kind, settings = SAMPLERS[name]
    model, sampler = model_of(options), kind(**settings, cache_interval=3)
    torch.testing.assert_close(draw(model, sampler)[1:2], draw(model, sampler, [1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_work_that_is_said_to_be_left_out_is_left_out(name):
    options, kind, settings = SAMPLERS[name]
    model, sampler = model_of(options), kind(**settings, cache_interval=3)
    counted = BlockRuns(model)
    latents = draw(model, sampler)
    cached, counted.rows = counted.rows, 0
    calls = sampler.calls
    expected = draw(model, plain := sampler.with_options(cache_interval=1))
    assert not torch.allclose(latents, expected, atol=1e-5, rtol=1e-5)
    assert (cached, counted.rows) == tuple(3 * runs for runs in sampler.block_runs(model))
    assert cached < 0.75 * counted.rows
    assert plain.block_runs(model) == (counted.rows // 3, counted.rows // 3)
    assert calls.tolist() == plain.calls.tolist() == [sampler.network_calls(model)] * 3  # an evaluation counts, whatever it runs


@pytest.mark.parametrize("name", ["ddim, guided", "euler, guided in an interval", "heun, guided"])
def test_a_shorter_interval_has_a_smaller_error(name):
    options, kind, settings = SAMPLERS[name]
    found = errors(model_of(options), kind(**settings | {"num_steps": 24}), (2, 4, 8))
    assert 0 < found[0] < found[1] < found[2] < 0.2


def test_an_evaluation_that_runs_all_blocks_gives_the_same_bits():
    model, cache = model_of(DIFFUSION), BlockCache([True])
    cache.begin(7.0)
    inputs = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((3,), 7.0), LABELS
    with torch.inference_mode():
        found, expected = model(*inputs, run_blocks=cache.run_blocks({"conditional": 2, "base": 1})), model(*inputs)
    assert torch.equal(found, expected)


def test_a_weaker_model_guides_with_residuals_of_its_own():
    model, guide = model_of(FLOW), model_of(FLOW, seed=1, depth=2)
    sampler = FlowSampler(num_steps=20, **INTERVAL, cache_interval=3)
    counted = BlockRuns(model), BlockRuns(guide)
    together = draw(model, sampler, guide=guide)
    assert sum(count.rows for count in counted) == 3 * sampler.block_runs(model, guide)[0]
    torch.testing.assert_close(together[1:2], draw(model, sampler, [1], guide=guide), atol=1e-5, rtol=1e-5)
    tight, loose = errors(model, sampler.with_options(cache_interval=1), (2, 6), guide)
    assert 0 < tight < loose < 0.1


def test_rows_apart_give_what_rows_together_do():
    model, sampler = model_of(FLOW), FlowSampler(num_steps=20, **INTERVAL, cache_interval=3)
    expected = draw(model, sampler)
    torch.testing.assert_close(draw(model, sampler.with_options(rows="apart")), expected, atol=1e-5, rtol=1e-5)


def test_running_out_of_memory_disturbs_nothing():
    model, sampler = model_of(FLOW), FlowSampler(num_steps=20, guidance_scale=3.0, cache_interval=3)
    expected = draw(model, sampler)
    fails = [True]

    def no_memory(module, arguments):
        if len(arguments[0]) > 3 and fails:
            fails.clear()
            raise torch.OutOfMemoryError("no memory for conditional and base rows")

    model.head.register_forward_pre_hook(no_memory)  # behind the blocks: the residuals are known by then
    sampler.memory = JobMemory()
    torch.testing.assert_close(draw(model, sampler), expected, atol=1e-5, rtol=1e-5)
    assert not fails and sampler.memory.apart


def test_which_evaluations_run_all_blocks():
    unguided = full_evaluations([False] * 14, 3)
    assert [i for i, is_full in enumerate(unguided) if is_full] == [0, 1, 2, 5, 8, 11, 12, 13]
    late = full_evaluations([i >= 7 for i in range(20)], 4)
    assert [i for i, is_full in enumerate(late) if is_full] == [0, 1, 2, 6, 7, 8, 12, 16, 17, 18, 19]
    assert all(full_evaluations([True] * 20, 1)) and all(full_evaluations([True] * 2 * ENDS, 9))


def test_a_residual_that_is_a_line_over_time_is_guessed_exactly():
    cache = BlockCache([True, True, False, False])
    slope, start, tokens = torch.randn(3, 2, 5, 4, dtype=torch.float64)

    def step(t):
        cache.begin(t)
        run = cache.run_blocks({"conditional": 2})
        return run(lambda i, x: x + (start + slope * t) / 2, 2, tokens)

    for t in (1.0, 0.9, 0.75, 0.3):
        torch.testing.assert_close(step(t), tokens + start + slope * t)


def test_a_corrector_at_the_same_time_replaces_what_was_known():
    cache = BlockCache([True, True, True, False])
    tokens, residuals = torch.zeros(1, 2, 3), iter([1.0, 5.0, 2.0])
    for t in (1.0, 0.5, 0.5):
        cache.begin(t)
        cache.run_blocks({"conditional": 1})(lambda i, x: x + next(residuals), 1, tokens)
    cache.begin(0.0)
    guess = cache.run_blocks({"conditional": 1})(lambda i, x: x, 1, tokens)
    torch.testing.assert_close(guess, torch.full_like(tokens, 3.0))


def test_the_report_compares_with_the_same_images_drawn_with_all_blocks():
    model, sampler = model_of(FLOW), FlowSampler(num_steps=20, guidance_scale=3.0, cache_interval=3)
    report = sampler.cache_report(model, LABELS[:2], ImageStreams(0, range(2)))
    assert (report.block_runs - report.left_out, report.block_runs) == sampler.block_runs(model)
    latents, expected = draw(model, sampler, [0, 1]), draw(model, sampler.with_options(cache_interval=1), [0, 1])
    assert report.distances == relative_distances(latents, expected)


def test_the_line_of_the_report():
    several = CacheReport(384, 1200, (0.01, 0.03))
    assert str(several) == (
        "block caching: 384 of 1,200 block runs an image left out; "
        "the first 2 images differ from uncached ones by 2.00% on average, 3.00% at most (relative L2 of latents)"
    )
    assert "the first image differs from uncached ones by 1.00% (relative" in str(CacheReport(1, 2, (0.01,)))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (DiffusionSampler, {"cache_interval": 0}, "cache_interval 0 is not allowed"),
        (FlowSampler, {"cache_interval": 2, "method": "dopri5"}, "cache_interval 2: dopri5"),
    ],
)
def test_impossible_options_are_refused(kind, settings, words):
    with pytest.raises(UserError, match=words) as refusal:
        kind(**settings)
    assert "\n" not in str(refusal.value)


def test_an_interval_that_leaves_nothing_out_is_refused():
    with pytest.raises(UserError, match="cache_interval 4 leaves nothing out"):
        draw(model_of(FLOW), FlowSampler(num_steps=2 * ENDS, cache_interval=4))
