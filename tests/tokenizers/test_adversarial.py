"""The whole losses of VQGAN's and LlamaGen's tokenizers, composed from the functions as the training does it.

Fixtures: `taming_losses` has its discriminator in eval mode, no perceptual loss, and reconstructs with one convolution of `hidden`;
`llamagen_vqloss` has the discriminator in train mode, LPIPS on a narrow VGG16, and mixes a convolution of `feat` with the image.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.convert.readers import fill
from genvision.errors import UserError
from genvision.tokenizers.adversarial import (
    LeCam,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    feature_matching,
    generator_loss,
    r1_penalty,
    ramp,
)
from genvision.tokenizers.discriminators import PatchGAN, make_discriminator
from genvision.tokenizers.lpips import LPIPS, TAPS
from parity_fixtures import Fixture

KINDS = ["hinge", "vanilla", "non_saturating"]


def close(actual, expected, atol):
    torch.testing.assert_close(torch.as_tensor(actual), expected, atol=atol, rtol=0)


def patchgan(fixture: Fixture) -> PatchGAN:
    config, prefix = fixture.config, "discriminator."
    discriminator = PatchGAN(config.get("disc_ndf") or config["disc_dim"], config["disc_num_layers"])
    fill(discriminator, {k.removeprefix(prefix): t for k, t in fixture.state.items() if k.startswith(prefix)}, "fixture")
    return discriminator


def narrow_lpips(fixture: Fixture) -> LPIPS:
    """LPIPS of full width, all channels zero but the few of the fixture."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features[: max(TAPS) + 1]
    tensors = {f"features.{name}": torch.zeros(tensor.shape) for name, tensor in features.state_dict().items()}
    tensors |= {f"linear.{i}": torch.zeros(1, channels, 1, 1) for i, channels in enumerate(TAPS.values())}
    for name, tensor in fixture.state.items():
        if ".net.slice" in name:
            target = tensors["features." + name.split(".", 3)[3]]
        elif ".lin" in name:
            target = tensors[f"linear.{name.split('.lin')[1][0]}"]
        else:
            continue
        target[tuple(slice(size) for size in tensor.shape)] = tensor
    return LPIPS(tensors)


def generator_total(nll, fake_logits, last_layer, quantizer_loss, step, config, *, adaptive=True):
    g = generator_loss(config.get("gen_adv_loss", "hinge"), fake_logits)
    weight = config["disc_weight"] * ramp(step, config["disc_start"], 0)
    if adaptive:
        weight = weight * adaptive_weight(nll, g, last_layer)
    return nll + weight * g + quantizer_loss, g


@pytest.mark.parametrize("step", [99, 100])
def test_the_whole_loss_equals_taming_transformers(step):
    fixture = Fixture("taming_losses")
    discriminator, out, config = patchgan(fixture).eval(), fixture.outputs, fixture.config
    last_layer = fixture.inputs["last_layer"].requires_grad_()
    real, recon = fixture.inputs["real"], F.conv2d(fixture.inputs["hidden"], last_layer, padding=1)
    nll = (real - recon).abs().mean()
    total, g = generator_total(nll, discriminator(recon), last_layer, fixture.inputs["codebook_loss"], step, config)
    close(nll, out[f"gen_nll_loss_step{step}"], fixture.atol)
    close(g, out[f"gen_g_loss_step{step}"], fixture.atol)
    close(total, out[f"gen_total_step{step}"], fixture.atol)
    weight = config["disc_weight"] * adaptive_weight(nll, g, last_layer)
    close(weight, out[f"gen_d_weight_step{step}"], fixture.atol)
    factor = ramp(step, config["disc_start"])
    assert factor == out[f"gen_disc_factor_step{step}"]
    loss = factor * discriminator_loss("hinge", discriminator(real), discriminator(recon.detach()))
    close(loss, out[f"disc_loss_step{step}"], fixture.atol)

    [gradient] = torch.autograd.grad(total, last_layer)
    close(gradient, out["dnll_dW"] + factor * weight * out["dg_dW"], fixture.atol)


def test_losses_of_logits_equal_taming_transformers():
    fixture = Fixture("taming_losses")
    real, fake = fixture.outputs["logits_real_eval"], fixture.outputs["logits_fake_eval"]
    close(discriminator_loss("hinge", real, fake), fixture.outputs["hinge_d"], fixture.atol)
    close(discriminator_loss("vanilla", real, fake), fixture.outputs["vanilla_d"], fixture.atol)
    close(generator_loss("hinge", fake), fixture.outputs["g_loss"], fixture.atol)
    assert generator_loss("vanilla", fake) == generator_loss("hinge", fake)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return narrow_lpips(Fixture("llamagen_vqloss"))


