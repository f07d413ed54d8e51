"""The demo of every family, whole: minutes long, so it is marked slow."""

import json

import pytest

from genvision.demo import run_demo


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "accuracy", "copies", "protocol"),
    [("ar", 0.95, 0.2, "top-p"), ("masked", 0.95, 0.2, "8 steps of halton"), ("diffusion", 0.97, 0.05, "20 steps of heun")],
)
def test_the_demo_draws_digits_that_are_recognised(family, accuracy, copies, protocol, tmp_path):
    table = run_demo(tmp_path / "demo", family=family)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert results["class_accuracy"] >= accuracy
    assert results["fid"] < 3 and results["copies"] < copies
    assert protocol in table
    assert (tmp_path / "demo/samples.png").is_file() and (tmp_path / "demo/model/model_index.json").is_file()
