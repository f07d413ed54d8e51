import json

import pytest

from genvision.errors import UserError
from genvision.eval.classifier import ClassifierConfig
from genvision.jobs.cas import score_by_classifier

FEW = ClassifierConfig(architecture="resnet20", num_steps=2, batch_size=16, flip=False)


def test_the_result_file_holds_what_is_returned(tmp_path):
    out = tmp_path / "out"
    result = score_by_classifier(
        "digits:first", "digits:second", out, baseline="digits:first", config=FEW, device="cpu", show_progress=False
    )
    content = json.loads((out / "results.json").read_text())
    assert content["top1"] == result.top1 == content["baseline_top1"]
    assert content["seed"] == 0 and content["architecture"] == "resnet20" and content["versions"]["torch"]
    assert [path.name for path in out.iterdir()] == ["results.json"]


def test_bad_requests_leave_nothing_behind(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("important")
    for generated, out, options, message in (
        ("digits:first", tmp_path / "full", {}, "already holds"),
        ("digits:third", tmp_path / "out", {}, "part 'third' is unknown"),
        ("digits:first", tmp_path / "out", {"num_workers": -1}, "workers"),
        ("digits:first", tmp_path / "out", {"image_size": 0}, "image_size"),
        ("digits:first", tmp_path / "out", {"device": "abacus"}, "abacus"),
    ):
        with pytest.raises(UserError, match=message):
            score_by_classifier(generated, "digits:second", out, config=FEW, show_progress=False, **options)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="genvision cas runs on one process, got 2"):
        score_by_classifier("digits:first", "digits:second", tmp_path / "out", config=FEW, show_progress=False)
