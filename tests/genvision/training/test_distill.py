import pytest
import torch
from tiny_models import tiny

from genvision.errors import UserError
from genvision.layers.ternarize import ternarize_linears
from genvision.training.distill import distill_ternary

STEPS = 12
CODES = {"llamagen": lambda: torch.randint(16, (8, 4, 4)), "dit": lambda: torch.randn(8, 2, 4, 4)}


def batches(family, num=STEPS):
    for step in range(num):
        yield {"codes": CODES[family](), "labels": torch.randint(5, (8,)), "positions": torch.arange(8) + 8 * step}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", CODES)
def test_a_student_comes_closer_to_its_teacher(family, packed):
    teacher, student = tiny(family), tiny(family)
    names = ternarize_linears(student, packed=packed)
    before, of_teacher, told = state(student), state(teacher), []
    losses = distill_ternary(teacher, student, batches(family), steps=STEPS, lr=0.01, told=lambda step, loss: told.append((step, loss)))
    assert told == list(enumerate(losses, 1)) and len(losses) == STEPS
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(tensor.equal(of_teacher[name]) for name, tensor in teacher.state_dict().items())
    changed = {name for name, tensor in student.state_dict().items() if not tensor.equal(before[name])}
    if packed:
        assert {f"{name}.scale" for name in names} <= changed and not any(name.endswith(".codes") for name in changed)
    else:
        assert {f"{name}.weight" for name in names} <= changed


@pytest.mark.parametrize("family", CODES)
def test_a_copy_of_the_teacher_has_nothing_to_learn(family):
    assert distill_ternary(tiny(family), tiny(family), batches(family), steps=1, lr=0.0) == pytest.approx([0.0], abs=1e-6)


def test_what_cannot_be_calibrated_is_named():
    with pytest.raises(UserError, match="12 steps were asked for, but there are 2 batches"):
        distill_ternary(tiny("llamagen"), tiny("llamagen"), batches("llamagen", 2), steps=12, lr=0.01)
    with pytest.raises(UserError, match="is there for LlamaGen and DiT, not for MAGE"):
        distill_ternary(tiny("mage"), tiny("mage"), [], steps=1, lr=0.01)
    with pytest.raises(UserError, match="a DiT that is told the guidance scale"):
        distill_ternary(tiny("dit", scale_conditioned=True), tiny("dit"), [], steps=1, lr=0.01)
