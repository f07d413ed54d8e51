"""The demo of both families, whole: minutes long, so it is marked slow."""

import json

import pytest

from genvision.demo import run_demo


@pytest.mark.slow
@pytest.mark.parametrize(("family", "accuracy"), [("ar", 0.95), ("diffusion", 0.97)])
def test_the_demo_draws_digits_that_are_recognised(family, accuracy, tmp_path):
    table = run_demo(tmp_path / "demo", family=family)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert results["class_accuracy"] >= accuracy
    assert results["fid"] < 3 and results["copies"] < 0.05
    assert "no guidance" in table if family == "diffusion" else "top-p" in table
    assert (tmp_path / "demo/samples.png").is_file() and (tmp_path / "demo/model/model_index.json").is_file()
