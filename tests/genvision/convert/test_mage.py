"""MAGE of the original implementation: its outputs, its loss, its recorded sizes, and the files that cannot generate."""

import math

import pytest
import torch
import torch.nn.functional as F

from genvision.convert import load_official
from genvision.convert.mage import mage
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from parity_fixtures import Fixture, manifest

SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16)}
"""Width, depth, heads of the encoder."""


def load(state, config):
    return load_official("mage", state, config)


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def pretrain() -> Fixture:
    return Fixture("mage_pretrain")


@pytest.fixture
def model(pretrain):
    return load(pretrain.state, pretrain.config)


class Batch:
    """Tokens that are masked and kept, from the noise and the rate that are given."""

    def __init__(self, fixture: Fixture, model) -> None:
        ids, noise = fixture.inputs["token_indices"], fixture.inputs["mask_noise"]
        num_dropped, num_masked = math.ceil(ids.shape[1] * 0.5), math.ceil(ids.shape[1] * fixture.inputs["mask_rate"].item())
        rank = noise.argsort(1).argsort(1)
        self.masked, self.dropped = rank < num_masked, rank < num_dropped
        self.kept = (~self.dropped).nonzero()[:, 1].view(len(ids), -1)
        self.ids, self.codes = ids, torch.where(self.masked, model.mask_id, ids)
        self.labels = torch.zeros(len(ids), dtype=torch.int64)


class TestPreTraining:
    @torch.no_grad()
    def test_every_stage_is_the_original_one(self, pretrain, model):
        batch, out, atol = Batch(pretrain, model), pretrain.outputs, pretrain.atol
        assert torch.equal(batch.masked, out["token_all_mask"][:, 1:].bool())
        assert torch.equal(batch.dropped, out["token_drop_mask"][:, 1:].bool())
        seen = {}
        model.embed_dropout.register_forward_hook(lambda module, inputs, output: seen.update(embedding=output))
        model.decoder_blocks[0].register_forward_hook(lambda module, inputs, output: seen.update(decoder_input=inputs[0]))
        model.decoder_norm.register_forward_hook(lambda module, inputs, output: seen.update(decoder_output=output))
        logits, latent = model(batch.codes, batch.labels, kept=batch.kept, with_features=True)
        close(seen["embedding"], out["emb_after_drop"], atol)
        close(latent, out["latent"], atol)
        close(seen["decoder_input"], out["decoder_input"], atol)
        close(seen["decoder_output"], out["decoder_output"][:, 1:], atol)
        close(logits, out["logits"][:, 1:, : model.codebook_size], atol)
        where = batch.masked.nonzero()[:, 1].view(len(batch.ids), -1)
        index = where.unsqueeze(-1).expand(-1, -1, model.codebook_size)
        close(model(batch.codes, batch.labels, kept=batch.kept, where=where), logits.gather(1, index), 1e-6)

    @torch.no_grad()
    def test_without_dropping_tokens_it_is_the_original_one(self, pretrain, model):
        batch, out, atol = Batch(pretrain, model), pretrain.outputs, pretrain.atol
        seen = []
        model.embed_dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
        logits, latent = model(batch.codes, batch.labels, with_features=True)
        close(seen[0], out["emb_before_drop"], atol)
        close(latent, out["latent_masked_nodrop"], atol)
        close(logits, out["logits_nodrop_codebook"], atol)
        close(model(batch.ids, batch.labels, with_features=True)[1], out["latent_full_visible"], atol)
        (last,) = model.hidden_states(batch.ids, [len(model.blocks)])
        close(model.norm(last), out["latent_full_visible"], atol)

    def test_loss_and_gradients_are_the_original_ones(self, pretrain, model):
        batch, out = Batch(pretrain, model), pretrain.outputs
        logits = model(batch.codes, batch.labels, kept=batch.kept)
        loss = F.cross_entropy(logits[batch.masked], batch.ids[batch.masked], label_smoothing=0.1)
        close(loss.detach(), out["loss"], pretrain.atol)
        loss.backward()
        close(model.blocks[0].attention.qkv.weight.grad, out["grad_block0_qkv"], pretrain.atol)
        close(model.words.weight.grad[:49], out["grad_word_embeddings"], pretrain.atol)
        close(model.decoder_positions.grad, out["grad_decoder_pos_embed_learned"][0], pretrain.atol)


