"""What MAGE answers to: the tokens that are asked for, nested networks, kept tokens, the cache, labels and features."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genvision.errors import UserError
from genvision.layers.nested import TokenCache
from genvision.models.mage import MAGE


def tiny(**changes) -> MAGE:
    torch.manual_seed(0)
    sizes = dict(hidden_dim=16, depth=2, num_heads=2, decoder_dim=24, decoder_depth=2, decoder_num_heads=4, mlp_ratio=2.0)
    return MAGE(**(dict(codebook_size=12, grid_size=3, num_classes=5) | sizes | changes)).eval()


def inputs(model: MAGE, num: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the tokens are unknown."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(model.codebook_size, (num, model.num_tokens), generator=generator)
    unknown = torch.rand(codes.shape, generator=generator) < 0.5
    return torch.where(unknown, model.mask_id, codes), torch.arange(num) % model.num_classes


def rows(*positions: list[int]) -> torch.Tensor:
    return torch.tensor(positions)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def model() -> MAGE:
    return tiny()


@pytest.mark.parametrize("changes", [{}, {"sequence_length": 7}])
@torch.no_grad()
def test_there_are_logits_of_every_code_for_every_token(changes):
    model = tiny(**changes)
    codes, labels = inputs(model)
    logits = model(codes, labels)
    assert logits.shape == (3, model.num_tokens, 12) and logits.dtype == torch.float32
    assert torch.equal(model(codes.unflatten(1, model.code_shape), labels), logits)


@torch.no_grad()
def test_tokens_that_are_asked_for_are_those_of_all(model):
    codes, labels = inputs(model)
    where = rows([8, 0], [3, 4], [1, 1])
    close(model(codes, labels, where=where), model(codes, labels)[torch.arange(3)[:, None], where])


@torch.no_grad()
def test_to_keep_all_tokens_is_to_drop_none(model):
    codes, labels = inputs(model)
    close(model(codes, labels, kept=torch.arange(9).expand(3, -1)), model(codes, labels))


@torch.no_grad()
def test_what_is_not_kept_makes_no_difference(model):
    codes, labels = inputs(model)
    kept = rows([0, 4, 5], [1, 2, 8], [3, 6, 7])
    others = torch.full_like(codes, 3).scatter(1, kept, codes.gather(1, kept))
    assert not torch.equal(codes, others)
    assert torch.equal(model(codes, labels, kept=kept), model(others, labels, kept=kept))


@torch.no_grad()
def test_the_decoder_reads_the_class_token_wherever_a_token_is_masked_or_dropped(model):
    codes, labels = inputs(model)
    kept, seen = rows([0, 4, 5], [1, 2, 8], [3, 6, 7]), []
    hook = model.decoder_blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0] - model.decoder_positions))
    _, features = model(codes, labels, kept=kept, with_features=True)
    hook.remove()
    known = torch.zeros_like(codes, dtype=torch.bool).scatter(1, kept, True) & (codes != model.mask_id)
    assert 0 < int(known.sum()) < 9
    same = (seen[0] - seen[0][:, :1]).abs().amax(-1) < 1e-5
    assert torch.equal(same[:, 1:], ~known)
    close(seen[0][:, 0], model.decoder_embed(features[:, 0]))


class TestNesting:
    @torch.no_grad()
    def test_a_nested_network_reads_the_first_heads_and_units_alone(self):
        model = tiny()
        codes, labels = inputs(model)
        whole, nested = model(codes, labels), model(codes, labels, nesting=2)
        assert not torch.allclose(whole, nested) and torch.equal(model(codes, labels, nesting=1), whole)
        for block in (*model.blocks, *model.decoder_blocks):
            _, second = block.attention.qkv.weight.unflatten(0, (3, 2, -1)).unbind(1)
            second.add_(1.0)
            block.attention.proj.weight.chunk(2, dim=1)[1].mul_(2.0)
            block.mlp.fc1.weight.chunk(2)[1].add_(1.0)
            block.mlp.fc2.weight.chunk(2, dim=1)[1].mul_(2.0)
        assert torch.equal(model(codes, labels, nesting=2), nested) and not torch.allclose(model(codes, labels), whole)

    def test_encoder_and_decoder_must_both_divide(self):
        model = tiny(hidden_dim=24, num_heads=6, decoder_num_heads=4)
        model.check_nesting(2)
        for nesting in (0, 3, 4):
            with pytest.raises(UserError, match=f"nesting {nesting} is not possible; it must divide the 6 and 4 heads"):
                model.check_nesting(nesting)


class TestCache:
    @torch.no_grad()
    def test_to_read_every_token_anew_is_a_full_pass(self, model):
        codes, labels = inputs(model)
        cache = TokenCache()
        close(model(torch.full_like(codes, model.mask_id), labels, cache=cache), model(torch.full_like(codes, model.mask_id), labels))
        close(model(codes, labels, cache=cache, fresh=torch.arange(9).repeat(3, 1)), model(codes, labels))

    @pytest.mark.parametrize("nesting", [1, 2])
    @torch.no_grad()
    def test_a_cache_that_is_filled_at_every_step_changes_nothing(self, model, nesting):
        codes, labels = inputs(model)
        cache = TokenCache()
        for step in range(3):
            codes[:, step] = step
            close(model(codes, labels, cache=cache, nesting=nesting), model(codes, labels, nesting=nesting))

    @torch.no_grad()
    def test_tokens_read_anew_see_the_others_as_they_were(self, model):
        codes, labels = inputs(model)
        cache, fresh, where = TokenCache(), rows([1, 4, 6], [0, 2, 8], [3, 4, 5]), rows([6], [2], [3])
        full = model(codes, labels, cache=cache)
        same = model(codes, labels, cache=cache, fresh=fresh, where=where)  # nothing has changed, so nothing may differ
        close(same, full[torch.arange(3)[:, None], where])
        changed = codes.scatter(1, rows([1], [0], [5]), 7)
        approximate = model(changed, labels, cache=cache, fresh=fresh, where=where)
        assert not torch.allclose(approximate, same)
        unread = changed.scatter(1, rows([0], [1], [0]), 2)
        assert torch.equal(model(unread, labels, cache=cache, fresh=fresh, where=where), approximate)


@pytest.mark.parametrize(("num_read", "num_predicted", "nesting"), [(9, 9, 1), (9, 2, 2), (4, 3, 1)])
@torch.no_grad()
def test_multiply_adds_are_half_of_the_counted_operations(model, num_read, num_predicted, nesting):
    codes, labels = inputs(model, 2)
    cache, options = TokenCache(), {}
    if num_read < 9:
        model(codes, labels, cache=cache)
        options = {"cache": cache, "fresh": torch.arange(num_read).repeat(2, 1)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(codes, labels, where=torch.arange(num_predicted).repeat(2, 1), nesting=nesting, **options)
    assert counter.get_total_flops() == 2 * 2 * model.multiply_adds(num_read, num_predicted, nesting)


class TestLabels:
    @torch.no_grad()
    def test_a_dropped_label_is_the_null_one(self, model):
        codes, labels = inputs(model)
        null = model(codes, torch.full_like(labels, model.null_label))
        conditional = model(codes, labels)
        assert not any(torch.allclose(*pair) for pair in zip(null, conditional, strict=True))
        assert torch.equal(model(codes, labels, drop=torch.ones(3, dtype=torch.bool)), null)
        mixed = model(codes, labels, drop=torch.tensor([True, False, False]))
        close(mixed, torch.cat([null[:1], conditional[1:]]))

    @torch.no_grad()
    def test_labels_are_dropped_in_training(self):
        model = tiny(class_dropout=0.5, dropout=0.0)
        codes, labels = (tensor[:1].expand(64, *tensor.shape[1:]) for tensor in inputs(model))
        kept = model(codes, labels)
        changed = (model.train()(codes, labels) - kept).flatten(1).abs().amax(1) > 1e-4
        assert 16 < int(changed.sum()) < 48

    @torch.no_grad()
    def test_an_unconditional_model_reads_one_class_token_whatever_the_label(self):
        model = tiny(class_dropout=1.0, num_classes=1, class_slots=20, null_slot=7)
        assert model.is_unconditional and model.has_null_label and model.words.num_embeddings == 12 + 20 + 1
        codes, _ = inputs(model)
        first = model(codes, torch.zeros(3, dtype=torch.int64))
        assert torch.equal(model(codes, torch.ones(3, dtype=torch.int64), drop=torch.zeros(3, dtype=torch.bool)), first)
        unused = [row for row in range(12, 32) if row != 12 + 7]
        model.words.weight[unused] = torch.nan
        assert torch.equal(model(codes, torch.zeros(3, dtype=torch.int64)), first)

    def test_other_models_are_conditional(self, model):
        assert not model.is_unconditional and model.has_null_label and model.null_label == 5
        assert (model.null_word, model.mask_word, model.words.num_embeddings) == (17, 18, 19)


class TestRepresentation:
    @torch.no_grad()
    def test_hidden_states_are_those_of_the_encoder_before_its_norm(self, model):
        codes, labels = inputs(model)
        codes = codes % model.codebook_size
        states = model.hidden_states(codes.unflatten(1, (3, 3)), [0, 2])
        assert [tuple(state.shape) for state in states] == [(3, model.prefix_length + 9, 16)] * 2
        _, features = model(codes, torch.full_like(labels, model.null_label), with_features=True)
        close(model.norm(states[1]), features)

    def test_without_a_null_condition_there_are_none(self):
        model = tiny(class_dropout=0.0)
        with pytest.raises(UserError, match="without a null condition"):
            model.hidden_states(torch.zeros(1, 9, dtype=torch.int64), [0])

    @torch.no_grad()
    def test_features_are_of_the_kept_tokens_or_a_projection_of_their_mean(self, model):
        contrastive = tiny(contrastive_dim=6)
        contrastive.load_state_dict(model.state_dict(), strict=False)
        codes, labels = inputs(model)
        kept = rows([0, 4, 5], [1, 2, 8], [3, 6, 7])
        logits, features = model(codes, labels, kept=kept, with_features=True)
        assert features.shape == (3, 1 + 3, 16)
        same, projected = contrastive(codes, labels, kept=kept, with_features=True)
        assert torch.equal(same, logits) and projected.shape == (3, 6)
        assert torch.equal(projected, contrastive.projector(features[:, 1:].mean(1)))


class TestTraining:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_gradient_reaches_every_parameter(self, checkpointing):
        model = tiny(contrastive_dim=6, dropout=0.0).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        codes, labels = inputs(model, 7)
        kept = torch.arange(1, 9, 2).expand(7, -1)
        logits, features = model(codes, labels, kept=kept, drop=torch.arange(7) > 4, with_features=True)
        (logits.log_softmax(-1)[..., 0].mean() + features.square().sum()).backward()
        assert not {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}

    def test_the_output_side_teaches_the_word_table_nothing(self):
        """Codes that are nowhere read get no gradient, though all logits depend on them."""
        model = tiny().train()
        codes, labels = torch.full((2, 9), 4), torch.zeros(2, dtype=torch.int64)
        codes[:, ::2] = model.mask_id
        F.cross_entropy(model(codes, labels).flatten(0, 1), torch.ones(18, dtype=torch.int64)).backward()
        taught = set(model.words.weight.grad.any(1).nonzero().flatten().tolist())
        assert 4 in taught and model.mask_word in taught and not taught & {1, 2, 3, 5}

    def test_the_loss_of_one_batch_falls(self):
        model = tiny(dropout=0.0).train()
        codes, labels = inputs(model)
        targets = torch.arange(27).view(3, 9) % 12
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            loss = F.cross_entropy(model(codes, labels, drop=torch.zeros(3, dtype=torch.bool)).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_dropout_works_in_every_place(self):
        """Embedding, and in each block attention weights, its projection and two places of the feed-forward block."""
        model = tiny(dropout=0.3)
        rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert rates == [0.3] * (1 + 4 * 2)  # the feed-forward block uses its own twice
        assert {block.attention.attention_dropout for block in (*model.blocks, *model.decoder_blocks)} == {0.3}
        codes, labels = inputs(model)
        assert torch.equal(model(codes, labels), model(codes, labels))
        model.train()
        drop = torch.zeros(3, dtype=torch.bool)
        assert not torch.allclose(model(codes, labels, drop=drop), model(codes, labels, drop=drop))


@torch.no_grad()
def test_saving_and_loading_changes_nothing(tmp_path):
    model = tiny(class_slots=9, null_slot=7, contrastive_dim=3)
    model.save_pretrained(tmp_path)
    loaded = MAGE.from_pretrained(tmp_path).eval()
    assert dict(loaded.config)["null_slot"] == 7
    for ours, theirs in zip(loaded(*inputs(model), with_features=True), model(*inputs(model), with_features=True), strict=True):
        assert torch.equal(ours, theirs)


def test_it_starts_as_stated():
    model = tiny(hidden_dim=64, codebook_size=400, depth=1)
    assert model.words.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)
    weight = model.blocks[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.98 * bound < weight.abs().max().item() <= bound and not model.blocks[0].mlp.fc1.bias.any()


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_without_a_graph_break(model):
    codes, labels = inputs(model)
    kept = rows([0, 4, 5], [1, 2, 8], [3, 6, 7])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(codes, labels, where=kept), model(codes, labels, where=kept))
    close(compiled(codes, labels, kept=kept), model(codes, labels, kept=kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_depth": 0}, "decoder_depth must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"class_dropout": 1.5}, "class_dropout must lie in 0 .. 1, got 1.5"),
        ({"dropout": -0.1}, "dropout must lie in 0 .. 1, got -0.1"),
        ({"num_heads": 3}, "num_heads 3 must divide hidden_dim 16"),
        ({"decoder_num_heads": 5}, "decoder_num_heads 5 must divide decoder_dim 24"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01 leaves no hidden unit of 16"),
        ({"contrastive_dim": -1}, "contrastive_dim must be at least 0, got -1"),
        ({"class_slots": 5}, r"null_slot 5 must lie in 5 .. 4"),
        ({"class_slots": 1000, "null_slot": 3}, r"null_slot 3 must lie in 5 .. 999, behind the slots of the classes"),
    ],
)
def test_impossible_options_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        tiny(**changes)
    assert "\n" not in str(error.value)
