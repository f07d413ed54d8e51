import numpy as np
import pytest
import torch
from inception_recipe import inception_tensors
from PIL import Image
from safetensors.torch import save_file

from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions, load_extractor, tensors_hash
from genvision.eval.inception import CPU_BATCH, CleanInceptionExtractor, InceptionExtractor, inception_shapes, resize_like_tensorflow1
from parity_fixtures import Fixture, manifest


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("eval_inception_tiny")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return inception_tensors()


@pytest.fixture(scope="module")
def weights_file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def inception(weights_file) -> InceptionExtractor:
    return InceptionExtractor(ExtractorOptions(inception_weights=weights_file))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [10, 40, 56, 3]: smooth patterns, each another."""
    rng = np.random.default_rng(3)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(CPU_BATCH + 2)]
    return np.stack([np.asarray(image.resize((56, 40), Image.Resampling.BICUBIC)) for image in coarse])


def test_names_and_shapes_are_those_of_the_official_file():
    official = manifest("inception_v3_fid")["tensors"]
    wanted = {name: torch.Size(shape) for name, shape in official.items() if not name.endswith("num_batches_tracked")}
    assert inception_shapes() == wanted
    assert len(wanted) == 472


def test_features_equal_torch_fidelitys_record(fixture, inception, tensors):
    checksum = fixture.config["checksum"]
    assert tensors["fc.weight"].double().abs().sum().item() == pytest.approx(checksum["sum_abs_fc"], rel=1e-6)
    for image in ("img0", "img1"):
        found = inception(fixture.inputs[image].permute(1, 2, 0)[None])
        for value, tap in ((found.features[0], "2048"), (found.logits[0], "logits_unbiased"), (found.spatial[0], "adm_spatial")):
            mean, std = fixture.outputs[f"{image}/{tap}/mean_std"].tolist()
            recorded = fixture.outputs[f"{image}/{tap}"]
            torch.testing.assert_close(value[: len(recorded)], recorded, atol=1e-4 * std, rtol=0)
            assert value.double().mean().item() == pytest.approx(mean, abs=1e-4 * std)
            assert value.double().std(correction=0).item() == pytest.approx(std, abs=1e-4 * std)


def test_features_equal_those_of_torch_fidelitys_network(inception, weights_file, images):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    original = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights_file))
    spatial = []
    original.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1)))
    pool, logits = original(torch.from_numpy(images[:3]).permute(0, 3, 1, 2))
    found = inception(images[:3])
    for value, wanted in zip(found, (pool, logits, spatial[0].flatten(1)), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4 * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("kind", [InceptionExtractor, CleanInceptionExtractor])
def test_inception_is_what_it_says(kind, weights_file, images):
    extractor = kind(ExtractorOptions(inception_weights=weights_file))
    assert (extractor.feature_dim, extractor.num_logits, extractor.spatial_dim) == (2048, 1008, 2023)
    assert not extractor.network.training
    found = extractor(images[:2])
    assert [tuple(tensor.shape) for tensor in found] == [(2, 2048), (2, 1008), (2, 2023)]
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in found)


def test_what_is_not_wanted_is_left_out_and_moves_nothing(inception, images):
    everything = inception(images[:1])
    alone = inception(images[:1], want_logits=False, want_spatial=False)
    assert alone.logits is None
    assert alone.spatial is None
    assert torch.equal(alone.features, everything.features)


def test_batch_size_does_not_matter(inception, images):
    whole = inception(images)
    for size in (1, 7):
        parts = [inception(images[start : start + size]) for start in range(0, len(images), size)]
        for name in ("features", "logits", "spatial"):
            wanted = getattr(whole, name)
            found = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.std().item(), rtol=0)


def check_views(found: torch.Tensor, fixture: Fixture, name: str, atol: float) -> None:
    """Compare float32 [3, S, S] with the places that were recorded of an image."""
    image = found.permute(1, 2, 0)
    for view, pixels in (("stride7", image[::7, ::7]), ("top_left16", image[:16, :16]), ("bottom_right16", image[-16:, -16:])):
        torch.testing.assert_close(pixels, fixture.outputs[f"{name}/{view}"], atol=atol, rtol=0)
    assert image.double().mean().item() == pytest.approx(fixture.outputs[f"{name}/mean"].item(), abs=atol)
    assert image.double().square().sum().item() == pytest.approx(fixture.outputs[f"{name}/sumsq"].item(), rel=1e-6)


@pytest.mark.parametrize("image", ["img0", "img1", "img2"])
def test_images_are_resized_as_the_originals_do(image, inception, weights_file):
    fixture = Fixture("eval_preprocess")
    pixels = fixture.inputs[image].permute(2, 0, 1)[None]
    check_views(inception.resized(pixels)[0], fixture, f"tf1_bilinear299/{image}", atol=2e-4)
    clean = CleanInceptionExtractor(ExtractorOptions(inception_weights=weights_file))
    check_views(clean.resized(pixels)[0], fixture, f"cleanfid_clean299/{image}", atol=1e-3)


def test_an_image_of_the_networks_size_is_not_resized(weights_file):
    pixels = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_like_tensorflow1(pixels, 299), pixels.float())
    assert torch.equal(CleanInceptionExtractor(ExtractorOptions(inception_weights=weights_file)).resized(pixels), pixels.float())


def test_clean_features_are_those_of_images_that_pillow_resized(inception, weights_file, images):
    channels = [Image.fromarray(images[0, :, :, c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC) for c in range(3)]
    by_pillow = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]).clip(0, 255))[None]
    wanted, _ = inception.network(by_pillow)
    found = CleanInceptionExtractor(ExtractorOptions(inception_weights=weights_file))(images[:1]).features
    torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.std().item(), rtol=0)
    assert (inception(images[:1]).features - wanted).abs().max() > 0.05 * wanted.std()  # the two resizes are not the same thing


def test_a_safetensors_file_has_the_same_hash_and_the_global_random_state_stays(inception, tensors, tmp_path):
    save_file(tensors, tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    again = InceptionExtractor(ExtractorOptions(inception_weights=tmp_path / "weights.safetensors"))
    assert again.weights_hash == inception.weights_hash == tensors_hash(tensors)
    assert torch.equal(torch.get_rng_state(), before)


def test_counters_of_training_in_the_file_do_not_matter(inception, tensors, tmp_path):
    counters = {f"{name.removesuffix('weight')}num_batches_tracked": torch.tensor(0) for name in tensors if name.endswith("bn.weight")}
    torch.save({**tensors, **counters}, tmp_path / "counted.pth")
    assert len(counters) == 94
    assert InceptionExtractor(ExtractorOptions(inception_weights=tmp_path / "counted.pth")).weights_hash == inception.weights_hash


def test_without_weights_nothing_is_downloaded_and_the_mend_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no Inception weights; give `--inception-weights FILE` or `--download`") as caught:
        load_extractor("inception")
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_extractor("inception-clean", ExtractorOptions(inception_weights=tmp_path / "absent.pth"))


def test_weights_in_torch_hubs_folder_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"cut off")
    with pytest.raises(UserError, match="not readable as Inception weights"):
        load_extractor("inception")


def test_damaged_weights_give_one_line(tensors, weights_file, tmp_path):
    def message(name: str) -> str:
        with pytest.raises(UserError) as caught:
            load_extractor("inception", ExtractorOptions(inception_weights=tmp_path / name))
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
        return str(caught.value)

    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "cut.pth").write_bytes(weights_file.read_bytes()[:100_000])
    for name in ("noise.pth", "noise.safetensors", "cut.pth"):
        assert "not readable as Inception weights" in message(name)

    torch.save([1, 2, 3], tmp_path / "list.pth")
    assert "mapping of names to tensors" in message("list.pth")

    wrong = {key: value for key, value in tensors.items() if key != "fc.bias"}
    wrong["fc.weight"] = torch.zeros(1000, 2048)
    wrong["AuxLogits.fc.bias"] = torch.zeros(1000)
    torch.save(wrong, tmp_path / "torchvision.pth")
    told = message("torchvision.pth")
    for part in ("1 missing (fc.bias)", "1 unexpected (AuxLogits.fc.bias)", "1 misshapen (fc.weight [1000, 2048] instead of [1008, 2048])"):
        assert part in told

    torch.save({**tensors, "fc.bias": torch.full((1008,), float("nan"))}, tmp_path / "nan.pth")
    assert "1 not finite (fc.bias)" in message("nan.pth")


class Malice:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch.save({"fc.bias": Malice(str(tmp_path / "harmed"))}, tmp_path / "malice.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_extractor("inception", ExtractorOptions(inception_weights=tmp_path / "malice.pth"))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_features_of_the_cpu_though_tf32_is_allowed(inception, weights_file, images):
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        on_gpu = InceptionExtractor(ExtractorOptions(inception_weights=weights_file, device="cuda"))(images)
    finally:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "none"
    for value, wanted in zip(on_gpu, inception(images), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4 * wanted.std().item(), rtol=0)
