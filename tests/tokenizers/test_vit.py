import copy
import math

import pytest
import torch
import torch.nn.functional as F

from genvision.convert.readers import fill
from genvision.convert.vitok import vitok
from genvision.errors import UserError
from genvision.layers.embed import grid_positions, resize_position_table, sincos_table
from genvision.layers.patches import TubeletDecode, TubeletEmbed
from genvision.layers.rotary import mixed_rotary_frequencies, mixed_rotary_table, rotary_table, rotate, rotate_rows
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.vit import VITOK_SIZES, ViTok, vitok_options
from parity_fixtures import Fixture

SIDES = dict(encoder_width=24, encoder_depth=1, encoder_heads=2, decoder_width=48, decoder_depth=2, decoder_heads=4)
VARIANTS = {
    "image": {},
    "rows and columns": dict(rope_style="2d_axial", position_embedding="sincos2d"),
    "mixed": dict(rope_style="2d_mixed", position_embedding="dec"),
    "no rope": dict(rope_style="none", position_embedding="learned", variational=False),
    "code": dict(code_length=6, position_embedding="sincos1d"),
    "adaptive code": dict(code_length=6, position_embedding="learned", code_lengths=(1, 2, 4, 6)),
    "video": dict(num_frames=4, tubelet_size=2, position_embedding="sincos3d"),
}


def tiny(variant: str = "image", **changes) -> ViTok:
    torch.manual_seed(0)
    return ViTok(**(dict(image_size=16, patch_size=4, code_width=5) | SIDES | VARIANTS[variant] | changes))


