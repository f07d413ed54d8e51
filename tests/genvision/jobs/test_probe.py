import json

import pytest

from genvision.errors import UserError
from genvision.eval.probe_config import ProbeConfig
from genvision.jobs.probe import parse_layers, probe_config, probe_folder

QUICK = ProbeConfig(layers=(1,), k=3, weight_decays=(0.1,))


def test_a_model_folder_is_probed_into_files(tiny_model, tmp_path):
    out = tmp_path / "out"
    result = probe_folder(tiny_model, "digits:first", "digits:second", out, config=QUICK, num_train=50, num_test=20, show_progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["probe.svg", "results.json"]
    content = json.loads((out / "results.json").read_text())
    assert content["top1"] == result.top1 and content["model"] == str(tiny_model)
    assert len(content["generator_hash"]) == len(content["tokenizer_hash"]) == 64
    assert (out / "probe.svg").read_text().startswith("<svg")
    with pytest.raises(UserError, match="already holds"):
        probe_folder(tiny_model, "digits:first", "digits:second", out, config=QUICK, show_progress=False)


@pytest.mark.parametrize("fixture", ["tiny_flow", "tiny_diffusion"])
def test_a_model_of_latents_is_probed(fixture, request, tmp_path):
    config = probe_config(layer="0,2", pooling="mean", k=3, weight_decays=(0.1,))
    sets = {"num_train": 200, "num_test": 100, "show_progress": False}
    result = probe_folder(request.getfixturevalue(fixture), "digits:first", "digits:second", tmp_path / "out", config=config, **sets)
    assert {row["layer"] for row in result.rows} == {0, 2} and result.num_layers == 2
    assert max(row["top1"] for row in result.rows) > result.chance
    assert {row["input"] for row in result.baselines} == {"pixels", "latents"}
    grey, latents = ([row["top1"] for row in result.baselines if row["input"] == name] for name in ("pixels", "latents"))
    assert latents == pytest.approx(grey, abs=0.05)  # which say the same here


def test_bad_requests_leave_nothing_behind(tiny_model, tmp_path):
    for model, train, message in (
        (tmp_path / "absent", "digits:first", "no such folder"),
        (tiny_model, "digits:third", "part 'third' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            probe_folder(model, train, "digits:second", tmp_path / "out", config=QUICK, show_progress=False)
    assert not (tmp_path / "out").exists()


def test_layers_are_read_from_text():
    assert parse_layers("all") is None
    assert parse_layers("3") == (3,) and parse_layers("0,4,8") == (0, 4, 8)
    with pytest.raises(UserError, match="layer 'top'"):
        parse_layers("top")


def test_options_are_read_as_the_command_line_gives_them():
    config = probe_config(layer="0,2", pooling="mean, attentive", probe="knn, mage", k=7, seed=3)
    assert config == ProbeConfig(layers=(0, 2), poolings=("mean", "attentive"), probes=("knn", "mage"), k=7, seed=3)
    with pytest.raises(UserError, match="pooling 'max'"):
        probe_config(layer="all", pooling="max")
