"""From picture files to the tokens that all images of a sampling job keep: completion, inpainting, class-conditional editing.

Known tokens are int64 [h, w], -1 where a token is to be drawn. The tokenizer reads the whole picture, so a token that is kept beside
the mask may know a little of what is under it; paint it over in the picture where that must not be.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genvision.data.sources import open_image
from genvision.data.transforms import center_crop, resize_shorter_side
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.pipeline import ImagePipeline

WHITE = 128
"""The least grey level (of 255) that counts as white."""
DEFAULT_KEEP = 0.5


def known_tokens(
    pipeline: ImagePipeline,
    *,
    complete: Path | None = None,
    keep: float | None = None,
    init: Path | None = None,
    mask: Path | None = None,
) -> Tensor | None:
    """The tokens of `complete` or `init` that are kept, int64 [h, w] with -1 elsewhere; None where no picture is given.

    Args:
        complete: picture whose upper part is kept.
        keep: that part, between 0 and 1; half of it unless told.
        init: picture that is drawn anew where `mask` is white.
        mask: picture of the same size; a token is drawn anew if any pixel of its cell is white (at least 128 of 255).

    Raises:
        UserError: the options or sizes do not go together, a picture cannot be read, nothing would be kept or left of `complete`, or the
            tokens of this model are no grid.
    """
    if (init is None) != (mask is None):
        given, missing = ("--init", "--mask") if mask is None else ("--mask", "--init")
        raise UserError(f"{given} needs {missing}: --init is the picture, and --mask is white where it is drawn anew")
    if complete is not None and init is not None:
        raise UserError("--complete and --init both say which tokens are kept; give one of them")
    if keep is not None and complete is None:
        raise UserError("--keep says how much of --complete is kept; give --complete, too")
    if complete is not None:
        _check_grid(pipeline, "--complete")
        return _upper_part(pipeline, open_image(complete), DEFAULT_KEEP if keep is None else keep)
    if init is not None and mask is not None:
        _check_grid(pipeline, "--init")
        image, painted = open_image(init), open_image(mask)
        if image.size != painted.size:
            sizes = [f"{picture.width} x {picture.height}" for picture in (painted, image)]
            raise UserError(f"{mask}: has {sizes[0]} pixels, and {init} has {sizes[1]}; the mask must have the size of the picture")
        return _encode(pipeline, image).masked_fill(_drawn_anew(pipeline, image, painted).to(pipeline.device), -1)
    return None


def _check_grid(pipeline: ImagePipeline, option: str) -> None:
    if not pipeline.tokenizer.spec.discrete:
        raise UserError(f"{option}: this model draws latents, which are never known in part; it is for models of tokens")
    if len(pipeline.generator.code_shape) == 1:
        raise UserError(f"{option}: the tokens of this model are no grid, so none of them stand for a part of the image")


@torch.no_grad()
def _encode(pipeline: ImagePipeline, image: Image.Image) -> Tensor:
    array = np.asarray(center_crop(image, pipeline.image_size))
    tokens: Tensor = pipeline.tokenizer.encode(from_uint8(array[None]).to(pipeline.device))[0]
    return tokens


def _upper_part(pipeline: ImagePipeline, image: Image.Image, keep: float) -> Tensor:
    if not 0 < keep < 1:
        raise UserError(f"keep {keep} is not allowed; give the part of the image to keep, between 0 and 1")
    tokens = _encode(pipeline, image)
    rows = round(keep * len(tokens))
    if not 0 < rows < len(tokens):
        raise UserError(f"keep {keep} keeps {rows} of {len(tokens)} rows of tokens; choose a part that leaves something to draw")
    tokens[rows:] = -1
    return tokens


def _drawn_anew(pipeline: ImagePipeline, image: Image.Image, mask: Image.Image) -> Tensor:
    """Boolean [h, w], true where a pixel of the token's cell is white, after the mask is cropped as the picture is."""
    size, cell = pipeline.image_size, pipeline.tokenizer.spec.downsample
    white = Image.fromarray((np.asarray(mask.convert("L")) >= WHITE).astype(np.float32))
    shares = white.resize(resize_shorter_side(image, size).size, Image.Resampling.BOX)  # means, so that no white pixel is passed over
    drawn = np.asarray(center_crop(shares, size)) > 0  # it has its size by now, so this only crops
    return torch.from_numpy(drawn.reshape(size // cell, cell, size // cell, cell).any(axis=(1, 3)))
