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


def test_gradient_checkpointing_changes_no_gradient():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    model = tiny()
    model(x).reconstruction.sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    model.enable_gradient_checkpointing()
    model(x).reconstruction.sum().backward()
    for a, b in zip(plain, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        close(a, b, 1e-5)


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
