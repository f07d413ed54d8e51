"""The byte stream of tokens (SeiT, arXiv:2303.11114, section 3): one byte a code, two where the code is 255 or more.

The byte 255 is an escape: the byte after it, 0 .. 254, is added to 255. So each byte tells by itself what it is, and codes reach 509.
Images stand one after the other; `starts` says where.

Letters: n images, L codes of an image, S bytes of all.
"""

import numpy as np

from genvision.errors import UserError

ESCAPE = 255
MAX_CODE = 2 * ESCAPE - 1


def to_bytes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, ...] of n images -> (stream uint8 [S], starts int64 [n + 1]); image i is stream[starts[i] : starts[i + 1]].

    Raises:
        UserError: a code lies outside 0 .. 509.
    """
    codes = np.asarray(codes)
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if low < 0 or high > MAX_CODE:
        raise UserError(
            f"codes lie in {low} .. {high}, but the byte stream holds 0 .. {MAX_CODE}; number those in use from 0, or store 16-bit numbers"
        )
    rows = codes.reshape(len(codes), -1) if codes.size else np.zeros((len(codes), 0), dtype=np.int64)  # [n, L]
    escaped = rows >= ESCAPE
    starts = np.concatenate([[0], np.cumsum(rows.shape[1] + escaped.sum(1))]).astype(np.int64)
    flat, is_long = rows.ravel().astype(np.int64), escaped.ravel()
    last = np.cumsum(1 + is_long) - 1  # where the last byte of each code stands, [n L]
    stream = np.full(starts[-1], ESCAPE, dtype=np.uint8)  # what no code ends at is an escape
    stream[last] = flat - ESCAPE * is_long
    return stream, starts


def from_bytes(stream: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The codes int64 [n, L] of a stream uint8 [S] with starts [n + 1].

    Raises:
        UserError: it is cut off or damaged, or its images have different numbers of codes.
    """
    stream, starts = np.asarray(stream), np.asarray(starts)
    if stream.dtype != np.uint8 or stream.ndim != 1:
        raise UserError(f"a byte stream is uint8 [S], got {stream.dtype} {list(stream.shape)}")
    if starts.ndim != 1 or not len(starts) or starts[0] != 0 or starts[-1] != len(stream) or (np.diff(starts) < 0).any():
        raise UserError(f"the starts of a byte stream must rise from 0 to its length {len(stream)}; one of the two is damaged")
    is_escape = stream == ESCAPE
    ends = starts[1:][np.diff(starts) > 0] - 1
    if (is_escape[1:] & is_escape[:-1]).any() or is_escape[ends].any():
        raise UserError(f"the byte stream is damaged: {ESCAPE} must be followed by 0 .. {ESCAPE - 1} of the same image")
    is_last = ~is_escape
    added = np.zeros(len(stream), dtype=np.int64)
    added[1:][is_escape[:-1]] = ESCAPE
    lengths = np.diff(np.concatenate([[0], np.cumsum(is_last)])[starts])  # codes of each image, [n]
    if len(lengths) and (lengths != lengths[0]).any():
        odd = int(np.argmax(lengths != lengths[0]))
        raise UserError(f"image {odd} of the byte stream has {lengths[odd]} codes, image 0 has {lengths[0]}; it is damaged")
    codes: np.ndarray = (stream + added)[is_last].reshape(len(lengths), lengths[0] if len(lengths) else 0)
    return codes