def pictures(model: ViTok, batch: int = 2, *, side: int = 16) -> torch.Tensor:
    frames = (model.config.num_frames,) if model.config.num_frames > 1 else ()
    return torch.rand(batch, 3, *frames, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


class TestParity:
    @pytest.fixture(params=["vitok_ae", "vitok_ae_code", "vitok_ae_video"])
    def fixture(self, request) -> Fixture:
        return Fixture(request.param)

    @pytest.fixture
    def model(self, fixture) -> ViTok:
        module, state = vitok(fixture.state, fixture.config)
        fill(module, state, "fixture")
        return module.eval()

    def images(self, model, fixture):
        return fixture.inputs["x"] if model.is_video else fixture.inputs["x"].squeeze(2)

    @torch.no_grad()
    def test_posterior_and_images_equal_the_official_ones(self, fixture, model):
        x, out = self.images(model, fixture), fixture.outputs
        mean, logvar = model.moments(x)
        assert mean.shape[2:] == ((4, 4) if fixture.config["simple"] and not model.is_video else (out["mean"].shape[1],))
        close(mean.flatten(2).transpose(1, 2), out["mean"], fixture.atol)
        assert (logvar is None) == (not fixture.config["variational"])
        if logvar is not None:
            close(logvar.flatten(2).transpose(1, 2), out["logvar"], fixture.atol)
            close((0.5 * logvar).exp().flatten(2).transpose(1, 2), out["std"], fixture.atol)
            close(model(x).losses["kl"], 1e-3 * out["kl"].mean(), 1e-3 * fixture.atol)
        for z, recon in ((out["mean"], out["recon_mode"]), (out["z"], out["recon_z"])):
            latents = z.transpose(1, 2).reshape(mean.shape)
            close(model.decode(latents).reshape(recon.shape), recon, fixture.atol)
        close(model(x).reconstruction.reshape(recon.shape), out["recon_mode"], fixture.atol)

    def test_tables_start_as_the_official_ones(self, fixture):
        module, _ = vitok({}, fixture.config)
        for name in {"posemb", "dec_posemb", "code"} & fixture.state.keys():
            close(module.state_dict()[name], fixture.state[name])

    def test_a_training_pass_reads_the_noise_once(self, fixture, model):
        """The sample in training is mean + std * noise, the noise being what torch's generator gives next."""
        x = self.images(model, fixture)
        torch.manual_seed(3)
        with torch.no_grad():
            drawn = model.train()(x).reconstruction
            torch.manual_seed(3)
            mean, logvar = model.moments(x)
            tokens = mean.flatten(2).transpose(1, 2)
            if logvar is not None:
                tokens = tokens + (0.5 * logvar).exp().flatten(2).transpose(1, 2) * torch.randn(tokens.shape)
            latents = tokens.transpose(1, 2).reshape(mean.shape)
            close(drawn, model.decode(latents), fixture.atol)


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    def test_codes_are_as_the_spec_says_and_images_come_back_in_their_shape(self, variant):
        model = tiny(variant).eval()
        x = pictures(model)
        with torch.no_grad():
            codes = model.encode(x)
            again = model.decode(codes)
        assert again.shape == x.shape and torch.isfinite(again).all()
        assert codes.shape[1:] == model.spec.code_shape() and not model.spec.discrete
        with torch.no_grad():
            close(model(x).reconstruction, again, 1e-5)

    def test_saved_and_loaded_tokenizer_gives_equal_codes_and_images(self, variant, tmp_path):
        model = tiny(variant, latent_mean=(1.0, 2.0, 3.0, 4.0, 5.0), latent_std=2.0).eval()
        model.save_pretrained(tmp_path / "tokenizer")
        again = load_tokenizer(tmp_path)
        x = pictures(model)
        with torch.no_grad():
            codes = model.encode(x)
            assert torch.equal(again.encode(x), codes)
            assert torch.equal(again.decode(codes), model.decode(codes))

    def test_gradient_reaches_every_trained_parameter_and_loss_falls(self, variant):
        model = tiny(variant).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        x = pictures(model)
        seen, losses = set(), []
        for _ in range(40):
            output = model(x)
            loss = (output.reconstruction - x).square().mean() + sum(output.losses.values())
            optimizer.zero_grad()
            loss.backward()
            seen |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            optimizer.step()
            losses.append(loss.item())
        assert seen == {name for name, p in model.named_parameters() if p.requires_grad}
        assert losses[-1] < 0.6 * losses[0]
        assert output.codes is None and output.z is None and set(output.losses) == ({"kl"} if model.config.variational else set())

    def test_other_sizes_work_both_ways(self, variant):
        model = tiny(variant).eval()
        x = pictures(model, side=24)
        size = None if model.spec.num_tokens is None else x.shape[2:]
        with torch.no_grad():
            assert model.decode(model.encode(x), size).shape == x.shape
            assert model(x[..., :20]).reconstruction.shape == x[..., :20].shape

    def test_gradient_checkpointing_changes_no_gradient(self, variant):
        plain = tiny(variant, code_lengths=None).eval()
        saving = copy.deepcopy(plain)
        saving.enable_gradient_checkpointing()
        assert saving.encoder.gradient_checkpointing and saving.decoder.gradient_checkpointing
        for model in (plain, saving):
            model(pictures(model)).reconstruction.square().sum().backward()
        for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)

    def test_half_precision_weights_stay_close(self, variant):
        model = tiny(variant).eval()
        x = pictures(model)
        with torch.no_grad():
            expected = model(x).reconstruction
            got = copy.deepcopy(model).bfloat16()(x).reconstruction
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).abs().mean() < 0.05 * expected.std()


