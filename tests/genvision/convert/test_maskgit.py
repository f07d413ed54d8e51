"""MaskGIT's official weights: logits are the recorded ones, and every published size has exactly our tensors."""

import pytest
import torch

from genvision.convert import load_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from genvision.layers.nested import TokenCache
from parity_fixtures import Fixture, manifest

FAMILIES = {
    "maskgit_bert": "maskgit-bert",
    "maskgit_uvit": "maskgit-bert",
    "maskgit_jax": "maskgit-jax",
    "halton_maskgit": "halton-maskgit",
}
"""Of each fixture."""
TITOK_B64 = {"vq_model": {"codebook_size": 4096}, "generator": {"image_seq_len": 64}}
HALTON = {
    "halton_small_256": {"input_size": 16, "hidden_dim": 512, "depth": 12, "heads": 6, "mlp_dim": 2048},
    "halton_base_256": {"input_size": 16, "hidden_dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
    "halton_large_384": {"input_size": 24, "hidden_dim": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
}
SIZES = [("maskgit_bert_titok_b64", "maskgit-bert", {"model": TITOK_B64})]
SIZES += [(name, "halton-maskgit", config) for name, config in HALTON.items()]
TOKEN_TYPES = "model.embeddings.token_type_embeddings.weight"


def loaded(fixture: Fixture, name: str) -> torch.nn.Module:
    return load_official(FAMILIES[name], fixture.state, fixture.config)


class TestNumbers:
    @pytest.mark.parametrize("name", ["maskgit_bert", "maskgit_uvit", "halton_maskgit"])
    def test_logits_with_and_without_the_class_are_the_recorded_ones(self, name):
        fixture = Fixture(name)
        model, labels = loaded(fixture, name), fixture.inputs["labels"]
        codes = fixture.inputs["code" if name == "halton_maskgit" else "tokens"]
        for kind, dropped in (("cond", False), ("uncond", True)):
            drop, recorded = torch.full_like(labels, dropped, dtype=torch.bool), fixture.outputs[f"logits_{kind}"]
            logits = model(codes, labels, drop=drop, whole_vocabulary=True)
            torch.testing.assert_close(logits, recorded, atol=fixture.atol, rtol=0)
            torch.testing.assert_close(model(codes, labels, drop=drop), recorded[..., :40], atol=fixture.atol, rtol=0)

    def test_logits_of_the_original_are_the_recorded_ones(self):
        fixture = Fixture("maskgit_jax")
        model, size = loaded(fixture, "maskgit_jax"), fixture.config["codebook_size"]
        labels, codes = fixture.inputs["tokens"][:, 0] - size, fixture.inputs["tokens"][:, 1:]
        recorded = fixture.outputs["logits"][:, 1:]  # nothing is predicted at the class token here
        logits = model(codes.where(codes >= 0, model.mask_id), labels, whole_vocabulary=True)
        codes_mask_classes = torch.cat([recorded[..., :size], recorded[..., -1:], recorded[..., size:-1]], dim=-1)
        torch.testing.assert_close(logits, codes_mask_classes, atol=fixture.atol, rtol=0)
        assert not model.has_null_label and model.code_shape == (4, 4)

    def test_half_a_pass_from_the_cache_is_the_recorded_one(self):
        fixture, cache = Fixture("maskgit_uvit"), TokenCache()
        model, fresh = loaded(fixture, "maskgit_uvit"), torch.arange(0, 16, 2).expand(2, -1)
        with torch.no_grad():
            model(fixture.inputs["tokens"], fixture.inputs["labels"], cache=cache)
            logits = model(fixture.inputs["tokens"], fixture.inputs["labels"], cache=cache, fresh=fresh)
        torch.testing.assert_close(logits, fixture.outputs["logits_cond"][:, ::2], atol=fixture.atol, rtol=0)


class TestSizes:
    @pytest.mark.parametrize(("name", "family", "config"), SIZES)
    def test_our_module_has_exactly_the_recorded_tensors(self, name, family, config):
        recorded = manifest(name)
        with torch.device("meta"):
            module = load_official(family, {key: torch.empty(shape) for key, shape in recorded["tensors"].items()}, config)
        ours, width = sum(tensor.numel() for tensor in module.state_dict().values()), module.config.hidden_dim
        # the token types are part of the positions; Halton's head is the table of tokens, recorded twice
        assert recorded["params"] - ours == (2 * width if family == "maskgit-bert" else (16384 + 1) * width)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_one_tensor_less_or_more_is_noticed(self, name):
        fixture = Fixture(name)
        for key in list(fixture.state)[::5]:
            if key in ("head.weight", TOKEN_TYPES):
                continue
            with pytest.raises(UserError, match="missing"):
                load_official(FAMILIES[name], {other: tensor for other, tensor in fixture.state.items() if other != key}, fixture.config)
        with pytest.raises(UserError, match=r"1 tensors do not fit MaskGIT: unexpected extra\.weight 1"):
            load_official(FAMILIES[name], fixture.state | {"extra.weight": torch.zeros(1)}, fixture.config)


class TestFiles:
    def test_old_files_hold_numbers_of_positions(self):
        fixture = Fixture("maskgit_bert")
        state = fixture.state | {"model.embeddings.position_ids": torch.arange(17).unsqueeze(0)}
        load_official("maskgit-bert", state, fixture.config)

    def test_token_types_must_be_there(self):
        fixture = Fixture("maskgit_bert")
        with pytest.raises(UserError, match=rf"^x\.bin: {TOKEN_TYPES} is missing"):
            load_official(
                "maskgit-bert", {key: t for key, t in fixture.state.items() if key != TOKEN_TYPES}, fixture.config, source="x.bin"
            )

    @pytest.mark.parametrize(("name", "block"), [("maskgit_bert", "post_norm"), ("maskgit_uvit", "pre_norm")])
    def test_the_network_is_told_from_names_of_tensors(self, name, block):
        fixture = Fixture(name)
        config = {"vq_model": fixture.config["model"]["vq_model"], "generator": fixture.config["model"]["generator"]}
        assert load_official("maskgit-bert", fixture.state, config).config.block == block
        with pytest.raises(UserError, match="class 'RAR' is unknown; choose ImageBert or UViTBert"):
            load_official("maskgit-bert", fixture.state, config | {"class": "RAR"})

    def test_haltons_container_is_read(self, tmp_path):
        fixture = Fixture("halton_maskgit")
        torch.save({"model_state_dict": fixture.state, "iter": 7}, tmp_path / "halton.pth")
        load_official("halton-maskgit", read_state_dict(tmp_path / "halton.pth"), fixture.config)

    def test_names_of_parallel_training_are_read(self):
        for name in ("maskgit_bert", "halton_maskgit"):
            fixture = Fixture(name)
            load_official(FAMILIES[name], {f"module.{key}": tensor for key, tensor in fixture.state.items()}, fixture.config)

    def test_a_head_of_its_own_is_refused(self):
        fixture = Fixture("halton_maskgit")
        state = dict(fixture.state)
        head = state.pop("head.weight")
        assert load_official("halton-maskgit", state, fixture.config).to_logits.bias.shape == (41,)
        with pytest.raises(UserError, match=r"^f\.pth: head\.weight differs from tok_emb\.weight"):
            load_official("halton-maskgit", state | {"head.weight": head + 1e-6}, fixture.config, source="f.pth")

    @pytest.mark.parametrize(
        ("family", "config", "message"),
        [
            ("halton-maskgit", {"proj": 2}, "proj is 2; only 1 is supported"),
            ("halton-maskgit", {"mask_value": 5}, "mask_value is 5; only 16384 is supported"),
            ("maskgit-jax", {"vocab_size": 2000}, r"vocab_size 2000 must be codebook_size 1024 \+ num_class 1000 \+ 1"),
            ("maskgit-jax", {"max_position_embeddings": 100}, "max_position_embeddings 100 must be a square"),
        ],
    )
    def test_options_of_another_network_are_named(self, family, config, message):
        with pytest.raises(UserError, match=message):
            load_official(family, {}, config)

    def test_a_loaded_model_is_saved_and_read_again(self, tmp_path):
        fixture = Fixture("maskgit_jax")
        model = loaded(fixture, "maskgit_jax")
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
