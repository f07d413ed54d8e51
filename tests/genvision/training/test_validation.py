"""Validation sees the same samples in the same way every time, whatever the number of processes."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from genvision.data.encoded import EncodedDataset
from genvision.errors import UserError
from genvision.models.maskgit import MaskGIT
from genvision.objectives.masked import MaskedLossConfig, MaskedTokens
from genvision.training.validation import ValidationBatches, validate


@pytest.fixture
def codes(tiny_codes):
    return EncodedDataset(tiny_codes)


def test_the_same_loss_every_time(codes):
    model = MaskGIT(codebook_size=16, grid_size=4, hidden_dim=16, depth=1, num_heads=2, num_classes=10, dropout=0.2).eval()
    objective = MaskedTokens(MaskedLossConfig(), model, seed=0, num_steps=1)
    batches = ValidationBatches(codes, num=50, batch_size=16)
    first = validate(partial(objective, model), batches, Accelerator(cpu=True))
    torch.rand(7)
    assert validate(partial(objective, model), batches, Accelerator(cpu=True)) == first
    assert first.keys() == {"validation_loss", "validation_accuracy", "validation_masked"}
    with torch.no_grad():
        whole = objective(model, next(iter(ValidationBatches(codes, num=50, batch_size=50))))
    assert first["validation_loss"] == pytest.approx(float(whole["loss"]), rel=1e-5)  # batches of 16, 16, 16 and 2, each by its size


def test_it_computes_no_gradients(codes):
    weight = torch.ones(1, requires_grad=True)
    seen = []
    validate(
        lambda batch: seen.append(weight * 2) or {"loss": seen[-1].sum()}, ValidationBatches(codes, num=4, batch_size=4), Accelerator()
    )
    assert not seen[0].requires_grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_take_different_samples_in_equal_batches(codes, world_size):
    shares = [list(ValidationBatches(codes, num=60, batch_size=18, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert all([len(batch["labels"]) for batch in share] == [len(batch["labels"]) for batch in shares[0]] for share in shares)
    positions = torch.cat([batch["positions"] for share in shares for batch in share])
    seen = torch.cat([batch["codes"] for share in shares for batch in share])[positions.argsort()]
    assert positions.sort()[0].tolist() == list(range(60))
    spread = np.arange(60) * len(codes) // 60  # over the whole set, which may be sorted by class
    assert torch.equal(seen, codes.get_batch(np.arange(60), spread)["codes"])


def test_a_small_set_is_seen_once_and_what_does_not_divide_is_left_out(codes):
    num = len(codes)
    batches = [ValidationBatches(codes, num=10**6, batch_size=2 * num, rank=rank, world_size=2) for rank in range(2)]
    assert [len(next(iter(share))["labels"]) for share in batches] == [num // 2, num // 2]


def test_too_few_samples_are_refused(codes):
    with pytest.raises(UserError, match=r"validate_num 3 .* each of 4 processes needs one"):
        ValidationBatches(codes, num=3, batch_size=16, world_size=4)
    with pytest.raises(UserError, match="a batch of 2 cannot be split over 4 processes"):
        ValidationBatches(codes, num=16, batch_size=2, world_size=4)
