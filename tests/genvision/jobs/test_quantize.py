"""Rounded weights beside float ones, and folders with ternary weights."""

import json
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genvision.errors import UserError
from genvision.jobs import drawing_memory as memory_job
from genvision.jobs.quantize import QuantizationOptions, quantize_folder
from genvision.jobs.quantize_check import compare_pipelines
from genvision.jobs.quantize_report import format_result
from genvision.jobs.weight_changes import divergence
from genvision.layers.packed_storage import packed_layers
from genvision.layers.ternarize import plain_linears, ternarize_linears
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR
from genvision.pipeline import ImagePipeline
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.masked import MaskedSampler
from genvision.tokenizers.base import load_tokenizer

FEW = {"num": 12, "batch_size": 8}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def trained(tiny_model, tmp_path):
    """A copy of the tiny model whose weights all matter: a head that was trained for three steps hardly looks at what is below."""
    torch.manual_seed(0)
    pipeline = ImagePipeline.from_pretrained(tiny_model)
    for parameter in pipeline.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipeline.sampler = pipeline.sampler.with_options(guidance_scale=1.5, top_p=0.9)
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_check_says_what_int8_changes_and_writes_nothing_but_the_result(trained, tmp_path, capsys):
    before = files(trained)
    result = quantize_folder(trained, QuantizationOptions(weights="int8", **FEW), check=True, json_file=tmp_path / "int8.json")
    check = result.check
    assert [change.what for change in check.changes] == ["as drawn (guidance 1.5)", "conditional rows", "null rows"]
    assert 0 < check.kl == check.changes[0].mean <= check.changes[0].high <= check.changes[0].largest < 0.1
    assert check.error is None and check.changes[0].same_best > 0.8
    assert 0 <= check.drawn_otherwise <= check.codes_changed < 1
    seen = check.recognition
    assert seen.right_after - seen.right_before == pytest.approx((seen.won - seen.lost) / 12) and seen.changed >= seen.lost + seen.won
    assert result.storage.layers == 5 and 2 < result.storage.ratio < 4
    assert json.loads((tmp_path / "int8.json").read_text())["check"]["kl"] == check.kl
    table = capsys.readouterr().out.rstrip("\n")
    assert table == format_result(result) and max(map(len, table.splitlines())) <= 80
    assert table.splitlines()[-1].startswith(f"int8: {check.grade} (KL ")
    assert files(trained) == before and {path.name for path in tmp_path.iterdir()} == {"model", "int8.json"}


def test_ternary_weights_are_written_as_two_bits_and_draw_what_was_checked(trained, tmp_path):
    before, out = files(trained), tmp_path / "out" / "ternary"
    options = QuantizationOptions(weights="ternary", scales="matrix", exclude=("blocks.0.mlp.down",), **FEW)
    result = quantize_folder(trained, options, out=out, check=True)
    assert files(trained) == before
    pipeline = ImagePipeline.from_pretrained(out)
    layers = packed_layers(pipeline.generator)
    assert len(layers) == result.storage.layers and "blocks.0.mlp.down" not in layers
    assert all(layer.scale.shape == (1,) for layer in layers.values())
    size = sum(path.stat().st_size for path in (out / "generator").iterdir())
    assert result.storage.bytes_after <= size < result.storage.bytes_after + 6000 and result.storage.ratio > 2
    described = json.loads((out / "generator" / "quantization.json").read_text())
    assert described["scales"] == "matrix" and described["measure"] == "mean"
    assert "not the generator's own from_pretrained" in (out / "README.md").read_text()
    expected = ImagePipeline.from_pretrained(trained)
    ternarize_linears(expected.generator, per_row=False, exclude=options.exclude)
    assert pipeline.hashes() == expected.hashes()
    labels = list(range(10))
    assert np.array_equal(pipeline(labels, output_type="np").images, expected(labels, output_type="np").images)
    with pytest.raises(UserError, match="ternary already"):
        quantize_folder(out, options, check=True)


def test_weights_that_are_ternary_already_lose_nothing(trained, tmp_path):
    pipeline = ImagePipeline.from_pretrained(trained)
    ternarize_linears(pipeline.generator)
    plain_linears(pipeline.generator)
    pipeline.save_pretrained(tmp_path / "plain")
    check = quantize_folder(tmp_path / "plain", QuantizationOptions(weights="ternary", **FEW), check=True).check
    assert check.kl < 1e-9 and check.codes_changed == 0 and check.drawn_otherwise == 0
    assert check.images_equal == 1 and check.psnr is None and check.grade == "negligible"
    assert check.recognition.changed == 0 and check.recognition.is_chance


def test_calibration_brings_ternary_weights_closer(trained):
    options = {"weights": "ternary", **FEW}
    plain = quantize_folder(trained, QuantizationOptions(**options), check=True)
    calibrated = quantize_folder(trained, QuantizationOptions(**options, distill_steps=30, distill_images=20, distill_lr=0.01), check=True)
    assert calibrated.check.kl < 0.8 * plain.check.kl
    first, last = calibrated.distill_loss
    assert last < first and plain.distill_loss is None


