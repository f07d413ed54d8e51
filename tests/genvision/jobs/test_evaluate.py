"""The evaluate command on several processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from genvision.cli import main

ROOT = Path(__file__).resolve().parents[3]


def test_two_processes_find_what_one_finds_and_share_the_cache(tmp_path):
    words = ["evaluate", "--generated", "digits:first", "--reference", "digits:second", "--protocol", "digits", "--device", "cpu"]
    words += ["--workers", "0", "--batch-size", "50", "--cache", str(tmp_path / "cache")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "genvision", "--"]
    two = subprocess.run([*launcher, *words, "--json", str(tmp_path / "two.json")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert sum(line.startswith("FID  ") for line in two.stdout.splitlines()) == 1
    main([*words, "--json", str(tmp_path / "one.json")])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert (one["reference_cached"], two["reference_cached"]) == (True, False)
    for key in ("fid", "fid_infinity", "inception_score", "precision", "recall", "class_accuracy"):
        assert two[key] == pytest.approx(one[key], rel=1e-9), key
    for key in ("fid_interval", "precision_interval"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    same = one.keys() - {key for key in one if isinstance(one[key], float | list)}
    assert {key for key in same if one[key] != two[key]} == {"num_processes", "reference_cached"}
