"""Sampling jobs: the same images however they are run, interrupted or written."""

import json
import re
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

from genvision.cli import main
from genvision.errors import UserError
from genvision.images import from_uint8, to_uint8
from genvision.jobs.known_tokens import known_tokens
from genvision.jobs.sample import SampleRequest, open_job, sample, sample_from_folder
from genvision.models.dit import DiT
from genvision.models.mage import MAGE
from genvision.pipeline import ImagePipeline
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.masked import MaskedSampler
from genvision.samplers.randomness import draw_labels
from genvision.tokenizers.base import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def draw(model: Path, out: Path, **options) -> None:
    sample_from_folder(model, out, **{"num": 16, "batch_size": 16, "seed": 5, **options})


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """Images 0 .. 15 of the tiny model with guidance, drawn at once by one process."""
    out = tmp_path_factory.mktemp("whole") / "images"
    draw(tiny_model, out, sampler_options={"guidance_scale": 2.0})
    return out


@pytest.fixture
def pipeline(tiny_model) -> ImagePipeline:
    return ImagePipeline.from_pretrained(tiny_model)


class TestTheSameImages:
    @pytest.mark.parametrize("batch_size", [1, 4, 5])
    def test_whatever_the_batch_size(self, tiny_model, whole, tmp_path, batch_size):
        draw(tiny_model, tmp_path / "out", batch_size=batch_size, sampler_options={"guidance_scale": 2.0})
        assert len(pictures(whole)) == 16
        assert contents(tmp_path / "out") == contents(whole)

    def test_in_codes_too(self, pipeline):
        labels = [i % 10 for i in range(16)]
        together = pipeline(labels, seed=5, guidance_scale=2.0).codes
        for size in (1, 4):
            parts = [
                pipeline(labels[i : i + size], seed=5, indices=range(i, i + size), guidance_scale=2.0).codes for i in range(0, 16, size)
            ]
            assert torch.equal(torch.cat(parts), together)
        assert len(together.flatten(1).unique(dim=0)) == 16  # not one image sixteen times

    def test_from_two_processes(self, tiny_model, whole, tmp_path):
        words = ["sample", "--model", str(tiny_model), "--num", "16", "--seed", "5", "--guidance", "2", "--batch-size", "3"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533", "-m", "genvision"]
        result = subprocess.run(
            [*command, "--", *words, "--out", str(tmp_path / "out")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        assert "sampling: 9/9 images" in result.stderr  # the first process draws every other batch of three
        assert contents(tmp_path / "out") == contents(whole)

    def test_from_a_longer_job(self, tiny_model, whole, tmp_path):
        draw(tiny_model, tmp_path / "out", num=21, sampler_options={"guidance_scale": 2.0})
        assert list(pictures(tmp_path / "out").items())[:16] == list(pictures(whole).items())

    def test_but_not_from_another_seed(self, tiny_model, whole, tmp_path):
        draw(tiny_model, tmp_path / "out", seed=6, sampler_options={"guidance_scale": 2.0})
        assert not pictures(tmp_path / "out").items() & pictures(whole).items()


LATENT_PROTOCOLS = {
    "euler": ("tiny_flow", {}),
    "noise at every step": ("tiny_flow", {"method": "euler-maruyama"}),
    "steps of its own": ("tiny_flow", {"method": "dopri5", "rtol": 0.01, "atol": 0.01}),
    "ddpm": ("tiny_diffusion", {}),
    "ddim": ("tiny_diffusion", {"method": "ddim", "eta": 0.5}),
}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def assert_same_up_to_rounding(images: np.ndarray, others: np.ndarray) -> None:
    """Latents come out of sums, whose last bit depends on the batch; where a byte is cut off there it moves by one."""
    difference = np.abs(images - others)
    assert images.shape == others.shape and difference.max() <= 1 and difference.mean() < 1e-3


class TestLatents:
    """Models of latents draw like models of tokens: an image depends on (seed, number) alone."""

    @pytest.mark.parametrize("protocol", LATENT_PROTOCOLS)
    def test_the_same_images_whatever_the_batch_size(self, protocol, request, tmp_path):
        fixture, options = LATENT_PROTOCOLS[protocol]
        model = request.getfixturevalue(fixture)
        options = {"sampler_options": {"guidance_scale": 2.0, **options}}
        for size in (16, 5, 1):
            draw(model, tmp_path / str(size), batch_size=size, **options)
        whole = pixels(tmp_path / "16")
        assert len(np.unique(whole, axis=0)) == 16
        for size in ("5", "1"):
            assert_same_up_to_rounding(pixels(tmp_path / size), whole)

    def test_every_option_arrives(self, tiny_flow, tmp_path):
        words = ["sample", "--model", str(tiny_flow), "--num", "3", "--steps", "4", "--method", "heun", "--guidance", "1.5"]
        words += ["--guidance-interval", "[0.25, 0.75]", "--guidance-channels", "1", "--guidance-schedule", "linear", "--time-shift", "2"]
        main([*words, "--out", str(tmp_path / "out")])
        job = json.loads((tmp_path / "out" / "job.json").read_text())
        options = {"num_steps": 4, "method": "heun", "guidance_scale": 1.5, "guidance_start": 0.25, "guidance_stop": 0.75}
        options |= {"guidance_channels": 1, "guidance_schedule": "linear", "time_shift": 2.0}
        assert job["sampler"].items() >= options.items()
        expected = ImagePipeline.from_pretrained(tiny_flow)([0, 1, 2], output_type="np", **options)
        np.testing.assert_array_equal(pixels(tmp_path / "out"), expected.images)
        assert expected.network_calls.tolist() == [job["network_calls"]] * 3
        assert 8 < job["network_calls"] < 16  # two calls a step, and some of them guided

    @pytest.mark.parametrize(
        ("fixture", "words"),
        [
            ("tiny_flow", ["--steps", "3"]),
            ("tiny_flow", ["--time-shift", "3"]),
            ("tiny_diffusion", ["--method", "ddim"]),
            ("tiny_diffusion", ["--steps", "100"]),
            ("tiny_diffusion", ["--guidance", "3"]),
        ],
    )
    def test_every_option_matters(self, fixture, words, request, tmp_path):
        base = ["sample", "--model", str(request.getfixturevalue(fixture)), "--num", "2", "--out"]
        main([*base, str(tmp_path / "plain")])
        main([*base, str(tmp_path / "changed"), *words])
        assert np.abs(pixels(tmp_path / "plain") - pixels(tmp_path / "changed")).mean() > 0.1

    def test_a_weaker_model_guides(self, tiny_flow, tmp_path):
        weaker = tmp_path / "weaker"
        shutil.copytree(tiny_flow, weaker)
        generator = DiT.from_pretrained(weaker, subfolder="generator")
        with torch.no_grad():
            generator.head.linear.weight.mul_(0.5)
        generator.save_pretrained(weaker / "generator")
        base = ["sample", "--model", str(tiny_flow), "--num", "4", "--out"]
        main([*base, str(tmp_path / "plain")])
        main([*base, str(tmp_path / "itself"), "--guidance", "3", "--guide", str(tiny_flow)])
        main([*base, str(tmp_path / "guided"), "--guidance", "3", "--guide", str(weaker)])
        assert_same_up_to_rounding(pixels(tmp_path / "itself"), pixels(tmp_path / "plain"))  # weak + 3 (strong - weak)
        assert np.abs(pixels(tmp_path / "guided") - pixels(tmp_path / "plain")).mean() > 1
        jobs = [json.loads((tmp_path / name / "job.json").read_text()) for name in ("plain", "itself", "guided")]
        assert [job["network_calls"] for job in jobs] == [6, 12, 12]
        assert "guide_hash" not in jobs[0] and jobs[1]["guide_hash"] == jobs[1]["generator_hash"] != jobs[2]["guide_hash"]
        with pytest.raises(UserError, match="guide_hash"):  # another guide is another job
            draw(tiny_flow, tmp_path / "guided", num=4, seed=0, guide=tiny_flow, sampler_options={"guidance_scale": 3.0})

    def test_guidance_is_that_of_the_pipeline_inside_the_interval_only(self, tiny_diffusion):
        pipeline = ImagePipeline.from_pretrained(tiny_diffusion)
        plain = pipeline([0, 1])
        assert torch.equal(pipeline([0, 1], guidance_scale=3.0, guidance_start=0.5, guidance_stop=0.5).codes, plain.codes)
        late = pipeline([0, 1], guidance_scale=3.0, guidance_start=0.5)
        assert not torch.equal(late.codes, plain.codes)
        assert late.network_calls.tolist() == [9, 9] and plain.network_calls.tolist() == [6, 6]

    def test_bfloat16_draws_nearly_the_same(self, tiny_flow, tmp_path):
        for dtype in ("float32", "bfloat16"):
            draw(tiny_flow, tmp_path / dtype, num=4, dtype=dtype)
        assert 0 < np.abs(pixels(tmp_path / "bfloat16") - pixels(tmp_path / "float32")).mean() < 5

    def test_missing_pictures_are_drawn_again(self, tiny_diffusion, tmp_path):
        draw(tiny_diffusion, tmp_path / "out", batch_size=4)
        whole = pixels(tmp_path / "out")
        for name in ("000003.png", "000009.png", "labels.json"):
            (tmp_path / "out" / name).unlink()
        draw(tiny_diffusion, tmp_path / "out", batch_size=4)
        assert_same_up_to_rounding(pixels(tmp_path / "out"), whole)


class TestInterruption:
    def test_missing_pictures_are_drawn_again(self, tiny_model, whole, tmp_path):
        options = {"batch_size": 4, "sampler_options": {"guidance_scale": 2.0}}
        out = tmp_path / "out"
        draw(tiny_model, out, **options)
        for name in ("000003.png", "000007.png", "000008.png", "labels.json"):
            (out / name).unlink()
        untouched = (out / "000013.png").stat().st_mtime_ns
        draw(tiny_model, out, **options)
        assert contents(out) == contents(whole)
        assert (out / "000013.png").stat().st_mtime_ns == untouched

    def test_a_killed_job_goes_on_and_ends_equal(self, tiny_model, tmp_path):
        out = tmp_path / "out"
        words = ["sample", "--model", str(tiny_model), "--num", "200", "--batch-size", "2", "--out"]
        process = subprocess.Popen(
            [sys.executable, "-m", "genvision", *words, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while len(pictures(out)) < 10:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 10 <= len(pictures(out)) < 200
        (out / ".000199.png.123.part").write_bytes(b"half")  # as a kill in the middle of a write leaves it
        main([*words, str(out)])
        main([*words, str(tmp_path / "whole")])
        assert contents(out) == contents(tmp_path / "whole")

    def test_a_job_killed_before_its_first_image_goes_on(self, tiny_model, whole, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / ".job.json.123.part").write_text("{")
        draw(tiny_model, out, sampler_options={"guidance_scale": 2.0})
        assert contents(out) == contents(whole)

    def test_another_batch_size_may_finish_a_file(self, tiny_model, tmp_path):
        class Stop(Exception):
            pass

        pipeline = ImagePipeline.from_pretrained(tiny_model)
        decode, calls = pipeline.tokenizer.decode, []

        def failing(codes):
            calls.append(len(codes))
            if len(calls) == 3:
                raise Stop
            return decode(codes)

        pipeline.tokenizer.decode = failing
        request = SampleRequest(num=16, classes=(1, 2))
        with pytest.raises(Stop):
            sample(pipeline, request, tmp_path / "out.npz", batch_size=4)
        assert not (tmp_path / "out.npz").exists()
        pipeline.tokenizer.decode = decode
        sample(pipeline, request, tmp_path / "out.npz", batch_size=5)
        sample(pipeline, request, tmp_path / "whole.npz", batch_size=16)
        assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


class TestFormats:
    def test_a_folder_says_what_it_holds(self, whole):
        content = json.loads((whole / "labels.json").read_text())
        assert content["label_names"] == [str(i) for i in range(10)]
        assert content["labels"] == {f"{i:06d}.png": i % 10 for i in range(16)}
        job = json.loads((whole / "job.json").read_text())
        assert (job["seed"], job["num"], job["dtype"], job["rounding"]) == (5, 16, "float32", "trunc127.5")
        assert job["sampler"]["guidance_scale"] == 2.0
        assert len(job["generator_hash"]) == len(job["tokenizer_hash"]) == 64

    def test_an_npz_is_as_adm_reads_it(self, tiny_model, whole, tmp_path):
        draw(tiny_model, tmp_path / "out.npz", sampler_options={"guidance_scale": 2.0})
        with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
        assert images.dtype == np.uint8 and images.shape == (16, 8, 8, 3)
        assert labels.dtype == np.int64 and labels.tolist() == [i % 10 for i in range(16)]
        for i, path in enumerate(sorted(whole.glob("*.png"))):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), images[i])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "out.npz.json"]

    def test_a_grid_has_a_row_for_each_class(self, tiny_model, tmp_path):
        draw(tiny_model, tmp_path / "grid.png", num=6, classes="7,2")
        draw(tiny_model, tmp_path / "images", num=6, classes="7,2")
        grid = np.asarray(Image.open(tmp_path / "grid.png"))
        factor, gap = 8, 2  # 8 pixels are shown as 64
        height, width = grid.shape[:2]
        assert height == gap + 2 * (64 + gap)
        left = width - 3 * (64 + gap)  # behind the names of the rows
        images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").glob("*.png"))]
        for row, numbers in enumerate(([1, 3, 5], [0, 2, 4])):  # class 2 above class 7
            for column, i in enumerate(numbers):
                y, x = gap + row * (64 + gap), left + column * (64 + gap)
                np.testing.assert_array_equal(grid[y : y + 64 : factor, x : x + 64 : factor], images[i])

    def test_a_finished_file_is_not_drawn_again(self, tiny_model, tmp_path, pipeline):
        request = SampleRequest(num=4, classes=(1,))
        sample(pipeline, request, tmp_path / "out.npz")
        written = (tmp_path / "out.npz").stat().st_mtime_ns
        sample(pipeline, request, tmp_path / "out.npz")
        assert (tmp_path / "out.npz").stat().st_mtime_ns == written
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "out.npz.json"]


class TestLabels:
    def test_balanced_labels_go_through_the_classes_in_turn(self):
        request = SampleRequest(num=7, classes=(4, 2, 9))
        assert request.labels_of(range(7)).tolist() == [4, 2, 9, 4, 2, 9, 4]
        assert request.labels_of([5, 1]).tolist() == [9, 2]

    def test_random_labels_belong_to_the_image(self):
        request = SampleRequest(num=2000, classes=(4, 2, 9), labels="random", seed=3)
        labels = request.labels_of(range(2000))
        assert torch.equal(labels, draw_labels(3, range(2000), [4, 2, 9]))
        assert torch.equal(request.labels_of(range(100, 120)), labels[100:120])
        counts = torch.bincount(labels, minlength=10)
        assert counts.nonzero().flatten().tolist() == [2, 4, 9]
        assert (counts[[2, 4, 9]] - 2000 / 3).abs().max() < 100

    def test_labels_are_written_with_the_images(self, tiny_model, tmp_path):
        draw(tiny_model, tmp_path / "out", num=20, labels="random", classes="1,8")
        written = json.loads((tmp_path / "out" / "labels.json").read_text())["labels"]
        assert list(written.values()) == draw_labels(5, range(20), [1, 8]).tolist()


class TestKnownTokens:
    """What is kept of a picture is in test_known_tokens.py."""

    @pytest.fixture
    def pictures(self, tmp_path) -> dict[str, Path]:
        """A picture, and masks of its size that are white in the lower half, in the third row of tokens alone, nowhere."""
        rng = np.random.default_rng(0)
        arrays = {"picture": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)}
        for name, rows in {"lower": slice(4, 8), "middle": slice(4, 6), "nothing": slice(0, 0)}.items():
            arrays[name] = np.zeros((8, 8), np.uint8)
            arrays[name][rows] = 255
        paths = {name: tmp_path / f"{name}.png" for name in arrays}
        for name, array in arrays.items():
            Image.fromarray(array).save(paths[name])
        return paths

    def test_a_job_completes_every_image(self, tiny_model, pipeline, pictures, tmp_path):
        words = ["sample", "--model", str(tiny_model), "--num", "4", "--out", str(tmp_path / "out.npz")]
        main([*words, "--complete", str(pictures["picture"])])
        known = known_tokens(pipeline, complete=pictures["picture"])
        expected = pipeline([0, 1, 2, 3], known=known.expand(4, -1, -1), output_type="np").images
        with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["arr_0"], expected)
        assert len(np.unique(expected, axis=0)) > 1
        written = (tmp_path / "out.npz").stat().st_mtime_ns
        main([*words, "--init", str(pictures["picture"]), "--mask", str(pictures["lower"])])  # the same tokens are known: the same job
        assert (tmp_path / "out.npz").stat().st_mtime_ns == written

    def test_another_mask_is_another_job(self, tiny_model, pictures, tmp_path):
        draw(tiny_model, tmp_path / "out", num=2, init=pictures["picture"], mask=pictures["lower"])
        for options in ({"init": pictures["picture"], "mask": pictures["nothing"]}, {}):
            with pytest.raises(UserError, match=r"differs in known\)"):
                draw(tiny_model, tmp_path / "out", num=2, **options)

    def test_where_nothing_is_drawn_the_picture_comes_back_through_the_tokenizer(self, tiny_model, pipeline, pictures, tmp_path):
        draw(tiny_model, tmp_path / "out", num=2, init=pictures["picture"], mask=pictures["nothing"])
        image = from_uint8(np.asarray(Image.open(pictures["picture"]))[None])
        reconstruction = to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(image)))
        np.testing.assert_array_equal(pixels(tmp_path / "out"), np.repeat(reconstruction, 2, axis=0))

    def test_a_mask_that_the_sampler_cannot_fill_is_refused_before_anything_is_written(self, tiny_model, pictures, tmp_path):
        with pytest.raises(UserError, match="must be the first ones"):
            draw(tiny_model, tmp_path / "out", init=pictures["picture"], mask=pictures["middle"])
        assert not (tmp_path / "out").exists()


