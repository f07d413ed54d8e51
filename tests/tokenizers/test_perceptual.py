"""timm's tiny test models, started at random, stand for trained ones."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from genvision.errors import UserError
from genvision.tokenizers.perceptual import TimmPerceptual

NAMES = ["test_resnet", "test_convnext", "test_vit"]


def images(seed: int, side: int = 64) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_without_timm_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^a perceptual loss on timm's models needs timm: pip install genvision\[timm\]$"):
        TimmPerceptual("test_resnet", weights=tmp_path / "weights.pth")


class TestWithTimm:
    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    @pytest.fixture
    def weights(self, timm, tmp_path):
        """Files of randomly started models, classifier and all, as timm's own are."""

        def write(name: str):
            torch.manual_seed(1)
            torch.save(timm.create_model(name, pretrained=False).state_dict(), tmp_path / f"{name}.pth")
            return tmp_path / f"{name}.pth"

        return write

    @pytest.mark.parametrize("name", NAMES)
    def test_it_measures_how_alike_images_are(self, name, weights):
        network = TimmPerceptual(name, weights=weights(name), image_size=160)
        a, b = images(1).requires_grad_(), images(2)
        assert torch.equal(network(a, a), torch.zeros(3))
        torch.testing.assert_close(network(a, b), network(b, a))
        nearer = network(a, a + 0.1 * (b - a))
        assert (nearer > 0).all() and (nearer < network(a, b)).all()
        before = network(a, b)
        before.sum().backward()
        assert (a.grad != 0).any(dim=(1, 2, 3)).all() and not any(p.requires_grad for p in network.parameters())
        with torch.no_grad():
            assert (network(a - 0.1 * a.grad / a.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1), b) < before).all()

    def test_it_equals_the_definition_written_out_on_timms_own_feature_maps(self, timm, weights):
        path = weights("test_convnext")
        network = TimmPerceptual("test_convnext", weights=path)
        whole = timm.create_model("test_convnext", pretrained=False)
        whole.load_state_dict(torch.load(path, weights_only=True))
        data = timm.data.resolve_model_data_config(whole)
        mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
        maps = [whole.eval().forward_intermediates(((x + 1) / 2 - mean) / std, intermediates_only=True) for x in (images(1), images(2))]
        expected = torch.zeros(3)
        for p, q in zip(*maps, strict=True):
            expected += (F.normalize(p, dim=1) - F.normalize(q, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
        assert len(maps[0]) == 4
        torch.testing.assert_close(network(images(1), images(2)), expected)

    def test_stages_are_those_of_timms_feature_extractor_and_add_up(self, timm, weights):
        path = weights("test_resnet")
        parts = [TimmPerceptual("test_resnet", weights=path, stages=[stage]) for stage in range(5)]
        a, b = images(1), images(2)
        together = TimmPerceptual("test_resnet", weights=path)(a, b)
        torch.testing.assert_close(torch.stack([part(a, b) for part in parts]).sum(dim=0), together)
        sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
        assert sizes == sorted(set(sizes))  # layers behind the last stage are left out
        channels = timm.create_model("test_resnet", features_only=True).feature_info.channels()
        assert [part.features(a)[0].shape[1] for part in parts] == channels

    def test_training_mode_changes_nothing(self, weights):
        network = TimmPerceptual("test_resnet", weights=weights("test_resnet"))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        expected = network(images(1), images(2))
        outer = torch.nn.ModuleList([network]).train()
        assert torch.equal(outer[0](images(1), images(2)), expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    def test_under_autocast_it_is_float32(self, weights):
        network = TimmPerceptual("test_convnext", weights=weights("test_convnext"))
        with torch.autocast("cpu", torch.bfloat16):
            found = network(images(1), images(2))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, network(images(1), images(2)), rtol=0.05, atol=0)

    def test_small_images_are_enlarged_or_refused(self, weights):
        path = weights("test_resnet")
        a, b = images(1, 16), images(2, 16)
        with pytest.raises(UserError, match=r"'test_resnet' needs images of at least 32x32 pixels, got 16x16; set its image_size"):
            TimmPerceptual("test_resnet", weights=path)(a, b)
        assert (TimmPerceptual("test_resnet", weights=path, stages=(0, 1, 2))(a, b) > 0).all()
        large = [F.interpolate(x, (64, 64), mode="bilinear") for x in (a, b)]
        torch.testing.assert_close(
            TimmPerceptual("test_resnet", weights=path, image_size=64)(a, b), TimmPerceptual("test_resnet", weights=path)(*large)
        )

    def test_a_network_of_one_size_says_which(self, weights):
        with pytest.raises(UserError, match="'test_vit' takes images of 160x160 pixels alone; set image_size 160"):
            TimmPerceptual("test_vit", weights=weights("test_vit"))

    def test_files_without_classifier_and_safetensors_will_do(self, timm, weights, tmp_path):
        path = weights("test_resnet")
        tensors = torch.load(path, weights_only=True)
        save_file(
            {k: t for k, t in tensors.items() if not k.startswith("fc.") and "num_batches" not in k}, tmp_path / "headless.safetensors"
        )
        first, second = (
            TimmPerceptual("test_resnet", weights=path),
            TimmPerceptual("test_resnet", weights=tmp_path / "headless.safetensors"),
        )
        assert torch.equal(first(images(1), images(2)), second(images(1), images(2)))

    def test_torchvisions_vgg16_fits_timms(self, timm, tmp_path):
        from torchvision.models import vgg16

        with torch.device("meta"):
            published = vgg16(weights=None, init_weights=False).features.state_dict()
        tensors = {f"features.{name}": 0.05 * torch.randn(tensor.shape) for name, tensor in published.items()}
        save_file(tensors, tmp_path / "vgg16.safetensors")
        network = TimmPerceptual("vgg16", weights=tmp_path / "vgg16.safetensors")
        assert (network(images(1, 32), images(2, 32)) > 0).all()

    def test_files_that_do_not_fit_are_refused_in_one_line(self, weights, tmp_path):
        tensors = torch.load(weights("test_resnet"), weights_only=True)

        def refused(content: object, expected: str) -> None:
            torch.save(content, tmp_path / "file.pth")
            with pytest.raises(UserError, match=expected) as caught:
                TimmPerceptual("test_resnet", weights=tmp_path / "file.pth")
            assert "\n" not in str(caught.value) and str(tmp_path / "file.pth") in str(caught.value)

        refused(
            {k: t for k, t in tensors.items() if k != "layer1.0.conv1.weight"},
            r"timm's test_resnet\..*: 1 missing \(layer1.0.conv1.weight\)",
        )
        refused(tensors | {"bn1.bias": torch.zeros(5)}, r"1 misshapen \(bn1.bias \[5\] instead of \[32\]\)")
        refused(tensors | {"bn1.bias": torch.full((32,), float("nan"))}, r"1 not finite \(bn1.bias\)")
        refused(torch.load(weights("test_convnext"), weights_only=True), "missing")
        refused({"state_dict": tensors}, "mapping of names to tensors")
        with pytest.raises(UserError, match="no such file"):
            TimmPerceptual("test_resnet", weights=tmp_path / "nothing.pth")

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("test_resnet", {}, "'test_resnet' has no weights; give a file of them, or `pretrained` to fetch timm's"),
            ("test_resnett", {"pretrained": True}, "timm has no model 'test_resnett'; similar: .*test_resnet"),
            ("nonsense", {"pretrained": True}, "timm has no model 'nonsense'"),
        ],
    )
    def test_wrong_options_are_refused_in_one_line(self, name, options, expected):
        with pytest.raises(UserError, match=expected) as caught:
            TimmPerceptual(name, **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("stages", [(), (5,), (-1,)])
    def test_unknown_stages_are_refused(self, weights, stages):
        with pytest.raises(UserError, match=r"timm model 'test_resnet' has stages 0 .. 4, got"):
            TimmPerceptual("test_resnet", weights=weights("test_resnet"), stages=stages)

    def test_building_it_leaves_the_global_random_state_alone(self, weights):
        path = weights("test_convnext")
        before = torch.get_rng_state()
        TimmPerceptual("test_convnext", weights=path)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_fetch_that_fails_is_told_in_one_line(self, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            UserError, match=r"timm model 'test_resnet' cannot be made \(.*a local file of its weights needs no network"
        ) as caught:
            TimmPerceptual("test_resnet", pretrained=True)
        assert "\n" not in str(caught.value)
