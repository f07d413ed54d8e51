import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions, Features, load_extractor
from genvision.eval.pixels import psnr, ssim
from genvision.eval.reconstruction import ReconstructionResult, reconstruct
from genvision.eval.report import format_table, to_json
from genvision.eval.result import validate
from genvision.eval.sets import ArraySource
from genvision.images import from_uint8, to_uint8
from genvision.jobs.reconstruct import reconstruct_data
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.lpips import LPIPS, TAPS
from genvision.tokenizers.perceptual import TimmPerceptual

ROOT = Path(__file__).resolve().parents[2]


class GrayLevels(nn.Module):
    """Codes are `codebook_size` levels of gray, one a pixel."""

    def __init__(self, codebook_size: int, shrink: int = 0) -> None:
        super().__init__()
        self.spec = SimpleNamespace(codebook_size=codebook_size)
        self.shrink = shrink

    def encode(self, images: Tensor) -> Tensor:
        assert not self.training
        return ((images.mean(dim=1) + 1) / 2 * (self.spec.codebook_size - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        images = codes[:, None].expand(-1, 3, -1, -1) / (self.spec.codebook_size - 1) * 2 - 1
        return images[:, :, self.shrink :]


class Continuous:
    """Loses nothing, or adds an offset to every pixel."""

    spec = SimpleNamespace(codebook_size=None)

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def encode(self, images: Tensor) -> Tensor:
        return images / 2

    def decode(self, codes: Tensor) -> Tensor:
        return codes * 2 + self.offset


class Quarters:
    """An extractor without a network: the mean colours of the four quarters of an image."""

    name, feature_dim, resize, weights_hash = "quarters", 12, "none", "none"

    def __call__(self, images: np.ndarray, *, want_logits: bool, want_spatial: bool) -> Features:
        assert not want_logits and not want_spatial
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return Features(F.adaptive_avg_pool2d(pixels, 2).flatten(1), None)


def random_lpips() -> LPIPS:
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16(weights=None, init_weights=False).features[:30].state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"features.{name}": 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
    for layer, channels in enumerate(TAPS.values()):
        tensors[f"linear.{layer}"] = torch.rand(1, channels, 1, 1, generator=generator)
    return LPIPS(tensors)


@pytest.fixture(scope="module")
def source(digits_first) -> ArraySource:
    return ArraySource(digits_first[0][:100], name="hundred digits")


@pytest.fixture(scope="module")
def large_source(digits_first) -> ArraySource:
    """16 x 16 pixels, the least that LPIPS takes."""
    return ArraySource(digits_first[0][:30].repeat(2, axis=1).repeat(2, axis=2), name="thirty digits")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return random_lpips()


def test_scores_are_means_over_all_images(source):
    tokenizer = GrayLevels(4)
    found = reconstruct(tokenizer, source, image_size=8, batch_size=32)
    result = found.result
    images = from_uint8(source.images)
    codes = tokenizer.eval().encode(images)
    back = to_uint8(tokenizer.decode(codes))
    assert result.psnr == pytest.approx(psnr(source.images, back).mean())
    assert result.ssim == pytest.approx(ssim(source.images, back).mean())
    assert result.ssim_range2 == pytest.approx(ssim(source.images, back, data_range=2.0).mean())
    counts = torch.bincount(codes.flatten(), minlength=4)
    entropy = torch.distributions.Categorical(counts.double() / codes.numel()).entropy()
    assert result.codebook_usage == 1.0 and result.num_dead_codes == 0
    assert result.codebook_perplexity == pytest.approx(entropy.exp().item())
    assert result.codebook_entropy == pytest.approx(entropy.item() / np.log(2))
    assert result.codebook_top_share == counts.max().item() / codes.numel()
    np.testing.assert_array_equal(found.code_counts, counts)
    assert result.rfid is result.extractor is result.lpips is result.lpips_hash is None
    assert (result.num_images, result.image_size, result.data, result.num_codes) == (100, 8, "hundred digits", 6400)


def test_dead_codes_are_counted(source):
    light = ArraySource(source.images // 2 + 128)
    found = reconstruct(GrayLevels(3), light, image_size=8)
    assert found.result.num_dead_codes == 1 and found.result.codebook_usage == pytest.approx(2 / 3)
    assert found.code_counts is not None and found.code_counts.tolist()[0] == 0


def test_intervals_are_those_of_a_mean_and_hold_the_truth_19_times_of_20(digits_first):
    tokenizer, images = GrayLevels(3), digits_first[0]
    truth = psnr(images, to_uint8(tokenizer.eval().decode(tokenizer.encode(from_uint8(images))))).mean()
    rng, num_held, widths = np.random.default_rng(0), 0, []
    for _ in range(100):
        result = reconstruct(tokenizer, ArraySource(images[rng.choice(len(images), 50)]), image_size=8, batch_size=50).result
        low, high = result.psnr_interval
        assert low < result.psnr < high
        num_held += low <= truth <= high
        widths.append(high - low)
    assert 88 <= num_held <= 100
    whole = reconstruct(tokenizer, ArraySource(images), image_size=8, batch_size=128).result
    low, high = whole.psnr_interval
    assert (high - low) == pytest.approx(np.mean(widths) * (50 / len(images)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(large_source, lpips, batch_size):
    extractor = load_extractor("digits")
    options = {"image_size": 16, "extractor": extractor, "lpips": lpips}
    whole = reconstruct(GrayLevels(3), large_source, batch_size=30, **options)
    parts = reconstruct(GrayLevels(3), large_source, batch_size=batch_size, **options)
    assert parts.result.rfid == pytest.approx(whole.result.rfid, rel=1e-4)
    assert parts.result.lpips == pytest.approx(whole.result.lpips, rel=1e-5)
    for key in ("psnr", "ssim", "codebook_perplexity"):
        assert getattr(parts.result, key) == pytest.approx(getattr(whole.result, key), rel=1e-12)
    np.testing.assert_array_equal(parts.code_counts, whole.code_counts)
    for a, b in zip(parts.pairs, whole.pairs, strict=True):
        assert a.title == b.title
        np.testing.assert_allclose(a.values, b.values, rtol=1e-4)


def test_nothing_is_lost_by_a_tokenizer_that_gives_the_image_back(large_source, lpips):
    found = reconstruct(Continuous(), large_source, image_size=16, extractor=load_extractor("digits"), lpips=lpips)
    result = found.result
    assert abs(result.rfid) < 1e-4
    assert result.psnr == np.inf and result.psnr_interval is None
    assert result.ssim == result.ssim_range2 == pytest.approx(1.0, abs=1e-12)
    assert result.lpips == 0.0 and result.lpips_interval == (0.0, 0.0)
    for group in found.pairs:
        np.testing.assert_array_equal(group.originals, group.reconstructions)
    assert '"psnr": null' in to_json(result)


def test_every_score_is_worse_the_more_is_lost(large_source, lpips):
    options = {"image_size": 16, "extractor": load_extractor("digits"), "lpips": lpips}
    fine, coarse = (reconstruct(GrayLevels(size), large_source, **options).result for size in (5, 2))
    assert 0 < fine.rfid < coarse.rfid and 0 < fine.lpips < coarse.lpips
    assert fine.psnr > coarse.psnr and fine.ssim > coarse.ssim


def test_continuous_codes_have_no_codebook(source):
    found = reconstruct(Continuous(0.1), source, image_size=8)
    result = found.result
    assert result.codebook_usage is result.codebook_perplexity is result.codebook_entropy is result.codebook_size is None
    assert result.num_codes is result.num_dead_codes is result.codebook_top_share is found.code_counts is None


def test_worst_and_best_pairs_go_by_lpips_where_it_is_measured(large_source, lpips):
    by_psnr = reconstruct(GrayLevels(3), large_source, image_size=16, num_pairs=4, batch_size=7)
    by_lpips = reconstruct(GrayLevels(3), large_source, image_size=16, num_pairs=4, batch_size=7, lpips=lpips)
    for found, name in ((by_psnr, "PSNR"), (by_lpips, "LPIPS")):
        first, worst, _ = found.pairs
        assert worst.title == f"The worst of 30 images by {name}"
        assert first.indices.tolist() == [0, 1, 2, 3]
        for group in found.pairs:
            np.testing.assert_array_equal(group.originals, large_source.images[group.indices])
    values = psnr(large_source.images, to_uint8(GrayLevels(3).eval().decode(GrayLevels(3).eval().encode(from_uint8(large_source.images)))))
    assert by_psnr.pairs[1].indices.tolist() == np.argsort(values, kind="stable")[:4].tolist()
    assert by_lpips.pairs[1].values[0] > by_lpips.pairs[2].values[0]
    assert by_psnr.grid().size == by_lpips.grid().size


def test_the_result_says_what_was_measured_how_and_what_was_not(source, large_source, lpips):
    bare = reconstruct(GrayLevels(3), source, image_size=8, tokenizer_name="runs/vq", tokenizer_hash="abc").result
    assert any("LPIPS not measured" in note for note in bare.notes) and any("rFID not measured" in note for note in bare.notes)
    assert (bare.tokenizer, bare.tokenizer_hash, bare.num_processes) == ("runs/vq", "abc", 1)
    full = reconstruct(GrayLevels(3), large_source, image_size=16, extractor=load_extractor("digits"), lpips=lpips).result
    assert any("the same images" in note for note in full.notes)
    assert full.lpips_network == "VGG16, unknown linear layers" and any("no published LPIPS" in line for line in full.warnings)
    assert any("30 images, fewer than the 64 features" in line for line in full.warnings)
    assert full.lpips_hash is not None and len(full.lpips_hash) == 64
    for result in (bare, full):
        validate(json.loads(to_json(result)), kind=ReconstructionResult)
    assert "rFID" in format_table(full) and "LPIPS" in format_table(full)


def test_a_module_in_train_mode_is_put_into_eval_mode_meanwhile(source):
    tokenizer = GrayLevels(4).train()
    reconstruct(tokenizer, source, image_size=8)
    assert tokenizer.training


def test_only_the_first_images_are_measured_if_asked(source):
    few = reconstruct(GrayLevels(2), source, image_size=8, num_images=5).result
    assert few.num_images == 5
    assert few.psnr == pytest.approx(reconstruct(GrayLevels(2), ArraySource(source.images[:5]), image_size=8).result.psnr)


def test_what_cannot_be_measured_is_refused(source, lpips):
    with pytest.raises(UserError, match="at least 2 images"):
        reconstruct(GrayLevels(4), ArraySource(source.images[:1]), image_size=8)
    with pytest.raises(UserError, match=r"made \[7, 8\] pixels of 8"):
        reconstruct(GrayLevels(4, shrink=1), source, image_size=8)
    with pytest.raises(UserError, match="not finite"):
        reconstruct(Continuous(float("nan")), source, image_size=8)
    with pytest.raises(UserError, match="at least 16x16"):
        reconstruct(GrayLevels(4), source, image_size=8, lpips=lpips)
    with pytest.raises(UserError, match="at least 1, got 0"):
        reconstruct(GrayLevels(4), source, image_size=8, batch_size=0)


def test_two_processes_find_what_one_finds_even_if_one_has_nothing_to_do(tiny_tokenizer, lpips, tmp_path):
    script = f"""
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
import torch
from accelerate import PartialState
torch.set_num_threads(1)
sys.path[:0] = {[str(folder) for folder in (ROOT, ROOT / "tests", Path(__file__).parent)]!r}
from test_reconstruction import measure_digits, random_lpips

measure_digits({str(tiny_tokenizer)!r}, random_lpips(), Path({str(tmp_path)!r}), "two", lambda: PartialState().process_index)
"""
    (tmp_path / "measure.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run([*launcher, str(tmp_path / "measure.py")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    measure_digits(str(tiny_tokenizer), lpips, tmp_path, "one", lambda: 0)
    differing = {"num_processes", "seconds", "images_per_second", "rfid", "rfid_interval"}
    for batch_size in (7, 64):
        one = json.loads((tmp_path / f"one_{batch_size}_0.json").read_text())
        pictures = dict(np.load(tmp_path / f"one_{batch_size}_0.npz"))
        assert one["num_processes"] == 1 and one["rfid"] > 0
        for rank in (0, 1):
            two = json.loads((tmp_path / f"two_{batch_size}_{rank}.json").read_text())
            assert two["num_processes"] == 2
            assert two["rfid"] == pytest.approx(one["rfid"], rel=1e-9)
            assert two["rfid_interval"] == pytest.approx(one["rfid_interval"], rel=1e-6)
            assert without(two, differing) == without(one, differing)
            for name, array in np.load(tmp_path / f"two_{batch_size}_{rank}.npz").items():
                np.testing.assert_array_equal(array, pictures[name], err_msg=name)


def measure_digits(tokenizer: str, lpips: LPIPS, folder: Path, name: str, rank: Callable[[], int]) -> None:
    """Files of this process: results as JSON, pairs and counts as npz, with batches of 7 and of more than there are images."""
    for batch_size in (7, 64):
        found = reconstruct(
            load_tokenizer(tokenizer),
            open_source("digits:first"),
            image_size=16,
            extractor=Quarters(),
            lpips=lpips,
            batch_size=batch_size,
            num_images=24,
        )
        path = folder / f"{name}_{batch_size}_{rank()}"
        path.with_suffix(".json").write_text(to_json(found.result))
        keys = ("indices", "values", "reconstructions")
        arrays = {f"{group.title} {key}": getattr(group, key) for group in found.pairs for key in keys}
        np.savez(path.with_suffix(".npz"), counts=found.code_counts, **arrays)


def without(content: dict, keys: set[str]) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


class TestJob:
    def test_it_writes_numbers_pairs_and_counts(self, tiny_tokenizer, lpips, tmp_path):
        tensors = lpips.state_dict().items()
        weights = {f"lin{name[-1]}.model.1.weight" if name.startswith("linear") else name: tensor for name, tensor in tensors}
        torch.save(weights, tmp_path / "lpips.pth")
        out = tmp_path / "out"
        job = partial(reconstruct_data, tiny_tokenizer, "digits:first", out, extractor="none", options=ExtractorOptions())
        result = job(image_size=16, lpips_weights=tmp_path / "lpips.pth", num=20)
        assert sorted(path.name for path in out.iterdir()) == ["codes.npz", "reconstructions.png", "results.json"]
        content = json.loads((out / "results.json").read_text())
        assert content == json.loads(to_json(result))
        assert content["schema"] == "genvision.reconstruction/1" and content["lpips"] > 0
        assert content["tokenizer"] == str(tiny_tokenizer) and len(content["tokenizer_hash"]) == 64
        with np.load(out / "codes.npz") as file:
            assert file["counts"].sum() == content["num_codes"] == 20 * 64
            assert (file["counts"] == 0).sum() == content["num_dead_codes"]

    def test_without_weights_lpips_is_not_measured_unless_it_was_asked_for(self, tiny_tokenizer, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
        out = tmp_path / "out"
        job = partial(reconstruct_data, tiny_tokenizer, "digits:first", out, extractor="none", options=ExtractorOptions(), num=4)
        with pytest.raises(UserError, match="no LPIPS weights; give `--lpips-weights FILE` or `--download`"):
            job(lpips=True)
        with pytest.raises(UserError, match="no such file; --lpips-weights wants"):
            job(lpips_weights=tmp_path / "nothing.pth")
        assert not out.exists()
        assert job().lpips is None


def test_the_distance_on_a_timm_models_features_is_measured_and_named(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), file)
    network = TimmPerceptual("test_resnet", weights=file, image_size=32)
    lossless = reconstruct(Continuous(), open_source("digits"), image_size=8, perceptual=network, num_images=6)
    assert lossless.result.perceptual == pytest.approx(0.0, abs=1e-6)
    blurred = reconstruct(GrayLevels(3), open_source("digits"), image_size=8, perceptual=network, num_images=6)
    assert blurred.result.perceptual > 0.01 and len(blurred.result.perceptual_interval) == 2
    assert blurred.result.perceptual_network == "timm test_resnet, stages 0, 1, 2, 3, 4, images resized to 32"
    assert blurred.result.perceptual_hash == lossless.result.perceptual_hash
    assert blurred.pairs[1].title == "The worst of 6 images by distance"
    assert blurred.result.lpips is None
