import pytest
import torch
import torch.nn.functional as F

from genvision.convert.readers import fill
from genvision.convert.titok import titok
from genvision.errors import UserError
from genvision.tokenizers.base import content_hash, load_tokenizer
from genvision.tokenizers.titok import TiTok, kl_per_token
from parity_fixtures import Fixture

KINDS = {
    "vq": {},
    "vae": {"quantize_mode": "vae"},
    "legacy": dict(
        is_legacy=True,
        pixel_codebook_size=10,
        pixel_codebook_dim=4,
        pixel_base_channels=4,
        pixel_multipliers=(1, 1, 2),
        pixel_num_res_blocks=1,
        pixel_norm_groups=2,
    ),
}


def tiny(kind="vq", **changes) -> TiTok:
    torch.manual_seed(0)
    options = dict(image_size=16, patch_size=4, num_latent_tokens=5, token_dim=6, codebook_size=24)
    encoder = dict(encoder_dim=24, encoder_depth=2, encoder_heads=2)
    decoder = dict(decoder_dim=32, decoder_depth=1, decoder_heads=4)
    return TiTok(**(options | encoder | decoder | KINDS[kind] | changes))


def official(fixture: Fixture) -> TiTok:
    module, state = titok(fixture.state, fixture.config)
    assert module.config.encoder_heads == 2  # of 16 channels: no other number gives the recorded outputs
    fill(module, state, "fixture")
    assert isinstance(module, TiTok)
    return module.eval()


def pictures(num=2) -> torch.Tensor:
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


class TestFirstRelease:
    @pytest.fixture
    def fixture(self) -> Fixture:
        return Fixture("titok")

    @pytest.fixture
    def model(self, fixture) -> TiTok:
        return official(fixture)

    @torch.no_grad()
    def test_codes_and_images_equal_the_official_ones(self, fixture, model):
        images, out = fixture.inputs["x"] * 2 - 1, fixture.outputs
        codes = model.encode(images)
        assert torch.equal(codes, out["indices"].squeeze(1))
        result = model(images)
        assert torch.equal(result.codes, codes)
        close(result.z.transpose(1, 2).unsqueeze(2), out["z"], fixture.atol)
        close(model.quantize.look_up(codes).transpose(1, 2).unsqueeze(2), out["z_quantized"], fixture.atol)
        close((model.decode(codes) + 1) / 2, out["recon_from_tokens"], fixture.atol)  # [-1, 1] is twice as wide as the original's range
        # the random pixel decoder enlarges rounding to 2e-5 (the recorded images are that far from exact ones), so exact ones are compared
        exact = model.double()(images.double()).reconstruction
        close((exact + 1) / 2, out["recon"].double(), fixture.atol)
        close(result.reconstruction, exact.float(), 1e-4)

    @torch.no_grad()
    def test_quantiser_losses_equal_the_official_ones(self, fixture, model):
        losses = model(fixture.inputs["x"] * 2 - 1).losses
        close(losses["commitment"], fixture.outputs["commitment_loss"], fixture.atol)
        close(losses["codebook"], fixture.outputs["codebook_loss"], fixture.atol)
        close(losses["commitment"] + losses["codebook"], fixture.outputs["quantizer_loss"], fixture.atol)

    @torch.no_grad()
    def test_proxy_logits_equal_the_official_ones(self, fixture, model):
        logits, losses = model.proxy_logits(fixture.inputs["x"] * 2 - 1)
        close(logits, fixture.outputs["decoder_out"], fixture.atol)
        assert set(losses) == {"codebook", "commitment"}


