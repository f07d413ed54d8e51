import pytest
import torch

from genvision.errors import UserError
from genvision.layers.token_loss import TokenTargets, head_loss
from genvision.models.maskgit import MaskGIT
from genvision.objectives.masked import MaskedLossConfig, MaskedTokens
from genvision.objectives.nested import NestedLossConfig, NestedTraining

SHAPE = (2, 3, 7)
TARGETS = TokenTargets(torch.arange(6).view(2, 3), keep_hidden=True)


def training(num_steps=10, **options):
    return NestedTraining(NestedLossConfig(**options), seed=0, num_steps=num_steps)


def from_logits(logits, targets=TARGETS):
    """Losses of a network whose last layer gives what it reads."""
    return head_loss(logits, torch.eye(SHAPE[-1]), None, targets)


def tiny_maskgit():
    torch.manual_seed(0)
    model = MaskGIT(codebook_size=12, grid_size=3, hidden_dim=16, depth=1, num_heads=4, num_classes=3, mlp_multiple_of=8, dropout=0.0)
    for parameter in model.parameters():  # modulations start at zero, where the blocks do nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return model


BATCH = {"codes": torch.arange(36).view(4, 3, 3) % 12, "labels": torch.tensor([0, 1, 2, 0]), "positions": torch.arange(4)}


def test_the_share_of_labels_falls_from_one_to_zero_unless_distillation_is_off():
    curriculum = training(nested=(2,))
    assert [curriculum.label_share(step) for step in (0, 5, 10, 12)] == [1.0, 0.5, 0.0, 0.0]
    assert training(nested=(2,), distillation=False).label_share(9) == 1.0


def test_teachers():
    assert [training(nested=(8, 2, 4)).teacher(p) for p in (2, 4, 8)] == [1, 1, 1]
    assert [training(nested=(8, 2, 4), teacher="next").teacher(p) for p in (2, 4, 8)] == [1, 2, 4]


def test_a_step_trains_all_networks_or_one_that_is_the_same_on_every_process():
    assert training(nested=(8, 2, 4)).trained(3) == (2, 4, 8)
    random = training(nested=(2, 4, 8), nested_each="random")
    chosen = [random.trained(step) for step in range(60)]
    assert set(chosen) == {(2,), (4,), (8,)} and chosen == [random.trained(step) for step in range(60)]


@pytest.mark.parametrize("step, share", [(0, 1.0), (4, 0.6), (10, 0.0)])
def test_a_nested_network_learns_from_labels_and_from_its_teacher_which_learns_nothing_from_it(step, share):
    teacher, student = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)

    def loss(step, logits):
        def predict(factor, taught, label_share):
            return from_logits(logits, TARGETS._replace(teacher=taught, label_share=label_share))

        return training(nested=(2,)).losses(step, from_logits(teacher), predict)[2]

    term = loss(step, student)
    log_p = student.log_softmax(-1)
    hard = -log_p.gather(-1, TARGETS.codes[..., None]).mean()
    soft = -(teacher.softmax(-1) * log_p).sum(-1).mean()
    torch.testing.assert_close(term.loss, share * hard + (1 - share) * soft)
    torch.testing.assert_close(term.label_loss, hard)
    term.loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    equal = teacher.detach().clone().requires_grad_()
    loss(10, equal).loss.backward()
    torch.testing.assert_close(equal.grad, torch.zeros(SHAPE))  # who says what the teacher says has nothing to learn


def test_a_teacher_that_the_step_does_not_train_is_asked_without_gradients():
    asked = []

    def predict(factor, taught, label_share):
        asked.append((factor, torch.is_grad_enabled(), label_share))
        return from_logits(torch.full(SHAPE, float(factor)))

    random = training(nested=(2, 4), nested_each="random", teacher="next")
    step = next(step for step in range(1, 9) if random.trained(step) == (4,))
    assert set(random.losses(step, from_logits(torch.zeros(SHAPE)), predict)) == {4}
    assert asked == [(2, False, 1.0), (4, True, random.label_share(step))]
    asked.clear()
    training(nested=(2, 4), teacher="next").losses(1, from_logits(torch.zeros(SHAPE)), predict)
    assert asked == [(2, True, 0.9), (4, True, 0.9)]


def test_the_loss_is_the_mean_over_networks_and_that_of_the_whole_one_is_the_plain_loss():
    model = tiny_maskgit()
    plain = MaskedTokens(MaskedLossConfig(), model, seed=0, num_steps=10)(model, BATCH)
    terms = MaskedTokens(MaskedLossConfig(nested=(2, 4)), model, seed=0, num_steps=10)(model, BATCH)
    torch.testing.assert_close(terms["loss_p1"], plain["loss"].detach())
    torch.testing.assert_close(terms["accuracy"], plain["accuracy"])
    torch.testing.assert_close(terms["loss"], (terms["loss_p1"] + terms["loss_p2"] + terms["loss_p4"]) / 3)  # all labels at the first step
    assert len({round(float(terms[f"loss_p{p}"]), 4) for p in (1, 2, 4)}) == 3


def test_gradients_of_single_networks_add_up_to_that_of_all():
    def gradient(nested, step=4):
        model = tiny_maskgit()
        objective = MaskedTokens(MaskedLossConfig(nested=nested), model, seed=0, num_steps=10)
        objective.begin_step(step, None)
        objective(model, BATCH)["loss"].backward()
        return next(weight.grad for name, weight in model.named_parameters() if name.endswith("qkv.weight"))

    plain, two, four, both = gradient(()), gradient((2,)), gradient((4,)), gradient((2, 4))
    torch.testing.assert_close(3 * both, 2 * two + 2 * four - plain, atol=1e-6, rtol=1e-4)
    outside = (2 * four - plain).unflatten(0, (3, 4, -1))[:, 1:]  # of what M_4 adds: heads that it does not have
    torch.testing.assert_close(outside, torch.zeros_like(outside), atol=1e-6, rtol=0)


@pytest.mark.parametrize("nested", [(1, 2), (2, 2)])
def test_factors_must_be_different_and_nested(nested):
    with pytest.raises(UserError, match="must hold different factors"):
        NestedLossConfig(nested=nested)
