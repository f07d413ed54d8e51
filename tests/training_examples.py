"""Training runs in folders below one, and comparisons of what they leave."""

import multiprocessing
import signal
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from genvision.cli import main
from genvision.errors import UserError


class Runs:
    """Trains in this process, in folders below one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def words(self, name: str, config: dict, *more: object) -> list[str]:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["train", "--config", str(path), "--output_dir", str(self.folder / name), *map(str, more)]

    def __call__(self, name: str, config: dict, *more: object) -> Path:
        main(self.words(name, config, *more))
        return self.folder / name

    def killed(self, name: str, config: dict, step: int) -> Path:
        """The same in a fork of this process, killed after the checkpoint of that step and before the last; then it goes on here."""
        words, run = self.words(name, config), self.folder / name
        process = multiprocessing.get_context("fork").Process(target=main, args=(words,))
        process.start()
        deadline = time.monotonic() + 120
        while newest_step(run) < step:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and newest_step(run) < config["train"]["num_steps"]
        main([*words])
        return run

    def refused(self, config: dict, *more: object) -> str:
        """The one line of a run that must fail and leave nothing."""
        with pytest.raises(UserError) as error:
            main(["--debug", *self.words("refused", config, *more)])
        assert not (self.folder / "refused").exists()
        assert "\n" not in str(error.value)
        return str(error.value)


def newest_step(run: Path) -> int:
    return max((int(path.name[5:13]) for path in (run / "checkpoints").glob("step_????????")), default=0)


def weights(run: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """Of the last checkpoint."""
    return load_file(max((run / "checkpoints").iterdir()) / name)


def assert_equal_weights(one: Path, other: Path, atol: float = 1e-5) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        difference = (tensor - right[name]).abs()
        if name.endswith("qkv.bias"):  # attention does not depend on the bias of its keys, so that gradient is rounding alone
            difference[len(difference) // 3 : 2 * len(difference) // 3] = 0
        assert difference.max() <= atol, (name, difference.max())


def largest_difference(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    return max(float((tensor - right[name]).abs().max()) for name, tensor in left.items())


def assert_same_run(one: Path, other: Path) -> None:
    """Model, averages and optimiser state of the last checkpoint, and the finished model, bit for bit."""
    last = max((one / "checkpoints").iterdir()).relative_to(one)
    states = {path.name for path in (one / last).iterdir() if path.suffix in (".safetensors", ".pt")}
    assert {"model.safetensors", "ema_0.9.safetensors", "optimizer.safetensors"} <= states
    for name in states:
        if name.endswith(".pt"):
            assert (one / last / name).read_bytes() == (other / last / name).read_bytes(), name
            continue
        left, right = load_file(one / last / name), load_file(other / last / name)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].equal(right[key]), (name, key)
    for path in (one / "model").rglob("*.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()
