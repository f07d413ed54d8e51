import pytest
import torch
import torch.nn.functional as F

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.layers.rotary import rotary_table_2d, rotate
from genvision.layers.token_loss import TokenTargets, logits_loss
from genvision.models.llamagen import LlamaGen
from parity_fixtures import Fixture


def tiny(**changes):
    options = dict(codebook_size=32, grid_size=3, hidden_dim=32, depth=2, num_heads=4, num_classes=5, mlp_multiple_of=16)
    return LlamaGen(**(options | changes))


PLACES = [{"grid_size": 3}, {"sequence_length": 9}]
"""Nine tokens, as a grid and as a sequence that is none."""


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def next_token_loss(logits, targets, valid=None):
    """Of all tokens, or of those of the images that are valid, [B]."""
    return logits_loss(logits, TokenTargets(targets, None if valid is None else valid[:, None].expand_as(targets))).loss


def test_class_conditional_forward_equals_the_official_one():
    fixture = Fixture("llamagen_gpt_c2i")
    model = load_official("llamagen-gpt", fixture.state, fixture.config)
    residuals = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: residuals.append(output))
    labels, targets = fixture.inputs["labels"], fixture.inputs["targets"]
    logits = model(targets[:, :-1], labels)
    close(logits, fixture.outputs["logits"], fixture.atol)
    close(residuals[0], fixture.outputs["block0"], fixture.atol)
    close(residuals[1], fixture.outputs["block1"], fixture.atol)
    close(model.rotary, fixture.outputs["freqs_cis"], 1e-6)
    close(model.condition_embed(labels, fixture.inputs["force_drop_ids"].bool()), fixture.outputs["cls_embed_dropped"], fixture.atol)
    close(next_token_loss(logits, targets), fixture.outputs["loss"], fixture.atol)
    close(next_token_loss(logits, targets, fixture.inputs["valid"]), fixture.outputs["loss_valid"], fixture.atol)


def test_class_conditional_gradients_equal_the_official_ones():
    fixture = Fixture("llamagen_gpt_c2i")
    model = load_official("llamagen-gpt", fixture.state, fixture.config)
    targets = fixture.inputs["targets"]
    next_token_loss(model(targets[:, :-1], fixture.inputs["labels"]), targets).backward()
    gradients = {
        "cls_embedding.embedding_table.weight": model.condition_embed.table.weight,
        "layers.0.attention.wqkv.weight": model.blocks[0].attention.qkv.weight,
        "layers.0.attention_norm.weight": model.blocks[0].norm1.weight,
        "layers.1.attention.wo.weight": model.blocks[1].attention.proj.weight,
        "layers.1.feed_forward.w1.weight": model.blocks[1].mlp.gate.weight,
        "norm.weight": model.norm.weight,
        "output.weight": model.head.weight,
        "tok_embeddings.weight": model.token_embed.weight,
    }
    for name, parameter in gradients.items():
        close(parameter.grad, fixture.outputs[f"grad/{name}"], fixture.atol)


def test_text_conditional_forward_equals_the_official_one():
    fixture = Fixture("llamagen_gpt_t2i")
    model = load_official("llamagen-gpt", fixture.state, fixture.config)
    caption, mask, targets = fixture.inputs["caption"], fixture.inputs["emb_mask"], fixture.inputs["targets"]
    assert torch.equal(model._prefix_mask(mask, 136), fixture.inputs["attn_mask"])
    logits = model(targets[:, :-1], caption, mask)
    close(logits, fixture.outputs["logits"], fixture.atol)
    close(model.condition_embed(caption, fixture.inputs["force_drop_ids"].bool()), fixture.outputs["cap_embed_dropped"], fixture.atol)
    loss = next_token_loss(logits, targets)
    close(loss, fixture.outputs["loss"], fixture.atol)
    close(next_token_loss(logits, targets, fixture.inputs["valid"]), fixture.outputs["loss_valid"], fixture.atol)
    loss.backward()
    close(model.condition_embed.fc1.weight.grad, fixture.outputs["grad/cls_embedding.cap_proj.fc1.weight"], fixture.atol)
    close(model.condition_embed.fc2.weight.grad, fixture.outputs["grad/cls_embedding.cap_proj.fc2.weight"], fixture.atol)
    close(model.blocks[0].attention.qkv.weight.grad, fixture.outputs["grad/layers.0.attention.wqkv.weight"], fixture.atol)
    close(model.token_embed.weight.grad, fixture.outputs["grad/tok_embeddings.weight"], fixture.atol)


