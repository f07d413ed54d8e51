"""logits_* of the fixtures are of images and of reconstructions, in eval mode (running statistics) and in train mode (the batch's)."""

import copy

import pytest
import torch
import torch.nn.functional as F

from genvision.convert.readers import fill
from genvision.errors import UserError
from genvision.tokenizers.adversarial import discriminator_loss
from genvision.tokenizers.discriminators import Blur, PatchGAN, StyleGANDiscriminator, make_discriminator, stylegan_channels
from parity_fixtures import Fixture, manifest

KINDS = [("patchgan", "1331"), ("stylegan", "1331"), ("stylegan", "121")]


def tiny(kind: str, blur: str = "1331"):
    return make_discriminator(kind, 32, 8, 3, blur=blur)


def images(seed: int = 0, side: int = 32, batch: int = 4):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def of_fixture(fixture: Fixture, width: int, num_layers: int) -> PatchGAN:
    discriminator = PatchGAN(width, num_layers)
    prefix = "discriminator."
    fill(discriminator, {k.removeprefix(prefix): t for k, t in fixture.state.items() if k.startswith(prefix)}, "fixture")
    return discriminator


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_patches_are_judged_as_by_taming_transformers():
    fixture = Fixture("taming_losses")
    discriminator = of_fixture(fixture, fixture.config["disc_ndf"], fixture.config["disc_num_layers"]).eval()
    with torch.no_grad():
        close(discriminator(fixture.inputs["real"]), fixture.outputs["logits_real_eval"], fixture.atol)
        close(discriminator(fixture.outputs["recon"]), fixture.outputs["logits_fake_eval"], fixture.atol)
        close(discriminator.train()(fixture.inputs["real"]), fixture.outputs["logits_real_train"], fixture.atol)


def test_patches_are_judged_as_by_llamagen_and_its_statistics_move_alike():
    fixture = Fixture("llamagen_vqloss")
    discriminator = of_fixture(fixture, fixture.config["disc_dim"], fixture.config["disc_num_layers"])
    real, fake, out = fixture.inputs["x"], fixture.inputs["rec"], fixture.outputs
    with torch.no_grad():
        close(discriminator.eval()(fake), out["disc_logits_fake_eval"], fixture.atol)
        close(copy.deepcopy(discriminator).train()(real), out["disc_logits_real_train"], fixture.atol)
        close(discriminator.train()(fake), out["disc_logits_fake_train"], fixture.atol)
    close(discriminator.main[3].running_mean, out["bn_running_mean_after"], fixture.atol)
    close(discriminator.main[3].running_var, out["bn_running_var_after"], fixture.atol)


def test_the_official_patchgan_fits():
    official = manifest("llamagen_patchgan")
    discriminator = make_discriminator("patchgan", 256, 64, 3)
    fill(discriminator, {name: torch.rand(shape) for name, shape in official["tensors"].items()}, "random")
    assert sum(p.numel() for p in discriminator.parameters()) == official["params"]
    with torch.no_grad():
        assert discriminator(images(side=256, batch=1)).shape == (1, 1, 30, 30)


class TestViTok:
    @pytest.fixture
    def fixture(self) -> Fixture:
        return Fixture("vitok_disc")

    def test_images_are_judged_as_by_the_official_one(self, fixture):
        discriminator = StyleGANDiscriminator({int(side): channels for side, channels in fixture.config["channels"].items()})
        fill(discriminator, fixture.state, "fixture")
        with torch.no_grad():
            close(discriminator(fixture.inputs["real"]), fixture.outputs["logits_real"], fixture.atol)
            close(discriminator(fixture.inputs["fake"]), fixture.outputs["logits_fake"], fixture.atol)

    def test_its_blur_equals_the_official_one(self, fixture):
        close(Blur((1, 3, 3, 1), stride=2)(fixture.inputs["real"]), fixture.outputs["blur4"], fixture.atol)

    def test_its_widths_are_the_official_ones(self, fixture):
        official = {int(side): channels for side, channels in fixture.config["official_channels"].items()}
        assert stylegan_channels(1024, 512) == official
        assert stylegan_channels(128, 64) == {4: 64, 8: 64, 16: 64, 32: 64, 64: 32, 128: 16}


def test_llamagens_residual_discriminator_has_its_layers():
    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in make_discriminator("stylegan", 256, 512, 3, blur="121").state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    widths = [64, 128, 256, 512, 512, 512, 512]
    for i in range(6):
        assert shapes[f"res_blocks.{i}.conv1.weight"] == (widths[i + 1], widths[i], 3, 3)
        assert shapes[f"res_blocks.{i}.res_conv.weight"] == (widths[i + 1], widths[i], 1, 1)
    assert "res_blocks.6.conv1.weight" not in shapes
    assert shapes["fc1.weight"] == (512, 8192) and shapes["fc2.weight"] == (1, 512)


def test_llamagens_block_equals_its_definition_written_out():
    block = make_discriminator("stylegan", 8, 6, 1, blur="121").res_blocks[0]
    x = torch.randn(2, 6, 8, 8)
    h = x
    for conv in (block.conv1, block.conv2):
        h = F.leaky_relu(F.conv2d(h, conv.weight, conv.bias, padding=1), 0.2)
    around = F.pad(h, (1, 1, 1, 1), mode="reflect")
    rows = (around[:, :, :-2] + 2 * around[:, :, 1:-1] + around[:, :, 2:]) / 4
    blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    h = F.conv2d(blurred, block.conv3.weight, block.conv3.bias, stride=2, padding=1)
    skip = F.conv2d(x[:, :, ::2, ::2], block.res_conv.weight, block.res_conv.bias)
    torch.testing.assert_close(block(x), (skip + h) / 2**0.5)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("patches", [1, 2, 5])
