"""Rows of a set that is being made, kept on disk chunk by chunk, so that a killed job loses at most the chunk in hand.

`chunks.json` says which images these are; `000000-000064.safetensors` holds what the networks said of images 0 .. 63: a row name to an
array [B, ...] (genvision.eval.measurement has the names), the pixel hashes, the generator's network calls, and in its header the hash of
the network behind each row and a checksum. A file is complete or absent: it gets its name when all of it is on the disk.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genvision.errors import UserError
from genvision.eval.cache import checksum
from genvision.training.state import sync, write_atomically

HASHES, CALLS = "hashes", "network_calls"
FACTS = (HASHES, CALLS)
"""Rows that no feature network makes."""


class ChunkFolder:
    """Chunks of rows in a folder.

    Args:
        folder: made if it is not there.
        job: everything that decides the images, plain values; a folder that holds another job's chunks is refused.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder, self.job = folder, json.loads(json.dumps(job))
        self.warnings: list[str] = []

    def prepare(self) -> None:
        """Check or claim the folder; for one process before the others begin."""
        facts = self.folder / "chunks.json"
        if facts.is_file():
            try:
                old = json.loads(facts.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{facts}: is damaged ({error}); choose another --out") from error
            changed = sorted(key for key in old.keys() | self.job.keys() if old.get(key) != self.job.get(key))
            if changed:
                raise UserError(f"{self.folder}: holds images of another job (it differs in {', '.join(changed)}); choose another --out")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(facts, json.dumps(self.job, indent=2) + "\n")
        for leftover in self.folder.glob(".*.part"):
            leftover.unlink()

    def load(self, chunk: range, names: frozenset[str], networks: Mapping[str, str]) -> dict[str, np.ndarray] | None:
        """Rows of a chunk with its `hashes` and `network_calls`; None if it must be made: absent, damaged, or without all the rows.

        Args:
            names: rows that are wanted.
            networks: row name to the hash of the network that must have made it.
        """
        path = self._path(chunk)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                facts = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            self._warn(path, " ".join(str(error).split()))
            return None
        if facts.get("checksum") != checksum(arrays) or any(len(rows) != len(chunk) for rows in arrays.values()):
            self._warn(path, "its checksum does not fit")
            return None
        made_by = json.loads(facts["networks"])
        if any(name not in arrays or made_by.get(name) != networks[name] for name in names) or any(name not in arrays for name in FACTS):
            return None
        return {name: arrays[name] for name in (*sorted(names), *FACTS)}

    def store(self, chunk: range, rows: Mapping[str, np.ndarray], networks: Mapping[str, str]) -> None:
        """Write the rows of a chunk, `hashes` and `network_calls` among them."""
        arrays = {name: np.ascontiguousarray(array) for name, array in rows.items()}
        facts = {"checksum": checksum(arrays), "networks": json.dumps({name: networks[name] for name in arrays if name not in FACTS})}
        path = self._path(chunk)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_bytes(save(arrays, metadata=facts))
        sync(part)
        part.replace(path)

    def _path(self, chunk: range) -> Path:
        return self.folder / f"{chunk.start:06d}-{chunk.stop:06d}.safetensors"

    def _warn(self, path: Path, why: str) -> None:
        self.warnings.append(f"{path}: damaged ({why[:120]}); its images are made again")
        print(f"warning: {self.warnings[-1]}", file=sys.stderr, flush=True)