class TestGeneration:
    @torch.no_grad()
    def test_first_and_last_step_are_the_original_ones(self):
        fixture = Fixture("mage_generate")
        model, out = load(fixture.state, fixture.config), fixture.outputs
        ids = out["model_input_ids"]
        assert (ids[:, :, 0] == model.null_word).all()
        codes = torch.where(ids[:, :, 1:] == fixture.config["mask_token_label"], model.mask_id, ids[:, :, 1:])
        labels = torch.zeros(2, dtype=torch.int64)
        assert (codes[0] == model.mask_id).all()
        close(model(codes[0], labels), out["logits_step0"], fixture.atol)
        last = model(codes[-1].unflatten(1, model.code_shape), labels)
        close(last, out["logits_last"], fixture.atol)
        drawn = (last + fixture.inputs["sample_gumbel"][-1]).argmax(-1)
        assert torch.equal(torch.where(codes[-1] == model.mask_id, drawn, codes[-1]), out["final_ids"])


def recorded(size: str) -> tuple[dict, dict, dict]:
    """What is known of an official file: the manifest, a state dict without memory, and arguments."""
    content = manifest(f"mage_vit_{size}")
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in content["tensors"].items()}
    return content, state, {"embed_dim": width, "depth": depth, "num_heads": heads, "decoder_embed_dim": width, "norm_eps": 1e-6}


@pytest.mark.parametrize("size", SIZES)
def test_our_module_has_exactly_the_recorded_tensors(size):
    content, state, config = recorded(size)
    with torch.device("meta"):
        model = load(state, config)
    left_behind = ("vqgan.", "patch_embed.", "decoder_pred.", "cls_token", "pos_embed", "mask_token", "token_emb.position_ids")
    left = sum(math.prod(shape) for key, shape in content["tensors"].items() if key.startswith(left_behind) or key == "decoder_pos_embed")
    words_without_bias = 1000 + 1  # class slots and mask: nothing reads their logits
    assert sum(p.numel() for p in model.parameters()) + left + words_without_bias == content["params"]
    assert (model.num_tokens, model.is_unconditional, model.null_word, model.mask_word) == (256, True, 1100, 2024)


def test_one_tensor_less_or_more_is_noticed():
    _, state, config = recorded("b")
    with torch.device("meta"):
        for key in ("token_emb.position_embeddings.weight", "decoder_pos_embed_learned", "mlm_layer.bias"):
            with pytest.raises(UserError, match="1 tensors do not fit MAGE: missing"):
                load({other: tensor for other, tensor in state.items() if other != key}, config)
        with pytest.raises(UserError, match=r"unexpected blocks\.0\.surprise 2x3"):
            load(state | {"blocks.0.surprise": torch.empty(2, 3)}, config)


class TestFiles:
    def test_weights_lie_under_model_and_leftovers_may_be_missing(self, pretrain, model, tmp_path):
        dead = {"vqgan.encoder.conv_in.weight": torch.zeros(2), "patch_embed.proj.bias": torch.zeros(48)}
        lean = {key: tensor for key, tensor in pretrain.state.items() if not key.startswith(("cls_token", "pos_embed", "decoder_pred."))}
        torch.save({"model": lean | dead, "optimizer": {}, "epoch": 3}, tmp_path / "file.pth")
        loaded = load(read_state_dict(tmp_path / "file.pth"), pretrain.config)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())

    def test_dead_rows_of_the_position_table_are_dropped(self, pretrain, model):
        table = pretrain.state["token_emb.position_embeddings.weight"]
        assert table.shape[0] == 257 and torch.equal(model.positions, table[:17])
        with pytest.raises(UserError, match="positions is 16x48, expected 17x48"):
            load(pretrain.state | {"token_emb.position_embeddings.weight": table[:16]}, pretrain.config)

    @pytest.mark.parametrize("name", ["head.weight", "head.1.bias", "fc_norm.weight"])
    def test_a_classifier_is_refused(self, pretrain, name):
        with pytest.raises(UserError, match="MAGE classifier, which cannot generate") as error:
            load(pretrain.state | {name: torch.zeros(48)}, pretrain.config)
        assert "\n" not in str(error.value)

    def test_the_original_defaults_hold_for_what_is_left_out(self):
        with torch.device("meta"):
            config = mage({}, {})[0].config
        assert (config.hidden_dim, config.depth, config.num_heads) == (1024, 24, 16)
        assert (config.decoder_dim, config.decoder_depth, config.decoder_num_heads) == (512, 8, 16)
        assert (config.norm_eps, config.null_slot, config.class_slots, config.class_dropout) == (1e-5, 76, 1000, 1.0)

    def test_another_class_token_is_kept(self, pretrain):
        model, _ = mage(pretrain.state, pretrain.config | {"fake_class_label": 130})
        assert model.null_word == 130
