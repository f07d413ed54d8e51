"""Pickles as Python 2 wrote them, protocol 2: text and bytes are one type, which CIFAR's files and other old ones are full of."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any


def dump_python2(content: Any, path: Path) -> None:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2, fix_imports=True).dump(content)
    path.write_bytes(file.getvalue().replace(b"numpy._core.", b"numpy.core."))


class _Python2Pickler(pickle._Pickler):
    dispatch = dict(pickle._Pickler.dispatch)

    def _save_string(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin1")
        short = len(data) < 256
        self.write((pickle.SHORT_BINSTRING + bytes([len(data)]) if short else pickle.BINSTRING + struct.pack("<i", len(data))) + data)

    dispatch[str] = dispatch[bytes] = _save_string
