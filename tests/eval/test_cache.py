import subprocess
import sys

import numpy as np
import pytest

from genvision.eval.cache import StatisticsCache

PARTS = {"content": "abc", "crop": "none", "extractor": "inception", "extractor_hash": "123"}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"mu": rng.standard_normal(64), "sigma": rng.standard_normal((64, 64)), "count": np.array([7])}


def test_what_was_stored_comes_back(tmp_path):
    cache, warnings = StatisticsCache(tmp_path / "cache"), []
    assert cache.load(PARTS, warnings) is None
    cache.store(PARTS, arrays())
    found = cache.load(dict(reversed(PARTS.items())), warnings)
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)
    assert warnings == []


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_part_of_the_key_counts(tmp_path, part):
    cache = StatisticsCache(tmp_path)
    cache.store(PARTS, arrays())
    assert cache.load({**PARTS, part: "other"}, []) is None


@pytest.mark.parametrize("keep", [0, 5, 100, 1000, -1])
def test_a_cut_file_is_named_and_not_used(tmp_path, keep):
    cache, warnings = StatisticsCache(tmp_path), []
    cache.store(PARTS, arrays())
    path = cache.path(PARTS)
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.load(PARTS, warnings) is None
    [warning] = warnings
    assert str(path) in warning and "damaged" in warning and "\n" not in warning
    cache.store(PARTS, arrays())
    assert cache.load(PARTS, warnings) is not None


def test_a_flipped_bit_is_noticed(tmp_path):
    cache, warnings = StatisticsCache(tmp_path), []
    cache.store(PARTS, arrays())
    path = cache.path(PARTS)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert cache.load(PARTS, warnings) is None
    assert "checksum" in warnings[0]


def test_an_entry_under_a_wrong_name_is_not_used(tmp_path):
    cache, warnings = StatisticsCache(tmp_path), []
    cache.store(PARTS, arrays())
    other = {**PARTS, "crop": "other"}
    cache.path(other).parent.mkdir(parents=True, exist_ok=True)
    cache.path(PARTS).rename(cache.path(other))
    assert cache.load(other, warnings) is None
    assert "something else" in warnings[0]


WRITER = """
import sys, numpy as np
from pathlib import Path
from genvision.eval.cache import StatisticsCache
rng = np.random.default_rng(int(sys.argv[2]))
arrays = {"mu": rng.standard_normal(64), "sigma": rng.standard_normal((64, 64)), "count": np.array([7])}
parts = {"content": "abc", "crop": "none", "extractor": "inception", "extractor_hash": "123"}
for _ in range(200):
    StatisticsCache(Path(sys.argv[1])).store(parts, arrays)
"""


def test_two_jobs_never_read_a_half_written_file(tmp_path):
    cache = StatisticsCache(tmp_path)
    cache.store(PARTS, arrays(0))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(seed)]) for seed in (0, 1)]
    reads, warnings, seen = 0, [], set()
    while any(writer.poll() is None for writer in writers):
        found = cache.load(PARTS, warnings)
        assert found is not None and not warnings, warnings
        seen.add(float(found["mu"][0]))
        assert any(np.array_equal(found["sigma"], arrays(seed)["sigma"]) for seed in (0, 1))
        reads += 1
    assert all(writer.returncode == 0 for writer in writers)
    assert reads > 20 and len(seen) == 2
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = StatisticsCache(tmp_path / "file")
    cache.store(PARTS, arrays())
    assert "cannot be written" in capsys.readouterr().err


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("GENVISION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert StatisticsCache().root == tmp_path / "genvision" / "statistics"
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "mine"))
    assert StatisticsCache().root == tmp_path / "mine" / "statistics"