class TestPosterior:
    def test_training_draws_and_evaluation_does_not(self):
        model = tiny()
        x = pictures(model)
        with torch.no_grad():
            assert not torch.equal(model.train()(x).reconstruction, model(x).reconstruction)
            assert torch.equal(model.eval()(x).reconstruction, model(x).reconstruction)
            plain = tiny("no rope").train()
            assert torch.equal(plain(x).reconstruction, plain(x).reconstruction)

    def test_kl_is_the_mean_divergence_from_the_standard_normal(self):
        model = tiny(kl_weight=0.5).eval()
        x = pictures(model)
        with torch.no_grad():
            mean, logvar = model.moments(x)
            normal = torch.distributions.Normal
            expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(torch.zeros(()), torch.ones(()))).mean()
            close(model(x).losses["kl"], 0.5 * expected)

    def test_log_variance_is_clamped(self):
        model = tiny().eval()
        with torch.no_grad():
            model.encoder_to_code.bias[5:] = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4])
            _, logvar = model.moments(pictures(model))
        assert logvar.max() == 20 and logvar.min() == -30

    def test_a_code_that_is_not_variational_has_no_spread(self):
        model = tiny(variational=False, latent_std=0.5).eval()
        x = pictures(model)
        with torch.no_grad():
            mean, std = model.posterior(x)
            assert torch.equal(mean, model.encode(x)) and torch.equal(std, torch.zeros_like(mean))

    def test_latents_are_standardised_once_and_undone(self):
        plain, scaled = tiny().eval(), tiny(latent_mean=(1.0, 2.0, 3.0, 4.0, 5.0), latent_std=(1.0, 2.0, 3.0, 4.0, 5.0)).eval()
        x = pictures(plain)
        with torch.no_grad():
            per_channel = torch.arange(1.0, 6.0).view(-1, 1, 1)
            close(scaled.encode(x), (plain.encode(x) - per_channel) / per_channel)
            close(scaled.decode(scaled.encode(x)), plain.decode(plain.encode(x)), 1e-5)
            close(scaled(x).reconstruction, plain(x).reconstruction)
            assert torch.equal(scaled.moments(x)[0], plain.moments(x)[0])


class TestAdaptiveLength:
    def test_training_replaces_the_tail_of_each_image_by_the_mask_token(self):
        model = tiny("adaptive code", variational=False, code_lengths=(2,)).train()
        x = pictures(model)
        with torch.no_grad():
            model.mask_token.fill_(0.3)
            codes = model.encode(x)
            close(model(x).reconstruction, model.decode(codes[..., :2]), 1e-5)
            assert (model(x).reconstruction - model.decode(codes)).abs().max() > 1e-3
            close(model.eval()(x).reconstruction, model.decode(codes), 1e-5)

    def test_every_length_is_drawn(self):
        model = tiny("adaptive code", variational=False).train()
        x = pictures(model, batch=1).expand(64, -1, -1, -1)
        with torch.no_grad():
            model.mask_token.fill_(0.3)
            codes = model.encode(x[:1])
            reconstruction = model(x).reconstruction
            per_length = torch.cat([model.decode(codes[..., :length]) for length in (1, 2, 4, 6)])
        distance = (reconstruction.unsqueeze(1) - per_length).abs().amax(dim=(2, 3, 4))  # [64, 4]
        assert distance.amin(dim=1).max() < 1e-5
        assert set(distance.argmin(dim=1).tolist()) == {0, 1, 2, 3}


