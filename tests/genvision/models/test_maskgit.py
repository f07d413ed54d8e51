"""MaskGIT's network by itself; outputs of the official weights are tested in tests/genvision/convert/test_maskgit.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genvision.errors import UserError
from genvision.layers.nested import TokenCache
from genvision.models.maskgit import MaskGIT

VARIANTS = {
    "maskgit": {"block": "post_norm", "mlp": "gelu_tanh", "head": "mlm", "use_qkv_bias": True, "use_qk_norm": False, "num_registers": 0},
    "imagebert": {"block": "post_norm", "mlp": "gelu", "head": "linear", "use_qkv_bias": True, "use_qk_norm": False, "num_registers": 0},
    "uvit": {"block": "pre_norm", "mlp": "gelu", "head": "linear", "use_skips": True, "use_qk_norm": False, "num_registers": 0, "depth": 3},
    "halton": {},
    "mixed": {"block": "pre_norm", "num_registers": 2, "use_skips": True, "depth": 3, "sequence_length": 9},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def tiny(**changes) -> MaskGIT:
    options = dict(codebook_size=11, grid_size=3, hidden_dim=16, depth=2, num_heads=4, mlp_multiple_of=8, num_classes=5, dropout=0.0)
    return MaskGIT(**(options | changes))


def awake(model: MaskGIT) -> MaskGIT:
    """Fresh blocks may do nothing: give every parameter some."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model: MaskGIT, num: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """About a third of the tokens is unknown."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(model.codebook_size, (num, 9), generator=generator)
    unknown = torch.rand(codes.shape, generator=generator) < 1 / 3
    return codes.where(~unknown, model.mask_id), torch.arange(num) % model.num_classes


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)


