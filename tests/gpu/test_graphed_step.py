import pytest
import torch
from torch import nn

from genvision.models.llamagen import LlamaGen
from genvision.models.rar import RAR
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.graphed_step import graphed_step
from genvision.samplers.randomness import ImageStreams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {"codebook_size": 200, "grid_size": 4, "hidden_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.fixture(params=[LlamaGen, RAR])
def model(request):
    torch.manual_seed(0)
    model = request.param(**SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().cuda()


@torch.inference_mode()
def test_replays_give_the_logits_of_plain_steps_at_every_position_and_in_a_second_batch(model):
    steps = []
    for seed in range(2):
        codes = torch.randint(0, 200, (3, 15), device="cuda")
        labels = torch.tensor([0, 3, 4], device="cuda") - seed
        (_, plain), (_, graphed) = model.start(labels.clamp(min=0)), model.start(labels.clamp(min=0))
        step = graphed_step(model, graphed, None)
        assert step is not None
        steps.append(step)
        for position in range(15):
            expected = model.extend(codes[:, position], plain)
            torch.testing.assert_close(step.extend(model, codes[:, position], graphed), expected, rtol=1e-4, atol=1e-4)
        assert graphed.filled == plain.filled
        filled = slice(0, plain.filled)
        torch.testing.assert_close(graphed.store[..., filled, :], plain.store[..., filled, :], rtol=1e-4, atol=1e-4)
    assert steps[0] is steps[1]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_the_sampler_draws_the_tokens_that_it_draws_without_a_graph(model, interval, monkeypatch):
    labels, noise = torch.arange(4, device="cuda"), ImageStreams(0, range(4))
    sampler = AutoregressiveSampler(guidance_scale=2.0, guidance_start=interval[0], guidance_stop=interval[1], top_k=50)
    graphed = sampler.sample(model, labels, noise)
    monkeypatch.setattr("genvision.samplers.autoregressive.graphed_step", lambda *_: None)
    assert torch.equal(graphed, sampler.sample(model, labels, noise))
