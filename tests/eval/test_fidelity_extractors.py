import numpy as np
import pytest
import torch
from inception_recipe import inception_tensors

from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions, load_extractor


@pytest.fixture
def register():
    """Register classes with torch-fidelity as its users do, for one test."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    names = []

    def register(name: str, kind: type) -> None:
        register_feature_extractor(name, kind)
        names.append(name)

    yield register
    for name in names:
        del FEATURE_EXTRACTORS_REGISTRY[name]


def colours_class(fid_layer: str = "means", isc_layer: str | None = "bright"):
    """A user's extractor: mean and spread of the colours, and whether an image is dark or bright."""
    from torch_fidelity import FeatureExtractorBase

    class Colours(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.linear = torch.nn.Linear(3, 2)

        @staticmethod
        def get_provided_features_list():
            return "means", "bright", "map"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            layers = {"fid": fid_layer, "kid": fid_layer, "prc": fid_layer}
            return {**layers, **({} if isc_layer is None else {"isc": isc_layer})}[metric]

        def forward(self, x):
            assert x.dtype == torch.uint8
            means = x.float().mean((2, 3))
            found = {"means": means, "bright": self.linear(means), "map": x.float()}
            return tuple(found[layer] for layer in self.features_list)

    return Colours


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)


def test_a_users_extractor_gives_features_and_logits(register, images):
    register("colours", colours_class())
    before = torch.get_rng_state()
    extractor = load_extractor("fidelity:colours")
    assert torch.equal(torch.get_rng_state(), before)
    assert (extractor.name, extractor.feature_dim, extractor.num_logits, extractor.spatial_dim) == ("fidelity:colours", 3, 2, 0)
    found = extractor(images)
    torch.testing.assert_close(found.features, torch.from_numpy(images).float().mean((1, 2)))
    torch.testing.assert_close(found.logits, extractor.network.linear(found.features))
    assert found.spatial is None
    assert extractor(images, want_logits=False).logits is None


@pytest.mark.parametrize("isc_layer", [None, "means"])
def test_an_extractor_without_classes_gives_no_logits(register, images, isc_layer):
    register("colours", colours_class(isc_layer=isc_layer))
    extractor = load_extractor("fidelity:colours")
    assert extractor.num_logits == 0
    assert extractor(images).logits is None


def test_the_hash_tells_extractors_apart(register):
    register("colours", colours_class())
    register("colours2", colours_class(fid_layer="bright", isc_layer="means"))
    hashes = [load_extractor(f"fidelity:{name}").weights_hash for name in ("colours", "colours2")]
    assert len(set(hashes)) == 2
    assert all(len(each) == 64 for each in hashes)


def test_a_layer_that_is_no_row_per_image_is_refused(register):
    register("colours", colours_class(fid_layer="map"))
    with pytest.raises(UserError, match=r"layer 'map' of fidelity:colours gave \[1, 3, 64, 64\] for 1 images, expected \[B, D\]"):
        load_extractor("fidelity:colours")


def test_an_unknown_name_lists_the_known_ones_and_those_of_the_user(register):
    register("colours", colours_class())
    with pytest.raises(UserError, match="torch-fidelity has no extractor 'vgg'") as caught:
        load_extractor("fidelity:vgg")
    for name in ("fidelity:vgg16", "fidelity:clip-vit-l-14", "fidelity:dinov2-vit-s-14", "fidelity:colours"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["vgg16", "clip-vit-b-32", "dinov2-vit-l-14", "inception-v3-compat"])
def test_nothing_is_downloaded_unasked(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="--download"):
        load_extractor(f"fidelity:{name}")
    assert not list(tmp_path.rglob("*"))


def test_torch_fidelitys_inception_is_ours_with_another_forward(images, tmp_path):
    torch.save(inception_tensors(), tmp_path / "weights.pth")
    options = ExtractorOptions(inception_weights=tmp_path / "weights.pth")
    theirs, ours = load_extractor("fidelity:inception-v3-compat", options), load_extractor("inception", options)
    assert (theirs.feature_dim, theirs.num_logits) == (ours.feature_dim, ours.num_logits)
    for value, wanted in zip(ours(images[:1])[:2], theirs(images[:1])[:2], strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4 * wanted.std().item(), rtol=0)