@every_variant
class TestVariants:
    def test_codes_are_predicted_and_nothing_else(self, name):
        model = awake(tiny(**VARIANTS[name]))
        codes, labels = inputs(model)
        logits = model(codes, labels)
        assert logits.shape == (3, 9, 11) and logits.dtype == torch.float32
        close(model(codes.view(3, 3, 3), labels), logits)
        whole = model(codes, labels, whole_vocabulary=True)
        assert whole.shape[2] == model.vocabulary_size
        close(whole[..., :11], logits)

    def test_every_token_and_the_label_reach_every_prediction(self, name):
        model = awake(tiny(**VARIANTS[name]))
        codes, labels = inputs(model, 1)
        logits = model(codes, labels)
        assert ((model(codes, labels + 1) - logits).abs().amax(2) > 1e-6).all()
        for i in range(9):
            changed = codes.clone()
            changed[:, i] = (codes[:, i] + 1) % 12
            assert ((model(changed, labels) - logits).abs().amax(2) > 1e-6).all()

    def test_predictions_of_some_tokens_are_those_of_all(self, name):
        model = awake(tiny(**VARIANTS[name]))
        where = torch.tensor([[8, 0], [3, 4], [1, 2]])
        logits = model(*inputs(model))
        close(model(*inputs(model), where=where), logits.gather(1, where.unsqueeze(-1).expand(-1, -1, 11)))

    def test_dropped_labels_are_the_null_label(self, name):
        model = awake(tiny(**VARIANTS[name]))
        codes, labels = inputs(model)
        null = model(codes, torch.full_like(labels, model.null_label))
        close(model(codes, labels, drop=torch.tensor([True, False, True]))[[0, 2]], null[[0, 2]])
        close(model(codes, labels, drop=torch.tensor([True, False, True]))[1], model(codes, labels)[1])

    @pytest.mark.parametrize("nesting", [1, 2])
    def test_reading_all_tokens_anew_is_a_full_pass(self, name, nesting):
        model = awake(tiny(**VARIANTS[name]))
        (codes, labels), cache = inputs(model), TokenCache()
        other = codes.flip(1)
        every = torch.arange(9).expand(3, -1)
        with torch.no_grad():
            close(model(codes, labels, nesting=nesting, cache=cache), model(codes, labels, nesting=nesting))
            close(model(other, labels, nesting=nesting, cache=cache, fresh=every), model(other, labels, nesting=nesting))
            close(model(codes, labels, nesting=nesting, cache=cache), model(codes, labels, nesting=nesting))  # filled once more

    def test_unchanged_tokens_can_come_from_the_cache(self, name):
        model = awake(tiny(**VARIANTS[name]))
        (codes, labels), cache = inputs(model), TokenCache()
        fresh, where = torch.tensor([[0, 3, 5], [1, 2, 8], [4, 6, 7]]), torch.tensor([[5, 0], [2, 8], [6, 4]])
        with torch.no_grad():
            logits = model(codes, labels, cache=cache)
            read = model(codes, labels, cache=cache, fresh=fresh)
            close(read, logits.gather(1, fresh.unsqueeze(-1).expand(-1, -1, 11)))
            predicted = model(codes, labels, cache=cache, fresh=fresh, where=where)
        close(predicted, logits.gather(1, where.unsqueeze(-1).expand(-1, -1, 11)))

    def test_what_is_read_anew_is_what_changes(self, name):
        # keys of the first block depend on their own token alone: with one block, reading the changed tokens is enough
        model = awake(tiny(**(VARIANTS[name] | {"depth": 1})))
        (codes, labels), cache = inputs(model), TokenCache()
        fresh = torch.tensor([[0, 4], [1, 8], [2, 3]])
        changed = codes.scatter(1, fresh, (codes.gather(1, fresh) + 1) % 12)
        with torch.no_grad():
            model(codes, labels, cache=cache)
            read = model(changed, labels, cache=cache, fresh=fresh)
            close(read, model(changed, labels, where=fresh))

    @pytest.mark.parametrize("nesting", [1, 2])
    def test_the_count_of_multiplications_is_that_of_the_products(self, name, nesting):
        model = awake(tiny(**VARIANTS[name]))
        (codes, labels), cache = inputs(model, 1), TokenCache()
        fresh, where = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[3, 5]])
        for read, predicted, reading in (
            (9, 9, {}),
            (9, 2, {"where": where, "cache": cache}),
            (4, 2, {"where": where, "cache": cache, "fresh": fresh}),
        ):
            # the fused attention of CPUs is not counted
            with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                model(codes, labels, nesting=nesting, **reading)
            assert counter.get_total_flops() == 2 * model.multiply_adds(read, predicted, nesting)

    def test_a_nested_network_is_a_network_of_its_own(self, name):
        model = awake(tiny(**VARIANTS[name]))
        small = tiny(**(VARIANTS[name] | {"num_heads": 2, "head_dim": 4, "mlp_ratio": model.hidden_units / 32, "mlp_multiple_of": 1}))
        if model.config.mlp == "swiglu":  # which has two thirds of the ratio
            small = tiny(**(VARIANTS[name] | {"num_heads": 2, "head_dim": 4, "mlp_ratio": 0.75 * model.hidden_units / 16}))
        assert small.hidden_units == model.hidden_units // 2
        rows = torch.tensor([*range(8), *range(16, 24), *range(32, 40)])  # the first half of queries, keys and values
        half, state = small.hidden_units, {}
        for key, tensor in model.state_dict().items():
            if ".attn.qkv." in key:
                tensor = tensor[rows]
            elif ".attn.proj.weight" in key:
                tensor = tensor[:, :8]
            elif any(part in key for part in (".mlp.fc1.", ".mlp.gate.", ".mlp.up.")):
                tensor = tensor[:half]
            elif key.endswith((".mlp.fc2.weight", ".mlp.down.weight")):
                tensor = tensor[:, :half]
            state[key] = tensor
        small.load_state_dict(state)
        close(model(*inputs(model), nesting=2), small.eval()(*inputs(model)))

    def test_gradients_stay_within_the_nested_network(self, name):
        model = awake(tiny(**VARIANTS[name]))
        model(*inputs(model), nesting=2).square().sum().backward()
        for block in model.blocks:
            assert not block.attn.qkv.weight.grad.view(3, 4, 4, 16)[:, 2:].any() and not block.attn.proj.weight.grad[:, 8:].any()
            last = block.mlp.fc2 if hasattr(block.mlp, "fc2") else block.mlp.down
            assert last.weight.grad[:, : model.hidden_units // 2].any() and not last.weight.grad[:, model.hidden_units // 2 :].any()

    def test_saving_and_loading_changes_nothing(self, name, tmp_path):
        model = awake(tiny(**VARIANTS[name]))
        model.save_pretrained(tmp_path)
        loaded = MaskGIT.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(*inputs(model)), model(*inputs(model)))

    def test_the_gradient_reaches_every_parameter(self, name):
        model = awake(tiny(**VARIANTS[name]))
        model(*inputs(model)).square().sum().backward()
        assert not {key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}

    def test_it_learns_a_batch(self, name):
        model = tiny(**VARIANTS[name]).train()
        codes = torch.randint(11, (4, 9))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            masked = torch.full_like(codes, model.mask_id)
            loss = F.cross_entropy(model(masked, torch.arange(4), drop=torch.zeros(4, dtype=torch.bool)).flatten(0, 1), codes.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(math.log(11), abs=0.2) and losses[-1] < 1.2

    def test_weights_of_half_precision_give_about_the_same(self, name):
        model = awake(tiny(**VARIANTS[name]))
        with torch.no_grad():
            logits = model(*inputs(model))
            halved = model.to(torch.bfloat16)(*inputs(model))
        assert halved.dtype == torch.float32
        assert (halved - logits).square().mean() < 1e-3 * logits.square().mean() + 1e-3

    def test_hidden_states_know_no_label(self, name):
        model = awake(tiny(**VARIANTS[name]))
        codes = inputs(model)[0].clamp(max=10)
        states = model.hidden_states(codes, [0, 2, len(model.blocks)])
        places = model.prefix_length + 9
        assert [tuple(state.shape) for state in states] == [(3, places, 16)] * 3 and model.prefix_length == (name != "halton")
        null = torch.full((3,), model.null_label)
        last, condition = model._embed(codes, null, None, None)
        close(states[0], last[:, :places])
        close(states[2], model._run(last, condition)[:, :places])


@pytest.mark.parametrize("name", ["maskgit", "halton", "mixed"])
def test_it_compiles_without_a_graph_break(name):
    model = awake(tiny(**VARIANTS[name]))
    close(torch.compile(model, fullgraph=True, backend="eager")(*inputs(model)), model(*inputs(model)))


def test_labels_are_dropped_in_training():
    model = awake(tiny(class_dropout=0.5))
    codes, _ = inputs(model, 1)
    codes, labels = codes.expand(64, -1), torch.zeros(64, dtype=torch.int64)
    kept = model(codes, labels)
    changed = (model.train()(codes, labels) - kept).flatten(1).abs().amax(1) > 1e-6
    assert 16 < int(changed.sum()) < 48


def test_without_dropout_of_labels_there_is_no_null_class():
    model = tiny(class_dropout=0.0)
    assert not model.has_null_label and model.label_embed.table.num_embeddings == 5
    with pytest.raises(UserError, match="null condition"):
        model.hidden_states(torch.zeros(1, 3, 3, dtype=torch.int64), [0])


def test_shape_of_codes_is_a_grid_or_a_sequence():
    assert tiny().code_shape == (3, 3) and tiny().num_tokens == 9
    assert tiny(sequence_length=7).code_shape == (7,) and tiny(sequence_length=7).num_tokens == 7


def test_the_default_is_of_the_published_size():
    with torch.device("meta"):
        model = MaskGIT()
    assert model.num_parameters_million == pytest.approx(142.2, abs=0.1)  # Halton-MaskGIT-B


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"num_registers": -1}, "num_registers must be at least 0"),
        ({"dropout": 1.5}, r"dropout must lie in 0 \.\. 1"),
        ({"block": "norm"}, "block 'norm' is unknown; choose one of post_norm, pre_norm, modulated"),
        ({"mlp": "relu"}, "mlp 'relu' is unknown; choose one of gelu, gelu_tanh, swiglu"),
        ({"head": "bert"}, "head 'bert' is unknown; choose one of linear, tied, mlm"),
        ({"use_skips": True}, "depth 2 must be odd for use_skips"),
        ({"num_heads": 17}, "num_heads 17 must be at most hidden_dim 16"),
        ({"mlp": "gelu", "mlp_ratio": 0.0}, "mlp_ratio must leave a width of at least 1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nesting", [0, 3, 8])
def test_nested_networks_that_do_not_exist_are_refused(nesting):
    model = tiny()
    with pytest.raises(UserError, match=f"nesting {nesting} is not possible; it must divide the 4 heads"):
        model(*inputs(model), nesting=nesting)