@pytest.mark.parametrize("model", ["tiny_flow", "tiny_diffusion"])
def test_latents_are_compared_by_their_distance(model, request, capsys):
    folder = request.getfixturevalue(model)
    result = quantize_folder(folder, QuantizationOptions(weights="ternary", **FEW), check=True)
    assert result.check.kl is None and 0.01 < result.check.error < 2
    assert [change.what for change in result.check.changes][::4] == ["noise level 0.1", "noise level 0.9"]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    with pytest.raises(UserError, match=r"above --max-error 0\.0001"):
        quantize_folder(folder, QuantizationOptions(weights="ternary", **FEW), max_error=1e-4)
    with pytest.raises(UserError, match="give --max-error"):
        quantize_folder(folder, QuantizationOptions(weights="ternary"), max_kl=0.1)


def other_tokens(tiny_tokenizer, family):
    sizes = {"codebook_size": 16, "grid_size": 4, "hidden_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    if family == "masked":
        generator, sampler = MaskGIT(**sizes, mlp_multiple_of=8), MaskedSampler(num_steps=4, guidance_scale=2.0)
    else:
        generator, sampler = RAR(**sizes), AutoregressiveSampler(guidance_scale=2.0, guidance_start=0.5, temperature=0.8)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ImagePipeline(generator, load_tokenizer(tiny_tokenizer), sampler, ["a", "b", "c"])


@pytest.mark.parametrize("family", ["masked", "permuted"])
def test_equal_networks_have_no_distance_and_rounded_ones_have(family, tiny_tokenizer):
    before = other_tokens(tiny_tokenizer, family)
    same = compare_pipelines(before, before, num=5, seed=1, batch_size=4)
    assert same.kl == 0 and same.codes_changed == 0 and same.images_equal == 1 and same.recognition is None
    assert same.drawn_otherwise == (None if family == "masked" else 0)  # tokens are those that teacher forcing draws again
    after = ImagePipeline(deepcopy(before.generator), before.tokenizer, before.sampler, before.label_names)
    ternarize_linears(after.generator)
    rounded = compare_pipelines(before, after, num=5, seed=1, batch_size=4)
    assert rounded.kl > 0.001 and rounded.codes_changed > 0 and rounded.psnr < 60


def test_the_divergence_is_that_of_the_definition():
    before, after = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    expected = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(before, after), expected.double(), rtol=1e-4, atol=1e-6)
    assert divergence(before, before + 3).max() < 1e-9


def test_nothing_is_written_above_the_limit(trained, tmp_path, capsys):
    options = QuantizationOptions(weights="ternary", **FEW)
    with pytest.raises(UserError, match=r"above --max-kl 0\.001, so nothing was written"):
        quantize_folder(trained, options, out=tmp_path / "out", max_kl=0.001)
    assert "ternary: " in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["model"]
    assert quantize_folder(trained, options, out=tmp_path / "out", max_kl=100.0).out == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "request_", "message"),
    [
        ({"weights": "int8"}, {}, "nothing to do; give --check"),
        ({"weights": "int8"}, {"out": "out"}, "genvision sample --weights int8"),
        ({"weights": "ternary"}, {"memory": True}, "give --out, too"),
        ({"weights": "ternary"}, {"out": "model"}, "lies within the model"),
        ({"weights": "int4"}, {"check": True}, "'int4' is unknown"),
        ({"weights": "ternary", "num": 0}, {"check": True}, "num must be at least 1"),
        ({"weights": "ternary", "seed": -1}, {"check": True}, "seed -1"),
        ({"weights": "ternary", "distill_steps": -1}, {"check": True}, "distill_steps"),
        ({"weights": "ternary", "distill_lr": 0}, {"check": True}, "distill_lr"),
        ({"weights": "int8", "distill_steps": 5}, {"check": True}, "are for ternary weights"),
        ({"weights": "ternary", "exclude": ("blocks.7",)}, {"out": "out"}, "blocks.7 is no linear layer"),
        ({"weights": "ternary"}, {"check": True, "max_error": 0.1}, "give --max-kl"),
        ({"weights": "ternary"}, {"check": True, "json_file": "model"}, "is a folder"),
    ],
)
def test_impossible_requests_leave_nothing_behind(trained, tmp_path, options, request_, message):
    paths = {name: tmp_path / value if isinstance(value, str) else value for name, value in request_.items()}
    with pytest.raises(UserError, match=message):
        quantize_folder(trained, QuantizationOptions(**options), **paths)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_model_is_refused_before_anything_is_done(trained, tmp_path):
    shutil.rmtree(trained / "generator")
    with pytest.raises(UserError, match="the generator is missing"):
        quantize_folder(trained, QuantizationOptions(weights="ternary"), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not memory_job.CLEAR.exists(), reason="needs /proc")
def test_memory_of_drawing_is_at_least_that_of_the_loaded_model(trained, capsys):
    memory_job.report(str(trained), "float32")
    loaded, peak = json.loads(capsys.readouterr().out)
    assert loaded <= peak < 2**31


@pytest.mark.slow
@pytest.mark.skipif(not memory_job.CLEAR.exists(), reason="needs /proc")
def test_memory_is_measured_in_a_process_of_its_own(trained, tmp_path):
    measured = memory_job.drawing_memory(trained, "int8")
    assert 0 < measured.loaded <= measured.peak
    with pytest.raises(UserError, match="a process that draws failed"):
        memory_job.drawing_memory(tmp_path / "nothing", "float32")