class TestLlamaGen:
    @pytest.fixture
    def fixture(self) -> Fixture:
        return Fixture("llamagen_vqloss")

    def nll(self, fixture: Fixture, lpips: LPIPS) -> tuple[Tensor, Tensor, Tensor]:
        """Loss without the discriminator, reconstruction, and the last layer that made it."""
        w, x = fixture.inputs["w"].requires_grad_(), fixture.inputs["x"]
        rec = 0.7 * x + 0.3 * torch.tanh(F.conv2d(fixture.inputs["feat"], w, padding=1))
        close(rec, fixture.inputs["rec"], fixture.atol)
        mse, perceptual = F.mse_loss(rec, x), lpips(x, rec)
        close(mse, fixture.outputs["rec_l2"], fixture.atol)
        close(perceptual, fixture.outputs["lpips"], fixture.atol)
        config = fixture.config
        return config["reconstruction_weight"] * mse + config["perceptual_weight"] * perceptual.mean(), rec, w

    @pytest.mark.parametrize(("step", "when"), [(99, "before"), (100, "after")])
    def test_the_whole_loss_and_its_gradient_equal_the_official_ones(self, fixture, lpips, step, when):
        nll, rec, w = self.nll(fixture, lpips)
        fake = patchgan(fixture).train()(rec)
        quantizer_loss = fixture.inputs["codebook_losses"].sum()
        total, g = generator_total(nll, fake, w, quantizer_loss, step, fixture.config)
        close(g, fixture.outputs["gen_adv_hinge"], fixture.atol)
        close(adaptive_weight(nll, g, w), fixture.outputs["adaptive_weight"], fixture.atol)
        close(total, fixture.outputs[f"gen_loss_{when}"], fixture.atol)
        if when == "after":
            plain, _ = generator_total(nll, fake, w, quantizer_loss, step, fixture.config, adaptive=False)
            close(plain, fixture.outputs["gen_loss_after_no_adaptive"], fixture.atol)
        total.backward()
        close(w.grad, fixture.outputs[f"grad_gen_loss_{when}/w"], fixture.atol)

    @pytest.mark.parametrize(("step", "when"), [(99, "before"), (100, "after")])
    def test_the_discriminators_loss_equals_the_official_one_and_its_statistics_move_before_its_start(self, fixture, step, when):
        discriminator = patchgan(fixture).train()
        start = discriminator.main[3].running_mean.clone()
        loss = discriminator_loss("hinge", discriminator(fixture.inputs["x"]), discriminator(fixture.inputs["rec"]))
        weighted = fixture.config["disc_weight"] * ramp(step, fixture.config["disc_start"]) * loss
        close(weighted, fixture.outputs[f"disc_loss_{when}"], fixture.atol)
        weighted.backward()
        assert all((p.grad == 0).all() == (when == "before") for p in discriminator.parameters())
        assert not torch.equal(discriminator.main[3].running_mean, start)

    def test_losses_of_logits_equal_the_official_ones_but_for_its_bug(self, fixture):
        real, fake = fixture.outputs["disc_logits_real_train"], fixture.outputs["disc_logits_fake_train"]
        out = {name.removeprefix("fn/"): value for name, value in fixture.outputs.items() if name.startswith("fn/")}
        close(discriminator_loss("hinge", real, fake), out["hinge_d_loss"], fixture.atol)
        close(discriminator_loss("vanilla", real, fake), out["vanilla_d_loss"], fixture.atol)
        close(generator_loss("hinge", fake), out["hinge_gen_loss"], fixture.atol)

        def swapped(logits: Tensor, target: float) -> Tensor:
            return F.binary_cross_entropy_with_logits(torch.full_like(logits, target), logits)

        close(0.5 * (swapped(real, 1) + swapped(fake, 0)), out["non_saturating_d_loss"], fixture.atol)
        close(swapped(fake, 1), out["non_saturating_gen_loss"], fixture.atol)
        assert abs(discriminator_loss("non_saturating", real, fake) - out["non_saturating_d_loss"]) > 0.1
        assert abs(generator_loss("non_saturating", fake) - out["non_saturating_gen_loss"]) > 0.1


def test_losses_of_logits_equal_vitoks():
    fixture = Fixture("vitok_disc")
    real, fake = fixture.outputs["logits_real"], fixture.outputs["logits_fake"]
    close(discriminator_loss("hinge", real, fake), fixture.outputs["hinge_d"], fixture.atol)
    close(generator_loss("hinge", fake), fixture.outputs["g_loss"], fixture.atol)
    lecam = LeCam()
    lecam.load_state_dict({"real": fixture.inputs["ema_real"], "fake": fixture.inputs["ema_fake"]})
    close(lecam(real, fake), fixture.outputs["lecam"], fixture.atol)


