"""How the codes of an encoded data set lie on disk, the smallest way that holds them.

`numbers`   the codes themselves: unsigned [n, V, *code_shape]; latents as float32 or float16
`ranks`     uint8 [n, V, *code_shape], places in the list of the codes that occur in the set: at most 256 of them
`bytes`     SeiT's byte stream of such places, uint8 [S], and where each view begins, int64 [n V + 1]: at most 510 of them

What lies beside them is stored as it is: standard deviations like their latents, features of a frozen network as float16 [n, V, T, Z].

Letters: n images of a shard, V views of an image, S bytes of all; T feature tokens of Z channels.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from genvision.data.array_files import GrowingArray, open_array, write_whole
from genvision.data.token_codec import MAX_CODE, from_bytes, to_bytes
from genvision.errors import UserError

StoredAs = Literal["numbers", "ranks", "bytes"]
MAX_RANKS = 1 << 8
MAX_STREAM_CODES = MAX_CODE + 1
ROWS = 512
"""Images of a shard that are stored anew at once."""


def code_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest kind of number that holds every code."""
    return np.dtype(np.uint8 if codebook_size <= 1 << 8 else np.uint16 if codebook_size <= 1 << 16 else np.int32)


def choose_storage(codebook_size: int, num_in_use: int, use_stream: bool) -> StoredAs:
    """The smallest way for a set in which `num_in_use` codes occur; the stream only where it is allowed."""
    if codebook_size <= MAX_RANKS:
        return "numbers"  # they take one byte already
    if num_in_use <= MAX_RANKS:
        return "ranks"
    return "bytes" if use_stream and num_in_use <= MAX_STREAM_CODES else "numbers"


class ArrayShard:
    """A shard with one number for every code, or every value of a latent or feature."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path = path
        self.array = open_array(path, shape, dtype)
        self.nbytes: int = self.array.nbytes

    def take(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B, *shape[2:]] of one view of each of these images."""
        taken: np.ndarray = self.array[rows, views]
        return taken


class StreamShard:
    """A shard that is a byte stream."""

    def __init__(self, path: Path, starts_path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self.stream = open_array(path, (None,), np.dtype(np.uint8))
        self.starts = open_array(starts_path, (shape[0] * shape[1] + 1,), np.dtype(np.int64))
        if self.starts[-1] != len(self.stream):
            raise UserError(
                f"{path}: has {len(self.stream)} bytes, {starts_path.name} says {self.starts[-1]}; delete the folder and encode again"
            )
        self.nbytes: int = self.stream.nbytes + self.starts.nbytes

    def take(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B, *code_shape] of one view of each of these images."""
        places = rows * self.shape[1] + views
        pieces = [self.stream[first:end] for first, end in zip(self.starts[places], self.starts[places + 1], strict=True)]
        starts = np.cumsum([0, *map(len, pieces)])
        try:
            codes = from_bytes(np.concatenate(pieces), starts)
        except UserError as error:
            raise UserError(f"{self.path}: {error}; restore it, or delete the folder and encode again") from error
        if codes.shape[1] != np.prod(self.shape[2:]):
            raise UserError(
                f"{self.path}: an image has {codes.shape[1]} codes, not {list(self.shape[2:])}; delete the folder and encode again"
            )
        return codes.reshape(-1, *self.shape[2:])


def store_again(folder: Path, shard: dict[str, Any], shape: tuple[int, ...], in_use: np.ndarray, codebook_size: int, how: StoredAs) -> Any:
    """Write the codes of a shard of `numbers` in another way, into files of other names; the old file stays.

    Args:
        shard: its entry in the index.
        shape: [n, V, *code_shape].
        in_use: codes that occur in the set, rising.

    Returns:
        The new entry.
    """
    numbers = open_array(folder / shard["codes"], shape, code_dtype(codebook_size))
    rank_of = np.zeros(codebook_size, dtype=np.int64)
    rank_of[in_use] = np.arange(len(in_use))
    name = shard["codes"].replace("codes-", f"{how}-")
    array = GrowingArray(folder / name, np.dtype(np.uint8), shape[1:] if how == "ranks" else ())
    ends = [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(numbers), ROWS):
        ranks = rank_of[numbers[first : first + ROWS]]
        if how == "ranks":
            array.append(ranks)
            continue
        stream, starts = to_bytes(ranks.reshape(-1, *shape[2:]))
        ends.append(starts[1:] + array.count)
        array.append(stream)
    array.finish()
    if how == "ranks":
        return {**shard, "codes": name}
    starts_name = shard["codes"].replace("codes-", "starts-")
    write_whole(folder / starts_name, lambda file: np.save(file, np.concatenate(ends)))
    return {**shard, "codes": name, "starts": starts_name}
