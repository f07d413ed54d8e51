"""Rows I, T and M at tiny sizes, and block caching where its peer is installed."""

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from genvision.bench import masked, processes, training
from genvision.bench.checks import WrongAnswer
from genvision.bench.floors import Work
from genvision.bench.plan import ROWS

TINY_MASKED = masked.Sizes(rounds=1, images=1, hidden_dim=16, depth=1, num_heads=2, codebook_size=16, grid_size=4, options={"num_steps": 2})
TINY_TRAINING = training.Sizes(rounds=1, steps=1, side=4, hidden_dim=12, depth=1, num_heads=1, batch_size=2, num_samples=4)


def test_masked_decoding_is_measured_by_the_floor_alone():
    (result,) = masked.measure([ROWS["M1"]], TINY_MASKED)
    assert result.outcome == "measured" and result.ratio is None and 0 < result.fraction.median < 1
    assert "work 1.000 of torch's count" in result.check


def test_work_that_is_not_done_may_not_be_claimed():
    job = masked.DecodingJob(TINY_MASKED)
    job.work = Work(2 * job.work.flops)
    with pytest.raises(WrongAnswer, match="are claimed"):
        job.check()


@pytest.mark.parametrize("row", ["T1", "T1g"])
def test_steps_of_both_loops_have_the_same_losses_and_are_timed(row, capsys):
    (result,) = training.measure([ROWS[row]], TINY_TRAINING)
    assert result.outcome == "measured" and result.rounds == 1 and result.unit == "step"
    assert result.check.startswith("losses of 3 steps") and "for data" in result.notes[0]
    assert capsys.readouterr().err == ""


def test_loops_over_other_data_have_other_losses(tmp_path):
    losses = {}
    for seed, sizes in enumerate([TINY_TRAINING, replace(TINY_TRAINING, num_samples=3)]):
        (tmp_path / str(seed)).mkdir()
        data = training.write_set(tmp_path / f"codes{seed}", sizes)
        losses[seed] = training.bare_loop(replace(sizes, steps=0), data, tmp_path / str(seed), [])
    with pytest.raises(WrongAnswer):
        training.check_close("losses", torch.tensor(losses[0]), torch.tensor(losses[1]))


def test_the_import_of_the_package_is_timed_in_processes_of_its_own():
    (result,) = processes.measure([ROWS["I2"]], processes.Sizes(import_rounds=2))
    assert result.outcome == "measured" and result.clock == "wall" and 0 < result.own_ms < 5000
    assert result.reached == (result.own_ms <= 150)


def test_processes_take_turns_and_a_failing_one_is_no_result(tmp_path):
    commands = {"own": [sys.executable, "-c", "pass"], "peer": [sys.executable, "-c", "sum(range(10**6))"]}
    seconds = processes.processes_by_turns(commands, 2, warm=False, written=tmp_path / "nothing")
    assert all(len(times) == 2 and min(times) > 0 for times in (*seconds.cpu.values(), *seconds.wall.values()))
    with pytest.raises(WrongAnswer, match="ends with status 3: it said nothing"):
        processes.processes_by_turns({"own": [sys.executable, "-c", "exit(3)"]}, 1, warm=False, written=tmp_path / "nothing")


def test_a_command_must_write_a_picture_of_more_than_one_colour(tmp_path):
    code = f"from PIL import Image; Image.new('RGB', (8, 8), 'red').save({str(tmp_path / 'red.png')!r})"
    with pytest.raises(WrongAnswer, match="an image of 8 x 8"):
        processes.check_sampled([sys.executable, "-c", code], tmp_path / "red.png", 8)
    with pytest.raises(WrongAnswer, match="status 1: ZeroDivisionError"):
        processes.check_sampled([sys.executable, "-c", "1 / 0"], tmp_path / "red.png", 8)


@pytest.mark.slow
def test_a_whole_sampling_process_is_timed_beside_the_import_of_diffusers():
    (result,) = processes.measure([ROWS["I1"]], processes.Sizes(rounds=1, warm=False))
    assert result.outcome == "measured", result.reason
    assert result.ratio.median > 0 and 0 < result.fraction.median <= 1.2 and result.unit == "process"


def test_the_tiny_pipeline_is_one_that_sampling_reads(tmp_path):
    from genvision.pipeline import ImagePipeline

    side = processes.write_tiny_pipeline(tmp_path / "model")
    image = ImagePipeline.from_pretrained(tmp_path / "model")([0]).images[0]
    assert isinstance(image, Image.Image) and image.size == (side, side)


def test_block_caching_beside_cache_dit():
    pytest.importorskip("cache_dit", reason="the peer of this row: pip install cache-dit")
    from genvision.bench import block_caching

    sizes = block_caching.Sizes(rounds=1, network="tiny", depth=2, steps=10, thresholds=(0.2,))
    (result,) = block_caching.measure([ROWS["D3c"]], sizes)
    assert result.outcome == "measured" and result.samples_differ and "from uncached ones" in result.notes[0]
