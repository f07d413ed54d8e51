"""Which shards an address names: a path or an fsspec URL of a file or a folder, with wildcards or with WebDataset's braces.

`x-{000..146}.tar` stands for 147 names and `{train,val}.tar` for two; `*`, `?`, `[...]` and `**` are wildcards. A folder stands for the
tar files in it.
"""

import os
import re
from typing import Any

from genvision.errors import UserError

MAX_NAMES = 1_000_000
"""What braces may stand for; more is a typing error."""
COMPRESSIONS = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
"""How the name of a compressed shard ends, and what unpacks it."""
_SPLITS = re.compile(r"(?<![a-z])(train|val|valid|validation|dev|test)(?![a-z])")


def list_shards(fs: Any, path: str, address: str) -> list[str]:
    """Paths of the shards in `fs`: sorted, or in the order of the braces.

    Args:
        fs: an fsspec file system.
        path: what `fs` makes of the address.
        address: for messages.

    Raises:
        UserError: nothing is there, a shard is named twice or is compressed, or a folder holds several splits.
    """
    literal = _is_local(fs) and os.path.lexists(path)  # a name may hold a bracket
    names = [path] if literal else expand_braces(path)
    if len(names) == 1 and (literal or not _is_wild(path)) and not path.endswith(".tar") and fs.isdir(path):
        shards = _tars_in(fs, path, address)
    elif not literal and _is_wild(path):
        shards = [shard for name in names for shard in _matches(fs, name, address)]
    else:
        shards = names
    for shard in shards:
        ending = next((ending for ending in COMPRESSIONS if shard.lower().endswith(ending)), None)
        if ending is not None:
            raise UserError(f"{shard}: is compressed, so images cannot be read at random; unpack it first: {COMPRESSIONS[ending]} {shard}")
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise UserError(f"{address}: names {twice} twice; name every shard once")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, the last brace running fastest.

    Raises:
        UserError: a brace holds neither numbers `000..146` nor words `a,b`; or there are more than MAX_NAMES names.
    """
    names = [""]
    for number, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        words = [part] if number % 2 == 0 else _words(part, pattern)
        if len(names) * len(words) > MAX_NAMES:
            raise UserError(f"{pattern}: stands for more than {MAX_NAMES} shards; check the numbers in its braces")
        names = [name + word for name in names for word in words]
    return names


def _words(text: str, pattern: str) -> list[str]:
    """What one pair of braces stands for."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if numbers is None and "," in text:
        return text.split(",")
    if numbers is None:
        raise UserError(f"{pattern}: braces hold '{text}', expected numbers {{000..146}} or words {{train,val}}")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= MAX_NAMES:
        raise UserError(f"{pattern}: braces hold '{text}', expected at most {MAX_NAMES} numbers, the smaller one first")
    is_padded = any(len(word) > 1 and word.startswith("0") for word in numbers.groups())
    width = max(map(len, numbers.groups())) if is_padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _is_wild(path: str) -> bool:
    """Whether there are wildcards; a question mark in a web address begins the query."""
    return any(sign in path for sign in ("*[" if path.startswith(("http://", "https://")) else "*?["))


def _matches(fs: Any, pattern: str, address: str) -> list[str]:
    found = sorted(match for match in fs.glob(pattern) if not _base(match).startswith("."))
    if not found:
        raise UserError(f"{address}: no file matches; give for example wds:data/train-{{000..146}}.tar or wds:data/*.tar (quoted)")
    return found


def _tars_in(fs: Any, folder: str, address: str) -> list[str]:
    names = sorted(name for name in fs.ls(folder, detail=False) if not _base(name).startswith("."))
    endings = (".tar", ".tgz", *(f".tar{ending}" for ending in COMPRESSIONS))
    shards = [name for name in names if name.lower().endswith(endings)]
    if not shards:
        shards_below = f"wds:{address.rstrip('/')}/**/*.tar"
        raise UserError(
            f"{address}: there is no tar file in this folder; give the shards, for example {shards_below}, or pictures by folder:"
        )
    splits = {found[1] for shard in shards if (found := _SPLITS.search(_base(shard).lower()))}
    if len(splits) > 1:
        like = next(_base(shard) for shard in shards if _SPLITS.search(_base(shard).lower()))
        raise UserError(
            f"{address}: holds shards of several splits ({', '.join(sorted(splits))}); choose one by a pattern, as for names like {like}"
        )
    return shards


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    return isinstance(fs, LocalFileSystem)
