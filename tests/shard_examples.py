"""Small tar shards for tests."""

import io
import itertools
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, size: int = 6) -> bytes:
    """A picture that belongs to the number."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar_bytes(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file with these members, in their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def samples(start: int, stop: int, num_classes: int = 3) -> dict[str, bytes]:
    """Members of some samples: picture and label are those of the number."""
    return {
        f"{i:06d}.{extension}": content
        for i in range(start, stop)
        for extension, content in (("cls", str(i % num_classes).encode()), ("png", png(i)))
    }


def write_shards(folder: Path, num_samples: int, num_shards: int) -> Path:
    """`folder` with shards `train-0000.tar` and so on, samples numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, num_samples, num_shards + 1).astype(int).tolist()
    for shard, (start, stop) in enumerate(itertools.pairwise(edges)):
        (folder / f"train-{shard:04d}.tar").write_bytes(tar_bytes(samples(start, stop)))
    return folder
