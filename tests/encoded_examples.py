"""Encoded data sets of any length, written without a tokenizer: the codes of an image are its number."""

import json
from pathlib import Path

import numpy as np


def write_codes(folder: Path, num: int, *, shard_rows: int = 1 << 20, side: int = 2, label_names=("a", "b"), first_code: int = 0, **facts):
    """`num` images with one view of [side, side] codes `first_code` + index (modulo 2^16), and labels in turns."""
    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, num, shard_rows)):
        indices = np.arange(first, min(first + shard_rows, num))
        names = {part: f"{part}-{number:05d}.npy" for part in ("codes", "labels")}
        codes = ((first_code + indices) % (1 << 16)).astype(np.uint16)
        np.save(folder / names["codes"], np.broadcast_to(codes[:, None, None, None], (len(codes), 1, side, side)))
        np.save(folder / names["labels"], indices % len(label_names))
        shards.append({**names, "count": len(indices)})
    index = {
        "format_version": 1,
        "kind": "codes",
        "tokenizer_hash": "a" * 64,
        "codebook_size": 1 << 16,
        "image_size": 64,
        "views": 1,
        "code_shape": [side, side],
        "num_images": num,
        "label_names": list(label_names),
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index | facts))
