"""timm's tiny test transformers, started at random, stand for trained ones."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from genvision.data.alignment import FEATURE_NETWORKS, FrozenFeatures
from genvision.errors import UserError


def images(num: int = 3, side: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_without_timm_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^features of a frozen network need timm: pip install genvision\[timm\]$"):
        FrozenFeatures("dinov2_vitb14", tmp_path / "weights.pth")


class TestWithTimm:
    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    @pytest.fixture
    def weights(self, timm, tmp_path):
        """Files of randomly started models, classifier and all, as timm's own are."""

        def write(name: str = "test_vit", **options):
            torch.manual_seed(1)
            torch.save(timm.create_model(name, **options).state_dict(), tmp_path / f"{name}.pth")
            return tmp_path / f"{name}.pth"

        return write

    @pytest.mark.parametrize(("name", "dim", "num_prefix"), [("test_vit", 64, 1), ("test_vit3", 96, 1), ("test_vit_relpos", 96, 0)])
    def test_they_are_the_patch_tokens_that_timms_own_loading_gives(self, timm, weights, name, dim, num_prefix):
        """The three have a class token, a register token, and neither."""
        network = FrozenFeatures(name, weights(name), tokens_per_side=3)
        file = {"file": str(weights(name))}
        whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, img_size=48, num_classes=0).eval()
        assert whole.num_prefix_tokens == num_prefix and network.side == 48
        x = images()
        given = F.interpolate(x / 2 + 0.5, (48, 48), mode="bicubic").sub(network.mean).div(network.std)
        with torch.no_grad():
            expected = whole.forward_features(given)[:, num_prefix:]
        found = network(x)
        assert found.shape == (3, network.num_tokens, network.dim) == (3, 9, dim) and found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_images_of_the_networks_own_size_are_not_resampled(self, weights):
        network = FrozenFeatures("test_vit", weights(), tokens_per_side=2)
        x = images(side=32)
        direct = network.network.forward_features((x / 2 + 0.5 - network.mean) / network.std)
        torch.testing.assert_close(network(x), direct[:, 1:])

    def test_short_names_are_dinov2s_four_sizes_with_imagenets_statistics(self, timm):
        with torch.device("meta"):
            networks = [timm.create_model(name, num_classes=0) for name in FEATURE_NETWORKS.values()]
        assert [network.num_features for network in networks] == [384, 768, 1024, 1536]
        for network in networks:
            data = timm.data.resolve_model_data_config(network)
            assert (data["mean"], data["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            assert network.patch_embed.patch_size == (14, 14) and network.num_prefix_tokens == 1

    def test_it_is_frozen_and_stays_in_eval_mode(self, weights):
        network = FrozenFeatures("test_vit", weights(), tokens_per_side=2)
        outer = torch.nn.ModuleList([network]).train()
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
        assert not outer[0](images().requires_grad_()).requires_grad

    def test_the_hash_is_that_of_the_weights_whatever_the_file_and_the_grid(self, weights, tmp_path):
        path = weights()
        tensors = torch.load(path, weights_only=True)
        headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        save_file(headless | {"mask_token": torch.zeros(1, 64)}, tmp_path / "headless.safetensors")
        first, second = FrozenFeatures("test_vit", path), FrozenFeatures("test_vit", tmp_path / "headless.safetensors", tokens_per_side=2)
        assert first.hash == second.hash and first.name == second.name == "test_vit.r160_in1k"
        assert first.num_tokens == 256 and second.num_tokens == 4
        save_file(headless | {"norm.bias": torch.ones(64)}, tmp_path / "other.safetensors")
        assert FrozenFeatures("test_vit", tmp_path / "other.safetensors").hash != first.hash

    def test_building_it_leaves_the_global_random_state_alone(self, weights):
        path = weights()
        before = torch.get_rng_state()
        FrozenFeatures("test_vit", path)
        assert torch.equal(torch.get_rng_state(), before)

    def test_weights_of_another_network_are_refused_in_one_line(self, weights, tmp_path):
        def refused(expected: str, path) -> None:
            with pytest.raises(UserError, match=expected) as caught:
                FrozenFeatures("test_vit", path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

        tensors = torch.load(weights(), weights_only=True)
        deeper = tensors | {f"blocks.6.{key[9:]}": value for key, value in tensors.items() if key.startswith("blocks.0.")}
        contents = {
            "unexpected": deeper,
            "misshapen": torch.load(weights("vit_tiny_patch16_224", depth=6, img_size=160), weights_only=True),
            "missing": {key: value for key, value in tensors.items() if key != "norm.weight"},
            "not finite": tensors | {"norm.weight": torch.full((64,), float("nan"))},
            "mapping of names to tensors": {"model": tensors},
        }
        for expected, content in contents.items():
            torch.save(content, tmp_path / "file.pth")
            refused(expected, tmp_path / "file.pth")
        refused("no such file; features_weights wants the file", tmp_path / "nothing.pth")

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("dinov2_vitb14", {}, r"'vit_base_patch14_dinov2.lvd142m' has no weights; give a file of them \(features_weights\), or"),
            ("dinov2_vitb", {"weights": "x"}, "timm has no model 'dinov2_vitb'; choose one of dinov2_vits14, dinov2_vitb14"),
            ("test_convnext", {"weights": "x"}, "timm model 'test_convnext' has no patch tokens; choose a vision transformer"),
            ("test_vit", {"weights": "x", "tokens_per_side": 0}, "at least 1 a side, got 0"),
        ],
    )
    def test_wrong_options_are_refused_in_one_line(self, name, options, expected):
        with pytest.raises(UserError, match=expected) as caught:
            FrozenFeatures(name, **options)
        assert "\n" not in str(caught.value)

    def test_a_fetch_that_fails_is_told_in_one_line(self, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(UserError, match=r"timm model 'test_vit' cannot be made \(.*a local file of its weights needs no") as caught:
            FrozenFeatures("test_vit", download=True)
        assert "\n" not in str(caught.value)
