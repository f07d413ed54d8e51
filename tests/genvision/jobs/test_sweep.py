import json
import shutil
from pathlib import Path

import pytest

from genvision.errors import UserError
from genvision.eval.job import EvaluationOptions
from genvision.jobs.fid import fid_from_folder
from genvision.jobs.sweep import format_sweep, parse_values, sweep
from genvision.models.dit import DiT

OPTIONS = EvaluationOptions(protocol="digits", metrics=("fid", "is", "pr"), show_progress=False)
FAST = {"batch_size": 32, "options": OPTIONS, "num": 96}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1.25:2.5:0.25", [1.25, 1.5, 1.75, 2.0, 2.25, 2.5]),
        ("1:1.25:0.1", [1.0, 1.1, 1.2]),
        ("1,1.5, 2", [1.0, 1.5, 2.0]),
        ("3", [3.0]),
        ("0:0:1", [0.0]),
    ],
)
def test_values_are_ranges_lists_or_one_number(text, values):
    assert parse_values(text, "guidance") == values


@pytest.mark.parametrize("text", ["", "a", "1:2", "2:1:0.5", "1:2:0", "1:2:-1", "1:2:x", "1,,2", "1:1000000:0.1"])
def test_other_texts_are_refused_with_the_option_named(text):
    with pytest.raises(UserError, match="--guidance"):
        parse_values(text, "guidance")


def chunks(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_a_sweep_scores_every_setting_and_names_the_best(tiny_model, tmp_path):
    tried = {"guidance_scale": [1.0, 2.0], "top_k": [0.0, 4.0]}
    done = sweep(tiny_model, "digits:second", tmp_path / "out", options_to_try=tried, **FAST)
    assert [tuple(setting.values()) for setting in done.settings] == [(1, 0), (1, 4), (2, 0), (2, 4)]
    assert len({result.fid for result in done.results}) == 4
    assert done.results[done.best].fid == min(result.fid for result in done.results)
    alone = fid_from_folder(
        tiny_model, "digits:second", tmp_path / "alone", page=False, sampler_options={"guidance_scale": 2.0, "top_k": 4}, **FAST
    )
    assert done.results[3].fid == alone.fid
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["settings"][3]["fid"] == alone.fid and content["best"] == done.settings[done.best]
    assert "<svg" in (tmp_path / "out" / "sweep.html").read_text()
    table = format_sweep(done)
    assert table.count("best") == 2 and "FID" in table and "guidance_scale=" in table

    before = chunks(tmp_path / "out")
    denser = sweep(tiny_model, "digits:second", tmp_path / "out", options_to_try={**tried, "guidance_scale": [1.0, 1.5, 2.0]}, **FAST)
    after = chunks(tmp_path / "out")
    assert len(denser.results) == 6
    assert before.items() <= after.items()  # nothing was drawn twice
    longer = fid_from_folder(
        tiny_model,
        "digits:second",
        tmp_path / "out" / "guidance_scale=2,top_k=4",
        page=False,
        sampler_options={"guidance_scale": 2.0, "top_k": 4},
        **{**FAST, "num": 128},
    )
    assert longer.num_generated == 128
    assert after.items() <= chunks(tmp_path / "out").items()


@pytest.mark.parametrize("fixture", ["tiny_flow", "tiny_diffusion"])
def test_steps_of_models_of_latents_are_swept(fixture, request, tmp_path):
    model = request.getfixturevalue(fixture)
    done = sweep(model, "digits:second", tmp_path / "out", options_to_try={"num_steps": [2.0, 5.0], "guidance_scale": [1.0, 2.0]}, **FAST)
    assert [result.sampling["network_calls"] for result in done.results] == [2, 4, 5, 10]
    assert len({result.fid for result in done.results}) == 4
    assert "num_steps=" in format_sweep(done)
    with pytest.raises(UserError, match="steps"):
        sweep(model, "digits:second", tmp_path / "zero", options_to_try={"num_steps": [2.0, 0.0]}, **FAST)
    assert not (tmp_path / "zero").exists()


def test_a_guide_stands_in_for_the_null_class_in_a_sweep(tiny_flow, tmp_path):
    model = tmp_path / "without null class"
    shutil.copytree(tiny_flow, model)
    generator = DiT.from_pretrained(model, subfolder="generator")
    without = DiT.from_config({**generator.config, "class_dropout": 0.0})
    state = generator.state_dict() | {"label_embed.table.weight": generator.label_embed.table.weight[:-1]}
    without.load_state_dict(state)
    without.save_pretrained(model / "generator")
    tried = {"options_to_try": {"guidance_scale": [1.0, 2.0]}, **FAST}
    with pytest.raises(UserError, match="no null class"):
        sweep(model, "digits:second", tmp_path / "alone", **tried)
    done = sweep(model, "digits:second", tmp_path / "guided", guide=tiny_flow, **tried)
    assert [result.sampling["network_calls"] for result in done.results] == [6, 12]


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        ({}, "nothing to try"),
        ({"guidance_scale": []}, "nothing to try"),
        ({"num_steps": [1.0]}, "num_steps"),
        ({"temperature": [1.0, -1.0]}, "temperature -1.0 is not allowed"),
        ({"guidance_scale": [1.0] * 50, "top_k": [1.0] * 50}, "2,500 settings are too many"),
    ],
)
def test_impossible_sweeps_are_refused_before_an_image_is_drawn(tiny_model, tmp_path, tried, message):
    with pytest.raises(UserError, match=message):
        sweep(tiny_model, "digits:second", tmp_path / "out", options_to_try=tried, **FAST)
    assert not (tmp_path / "out").exists()