@torch.no_grad()
def test_latents_and_images_of_the_vae_equal_the_official_ones():
    fixture = Fixture("titok_vae")
    model, images, out = official(fixture), fixture.inputs["x"] * 2 - 1, fixture.outputs
    mean, logvar = model.moments(images)
    close(mean, out["mean"].squeeze(2), fixture.atol)
    close(logvar, out["logvar"].squeeze(2), fixture.atol)
    close(kl_per_token(mean, logvar), out["kl"], fixture.atol)
    sample = mean + (logvar / 2).exp() * fixture.inputs["noise"].squeeze(2)
    close(sample, out["z_sample"].squeeze(2), fixture.atol)
    close((model.decode(sample) + 1) / 2, out["recon"], fixture.atol)
    close(model(images).losses["kl"], 1e-6 * out["kl"].sum(1).mean(), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_on_one_batch_and_gradients_reach_every_parameter(kind):
    model, images = tiny(kind), pictures(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = model(images)
        loss = (output.reconstruction - images).square().mean() + sum(output.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_first_stage_learns_proxy_codes():
    model, images = tiny("legacy"), pictures(4)
    proxy_codes = torch.randint(10, (4, 4, 4), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        logits, terms = model.proxy_logits(images)
        losses.append(F.cross_entropy(logits, proxy_codes))
        optimizer.zero_grad()
        (losses[-1] + sum(terms.values())).backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert model.head.pixel_decoder.conv_in.weight.grad is None  # the pixel decoder comes in the second stage
    with pytest.raises(UserError, match="set is_legacy to true"):
        tiny().proxy_logits(images)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_and_loaded_tokenizer_gives_equal_codes_images_and_hash(kind, tmp_path):
    model = tiny(kind).eval()
    model.save_pretrained(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path)
    codes = model.encode(pictures())
    assert torch.equal(again.encode(pictures()), codes)
    assert torch.equal(again.decode(codes), model.decode(codes))
    assert again.spec == model.spec
    assert content_hash(again) == content_hash(model)
    again.encoder.latent_tokens[0, 0] += 1e-3
    assert content_hash(again) != content_hash(model)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(kind)
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)  # of the latents that the VAE draws
        model(pictures()).reconstruction.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(plain, checkpointed, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_spec_says_what_codes_look_like(kind):
    spec, codes = tiny(kind).spec, tiny(kind).encode(pictures())
    assert codes.shape == (2, *spec.code_shape())
    assert (spec.image_size, spec.downsample, spec.num_tokens) == (16, 4, 5)
    if kind == "vae":
        assert codes.shape == (2, 6, 5) and not spec.discrete and spec.channels == 6
    else:
        assert codes.dtype == torch.int64 and spec.discrete and spec.codebook_size == 24


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reconstruction_in_eval_mode_is_what_codes_decode_to(kind):
    model = tiny(kind, **{"latent_mean": (0.5, 0, 0, 0, 0, 0), "latent_std": 0.3} if kind == "vae" else {}).eval()
    close(model(pictures()).reconstruction, model.decode(model.encode(pictures())), 1e-5)


@torch.no_grad()
def test_latents_are_standardised_by_channel():
    mean, std = (0.5, -1.0, 0.0, 0.25, 2.0, 0.0), (0.5, 1.0, 2.0, 1.0, 1.0, 4.0)
    plain, standardised = (tiny("vae", **options) for options in ({}, {"latent_mean": mean, "latent_std": std}))
    latents = plain.encode(pictures())
    shift, scale = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
    close(standardised.encode(pictures()), (latents - shift) / scale, 1e-6)
    close(standardised.decode((latents - shift) / scale), plain.decode(latents), 1e-5)


@torch.no_grad()
def test_latents_are_drawn_in_training_only():
    model = tiny("vae")
    first, second = (model(pictures()).reconstruction for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(pictures()).reconstruction for _ in range(2))
    assert torch.equal(first, second)


def test_codes_have_no_posterior():
    with pytest.raises(UserError, match="codes of a codebook have no posterior; take a tokenizer with quantize_mode 'vae'"):
        tiny().posterior(pictures())


@torch.no_grad()
def test_codes_of_one_image_do_not_depend_on_its_batch():
    model, images = tiny().eval(), pictures(4)
    assert torch.equal(torch.cat([model.encode(image[None]) for image in images]), model.encode(images))


@torch.no_grad()
def test_every_patch_is_made_in_its_own_place():
    """A head that copies one feature to every pixel of its patch draws the features as an enlarged picture."""
    head = tiny().head
    for parameter in head.parameters():
        parameter.zero_()
    grid = torch.arange(16.0).view(4, 4)
    colours = torch.tensor([1.0, 2.0, 3.0])
    head.proj.weight[:, 0] = colours.repeat(16)  # (p1 p2 c): colour last
    head.conv_out.weight[range(3), range(3), 1, 1] = 1
    features = F.pad(grid.view(1, 16, 1), (0, head.proj.in_features - 1))
    expected = grid.repeat_interleave(4, 0).repeat_interleave(4, 1) * colours[:, None, None]
    assert torch.equal(head(features)[0], expected)


@torch.no_grad()
def test_weights_of_half_precision_give_nearly_the_same_images():
    model = tiny().eval()
    codes = model.encode(pictures())
    close(model.bfloat16().decode(codes).float(), tiny().decode(codes), 0.05)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda model: model.encode(torch.zeros(1, 3, 20, 20)), "image size 20 .* 16 x 16 pixels"),
            (lambda model: model(torch.zeros(1, 3, 16, 8)), "image size 8 .* 16 x 16 pixels"),
            (lambda model: model.check_image_size(32), "image size 32 .* 16 x 16 pixels"),
            (lambda model: model.encode(torch.zeros(1, 1, 16, 16)), "convert them to RGB"),
            (lambda model: model.encode(torch.zeros(1, 3, 2, 16, 16)), r"\[B, 3, H, W\] is expected"),
            (lambda model: model.decode(torch.full((1, 5), 24)), "codes lie in 24 .. 24"),
            (lambda model: model.decode(torch.zeros(1, 4, dtype=torch.int64)), r"\[1, 4\]: the tokenizer makes \[B, 5\]"),
            (lambda model: model.decode(torch.zeros(1, 5)), "whole numbers"),
            (lambda _: tiny("vae").decode(torch.zeros(1, 4, 5)), "6 channels"),
            (lambda _: tiny("vae").decode(torch.zeros(1, 6, 7)), r"the tokenizer makes \[B, 6, 5\]"),
        ],
    )
    def test_images_and_codes_that_do_not_fit_are_one_line(self, call, message):
        with pytest.raises(UserError, match=message) as error:
            call(tiny())
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("vq", {"quantize_mode": "fsq"}, "quantize_mode 'fsq' is unknown"),
            ("legacy", {"quantize_mode": "vae"}, "set is_legacy to false"),
            ("vq", {"image_size": 18}, "image_size 18 must be a multiple of patch_size 4"),
            ("vq", {"encoder_heads": 5}, "encoder_heads 5 must divide encoder_dim 24"),
            ("vq", {"decoder_heads": 0}, "decoder_heads 0 must divide decoder_dim 32"),
            ("vq", {"num_latent_tokens": 0}, "num_latent_tokens must be at least 1, got 0"),
            ("vae", {"latent_std": (1.0, 2.0)}, "latent_std has 2 values"),
            ("vae", {"kl_weight": -1.0}, "kl_weight must be 0 or more"),
            ("legacy", {"pixel_multipliers": (1, 2)}, "must be patch_size 4"),
            ("legacy", {"pixel_norm_groups": 3}, "pixel_norm_groups 3 must divide"),
        ],
    )
    def test_options_that_do_not_fit_are_one_line(self, kind, options, message):
        with pytest.raises(UserError, match=message) as error:
            tiny(kind, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["vae", "legacy"])
def test_traces_without_a_graph_break(kind):
    explained = torch._dynamo.explain(tiny(kind).eval())(pictures())
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.slow
def test_compiled_tokenizer_gives_equal_images():
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        close(compiled(pictures()).reconstruction, model(pictures()).reconstruction, 1e-5)
