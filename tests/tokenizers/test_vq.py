import json

import pytest
import torch

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.tokenizers.base import content_hash, load_tokenizer
from genvision.tokenizers.vq import VQTokenizer
from parity_fixtures import Fixture


def tiny(**changes):
    options = dict(image_size=16, codebook_size=24, codebook_dim=4, base_channels=8, encoder_multipliers=(1, 2), z_channels=8)
    return VQTokenizer(**(options | dict(num_res_blocks=1, norm_groups=4) | changes))


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["llamagen_vq", "llamagen_vq_nol2"])
def test_codes_and_images_equal_the_official_ones(name):
    fixture = Fixture(name)
    model = load_official("llamagen-vq", fixture.state, fixture.config)
    x, out = fixture.inputs["x"], fixture.outputs
    with torch.no_grad():
        z = model.encode_continuous(x)
        close(z.permute(0, 3, 1, 2), out["z_pre_quant"], fixture.atol)
        assert torch.equal(model.encode(x), out["indices"])
        close(model(x).reconstruction, out["recon"], fixture.atol)
        close(model.decode(fixture.inputs["codes"]), out["decode_code"], fixture.atol)
        entries = model.quantize.look_up(fixture.inputs["codes"])
    close(entries, out["codebook_entry_channel_last"], fixture.atol)
    close(entries.permute(0, 3, 1, 2), out["codebook_entry_channel_first"], fixture.atol)


class TestVQGAN:
    @pytest.fixture
    def fixture(self) -> Fixture:
        return Fixture("taming_vqgan")

    def test_codes_and_images_equal_the_official_ones(self, fixture):
        model = load_official("taming-vqgan", fixture.state | {"loss.discriminator.main.0.bias": torch.zeros(4)}, fixture.config)
        x, out = fixture.inputs["x"], fixture.outputs
        with torch.no_grad():
            close(model.encode_continuous(x).permute(0, 3, 1, 2), out["prequant"], fixture.atol)
            codes = model.encode(x)
            assert torch.equal(codes.flatten(), out["indices"])
            close(model.quantize.look_up(codes).permute(0, 3, 1, 2), out["quant"], fixture.atol)
            close(model.decode(codes), out["recon_from_indices"], fixture.atol)
            close(model(x).reconstruction, out["recon"], fixture.atol)

    @pytest.mark.parametrize("legacy", [True, False])
    def test_beta_stands_where_the_release_has_it(self, fixture, legacy):
        model = load_official("taming-vqgan", fixture.state, fixture.config | {"legacy": legacy})
        kind = "legacy" if legacy else "fixed"
        z = fixture.outputs["prequant"].permute(0, 2, 3, 1).clone().requires_grad_()
        loss = sum(model.quantize(z).losses.values())
        loss.backward()
        close(loss, fixture.outputs[f"loss_{kind}"], fixture.atol)
        close(z.grad.permute(0, 3, 1, 2), fixture.outputs[f"dloss_dz_{kind}"], fixture.atol)
        close(model.quantize.embedding.weight.grad, fixture.outputs[f"dloss_demb_{kind}"], fixture.atol)

    def test_attention_elsewhere_is_refused(self, fixture):
        config = fixture.config | {"ddconfig": fixture.config["ddconfig"] | {"attn_resolutions": [8]}}
        with pytest.raises(UserError, match="only attention at the lowest resolution, 4, is supported"):
            load_official("taming-vqgan", fixture.state, config)


@pytest.mark.parametrize("name", ["llamagen_vq", "llamagen_vq_nol2"])
def test_training_losses_and_gradients_equal_the_official_ones(name):
    fixture = Fixture(name)
    model = load_official("llamagen-vq", fixture.state, fixture.config).train()
    x, expected = fixture.inputs["x"], fixture.outputs
    output = model(x)
    mse = (output.reconstruction - x).square().mean()
    close(mse, expected["train_mse"], fixture.atol)
    close(output.losses["codebook"], expected["train_codebook_loss"], fixture.atol)
    close(output.losses["commitment"], expected["train_commit_loss"], fixture.atol)
    close(output.losses["entropy"], expected["train_entropy_loss"], fixture.atol)
    total = mse + sum(output.losses.values())
    close(total, expected["train_total"], fixture.atol)
    total.backward()
    for key, gradient in expected.items():
        if key.startswith("grad/"):
            close(model.get_parameter(key.removeprefix("grad/")).grad, gradient, fixture.atol)


