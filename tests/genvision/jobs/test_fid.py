"""Sampling and scoring in one job: the same numbers however it is run, killed or split."""

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from genvision.cli import main
from genvision.errors import UserError
from genvision.eval.chunks import CALLS, HASHES, ChunkFolder
from genvision.eval.features import ExtractorOptions
from genvision.eval.job import EvaluationOptions, evaluate
from genvision.eval.result import EvaluationResult
from genvision.jobs.fid import fid_from_folder
from genvision.pipeline import ImagePipeline
from genvision.samplers.flow import FlowSampler

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = EvaluationOptions(protocol="digits", show_progress=False, networks=ExtractorOptions())
RUN_FACTS = {"seconds", "images_per_second", "num_processes", "model", "generated"}


def run(model: Path, out: Path, num: int = 60, **options) -> EvaluationResult:
    return fid_from_folder(model, "digits:second", out, options=OPTIONS, **{"num": num, "batch_size": 16, "page": False, **options})


def numbers(out: Path) -> dict:
    return {key: value for key, value in json.loads((out / "results.json").read_text()).items() if key not in RUN_FACTS}


def features(out: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: load_file(path) for path in sorted((out / "chunks").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """60 images of the tiny model, drawn and scored undisturbed by one process."""
    out = tmp_path_factory.mktemp("fid") / "whole"
    run(tiny_model, out)
    return out


def words(model: Path, out: Path, num: int, batch_size: int = 16) -> list[str]:
    return [
        *("fid", "--model", str(model), "--num", str(num), "--reference", "digits:second", "--protocol", "digits"),
        *("--batch-size", str(batch_size), "--no-cache", "--device", "cpu", "--workers", "0", "--out", str(out)),
    ]


def test_the_job_scores_what_sample_draws(tiny_model, whole, tmp_path):
    main(["sample", "--model", str(tiny_model), "--num", "60", "--out", str(tmp_path / "images")])
    again = evaluate(f"folder:{tmp_path / 'images'}", "digits:second", options=OPTIONS)
    ours = numbers(whole)
    assert ours["fid"] == pytest.approx(again.fid, rel=1e-5)
    assert ours["precision"] == again.precision
    assert ours["class_accuracy"] == again.class_accuracy
    assert ours["generated_hash"] == again.generated_hash
    assert ours["labels"] == "balanced" and ours["order"] == "permuted with seed 0"
    assert ours["sampling"]["network_calls"] == 16
    assert ours["sampling"]["generator_hash"] and ours["sampling"]["seed"] == 0


def test_killed_five_times_it_ends_with_the_same_features_and_numbers(tiny_model, tmp_path):
    num, batch_size = 400, 4
    main(words(tiny_model, tmp_path / "whole", num, batch_size))
    out, rng = tmp_path / "killed", random.Random(0)
    command = [sys.executable, "-m", "genvision", *words(tiny_model, out, num, batch_size)]
    kills, made = 0, 0
    while kills < 5:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wanted = made + rng.randint(2, 12)
        deadline = time.monotonic() + 120
        while len(features_present(out)) < wanted:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills, made = kills + 1, len(features_present(out))
        assert not (out / "results.json").exists()
    assert made < num // batch_size
    untouched = {path: path.stat().st_mtime_ns for path in features_present(out)}
    main(words(tiny_model, out, num, batch_size))
    assert all(path.stat().st_mtime_ns == before for path, before in untouched.items())
    ours, theirs = features(out), features(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, rows in theirs.items():
        for key, array in rows.items():
            np.testing.assert_array_equal(ours[name][key], array, err_msg=f"{name} {key}")
    assert numbers(out) == numbers(tmp_path / "whole")


@pytest.fixture(scope="module")
def adaptive_flow(tiny_flow, tmp_path_factory) -> Path:
    """`tiny_flow` whose protocol is guided dopri5, which decides on its steps image by image."""
    folder = Path(shutil.copytree(tiny_flow, tmp_path_factory.mktemp("adaptive") / "model"))
    FlowSampler(method="dopri5", rtol=1e-4, atol=1e-4, guidance_scale=2.0).save_pretrained(folder / "sampler")
    return folder


@pytest.mark.parametrize(
    ("fixture", "options"), [("tiny_flow", {"guidance_scale": 2.0, "guidance_start": 0.5}), ("adaptive_flow", {}), ("tiny_diffusion", {})]
)
def test_latents_are_scored_with_the_network_calls_that_were_made_even_after_a_kill(fixture, options, request, tmp_path):
    """The killed process is a fork of this one, which has loaded torch already."""
    model = request.getfixturevalue(fixture)
    run(model, tmp_path / "whole", batch_size=5, sampler_options=options)
    pipeline = ImagePipeline.from_pretrained(model)
    chunks = [range(i, i + 5) for i in range(0, 60, 5)]
    calls = torch.cat([pipeline([i % 10 for i in chunk], indices=chunk, **options).network_calls for chunk in chunks])
    assert (len(calls.unique()) > 1) == (fixture == "adaptive_flow")
    assert numbers(tmp_path / "whole")["sampling"]["network_calls"] == pytest.approx(float(calls.double().mean()))

    killed = tmp_path / "killed"
    job = {"batch_size": 5, "sampler_options": options}
    process = multiprocessing.get_context("fork").Process(target=run, args=(model, killed), kwargs=job)
    process.start()
    deadline = time.monotonic() + 60
    while len(features_present(killed)) < 2:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(features_present(killed)) < 12
    run(model, killed, **job)
    ours, theirs = numbers(killed), numbers(tmp_path / "whole")
    assert ours["sampling"] == theirs["sampling"]
    assert ours["fid"] == pytest.approx(theirs["fid"], rel=1e-3)


def test_two_processes_draw_and_count_the_same_latents(adaptive_flow, tiny_flow, tiny_diffusion, in_two_processes, tmp_path):
    draw = ["sample", "--num", "20", "--seed", "3", "--guidance", "2", "--batch-size", "3"]
    for model in (tiny_flow, tiny_diffusion):
        out = tmp_path / model.parent.parent.name
        in_two_processes(*draw, "--model", str(model), "--out", str(out / "two"))
        main([*draw, "--model", str(model), "--out", str(out / "one")])
        assert_same_pictures(out / "two", out / "one", 20)
    in_two_processes(*words(adaptive_flow, tmp_path / "two", 30, 7), "--keep")
    run(adaptive_flow, tmp_path / "one", num=30, batch_size=7, keep=True)
    assert_same_pictures(tmp_path / "two" / "images", tmp_path / "one" / "images", 30)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["num_processes"] == 2
    ours, theirs = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert ours["sampling"] == theirs["sampling"] and ours["sampling"]["network_calls"] % 1
    assert ours["fid"] == pytest.approx(theirs["fid"], rel=1e-3)


def assert_same_pictures(one: Path, other: Path, num: int) -> None:
    """Up to the last bit of a latent, which may move a byte by one."""
    images = [np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]) for folder in (one, other)]
    assert len(images[0]) == len(images[1]) == num and np.abs(np.subtract(*images, dtype=int)).max() <= 1


def features_present(out: Path) -> list[Path]:
    return list((out / "chunks").glob("[0-9]*.safetensors"))


def test_two_processes_give_the_same_numbers(tiny_model, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541", "-m", "genvision"]
    result = subprocess.run(
        [*command, "--", *words(tiny_model, tmp_path / "out", 60)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("FID  ") for line in result.stdout.splitlines()) == 1
    ours, theirs = numbers(tmp_path / "out"), numbers(whole)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_processes"] == 2
    for key, value in theirs.items():
        if key in ("fid", "fid_bias", "fid_debiased", "inception_score", "inception_score_std", "class_accuracy"):
            assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    assert (ours["precision"], ours["recall"], ours["generated_hash"]) == (theirs["precision"], theirs["recall"], theirs["generated_hash"])


def test_a_longer_job_takes_over_what_a_shorter_one_drew(tiny_model, whole, tmp_path):
    out = tmp_path / "out"
    run(tiny_model, out, num=32)
    drawn = {path.name: path.stat().st_mtime_ns for path in features_present(out)}
    result = run(tiny_model, out, num=60)
    assert all((out / "chunks" / name).stat().st_mtime_ns == before for name, before in drawn.items())
    assert result.num_generated == 60
    assert numbers(out) == numbers(whole)


def test_images_are_kept_if_asked_for_and_can_be_scored_again(tiny_model, whole, tmp_path):
    out = tmp_path / "out"
    run(tiny_model, out, keep=True)
    assert len(list((out / "images").glob("*.png"))) == 60
    again = evaluate(f"folder:{out / 'images'}", "digits:second", options=OPTIONS)
    assert again.fid == pytest.approx(numbers(whole)["fid"], rel=1e-5)
    (out / "images" / "000003.png").unlink()
    run(tiny_model, out, keep=True)
    assert len(list((out / "images").glob("*.png"))) == 60


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_chunk_is_named_and_made_again(tiny_model, whole, tmp_path, damage, capsys):
    out = tmp_path / "out"
    run(tiny_model, out)
    victim = out / "chunks" / "000016-000032.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "cut":
        del content[-100:]
    else:
        content[-7] ^= 1
    victim.write_bytes(content)
    result = run(tiny_model, out)
    assert any("000016-000032.safetensors: damaged" in line for line in result.warnings)
    assert "000016-000032.safetensors: damaged" in capsys.readouterr().err
    assert {**numbers(out), "warnings": None} == {**numbers(whole), "warnings": None}


def test_another_job_is_not_mixed_in(tiny_model, tmp_path):
    out = tmp_path / "out"
    run(tiny_model, out, num=16)
    before = features(out)
    with pytest.raises(UserError, match=r"holds images of another job \(it differs in seed\)"):
        run(tiny_model, out, num=16, seed=1)
    with pytest.raises(UserError, match="differs in batch_size"):
        run(tiny_model, out, num=16, batch_size=8)
    assert before.keys() == features(out).keys()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("important")
    with pytest.raises(UserError, match="already holds something else"):
        run(tiny_model, tmp_path / "else", num=16)
    assert [path.name for path in (tmp_path / "else").iterdir()] == ["thesis.txt"]


def test_what_cannot_be_scored_is_refused_before_an_image_is_drawn(tiny_model, tmp_path):
    for options, message in (
        ({"num": 5}, "at least 10 images, got 5"),
        ({"labels": "sorted"}, "labels 'sorted' is unknown"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(tiny_model, tmp_path / "out", **options)
    with pytest.raises(UserError, match="is unknown"):
        fid_from_folder(tiny_model, "digits", tmp_path / "out", options=EvaluationOptions(protocol="admm"))
    assert not (tmp_path / "out").exists()


def test_random_labels_and_other_seeds_are_other_sets(tiny_model, whole, tmp_path):
    randomly = run(tiny_model, tmp_path / "random", labels="random")
    assert randomly.labels == "random"
    assert randomly.generated_hash != numbers(whole)["generated_hash"]


def test_chunks_without_the_rows_that_are_wanted_now_are_made_again(tmp_path):
    folder = ChunkFolder(tmp_path / "chunks", {"seed": 0})
    folder.prepare()
    rows = {"pool": np.ones((2, 3), dtype=np.float32), HASHES: np.zeros((2, 16), dtype=np.uint8), CALLS: np.full(2, 6)}
    folder.store(range(2), rows, {"pool": "a"})
    found = folder.load(range(2), frozenset({"pool"}), {"pool": "a"})
    np.testing.assert_array_equal(found["pool"], rows["pool"])
    np.testing.assert_array_equal(found[CALLS], rows[CALLS])
    assert folder.load(range(2), frozenset({"pool"}), {"pool": "b"}) is None
    assert folder.load(range(2), frozenset({"pool", "logits"}), {"pool": "a", "logits": "a"}) is None
    assert folder.load(range(2, 4), frozenset({"pool"}), {"pool": "a"}) is None
    folder.store(range(4, 6), {name: array for name, array in rows.items() if name != CALLS}, {"pool": "a"})  # as earlier versions did
    assert folder.load(range(4, 6), frozenset({"pool"}), {"pool": "a"}) is None
    assert folder.warnings == []


def test_the_page_shows_images_of_every_class(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "out", num=40, page=True)
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert "FID" in page and "digits:second" in page
