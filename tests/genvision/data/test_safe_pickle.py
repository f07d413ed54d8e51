"""Pickles of arrays are read whole, without a copy where they are long, and run nothing."""

import pickle

import numpy as np
import pytest
from python2_pickle import dump_python2

from genvision.data.safe_pickle import MAPPED_BYTES, load_pickle

CONTENT = {
    "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "high byte first": np.arange(3, dtype=">i4"),
    "inside": {"is": np.array([True, False])},
    "scalar": np.float32(0.5),
    "labels": [1, 1000, 3],
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numbers_come_back_as_they_were(tmp_path, protocol):
    (tmp_path / "a").write_bytes(pickle.dumps(CONTENT, protocol=protocol))
    found = load_pickle(tmp_path / "a")
    assert found["labels"] == [1, 1000, 3] and found["scalar"] == 0.5
    for name in ("data", "by columns", "high byte first"):
        np.testing.assert_array_equal(found[name], CONTENT[name])
        assert found[name].dtype == CONTENT[name].dtype
    assert found["inside"]["is"].tolist() == [True, False]


def test_keys_that_python_2_wrote_are_text(tmp_path):
    dump_python2({**CONTENT, "names": ["a", "b"]}, tmp_path / "a")
    found = load_pickle(tmp_path / "a")
    assert found["names"] == [b"a", b"b"]
    np.testing.assert_array_equal(found["high byte first"], [0, 1, 2])


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_a_long_array_stays_in_the_file(tmp_path, protocol):
    content = {"data": np.zeros(MAPPED_BYTES, dtype=np.uint8)}
    if protocol == 2:
        dump_python2(content, tmp_path / "a")
    else:
        (tmp_path / "a").write_bytes(pickle.dumps(content, protocol=protocol))
    found = load_pickle(tmp_path / "a")["data"]
    assert not found.flags.writeable and not found.any()
    with (tmp_path / "a").open("r+b") as file:
        file.seek(MAPPED_BYTES // 2)
        file.write(b"\x07")
    assert np.count_nonzero(found) == 1  # it sees the file's change


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Evil(open, "owned", "w"), "open"),
        ({"data": Evil(eval, "1")}, "eval"),
        ({"data": np.array([Evil(print, "x")], dtype=object)}, "type O8?, not of numbers|print"),
        ({"data": Evil(np.load, "x.npy", "r", True)}, "load"),
        ({"labels": {1, 2}.__class__}, "set"),
    ],
)
def test_every_other_name_is_refused_and_nothing_runs(tmp_path, monkeypatch, content, name, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match=name):
        load_pickle(tmp_path / "a")
    assert not (tmp_path / "owned").exists()


def test_cut_and_broken_files_are_said_to_be_so(tmp_path):
    whole = pickle.dumps(CONTENT | {"long": np.ones(MAPPED_BYTES, np.uint8)}, protocol=4)
    for content in [whole[:keep] for keep in (0, 1, 40, 300, len(whole) - 1000, len(whole) - 1)] + [b"text", b"\x80\x04N0.", bytes(50)]:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(pickle.UnpicklingError):
            load_pickle(tmp_path / "a")


def test_broken_bytes_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    whole = np.frombuffer(pickle.dumps(CONTENT, protocol=2), dtype=np.uint8)
    for _ in range(100):
        broken = whole.copy()
        broken[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "a").write_bytes(broken.tobytes())
        try:
            load_pickle(tmp_path / "a")
        except pickle.UnpicklingError:
            continue