def test_loss_falls_on_one_batch_and_gradients_reach_every_parameter():
    model = tiny(entropy_weight=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    losses = []
    for _ in range(40):
        output = model(x)
        loss = (output.reconstruction - x).square().mean() + sum(output.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_saved_and_loaded_tokenizer_gives_equal_codes_images_and_hash(tmp_path):
    model = tiny().eval()
    model.save_pretrained(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again.encode(x), model.encode(x))
        assert torch.equal(again.decode(model.encode(x)), model.decode(model.encode(x)))
    assert content_hash(again) == content_hash(model)
    again.quantize.embedding.weight.data[0, 0] += 1e-3
    assert content_hash(again) != content_hash(model)


def test_spec_says_what_codes_look_like():
    model = tiny()
    assert (model.spec.downsample, model.spec.codebook_size, model.spec.discrete) == (2, 24, True)
    codes = model.encode(torch.zeros(1, 3, 12, 20))
    assert codes.shape == (1, 6, 10) and codes.dtype == torch.int64
    with pytest.raises(UserError, match="multiple of 2"):
        model.check_image_size(15)


def test_compiles_without_a_graph_break():
    model = tiny().eval()
    explained = torch._dynamo.explain(model)(torch.zeros(1, 3, 16, 16))
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("damage", ["truncate", "no config", "foreign class", "bad json"])
def test_damaged_folder_is_one_line(tmp_path, damage):
    tiny().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        config.unlink()
    elif damage == "foreign class":
        config.write_text(config.read_text().replace("VQTokenizer", "os.system"))
    else:
        config.write_text("{")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


class TestMaskGITStyle:
    @pytest.mark.parametrize("family", ["maskgit-vqgan", "mage-vqgan"])
    def test_codes_images_and_losses_equal_the_official_ones(self, family):
        fixture = Fixture(family.replace("-", "_"))
        model = load_official(
            family, fixture.state | {"loss.logvar": torch.zeros(())} if family == "mage-vqgan" else fixture.state, fixture.config
        )
        x, out = 2 * fixture.inputs["image"] - 1, fixture.outputs
        with torch.no_grad():
            close(model.encode_continuous(x).permute(0, 3, 1, 2), out["encoder_out"], fixture.atol)
            codes = model.encode(x)
            assert torch.equal(codes.flatten(1), out["indices"])
            close((model.decode(codes) + 1) / 2, out["reconstruction"], fixture.atol)
        losses = model(x).losses
        close(sum(losses.values()), out["quant_loss"], fixture.atol)
        # MAGE's trainer has taming's legacy weights, beta on the term that moves the codes
        assert (losses["codebook"] < losses["commitment"]) == (family == "mage-vqgan")

    def test_a_widening_block_has_no_path_around_it(self):
        widening, steady = (
            tiny(style="maskgit", encoder_multipliers=(2, 1)).encoder.conv_blocks[0].res[0],
            tiny(style="maskgit").encoder.mid[0],
        )
        for block in (widening, steady):
            torch.nn.init.zeros_(block.conv2.weight)
        x = torch.randn(1, 8, 4, 4)
        assert not widening(x).any()
        x = torch.randn(1, 16, 4, 4)
        assert torch.equal(steady(x), x)


class TestQuantizers:
    KINDS = {
        "vq": {},
        "ema": {"quantizer_options": {"update": "ema"}, "codebook_l2_norm": False},
        "rotation": {"quantizer_options": {"gradient": "rotation"}},
        "simvq": {"quantizer": "simvq"},
        "ibq": {"quantizer": "ibq"},
        "fsq": {"quantizer": "fsq", "quantizer_options": {"levels": [5, 5, 3]}, "codebook_size": 75, "codebook_dim": 3},
        "lfq": {"quantizer": "lfq", "codebook_size": 16},
        "bsq": {"quantizer": "bsq", "codebook_size": 16},
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_learns_and_comes_back_from_its_files(self, kind, tmp_path):
        model = tiny(**self.KINDS[kind])
        images = torch.randn(8, 3, 16, 16).clamp(-1, 1)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        errors = []
        for _ in range(12):
            output = model(images)
            error = (output.reconstruction - images).square().mean()
            optimizer.zero_grad()
            (error + sum(output.losses.values())).backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < 0.97 * errors[0]
        model.eval().save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        codes = model.encode(images)
        assert content_hash(loaded) == content_hash(model)
        assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), model.decode(codes))

    def test_sizes_that_do_not_agree_and_unknown_options_are_named(self):
        with pytest.raises(UserError, match=r"codebook_size 24: fsq with these options has 1000; set codebook_size to that"):
            tiny(quantizer="fsq")
        with pytest.raises(UserError, match=r"quantizer_options ema: vq has no such option; it has codebook_size, .*update"):
            tiny(quantizer_options={"ema": True})
        with pytest.raises(UserError, match="quantizer 'vqq' is unknown"):
            tiny(quantizer="vqq")
        with pytest.raises(UserError, match="power of two"):
            tiny(quantizer="lfq")


class TestBadInput:
    def test_images_of_other_channels_or_sizes(self):
        with pytest.raises(UserError, match=r"images of shape \[1, 4, 16, 16\]: \[B, 3, H, W\] is expected"):
            tiny().encode(torch.zeros(1, 4, 16, 16))
        with pytest.raises(UserError, match="image size 15 does not fit"):
            tiny().encode(torch.zeros(1, 3, 16, 15))

    @pytest.mark.parametrize("codes", [[[0, 24]], [[-1, 3]]])
    def test_codes_out_of_range(self, codes):
        with pytest.raises(UserError, match=r"codes lie in .*, but the tokenizer has codes 0 \.\. 23"):
            tiny().decode(torch.tensor([codes]))

    def test_codes_that_are_no_whole_numbers(self):
        with pytest.raises(UserError, match=r"codes are torch\.float32, whole numbers 0"):
            tiny().decode(torch.zeros(1, 2, 2))

    def test_weights_that_are_not_finite(self, tmp_path):
        model = tiny()
        model.decoder.conv_out.bias.data[1] = float("nan")
        model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"1 tensors of the tokenizer hold NaN or infinity, decoder\.conv_out\.bias first"):
            load_tokenizer(tmp_path)


def test_a_patch_makes_the_networks_smaller_but_not_the_codes():
    model = tiny(patch_size=2)
    codes = model.encode(torch.randn(2, 3, 16, 16))
    assert codes.shape == (2, 4, 4) and model.spec.code_shape() == (4, 4) and model.decode(codes).shape == (2, 3, 16, 16)


def test_an_option_at_its_default_leaves_the_hash_as_it_was(tmp_path):
    model = tiny()
    before = content_hash(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["patch_size"], config["style"]  # a file written before these options were there
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert content_hash(load_tokenizer(tmp_path)) == before
    config["commitment_beta"] = 0.3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert content_hash(load_tokenizer(tmp_path)) != before