def test_non_saturating_is_the_cross_entropy_with_labels():
    real, fake = torch.randn(5, 1, 3, 3), torch.randn(5, 1, 3, 3)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    both = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    torch.testing.assert_close(discriminator_loss("non_saturating", real, fake), both / 2)
    torch.testing.assert_close(generator_loss("non_saturating", fake), F.binary_cross_entropy_with_logits(fake, ones))


def test_a_generator_whose_pictures_are_seen_through_learns_most_from_the_non_saturating_loss():
    logits = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
    generator_loss("non_saturating", logits).backward()
    torch.testing.assert_close(-3 * logits.grad, torch.sigmoid(torch.tensor([8.0, 0.0, -8.0])))


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_pull_logits_the_right_way(kind):
    real, fake = torch.randn(6, 1, requires_grad=True), torch.randn(6, 1, requires_grad=True)
    # within the hinge
    d_real, d_fake = torch.autograd.grad(discriminator_loss(kind, real.tanh(), fake.tanh()), (real, fake))
    assert (d_real < 0).all() and (d_fake > 0).all()
    [g_fake] = torch.autograd.grad(generator_loss(kind, fake), fake)
    assert (g_fake < 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_low_precision_logits_are_float32_and_finite(kind, dtype):
    logits = torch.full((2000,), 6e4, dtype=dtype)  # their sum is infinite in float16
    with torch.autocast("cpu", torch.bfloat16):
        losses = [discriminator_loss(kind, -logits, logits), generator_loss(kind, -logits), LeCam()(-logits / 100, logits / 100)]
        losses.append(feature_matching([logits[None]], [-logits[None]]))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    torch.testing.assert_close(losses[1], logits[0].float(), rtol=1e-5, atol=0)


def test_unknown_losses_are_named_with_the_known_ones():
    for call in (lambda: discriminator_loss("wgan", torch.zeros(1), torch.zeros(1)), lambda: generator_loss("wgan", torch.zeros(1))):
        with pytest.raises(UserError, match=r"^adversarial loss 'wgan' is unknown; choose one of hinge, vanilla, non_saturating$"):
            call()


def test_accuracy_counts_logits_on_the_right_side():
    real, fake = torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([-1.0, -2.0])
    assert discriminator_accuracy(real, fake) == (0.75 + 1) / 2
    assert discriminator_accuracy(-real, -fake) == 0.25 / 2


class TestAdaptiveWeight:
    def losses(self, pull: float) -> tuple[Tensor, Tensor, Tensor]:
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        return (w * torch.tensor([3.0, 4.0])).sum(), pull * w.sum(), w  # gradients of length 5 and sqrt(2) * pull

    def test_it_is_the_ratio_of_the_gradients(self):
        nll, g, w = self.losses(2.0)
        weight = adaptive_weight(nll, g, w)
        torch.testing.assert_close(weight, torch.tensor(5 / (2 * 2**0.5 + 1e-4)))
        assert not weight.requires_grad
        (nll + weight * g).backward()  # the graph is still there

    def test_it_never_exceeds_its_bound(self):
        assert adaptive_weight(*self.losses(0.0)) == 1e4  # 5 / 1e-4 without it
        assert adaptive_weight(*self.losses(0.0), max_weight=10) == 10
        assert adaptive_weight(*self.losses(0.0), eps=1) == 5

    def test_a_louder_discriminator_does_not_pull_harder(self):
        nll, g, w = self.losses(1.0)
        pulls = [torch.autograd.grad(adaptive_weight(nll, c * g, w) * c * g, w, retain_graph=True)[0].norm() for c in (1, 10, 1000)]
        torch.testing.assert_close(torch.stack(pulls), torch.full((3,), 5.0), rtol=1e-3, atol=0)

    def test_it_is_the_same_under_autocast_but_for_rounding(self):
        last = nn.Conv2d(4, 3, 3, padding=1)
        features, x, discriminator = torch.randn(2, 4, 32, 32), torch.randn(2, 3, 32, 32), make_discriminator("patchgan", 32, 8, 3).eval()

        def weight() -> Tensor:
            rec = last(features)
            return adaptive_weight(F.mse_loss(rec.float(), x), generator_loss("hinge", discriminator(rec)), last.weight)

        expected = weight()
        with torch.autocast("cpu", torch.bfloat16):
            found = weight()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_a_ramp_starts_late_and_rises_to_one():
    assert [ramp(step, 10, 4) for step in (0, 9, 10, 11, 12, 13, 14, 1000)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [ramp(step, 10) for step in (9, 10, 11)] == [0, 1, 1]
    assert ramp(0, 0) == 1


class TestR1:
    def test_of_a_plane_it_is_the_squared_slope(self):
        slope = torch.randn(3 * 4 * 4, 1, requires_grad=True)
        images = torch.randn(5, 3, 4, 4).requires_grad_()
        penalty = r1_penalty(images.flatten(1) @ slope + 2, images)
        torch.testing.assert_close(penalty, slope.square().sum())
        penalty.backward()
        torch.testing.assert_close(slope.grad, 2 * slope)

    @pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
    def test_steps_along_it_flatten_a_discriminator(self, kind):
        discriminator = make_discriminator(kind, 32, 8, 3)
        images = torch.rand(4, 3, 32, 32).requires_grad_()
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
        penalties = []
        for _ in range(10):
            penalty = r1_penalty(discriminator(images), images)
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
            penalties.append(penalty.item())
        assert penalties[-1] < 0.7 * penalties[0]


class TestFeatureMatching:
    def test_it_is_the_squared_distance_of_the_means(self):
        real, fake = [torch.randn(4, 2, 3, 3), torch.randn(4, 5)], [torch.randn(6, 2, 3, 3), torch.randn(6, 5)]
        expected = sum((r.mean(0) - f.mean(0)).square().mean() for r, f in zip(real, fake, strict=True)) / 2
        torch.testing.assert_close(feature_matching(real, fake), expected)

    def test_equal_means_cost_nothing_whatever_the_pictures(self):
        real = torch.randn(4, 2, 3, 3)
        torch.testing.assert_close(feature_matching([real], [2 * real.mean(0) - real.flip(0)]), torch.zeros(()), atol=1e-12, rtol=0)

    def test_it_draws_reconstructions_towards_images_and_leaves_the_images_alone(self):
        discriminator = make_discriminator("stylegan", 32, 8, 3)
        real, fake = torch.rand(4, 3, 32, 32).requires_grad_(), torch.zeros(4, 3, 32, 32).requires_grad_()

        def loss() -> Tensor:
            return feature_matching(discriminator(real, return_features=True)[1], discriminator(fake, return_features=True)[1])

        before = loss()
        before.backward()
        assert real.grad is None
        with torch.no_grad():
            fake -= 0.1 * fake.grad / fake.grad.abs().max()
        assert loss() < before


class TestLeCam:
    def test_its_averages_follow_the_logits_after_they_were_used(self):
        lecam, real, fake = LeCam(decay=0.9), torch.full((4, 1), 2.0), torch.full((4, 1), -3.0)
        assert lecam(real, fake) == 2.0**2 + 3.0**2  # both averages are still 0
        assert lecam.real == pytest.approx(0.2) and lecam.fake == pytest.approx(-0.3)
        assert lecam(real, fake) == pytest.approx((2 + 0.3) ** 2 + (0.2 + 3) ** 2)

    def test_it_costs_nothing_within_the_averages(self):
        lecam = LeCam()
        lecam.load_state_dict({"real": torch.tensor(-1.0), "fake": torch.tensor(1.0)})
        assert lecam(torch.tensor([0.5]), torch.tensor([-0.5])) == 0

    def test_its_gradient_is_that_of_the_averages_it_used(self):
        lecam, real, fake = LeCam(decay=0.5), torch.tensor([1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
        lecam(real, fake).backward()
        assert real.grad == 2 and fake.grad == -4

    def test_saved_and_loaded_it_goes_on_equally(self):
        first = LeCam()
        for seed in range(3):
            first(*torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(seed)))
        second = LeCam()
        second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
        logits = torch.randn(2, 4, 1)
        assert torch.equal(first(*logits), second(*logits)) and torch.equal(first.real, second.real)
        assert sorted(first.state_dict()) == ["fake", "real"]

    @pytest.mark.slow
    def test_all_processes_have_the_same_averages(self, tmp_path):
        code = f"""
import sys, torch
from genvision.tokenizers.adversarial import LeCam
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path / "store"}", rank=rank, world_size=2)
lecam = LeCam(decay=0.5)
lecam(torch.tensor([1.0 + rank]), torch.tensor([-1.0]))
print(lecam.real.item(), lecam.fake.item())
"""
        jobs = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
        found = [job.communicate(timeout=120)[0].split() for job in jobs]
        assert found == [["0.75", "-0.5"]] * 2  # mean logits 1 and 2, and -1 twice