class TestPositions:
    def test_a_table_in_two_dimensions_has_the_column_first_and_divides_by_n_minus_one(self):
        table = sincos_table(grid_positions((1, 2, 3), 2), 16)
        assert table.shape == (6, 16)
        for row in range(2):
            for column in range(3):
                for k in range(4):
                    got = table[row * 3 + column, k::4]
                    angle = [place * 10000.0 ** (-k / 3) for place in (column, row)]
                    close(got, torch.tensor([f(a) for a in angle for f in (math.sin, math.cos)]))

    def test_rotary_angles_in_two_dimensions(self):
        table = rotary_table(grid_positions((1, 2, 3), 2).float(), 16, base=100.0)
        assert table.shape == (6, 8, 2)
        angles = [place * 100.0 ** (-4 * i / 16) for place in (2, 1) for i in range(4)]  # x of the last column, then y of the last row
        close(table[5], torch.tensor([[math.cos(a), math.sin(a)] for a in angles]))

    def test_rotated_products_depend_on_the_distance_alone(self):
        torch.manual_seed(0)
        q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
        table = rotary_table(torch.arange(12.0).unsqueeze(1), 8)
        products = [(rotate_rows(q, table[i : i + 1]) * rotate_rows(k, table[i + 3 : i + 4])).sum() for i in range(8)]
        close(torch.stack(products), products[0].expand(8), 1e-5)

    @pytest.mark.parametrize("per_head", [False, True])
    def test_complex_product_equals_the_real_one_in_value_and_gradient(self, per_head):
        torch.manual_seed(0)
        x = torch.randn(2, 5, 3, 8, requires_grad=True)
        table = torch.randn(*([3] if per_head else []), 5, 4, 2, requires_grad=True)
        outputs = [rotate_rows(x, table), rotate(x.transpose(1, 2), table).transpose(1, 2)]
        close(outputs[0], outputs[1])
        weights = torch.randn(2, 5, 3, 8)
        gradients = [torch.autograd.grad((output * weights).sum(), (x, table)) for output in outputs]
        for a, b in zip(*gradients, strict=True):
            close(a, b, 1e-5)

    def test_mixed_frequencies_with_one_direction_for_each_axis_are_the_axial_table(self):
        positions = grid_positions((1, 3, 4), 2).float()
        magnitudes = 100.0 ** (-torch.arange(0, 16, 4).float() / 16)
        none = torch.zeros(4)
        frequencies = torch.stack([torch.cat([magnitudes, none]), torch.cat([none, magnitudes])])
        close(mixed_rotary_table(positions, frequencies), rotary_table(positions, 16, base=100.0))

    def test_mixed_frequencies_start_orthogonal_in_pairs(self):
        start = mixed_rotary_frequencies(2, 3, 16, base=100.0).unflatten(2, (3, 2, 4))
        close((start[..., 0, :] * start[..., 1, :]).sum(0), torch.zeros(2, 3, 4))
        close(start.square().sum(0).sqrt(), (100.0 ** (-torch.arange(0, 16, 4).float() / 16)).expand(2, 3, 2, 4))

    def test_resized_tables_keep_frames_apart_and_constants_constant(self):
        table = torch.stack([torch.full((4, 5), 1.0), torch.full((4, 5), 2.0)]).flatten(0, 1).unsqueeze(0)
        resized = resize_position_table(table, (2, 2, 2), (2, 3, 4))
        close(resized, torch.stack([torch.full((12, 5), 1.0), torch.full((12, 5), 2.0)]).flatten(0, 1).unsqueeze(0))

    def test_a_table_over_the_sequence_is_continued_not_stretched(self):
        model = tiny("code")
        longer = model._resized(model.posemb, (1, 6, 6))
        assert longer.shape == (1, 36, 24)
        close(longer[:, :16], model.posemb.data)

    def test_images_without_tables_see_raster_order_alone(self):
        """Two wide rows and one wide row of the same patches in the same order have the same tokens."""
        model = tiny().eval()
        x = torch.rand(1, 3, 8, 16) * 2 - 1
        flat = torch.cat([x[:, :, :4], x[:, :, 4:]], dim=3)  # 4 x 32
        with torch.no_grad():
            close(model.encode(x).flatten(2), model.encode(flat).flatten(2), 1e-5)

    def test_more_frames_than_the_table_has_are_refused(self):
        model = tiny("video")
        with pytest.raises(UserError, match="clips of 6 frames: the tokenizer's position table is for 4"):
            model.encode(torch.zeros(1, 3, 6, 16, 16))
        longer = tiny("video", position_embedding="nope").eval()
        with torch.no_grad():
            assert longer.decode(longer.encode(torch.zeros(1, 3, 6, 16, 16)), (6, 16, 16)).shape == (1, 3, 6, 16, 16)


