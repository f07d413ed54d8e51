import torch
from torch import nn

from genvision.models.llamagen import LlamaGen
from genvision.models.rar import RAR
from genvision.samplers.graphed_step import GraphedStep, graphed_step

SIZES = {"codebook_size": 30, "grid_size": 3, "hidden_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@torch.inference_mode()
def test_a_step_that_reads_its_position_from_memory_is_the_plain_step():
    for kind in (LlamaGen, RAR):
        torch.manual_seed(0)
        model = kind(**SIZES).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        labels, codes = torch.tensor([0, 4]), torch.randint(0, 30, (2, 8))
        (_, plain), (_, placed) = model.start(labels), model.start(labels)
        placed.place = torch.zeros(1, dtype=torch.int32)
        for position in range(8):
            placed.place.fill_(placed.filled)
            logits = model.step(placed, *model.step_inputs(codes[:, position], placed))
            placed.filled += 1
            torch.testing.assert_close(logits, model.extend(codes[:, position], plain), rtol=0, atol=1e-6)
        assert placed.first_rows(1).place is None  # a graph belongs to the memory that it was captured with


@torch.inference_mode()
def test_a_cache_moves_to_the_memory_of_a_step():
    model = LlamaGen(**SIZES).eval()
    codes = torch.randint(0, 30, (2, 4))
    (_, first), (_, second), (_, same) = (model.start(torch.tensor([0, label])) for label in (1, 4, 4))
    step = GraphedStep(first)
    step.adopt(second)
    assert second.store is first.store and second.place is step.place
    second.place = None
    for i in range(4):
        torch.testing.assert_close(model.extend(codes[:, i], second), model.extend(codes[:, i], same), rtol=0, atol=1e-6)


def test_only_a_gpu_captures_steps():
    model = LlamaGen(**SIZES).eval()
    with torch.inference_mode():
        _, cache = model.start(torch.tensor([0]))
    assert graphed_step(model, cache, None) is None