def test_the_map_of_patches_has_its_size(num_layers, patches):
    side = (patches + 2) * 2**num_layers
    discriminator = make_discriminator("patchgan", side, 2, num_layers)
    assert discriminator(images(side=side)).shape == (4, 1, patches, patches)


def test_three_layers_work_on_32_pixels_and_the_smallest_size_is_told():
    assert tiny("patchgan")(images()).shape == (4, 1, 2, 2)
    assert tiny("patchgan")(images(side=24)).shape == (4, 1, 1, 1)
    for make in (lambda: make_discriminator("patchgan", 23, 8, 3), lambda: tiny("patchgan")(images(side=23))):
        with pytest.raises(UserError, match="at least 24x24 pixels, got 23x23; take a smaller num_layers") as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("resnet", 32, 8, 3), "discriminator 'resnet' is unknown; choose patchgan or stylegan"),
        (("patchgan", 32, 0, 3), "width of the discriminator must be at least 1, got 0"),
        (("patchgan", 32, 8, 0), "num_layers of the discriminator must be at least 1, got 0"),
        (("stylegan", 48, 8, 3), "power of two, at least 8, got 48"),
        (("stylegan", 4, 8, 3), "power of two, at least 8, got 4"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, expected):
    with pytest.raises(UserError, match=expected) as caught:
        make_discriminator(*arguments)
    assert "\n" not in str(caught.value)


def test_a_residual_discriminator_refuses_other_sizes_and_blurs():
    with pytest.raises(UserError, match="takes images of 32x32 pixels, got 64x32"):
        tiny("stylegan")(torch.zeros(1, 3, 64, 32))
    with pytest.raises(UserError, match="blur '11' of the discriminator is unknown; choose 1331 or 121"):
        tiny("stylegan", "11")


@pytest.mark.parametrize(("kind", "blur"), KINDS)
def test_features_come_from_every_layer_and_leave_the_logits_as_they_are(kind, blur):
    discriminator = tiny(kind, blur).eval()
    with torch.no_grad():
        logits, features = discriminator(images(), return_features=True)
        assert torch.equal(logits, discriminator(images()))
    sides = [16, 8, 4, 3] if kind == "patchgan" else [32, 16, 8, 4, 4]
    widths = [8, 16, 32, 64] if kind == "patchgan" else [8] * 5
    assert [tuple(f.shape) for f in features] == [(4, width, side, side) for width, side in zip(widths, sides, strict=True)]


@pytest.mark.parametrize(("kind", "blur"), KINDS)
def test_gradients_reach_every_parameter_and_the_images(kind, blur):
    discriminator, x = tiny(kind, blur), images().requires_grad_()
    # inside its margin the hinge pulls the last bias both ways alike
    discriminator_loss("vanilla", discriminator(images(1)), discriminator(x)).backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in discriminator.parameters())
    assert (x.grad != 0).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize(("kind", "blur"), KINDS)
def test_it_learns_to_tell_images_from_blurred_ones(kind, blur):
    discriminator = tiny(kind, blur)
    real = images(batch=8)
    fake = F.avg_pool2d(real, 3, stride=1, padding=1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = discriminator_loss("hinge", discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert discriminator(real).mean() > discriminator(fake).mean()


@pytest.mark.parametrize(("kind", "blur"), KINDS)
def test_a_saved_one_judges_equally(kind, blur):
    first, second = tiny(kind, blur), tiny(kind, blur)
    first(images(2))  # moves the statistics
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(images()), second.eval()(images()))


@pytest.mark.parametrize(("kind", "blur"), KINDS)
def test_it_runs_in_bfloat16(kind, blur):
    discriminator = tiny(kind, blur).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = discriminator(images())
    with torch.no_grad():
        high = discriminator(images())
    torch.testing.assert_close(low.float(), high, atol=0.05, rtol=0.05)
    assert discriminator.bfloat16()(images().bfloat16()).dtype == torch.bfloat16


def test_patchgan_starts_as_the_official_one():
    weights = PatchGAN(16, 3).state_dict()
    kernels = torch.cat([t.flatten() for name, t in weights.items() if t.dim() == 4])
    norms = torch.cat([weights[f"main.{i}.weight"] for i in (3, 6, 9)])
    assert abs(kernels.std() - 0.02) < 5e-4 and abs(kernels.mean()) < 5e-4
    assert abs(norms.std() - 0.02) < 5e-3 and abs(norms.mean() - 1) < 5e-3


def test_a_blur_keeps_the_brightness():
    constant = torch.full((1, 2, 8, 8), 0.7)
    torch.testing.assert_close(Blur((1, 2, 1), stride=1, pad_mode="reflect")(constant), constant)
    torch.testing.assert_close(Blur((1, 3, 3, 1), stride=2)(constant)[..., 1:-1, 1:-1], constant[..., :2, :2])


@pytest.mark.parametrize(("kind", "blur"), KINDS)
def test_it_compiles_without_a_graph_break(kind, blur):
    discriminator = tiny(kind, blur)
    compiled = torch.compile(copy.deepcopy(discriminator), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), discriminator(images()))