class CountedSampler(AutoregressiveSampler):
    """One that knows what an image costs."""

    def multiply_adds(self, generator):
        return 700_000_000 * generator.num_tokens


class TestCost:
    def test_it_is_told_where_the_sampler_counts_it(self, pipeline, tmp_path, capsys):
        request = SampleRequest(num=2, classes=(1,))
        sample(pipeline, request, tmp_path / "plain")
        assert "network calls" not in capsys.readouterr().err
        pipeline.sampler = CountedSampler()
        sample(pipeline, request, tmp_path / "counted")
        shown = capsys.readouterr()
        assert shown.err.splitlines()[-1] == "16 network calls, 22.40 GFLOPs an image" and shown.out == ""


class TestOptions:
    @pytest.fixture
    def protocol(self, tiny_model, tmp_path):
        """Options of the sampler that a command line leads to."""

        def run(*words: str) -> dict:
            out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            main(["sample", "--model", str(tiny_model), "--num", "1", "--out", str(out), *words])
            return json.loads((out / "job.json").read_text())["sampler"]

        return run

    def test_the_models_own_protocol_holds_unless_told(self, protocol, pipeline):
        expected = {name: value for name, value in dict(pipeline.sampler.config).items() if not name.startswith("_")}
        assert protocol() == {"name": "AutoregressiveSampler", **expected}

    def test_every_option_arrives(self, protocol):
        found = protocol(
            *("--guidance", "3", "--guidance-schedule", "cosine", "--guidance-interval", "[0.25, 0.5]"),
            *("--temperature", "0.5", "--top-k", "7", "--top-p", "0.75"),
        )
        assert found == {
            "name": "AutoregressiveSampler",
            "guidance_scale": 3.0,
            "guidance_schedule": "cosine",
            "guidance_start": 0.25,
            "guidance_stop": 0.5,
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.75,
            "guidance_power": 1.0,
        }

    @pytest.mark.parametrize(("option", "value"), [("order", "halton"), ("choice_temperature", "4.5"), ("nesting", "2x3,1x3")])
    def test_options_of_masked_tokens_are_no_options_of_others(self, protocol, capsys, option, value):
        with pytest.raises(SystemExit):
            protocol(f"--{option.replace('_', '-')}", value)
        assert f"AutoregressiveSampler has no option '{option}'" in capsys.readouterr().err

    @pytest.mark.parametrize(("interval", "stop"), [("-1", 1.0), ("0", 2 / 16), ("3", 5 / 16), ("100", 1.0)])
    def test_llamagens_interval_guides_the_first_c_plus_2_tokens(self, protocol, interval, stop):
        found = protocol("--guidance", "3", "--cfg-interval", interval)
        assert (found["guidance_start"], found["guidance_stop"]) == (0.0, stop)

    def test_guidance_outside_its_interval_changes_nothing(self, pipeline):
        labels = list(range(8))
        plain = pipeline(labels, guidance_scale=1.0).codes.flatten(1)
        late = pipeline(labels, guidance_scale=9.0, guidance_start=0.5).codes.flatten(1)
        assert torch.equal(late[:, :8], plain[:, :8])
        assert not torch.equal(late[:, 8:], plain[:, 8:])

    def test_the_rounding_rule_is_the_jobs(self, tiny_model, pipeline, tmp_path):
        floats = pipeline([3], seed=5, output_type="pt").images
        for rounding in ("trunc127.5", "trunc255", "round"):
            draw(tiny_model, tmp_path / rounding.replace(".", "_"), num=1, classes="3", rounding=rounding)
            written = np.asarray(Image.open(tmp_path / rounding.replace(".", "_") / "000000.png"))
            np.testing.assert_array_equal(written, to_uint8(floats, rounding)[0])

    def test_bfloat16_is_another_job(self, tiny_model, tmp_path):
        draw(tiny_model, tmp_path / "out", num=2, dtype="bfloat16")
        assert json.loads((tmp_path / "out" / "job.json").read_text())["dtype"] == "bfloat16"
        with pytest.raises(UserError, match="dtype"):
            draw(tiny_model, tmp_path / "out", num=2)

    def test_block_caching_says_what_it_leaves_out_and_what_it_changes(self, tiny_flow, tmp_path, capfd):
        draw(tiny_flow, tmp_path / "out", num=6, batch_size=4, sampler_options={"cache_interval": 2, "num_steps": 12})
        said = capfd.readouterr().err
        share = re.search(r"block caching: (\d+) of (\d+) block runs an image left out; the first 4 images .* by ([\d.e-]+)%", said)
        assert share is not None and 0 < int(share[1]) < int(share[2]) and float(share[3]) > 0
        job = json.loads((tmp_path / "out" / "job.json").read_text())
        assert job["block_runs"] == [int(share[2]) - int(share[1]), int(share[2])]

    def test_rounded_weights_are_another_job(self, tiny_model, tmp_path):
        draw(tiny_model, tmp_path / "float32", num=2)
        draw(tiny_model, tmp_path / "int8", num=2, weights="int8")
        jobs = [json.loads((tmp_path / name / "job.json").read_text()) for name in ("float32", "int8")]
        assert jobs[0] | {"weights": "int8"} == jobs[1]
        with pytest.raises(UserError, match="weights"):
            draw(tiny_model, tmp_path / "int8", num=2, weights="float16")

    @pytest.mark.parametrize("name", ["checkpoint-3.5", "imagenet_cfg2.0"])
    def test_a_folder_may_have_a_dot_in_its_name(self, tiny_model, tmp_path, name):
        draw(tiny_model, tmp_path / name, num=1)
        assert (tmp_path / name / "000000.png").is_file()


def test_an_unconditional_model_has_no_classes_to_choose(tiny_tokenizer, tmp_path):
    sizes = {"hidden_dim": 8, "depth": 1, "num_heads": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    generator = MAGE(codebook_size=16, grid_size=4, num_classes=2, class_dropout=1.0, **sizes)
    pipeline = ImagePipeline(generator, load_tokenizer(tiny_tokenizer / "tokenizer"), MaskedSampler(num_steps=4), ["a", "b"])
    pipeline.save_pretrained(tmp_path / "model")
    assert "labels make no difference" in (tmp_path / "model/README.md").read_text()
    with pytest.raises(UserError, match="--classes: this model is unconditional"):
        open_job(tmp_path / "model", classes="1")
    _, request = open_job(tmp_path / "model", num=3)
    assert request.classes == (0, 1)
