"""Reading the parity fixtures: tensors and facts recorded from the original implementations."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "parity"


class Fixture:
    """`state`, `inputs` and `outputs` of one original implementation at a tiny size, with its `config` and `atol`."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config: dict[str, Any] = json.loads(metadata["config"])
        self.metadata = metadata
        self.state = _below(tensors, "state/")
        self.inputs = _below(tensors, "in/")
        self.outputs = _below(tensors, "out/")

    @property
    def atol(self) -> float:
        return float(self.metadata["atol"])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def manifest(name: str) -> dict[str, Any]:
    """`params` and `tensors` (name to shape) of an official checkpoint."""
    content: dict[str, Any] = json.loads((FOLDER / f"manifest_{name}.json").read_text())
    return content