def test_rotary_tables_equal_the_official_ones():
    fixture = Fixture("llamagen_rope2d")
    for name, (grid_size, head_dim, base, prefix) in fixture.config["tables"].items():
        table = rotary_table_2d(grid_size, head_dim, base=base, prefix_length=prefix)
        close(table, fixture.outputs[f"table/{name}"], fixture.atol)
    x = fixture.inputs["x"].transpose(1, 2)
    rotated = rotate(x, rotary_table_2d(4, 16, prefix_length=1)).transpose(1, 2)
    close(rotated, fixture.outputs["rotated"], fixture.atol)
    assert (rotated[:, 0] == 0).all()


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_steps_equal_the_parallel_pass(places, kv_heads):
    model = tiny(num_kv_heads=kv_heads, **places).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    codes, labels = torch.randint(0, 32, (2, 9)), torch.tensor([1, 4])
    parallel = model(codes[:, :-1], labels)
    logits, cache = model.start(labels, codes=codes[:, :3])
    steps = [logits]
    for i in range(3, 8):
        steps.append(model.extend(codes[:, i], cache))
    close(torch.stack(steps, 1), parallel[:, 3:], 1e-5)


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
def test_any_length_is_read_and_the_future_is_not_seen(places):
    model = tiny(**places).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    codes, labels = torch.randint(0, 32, (2, 8)), torch.tensor([0, 3])
    whole = model(codes, labels)
    for n in (0, 1, 5):
        close(model(codes[:, :n], labels), whole[:, : n + 1], 1e-5)


def test_first_loss_is_that_of_guessing():
    model = tiny()
    targets = torch.randint(0, 32, (4, 9))
    loss = next_token_loss(model(targets[:, :-1], torch.tensor([0, 1, 2, 3])), targets)
    close(loss, torch.tensor(32.0).log(), 1e-5)


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
def test_loss_falls_on_one_batch_and_gradients_reach_every_parameter(places):
    model = tiny(**places, token_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    targets, labels = torch.randint(0, 32, (8, 9)), torch.arange(8) % 5
    losses = []
    for _ in range(60):
        loss = next_token_loss(model(targets[:, :-1], labels), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
def test_saved_and_loaded_model_gives_equal_logits(places, tmp_path):
    model = tiny(**places).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    again = LlamaGen.from_pretrained(tmp_path)
    assert again.code_shape == model.code_shape
    codes, labels = torch.randint(0, 32, (2, 4)), torch.tensor([0, 5])
    assert torch.equal(again(codes, labels), model(codes, labels))


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
def test_rotary_table_stays_float32_when_weights_are_cast(places):
    model = tiny(**places).to(torch.bfloat16)
    assert model.rotary.dtype == torch.float32
    assert model(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0])).dtype == torch.float32


@pytest.mark.parametrize("places", PLACES, ids=["grid", "sequence"])
def test_compiles_without_a_graph_break(places):
    model = tiny(**places).eval()
    explained = torch._dynamo.explain(model)(torch.zeros(2, 8, dtype=torch.int64), torch.tensor([0, 1]))
    assert explained.graph_break_count == 0, explained.break_reasons


def test_positions_of_a_sequence_count_from_the_condition_on():
    model = tiny(sequence_length=9, rope_base=100.0)
    turns = torch.view_as_complex(model.rotary)  # [1 + 9, D / 2] of D = 8
    expected = torch.polar(torch.ones(10, 4), torch.outer(torch.arange(10.0), torch.tensor([1.0, 0.316227766, 0.1, 0.0316227766])))
    torch.testing.assert_close(turns, expected, atol=1e-6, rtol=0)


def test_shape_of_the_codes_is_a_grid_or_a_sequence():
    assert (tiny().code_shape, tiny().num_tokens) == ((3, 3), 9)
    assert (tiny(sequence_length=5).code_shape, tiny(sequence_length=5).num_tokens) == ((5,), 5)
    assert tiny(grid_size=6).image_size(8, 256) == 48 and tiny(sequence_length=5).image_size(8, 256) == 256


def test_condition_drop_uses_the_null_class():
    model = tiny().eval()
    torch.nn.init.normal_(model.head.weight)
    codes = torch.randint(0, 32, (2, 4))
    dropped = model(codes, torch.tensor([0, 1]), drop=torch.tensor([True, True]))
    assert torch.equal(dropped, model(codes, torch.full((2,), model.null_label)))


def test_drop_path_replaces_dropout_and_only_acts_in_training():
    model = tiny(drop_path=0.5, token_dropout=0.0)
    assert [block.drop_path for block in model.blocks] == [0.0, 0.5]
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    torch.nn.init.normal_(model.head.weight)
    codes, labels = torch.randint(0, 32, (16, 4)), torch.zeros(16, dtype=torch.int64)
    model.eval()
    assert torch.equal(model(codes, labels), model(codes, labels))
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))


@pytest.mark.parametrize("options", [{"num_heads": 5}, {"num_kv_heads": 3}, {"condition": "sound"}, {"sequence_length": 0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(UserError):
        tiny(**options)


def test_swiglu_is_silu_gate_times_up():
    mlp = tiny().blocks[0].mlp.eval()
    x = torch.randn(3, 32)
    expected = (F.silu(x @ mlp.gate.weight.T) * (x @ mlp.up.weight.T)) @ mlp.down.weight.T
    close(mlp(x), expected, 1e-6)
