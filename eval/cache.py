"""Statistics and features of references, kept so that no set is looked at twice.

An entry is one safetensors file under a key made of everything that decides its numbers: the hash of the images' bytes, the crop, the
extractor and the hash of its weights. So changed data never gets an old number. Files are written under another name and renamed, so
jobs may share a folder; a checksum in the header tells a damaged file, which is named and then measured again.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genvision.training.state import sync
from genvision.user_cache import user_cache


class StatisticsCache:
    """Entries in a folder.

    Args:
        root: the folder, made when the first entry is written; None takes `statistics` in the user's cache folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = user_cache("statistics") if root is None else root

    def load(self, parts: Mapping[str, str], warnings: list[str]) -> dict[str, np.ndarray] | None:
        """The entry of a key; None if there is none, or none that can be trusted.

        Args:
            parts: everything that decides the numbers.
            warnings: gets a line if the entry is damaged.
        """
        path = self.path(parts)
        try:
            with safe_open(path, framework="np") as file:
                facts = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            return self._give_up(path, " ".join(str(error).split()), warnings)
        if facts.get("parts") != _canonical(parts):
            return self._give_up(path, "it holds something else than its name says", warnings)
        if facts.get("checksum") != checksum(arrays):
            return self._give_up(path, "its checksum does not fit", warnings)
        return arrays

    def store(self, parts: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
        """Write an entry; a folder that cannot be written costs a warning, since the numbers are known by now."""
        path = self.path(parts)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(save(content, metadata={"parts": _canonical(parts), "checksum": checksum(content)}))
            sync(part)
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            print(f"warning: {path}: cannot be written ({error.strerror}); it is measured again next time", file=sys.stderr, flush=True)

    def path(self, parts: Mapping[str, str]) -> Path:
        """Where the entry of a key lies."""
        key = sha256(_canonical(parts).encode()).hexdigest()
        return self.root / key[:2] / f"{key}.safetensors"

    def _give_up(self, path: Path, why: str, warnings: list[str]) -> dict[str, np.ndarray] | None:
        warnings.append(f"{path}: this entry of the cache is damaged ({why[:120]}); its numbers are measured again")
        return None


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """blake2b over names, types, shapes and values."""
    digest = blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _canonical(parts: Mapping[str, str]) -> str:
    return json.dumps(dict(parts), sort_keys=True)
