import math

import pytest
import torch

from genvision.errors import UserError
from genvision.objectives.masking import MaskLaw, masks_of
from genvision.streams import IndexedStreams, Purpose
from parity_fixtures import Fixture

POSITIONS = torch.arange(1500)
MAGE = {"mask_law": "truncated_normal", "min_ratio": 0.5, "drop_ratio": 0.5}


@pytest.mark.parametrize("law, mean", [("cosine", 2 / math.pi), ("arccos", 2 / math.pi), ("linear", 1 / 2), ("pow3", 3 / 4)])
def test_a_schedule_masks_as_many_tokens_as_its_mean_says(law, mean):
    masked = MaskLaw(mask_law=law).draw(0, POSITIONS, 64).masked
    assert abs(masked.float().mean() - mean) < 4 * 0.35 / math.sqrt(len(POSITIONS))
    # every place is masked alike
    assert (masked.float().mean(0) - mean).abs().max() < 5 * 0.5 / math.sqrt(len(POSITIONS))


def test_the_number_of_masked_tokens_is_the_rounded_part_but_at_least_one():
    law = MaskLaw()
    masks = law.draw(3, POSITIONS, 9)
    u = IndexedStreams(3, POSITIONS.tolist()).uniform(Purpose.MASK_RATIO, 1)[:, 0]
    wanted = (9 * torch.cos(math.pi / 2 * u)).round().clamp(min=1)
    assert torch.equal(masks.masked.sum(1), wanted.long()) and (9 * torch.cos(math.pi / 2 * u)).min() < 0.5
    assert masks.where is None and masks.kept is None
    raised = MaskLaw(min_ratio=0.5).draw(3, POSITIONS, 9).masked.sum(1)
    assert torch.equal(raised, torch.maximum(wanted, torch.tensor(9 * 0.5).round()).long())


def test_independent_masks_follow_the_part_without_meeting_it_exactly():
    masked = MaskLaw(mask_law="arccos", independent=True).draw(0, POSITIONS[:300], 400).masked
    u = IndexedStreams(0, range(300)).uniform(Purpose.MASK_RATIO, 1)[:, 0]
    part = torch.arccos(u) / (math.pi / 2)
    deviations = (masked.double().mean(1) - part) / (part * (1 - part) / 400).sqrt()
    assert abs(deviations.std() - 1) < 0.15 and deviations.abs().max() < 5


def test_the_truncated_normal_has_the_quantiles_of_mage():
    fixture = Fixture("mask_schedules")
    ratios = MaskLaw(**MAGE).ratios(fixture.outputs["mage_truncnorm_ppf_q"].double(), 256)
    torch.testing.assert_close(ratios.float(), fixture.outputs["mage_truncnorm_ppf"], atol=fixture.atol, rtol=0)
    fine = MaskLaw(**MAGE).ratios((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000, 256)
    torch.testing.assert_close(
        torch.stack([fine.mean(), fine.std()]).float(), fixture.outputs["mage_truncnorm_mean_std"], atol=1e-4, rtol=0
    )


def test_masks_and_dropped_tokens_of_given_noise_are_those_of_mage():
    fixture = Fixture("mage_pretrain")
    law = MaskLaw(**MAGE)
    counts = law.counts(fixture.inputs["mask_rate"].double().expand(3), 16)
    masks = masks_of(fixture.inputs["mask_noise"], counts, law.num_dropped(16), equal=True)
    assert torch.equal(masks.masked, fixture.outputs["token_all_mask"][:, 1:].bool())
    assert torch.equal(torch.zeros(3, 16).scatter(1, masks.kept, 1.0), 1 - fixture.outputs["token_drop_mask"][:, 1:])


def test_mage_masks_equally_many_tokens_in_all_samples_of_a_step_and_drops_some_of_them():
    law, counts = MaskLaw(**MAGE), set()
    for step in range(40):
        masks = law.draw(0, POSITIONS[step : step + 3], 17, step=step)
        counts.add(int(masks.masked[0].sum()))
        assert masks.where.shape == (3, int(masks.masked[0].sum())) and masks.masked.gather(1, masks.where).all()
        assert masks.kept.shape == (3, 17 - 9) and (masks.kept.diff() > 0).all() and (masks.where.diff() > 0).all()
        dropped = torch.ones(3, 17, dtype=torch.bool).scatter(1, masks.kept, False)
        assert not (dropped & ~masks.masked).any()
    assert min(counts) == 9 and max(counts) <= 17 and len(counts) > 5


@pytest.mark.parametrize("options", [{}, MAGE, {"independent": True}, {"min_ratio": 0.5, "drop_ratio": 0.25}])
def test_masks_depend_on_seed_and_position_and_not_on_the_batch(options):
    law = MaskLaw(**options)
    whole = law.draw(5, POSITIONS[:8], 16, step=2)
    parts = [law.draw(5, positions, 16, step=2) for positions in (POSITIONS[:3], POSITIONS[3:8])]
    for name, tensor in whole._asdict().items():
        assert (tensor is None) == (getattr(parts[0], name) is None)
        assert tensor is None or torch.equal(tensor, torch.cat([getattr(part, name) for part in parts]))
    assert not torch.equal(law.draw(6, POSITIONS[:8], 16, step=2).masked, whole.masked)


def test_views_of_a_sample_are_masked_independently_and_the_first_one_as_if_alone():
    law = MaskLaw()
    first, second = law.draw(0, POSITIONS, 16, views=2).masked.chunk(2)
    assert torch.equal(first, law.draw(0, POSITIONS, 16).masked)
    together = torch.stack([first.float().mean(1), second.float().mean(1)])
    assert abs(torch.corrcoef(together)[0, 1]) < 4 / math.sqrt(len(POSITIONS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_law": "cosinus"}, "mask_law: schedule 'cosinus' is unknown"),
        ({"min_ratio": 1.0}, "min_ratio must be at least 0 and below 1"),
        ({"drop_ratio": 0.5}, "drop_ratio must lie between 0 and loss.min_ratio 0.0"),
        ({"ratio_std": 0.0}, "ratio_std must be above 0"),
        ({"independent": True, "min_ratio": 0.5, "drop_ratio": 0.5}, "loss.independent masks any number"),
    ],
)
def test_impossible_laws_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MaskLaw(**options)
