"""Images at the borders: float <-> uint8, grids, PNG and npz files.

Inside, images are float32 [B, 3, H, W] in [-1, 1]; at the borders uint8 [B, H, W, 3].
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from genvision.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Rounding = Literal["trunc127.5", "trunc255", "round"]


def to_uint8(images: "Tensor", rounding: Rounding = "trunc127.5") -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]; values outside are clamped.

    Args:
        images: any float dtype and device; cast to float32 first (bfloat16 has only 193 levels here).
        rounding: `trunc127.5` floors 127.5 x + 128 (DiT, SiT, LlamaGen, EDM2); `trunc255` floors 255 (x + 1) / 2
            (MAGE, TiTok; half a level darker); `round` rounds 127.5 (x + 1) half to even.
    """
    x = images.float()
    if rounding == "trunc127.5":
        x = x.mul(127.5).add(128)
    elif rounding == "trunc255":
        x = x.add(1).div(2).mul(255)
    elif rounding == "round":
        x = x.add(1).mul(127.5).round()
    else:
        raise UserError(f"rounding '{rounding}' is unknown; choose one of {', '.join(get_args(Rounding))}")
    array: np.ndarray = x.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def from_uint8(images: np.ndarray) -> "Tensor":
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]; level k becomes k / 127.5 - 1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div(127.5).sub(1)


def make_grid(images: np.ndarray, columns: int, *, min_side: int = 64, gap: int = 2, row_names: list[str] | None = None) -> Image.Image:
    """Put uint8 [N, H, W, 3] images on a white sheet, row by row.

    Args:
        images: all of one size; the last row may be short.
        columns: images in a row.
        min_side: smaller images are enlarged by a whole factor (nearest neighbour) until their short side reaches this.
        gap: white pixels between images.
        row_names: text at the left of each row.
    """
    num, height, width, _ = images.shape
    factor = max(1, -(-min_side // min(height, width)))
    cell_h, cell_w = height * factor + gap, width * factor + gap
    rows = -(-num // columns)
    margin = gap
    if row_names:
        probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        margin = 12 + int(max(probe.textlength(name, font_size=16) for name in row_names))
    sheet = Image.new("RGB", (margin + columns * cell_w, gap + rows * cell_h), "white")
    for i, array in enumerate(images):
        picture = Image.fromarray(array).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(picture, (margin + i % columns * cell_w, gap + i // columns * cell_h))
    if row_names:
        draw = ImageDraw.Draw(sheet)
        for row, name in enumerate(row_names[:rows]):
            draw.text((6, gap + row * cell_h + cell_h // 2), name, fill="black", anchor="lm", font_size=16)
    return sheet


def save_png(image: Image.Image | np.ndarray, path: Path) -> None:
    """Write a picture (PIL, or uint8 [H, W, 3]) so that no half-written file ever bears the name `path`."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    picture.save(part, format="PNG")
    part.replace(path)


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write an npz as ADM's evaluator reads it: `arr_0` uint8 [N, H, W, 3], `arr_1` int64 labels; uncompressed, atomic."""
    arrays: dict[str, Any] = {"arr_0": np.ascontiguousarray(images)}
    if labels is not None:
        arrays["arr_1"] = labels.astype(np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)
