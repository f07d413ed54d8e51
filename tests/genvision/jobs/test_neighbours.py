import json

import numpy as np
import pytest
from PIL import Image

from genvision.errors import UserError
from genvision.eval.features import ExtractorOptions
from genvision.eval.neighbours import NeighbourConfig
from genvision.jobs.neighbours import search_neighbours

FEW = NeighbourConfig(num=20, num_neighbours=2)


def run(out, generated="digits:first", train="digits:second", **options):
    settings = {"extractor": "digits", "options": ExtractorOptions(), "config": FEW, "show_progress": False} | options
    return search_neighbours(generated, train, out, **settings)


def test_numbers_arrays_and_a_picture_are_written(tmp_path):
    out = tmp_path / "out"
    result = run(out, held_out="digits:first", num_shown=4)
    assert sorted(path.name for path in out.iterdir()) == ["neighbours.npz", "neighbours.png", "results.json"]
    assert json.loads((out / "results.json").read_text())["pixels_nearer"] == result.pixels_nearer == 0.5
    with np.load(out / "neighbours.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == [
            *("features_distances", "features_indices", "generated", "held_out", "pixels_distances", "pixels_indices")
        ]
        assert arrays["features_indices"].shape == (40, 2) and arrays["generated"].shape == (20,)
    with Image.open(out / "neighbours.png") as picture:
        assert min(picture.size) > 300


def test_pixels_alone_need_no_extractor(tmp_path):
    result = run(tmp_path / "out", extractor="none")
    assert result.extractor is None and result.features_distances is None and result.pixels_distances[0] > 0


def test_bad_requests_leave_nothing_behind(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("important")
    for out, options, message in (
        (tmp_path / "full", {}, "already holds"),
        (tmp_path / "out", {"extractor": "inceptoin"}, "inceptoin"),
        (tmp_path / "out", {"train": "digits:third"}, "part 'third'"),
        (tmp_path / "out", {"num_shown": 0}, "rows at least 1"),
        (tmp_path / "out", {"image_size": 0}, "image_size"),
    ):
        with pytest.raises(UserError, match=message):
            run(out, **options)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
