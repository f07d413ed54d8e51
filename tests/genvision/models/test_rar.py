"""RAR by itself; outputs of the official weights are tested in tests/genvision/convert/test_rar.py."""

import pytest
import torch

from genvision.errors import UserError
from genvision.models import rar
from genvision.models.rar import RAR
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.randomness import ImageStreams

PLACES = [{"grid_size": 3}, {"sequence_length": 9}]
"""Nine tokens, as a grid and as a sequence that is none."""


def tiny(**changes) -> RAR:
    options = dict(codebook_size=11, grid_size=3, hidden_dim=16, depth=2, num_heads=2, mlp_dim=24, num_classes=5)
    return RAR(**(options | changes))


def awake(model: RAR) -> RAR:
    """Fresh modulations are zero: give every parameter some."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(num: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, labels and orders."""
    generator = torch.Generator().manual_seed(1)
    orders = torch.rand(num, 9, generator=generator).argsort(dim=1)
    return torch.randint(0, 11, (num, 9), generator=generator), torch.arange(num) % 5, orders


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
@pytest.mark.parametrize("at_once", [1, 4, 16])
@torch.inference_mode()
def test_cached_steps_equal_the_parallel_pass(places, at_once, monkeypatch):
    monkeypatch.setattr(rar, "PLACES_AT_ONCE", at_once)
    model = awake(tiny(**places))
    codes, labels, _ = inputs(4)
    labels[3], drop = labels[0], torch.tensor([False, True, True, False])
    parallel = model(codes, labels, drop=drop)
    for num_known in (0, 3):
        logits, cache = model.start(labels, drop=drop, codes=codes[:, :num_known])
        steps = [logits] + [model.extend(codes[:, i], cache) for i in range(num_known, 8)]
        close(torch.stack(steps, 1), parallel[:, num_known:])
        assert cache.filled == cache.store.shape[4] == 10


@torch.inference_mode()
def test_rows_leave_and_join_a_cache_between_steps():
    model = awake(tiny())
    codes, labels, _ = inputs(4)
    parallel = model(codes, labels)
    _, cache = model.start(labels[:2], codes=codes[:2, :2])
    close(model.extend(codes[:2, 2], cache), parallel[:2, 3])
    first = cache.first_rows(1)
    close(model.extend(codes[:1, 3], first), parallel[:1, 4])
    _, others = model.start(labels[2:], codes=codes[2:, :4])
    both = first.joined(others)
    close(model.extend(codes[[0, 2, 3], 4], both), parallel[[0, 2, 3], 5])


def test_a_token_knows_those_before_it_in_the_order_and_no_others():
    model = awake(tiny())
    codes, labels, orders = inputs(1)
    before = model(codes, labels, orders=orders)
    for i, position in enumerate(orders[0]):
        changed = codes.clone()
        changed[0, position] = (changed[0, position] + 1) % 11
        differs = (model(changed, labels, orders=orders) - before)[0].abs().amax(-1) > 1e-6
        assert differs.tolist() == [j > i for j in range(9)]


def test_a_prediction_depends_on_which_token_comes_next():
    model = awake(tiny())
    codes, labels, orders = inputs(1)
    swapped = orders[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    one, other = model(codes, labels, orders=orders), model(codes, labels, orders=swapped)
    close(other[:, :3], one[:, :3])
    assert (other[:, 3] - one[:, 3]).abs().max() > 1e-3


def test_without_an_order_tokens_are_read_as_a_raster():
    model = awake(tiny())
    codes, labels, _ = inputs()
    raster = torch.arange(9).expand(3, -1)
    assert torch.equal(model(codes.view(3, 3, 3), labels), model(codes, labels, orders=raster))


def test_hidden_states_are_what_the_blocks_give_to_an_image_without_a_label():
    model = awake(tiny())
    codes, labels, _ = inputs()
    seen = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    states = model.hidden_states(codes.view(3, 3, 3), [0, 2])
    assert [tuple(state.shape) for state in states] == [(3, model.prefix_length + 9, 16)] * 2
    model(codes, labels, drop=torch.ones(3, dtype=torch.bool))
    close(seen[1][:, :-1], seen[3])
    with pytest.raises(UserError, match="null condition"):
        tiny(class_dropout=0.0).hidden_states(codes, [0])


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
def test_saving_and_loading_changes_nothing(places, tmp_path):
    model = awake(tiny(**places))
    model.save_pretrained(tmp_path)
    loaded = RAR.from_pretrained(tmp_path).eval()
    assert loaded.code_shape == model.code_shape == ((3, 3) if "grid_size" in places else (9,))
    codes, labels, orders = inputs()
    assert torch.equal(loaded(codes, labels, orders=orders), model(codes, labels, orders=orders))


def test_the_gradient_reaches_every_parameter_and_checkpointing_changes_none():
    codes, labels, orders = inputs(5)
    gradients, weights = [], awake(tiny()).state_dict()
    for on in (False, True):
        model = tiny().train()
        model.load_state_dict(weights)
        if on:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        logits = model(codes, labels, orders=orders, drop=torch.arange(5) > 3)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.gather(1, orders).flatten()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], atol=1e-6, rtol=1e-5)


def test_a_fresh_model_guesses_and_its_blocks_change_nothing():
    model = tiny(codebook_size=64).eval()
    codes, labels, _ = inputs()
    first, last = model.hidden_states(codes, [0, 2])
    assert torch.equal(first, last)
    losses = torch.nn.functional.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
    assert losses.item() == pytest.approx(torch.tensor(64.0).log().item(), abs=0.1)


def test_labels_are_dropped_on_demand_and_in_training():
    model = awake(tiny(class_dropout=0.5, attention_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0))
    codes, labels = inputs(1)[0].expand(64, -1), torch.arange(64) % 5
    null = model(codes, torch.full_like(labels, model.null_label))
    close(model(codes, labels, drop=torch.ones(64, dtype=torch.bool)), null)
    kept = model(codes, labels)
    changed = (model.train()(codes, labels) - kept).flatten(1).abs().amax(1) > 1e-5
    assert 16 < int(changed.sum()) < 48


@pytest.mark.slow
def test_it_compiles_without_a_graph_break():
    model = awake(tiny())
    codes, labels, orders = inputs()
    explained = torch._dynamo.explain(model)(codes, labels, orders=orders, drop=torch.tensor([True, False, False]))
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("options", [{}, {"guidance_stop": 0.5}, {"guidance_start": 0.5, "guidance_schedule": "cosine"}])
def test_the_same_images_are_drawn_whatever_the_batch_size(options):
    model = awake(tiny())
    sampler = AutoregressiveSampler(guidance_scale=2.0, **options)
    labels = torch.arange(5)
    together = sampler.sample(model, labels, ImageStreams(3, range(5)))
    parts = [sampler.sample(model, labels[i : i + 2], ImageStreams(3, range(i, min(i + 2, 5)))) for i in (0, 2, 4)]
    assert together.shape == (5, 3, 3) and torch.equal(torch.cat(parts), together)


def test_known_first_tokens_are_kept():
    model, (codes, labels, _) = awake(tiny()), inputs()
    known = torch.where(torch.arange(9) < 4, codes, -1)
    drawn = AutoregressiveSampler(guidance_scale=2.0).sample(model, labels, ImageStreams(0, range(3)), known=known)
    assert torch.equal(drawn.flatten(1)[:, :4], codes[:, :4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"mlp_dim": 0}, "mlp_dim must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"num_heads": 3}, "hidden_dim 16 must be a multiple of num_heads 3"),
        ({"mlp_dropout": 1.5}, r"mlp_dropout must lie in 0 \.\. 1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)