@pytest.mark.parametrize("patch", [(1, 4, 4), (2, 4, 4)])
def test_patch_matrices_equal_the_convolutions_they_are(patch):
    torch.manual_seed(0)
    embed, decode = TubeletEmbed(7, patch), TubeletDecode(7, patch)
    clips = torch.randn(2, 3, 4, 8, 12)
    tokens = embed(clips)
    grid = (4 // patch[0], 2, 3)
    close(tokens, embed.proj(clips).flatten(2).transpose(1, 2), 1e-5)
    close(decode(tokens, grid), decode.proj(tokens.transpose(1, 2).unflatten(2, grid)), 1e-5)


def test_fresh_weights_are_xavier_with_zero_bias():
    model = tiny(encoder_width=96, encoder_heads=4)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.bias is None or not module.bias.any()
    bound = (6 / (96 + 48)) ** 0.5  # of the D x 3qpp matrix, not of the convolution
    assert 0.95 * bound < model.tubelet_embed.proj.weight.abs().max() <= bound
    last = model.tubelet_decode.proj.weight
    assert model.last_layer is last and 0.95 / 48**0.5 < last.abs().max() <= 48**-0.5


def test_second_stage_trains_the_decoder_alone():
    model = tiny("code").train()
    model.freeze_encoder()
    (model(pictures(model)).reconstruction).square().mean().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"decoder", "code_to_decoder", "tubelet_decode"}


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "options", "encoder", "decoder"),
        [
            ("S-S/1x16", {}, 43.2, 43.2),
            ("S-B/16", {}, 43.2, 85.7),
            ("B-S/1x16", {}, 85.7, 43.2),
            ("B-B/1x16", {}, 85.7, 85.7),
            ("S-L/1x16", {"shared_width": True}, 96.6, 383.7),
            ("S-L/1x16", {}, 43.2, 383.7),
            ("B-L/1x16", {"shared_width": True}, 192.3, 383.7),
            ("L-L/1x16", {}, 383.7, 383.7),
            ("S-H/1x16", {"shared_width": True}, 125.2, 663.1),
            ("S-B/1x8", {"code_width": 4}, 42.7, 85.2),
            ("S-B/1x8", {}, 42.7, 85.3),
            ("S-B/1x32", {"code_width": 32}, 45.0, 87.5),
            ("S-B/1x32", {"code_width": 64}, 45.0, 87.5),
            ("S-B/1x16", {"image_size": 512}, 43.2, 85.7),
            ("S-B/4x8", {"image_size": 128}, 43.2, 85.7),
            ("S-B/8x8", {"image_size": 128}, 43.8, 86.3),
            ("S-B/4x16", {"image_size": 128}, 44.9, 87.5),
        ],
    )
    def test_published_names_have_their_parameters(self, name, options, encoder, decoder):
        with torch.device("meta"):
            model = ViTok(**vitok_options(name, **options))
        count = {"encoder": 0, "decoder": 0}
        for parameter_name, parameter in model.named_parameters():
            if "posemb" not in parameter_name:
                side = parameter_name.startswith(("encoder", "tubelet_embed"))
                count["encoder" if side else "decoder"] += parameter.numel()
        assert count["encoder"] / 1e6 == pytest.approx(encoder, abs=0.06)
        assert count["decoder"] / 1e6 == pytest.approx(decoder, abs=0.06)

    @pytest.mark.parametrize(
        ("name", "options", "shape"),
        [
            ("S-B/1x16", {}, (16, 16, 16)),
            ("S-B/1x32", {"code_width": 64}, (64, 8, 8)),
            ("S-B/4x8", {"image_size": 128}, (16, 1024)),
            ("S-B/8x8", {"image_size": 128}, (16, 512)),
        ],
    )
    def test_published_names_have_their_codes(self, name, options, shape):
        with torch.device("meta"):
            assert ViTok(**vitok_options(name, **options)).spec.code_shape() == shape

    def test_a_name_that_is_none_is_told_an_example(self):
        for name in ("X-B/16", "S-B", "SB/16", "S-B/1x"):
            with pytest.raises(UserError, match="expected is S-B/1x16, for example, with sizes from S, B, L, H"):
                vitok_options(name)
        assert set(VITOK_SIZES) == set("SBLH")


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 18}, "image size 18 does not fit"),
            ({"patch_size": 0}, "patch_size must be at least 1"),
            ({"decoder_depth": 0}, "decoder_depth must be at least 1"),
            ({"num_frames": 3, "tubelet_size": 2}, "num_frames 3 must be a multiple of tubelet_size, 2"),
            ({"encoder_width": 26, "encoder_heads": 2}, "encoder_width 26 over encoder_heads 2"),
            ({"encoder_width": 25, "encoder_heads": 2}, "encoder_width 25 over encoder_heads 2"),
            ({"decoder_width": 40, "position_embedding": "sincos3d"}, "decoder_width 40: position_embedding 'sincos3d'"),
            ({"rope_style": "3d_axial"}, "rope_style '3d_axial' is unknown; known are none, 1d_axial"),
            ({"position_embedding": "mae"}, "position_embedding 'mae' is unknown"),
            ({"code_length": 4}, "code_length needs a position_embedding"),
            ({"code_length": 4, "position_embedding": "sincos1d", "rope_style": "2d_axial"}, "rope_style '2d_axial' is for images"),
            ({"num_frames": 2, "position_embedding": "sincos2d"}, "does not tell frames apart"),
            ({"code_lengths": (1, 2)}, "code_lengths .1, 2. must lie in 1 .. code_length, which is None"),
            ({"code_length": 4, "position_embedding": "sincos1d", "code_lengths": (1, 5)}, "must lie in 1 .. code_length, which is 4"),
            ({"kl_weight": -1.0}, "kl_weight must not be negative"),
            ({"latent_std": 0.0}, "latent_std must be above 0"),
            ({"latent_mean": (1.0, 2.0)}, "latent_mean has 2 values"),
        ],
    )
    def test_options_that_do_not_fit_are_one_line(self, options, message):
        with pytest.raises(UserError, match=message) as caught:
            tiny(**options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("variant", "shape", "message"),
        [
            ("image", (1, 1, 16, 16), "convert them to RGB"),
            ("image", (1, 3, 16, 18), "image size 18 does not fit"),
            ("image", (1, 3, 4, 16, 16), "is expected, as num_frames is 1"),
            ("image", (3, 16, 16), "is expected, as num_frames is 1"),
            ("video", (1, 3, 16, 16), "is expected, as num_frames is 4"),
            ("video", (1, 3, 5, 16, 16), "clips of 5 frames do not fit tubelets of 2"),
        ],
    )
    def test_images_that_do_not_fit_are_one_line(self, variant, shape, message):
        with pytest.raises(UserError, match=message) as caught:
            tiny(variant).encode(torch.zeros(shape))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("variant", "shape", "size", "message"),
        [
            ("image", (1, 4, 4, 4), None, "have 5 channels"),
            ("image", (1, 5, 16), None, "have the shape .B, 5, h, w."),
            ("image", (1, 5, 4, 4), (24, 24), "the latents are 4 x 4 patches of 4; leave the size out"),
            ("code", (1, 5, 4, 4), None, "have the shape .B, 5, N."),
            ("code", (1, 5, 5), None, "codes have exactly 6"),
            ("code", (1, 5, 6), (18, 16), "no H, W in multiples of patches"),
            ("code", (1, 5, 6), (16,), "no H, W in multiples of patches"),
            ("adaptive code", (1, 5, 7), None, "codes have at most 6"),
            ("video", (1, 5, 72), None, "do not fill a grid of 2 x 4 x 4; give the size"),
            ("video", (1, 5, 32), (4, 16), "no T, H, W"),
        ],
    )
    def test_latents_that_do_not_fit_are_one_line(self, variant, shape, size, message):
        with pytest.raises(UserError, match=message) as caught:
            tiny(variant).decode(torch.zeros(shape), size)
        assert "\n" not in str(caught.value)


def test_compiles_without_a_graph_break():
    model = tiny(decoder_depth=1).eval()
    x = pictures(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(x).reconstruction, model(x).reconstruction, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mixed", "adaptive code", "video"])
def test_compiled_training_step_has_no_graph_break_and_equals_the_plain_one(variant):
    model = tiny(variant, encoder_depth=1, decoder_depth=1).train()
    x = pictures(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for network in (model, compiled):
        model.zero_grad()
        torch.manual_seed(4)
        output = network(x)
        loss = F.mse_loss(output.reconstruction, x) + output.losses["kl"]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + sum(p.requires_grad for p in model.parameters())
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-5)
