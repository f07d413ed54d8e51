"""Weights that other people published, read from local files: found, fetched if asked, read without running anything, compared by name."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from genvision.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One published file and the option by which a user names a copy of it."""

    network: str
    """What the tensors belong to, in words for messages."""
    url: str
    option: str

    @property
    def cached(self) -> Path:
        """Where torch hub keeps it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name

    def find(self, given: Path | None, download: bool) -> Path:
        """The file that is given, else the one in torch hub's folder, fetched if `download`.

        Raises:
            UserError: there is none, or the download failed.
        """
        if given is not None:
            path = Path(given)
            if not path.is_file():
                raise UserError(f"{path}: no such file; {self.option} wants the file {self.url}")
            return path
        path = self.cached
        if path.is_file():
            return path
        if not download:
            raise UserError(f"no {self.network} weights; give `{self.option} FILE` or `--download` ({self.url}, kept as {path})")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(self.url, str(path))
        except (URLError, OSError) as error:
            raise UserError(f"{self.url}: download failed ({error}); fetch it elsewhere and give `{self.option} FILE`") from error
        return path

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a .pth or .safetensors file; nothing in the file is executed.

        Raises:
            UserError: the file is damaged or holds something else than named tensors.
        """
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                content: Any = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and safetensors raise many types; whatever it is, this file cannot be used
            reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else " ".join(str(error).split())[:120]
            raise UserError(f"{path}: not readable as {self.network} weights ({reason}); fetch {self.url} again") from error
        if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise UserError(f"{path}: {self.network} weights are a mapping of names to tensors, this is something else; fetch {self.url}")
        return dict(content)

    def check(self, given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], path: Path | str) -> dict[str, Tensor]:
        """The wanted tensors as float32; counters of training (`num_batches_tracked`) may come with them and are left out.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape, or holds a number that is not finite.
        """
        given = {name: tensor for name, tensor in given.items() if not name.endswith("num_batches_tracked")}
        shared = sorted(set(wanted) & set(given))
        problems = {
            "missing": sorted(set(wanted) - set(given)),
            "unexpected": sorted(set(given) - set(wanted)),
            "misshapen": [
                f"{name} {list(given[name].shape)} instead of {list(wanted[name])}" for name in shared if given[name].shape != wanted[name]
            ],
            "not finite": [name for name in shared if not bool(torch.isfinite(given[name]).all())],
        }
        found = [f"{len(items)} {kind} ({_shorten(items)})" for kind, items in problems.items() if items]
        if found:
            raise UserError(f"{path}: not the {len(wanted)} tensors of {self.network}: {'; '.join(found)}; fetch {self.url}")
        return {name: given[name].float().contiguous() for name in wanted}


def _shorten(items: list[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")
