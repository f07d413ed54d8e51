"""Protocols with Inception itself, at random weights: the whole path from files to scores, beside torch-fidelity's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from inception_recipe import inception_tensors

from genvision.errors import UserError
from genvision.eval.cache import StatisticsCache
from genvision.eval.features import ExtractorOptions
from genvision.eval.job import EvaluationOptions, evaluate
from genvision.eval.protocols import METRICS, PROTOCOLS, load_protocol
from genvision.images import save_npz, save_png
from genvision.jobs.statistics import write_data_statistics

NUM = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """inception.pth, and two sets of 12 images of 40 x 40 pixels."""
    root = tmp_path_factory.mktemp("protocols")
    torch.save(inception_tensors(), root / "inception.pth")
    rng = np.random.default_rng(0)
    for name, brightness in (("generated", 90), ("reference", 140)):
        coarse = rng.normal(brightness, 50, (NUM, 8, 8, 3)).repeat(5, axis=1).repeat(5, axis=2)
        images = (coarse + rng.normal(0, 12, (NUM, 40, 40, 3))).clip(0, 255).astype(np.uint8)
        save_npz(root / f"{name}.npz", images, np.arange(NUM) % 3)
        for i, image in enumerate(images):
            save_png(image, root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def options(folder) -> EvaluationOptions:
    return EvaluationOptions(
        networks=ExtractorOptions(inception_weights=folder / "inception.pth"), cache=StatisticsCache(folder / "cache"), show_progress=False
    )


def test_torch_fidelitys_numbers_are_those_of_torch_fidelity(folder, options):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folder / "generated"),
        input2=str(folder / "reference"),
        cuda=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=NUM,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(folder / "inception.pth"),
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    ours = evaluate(f"folder:{folder / 'generated'}", f"folder:{folder / 'reference'}", options=replace(options, protocol="torch-fidelity"))
    assert ours.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours.inception_score_std == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert (ours.precision, ours.recall) == (pytest.approx(theirs["precision"]), pytest.approx(theirs["recall"]))
    assert ours.sfid is None


def test_adm_measures_its_five_scores_whatever_the_format(folder, options):
    from_png = evaluate(str(folder / "generated"), str(folder / "reference"), options=options)
    from_npz = evaluate(str(folder / "generated.npz"), str(folder / "reference.npz"), options=options)
    for key in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert getattr(from_npz, key) == pytest.approx(getattr(from_png, key), rel=1e-6), key
    assert from_png.order_sensitive == ["inception_score"]
    assert any(note.startswith("precision and recall in float32, from the same features") for note in from_png.notes)
    assert (from_png.is_estimator, from_png.is_block_size, from_png.pr_mode) == ("adm", 5000, "adm")
    assert from_png.generated_hash == from_npz.generated_hash
    assert from_png.feature_dim == 2048
    itself = evaluate(str(folder / "reference.npz"), str(folder / "reference.npz"), options=options)
    assert itself.reference_cached is True
    assert abs(itself.fid) < 1e-6 and abs(itself.sfid) < 1e-6
    assert itself.precision == itself.recall == 1


def test_the_resize_is_part_of_the_protocol_and_of_the_cache(folder, options):
    clean = evaluate(
        str(folder / "generated.npz"), str(folder / "reference.npz"), options=replace(options, protocol="clean", metrics=("fid",))
    )
    first = evaluate(str(folder / "generated.npz"), None, options=replace(options, protocol="first-is"))
    adm = evaluate(str(folder / "generated.npz"), str(folder / "reference.npz"), options=replace(options, metrics=("fid",)))
    assert clean.reference_cached is False and clean.extractor == "inception-clean"
    assert clean.fid != pytest.approx(adm.fid, rel=1e-5)
    assert clean.resize != adm.resize
    assert first.inception_score > 1 and first.is_estimator == "first-is" and first.reference is None


def test_statistics_of_another_resize_are_refused(folder, options, tmp_path):
    """Both resizes feed one network, so its hash alone would not tell them apart."""
    out = tmp_path / "reference.safetensors"
    write_data_statistics(str(folder / "reference.npz"), out, options=replace(options, protocol="clean"))
    with pytest.raises(UserError, match=r"was measured with 'inception-clean' \(\w{12}\), these scores use 'inception'"):
        evaluate(str(folder / "generated.npz"), str(out), options=replace(options, metrics=("fid",)))


def test_another_extractor_is_named_in_the_notes(folder, options):
    result = evaluate("digits:first", "digits:second", options=replace(options, metrics=("fid",), extractor="digits"))
    assert any("extractor digits instead of inception" in note for note in result.notes)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_measures_what_it_can_be_asked_for(name):
    protocol = load_protocol(name)
    assert set(protocol.default_metrics) <= set(protocol.metrics) <= set(METRICS)
    assert protocol.choose(None) == protocol.default_metrics
    assert protocol.choose(list(reversed(protocol.metrics))) == tuple(metric for metric in METRICS if metric in protocol.metrics)
    with pytest.raises(UserError, match="'fidd' is unknown"):
        protocol.choose(["fidd"])


def test_unknown_protocols_are_refused_with_the_right_ones_listed():
    with pytest.raises(UserError, match="protocol 'amd' is unknown; choose one of adm, torch-fidelity, clean, edm2, first-is, digits"):
        load_protocol("amd")
