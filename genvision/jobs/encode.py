"""`genvision encode`: images through a tokenizer into an encoded data set, on one or many processes."""

import sys
from pathlib import Path
from typing import Any, Literal

from genvision.data.alignment import FrozenFeatures
from genvision.data.code_storage import MAX_STREAM_CODES
from genvision.data.datasets import bad_images_summary
from genvision.data.encoding import LatentDtype, Storage, encode_dataset
from genvision.data.sources import OnBadImage, open_source
from genvision.errors import UserError
from genvision.processes import process_state
from genvision.tokenizers.base import content_hash, load_tokenizer


def encode_data(
    tokenizer: str | Path,
    data: str,
    out: Path,
    *,
    image_size: int | None = None,
    crops: Literal["center", "ten"] = "center",
    flip: bool = False,
    enlarge: float = 1.1,
    dtype: LatentDtype = "float32",
    storage: Storage = "auto",
    posterior: bool = False,
    features: str | None = None,
    features_weights: Path | None = None,
    features_grid: int = 16,
    download: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    on_bad_image: OnBadImage = "stop",
) -> dict[str, Any]:
    """Returns the index of the encoded data set; `format_encoded` says it in words.

    Args:
        features: name of a frozen network, see FrozenFeatures; `features_grid` of its tokens a side.
        features_weights: local file of its weights; without one they are fetched if `download`.

    Raises:
        UserError: see `encode_dataset` and `FrozenFeatures`; or the tokenizer cannot take images of this size.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {num_workers}")
    if features is None and (features_weights is not None or download):
        raise UserError("features_weights and download are for the network of --features; name one, such as --features dinov2_vitb14")
    state = process_state()
    network = load_tokenizer(tokenizer).to(state.device)
    size = network.spec.image_size if image_size is None else image_size
    network.check_image_size(size)
    if posterior and network.spec.discrete:
        raise UserError(f"{tokenizer}: makes discrete codes, which have no posterior; leave --posterior out")
    frozen = None if features is None else FrozenFeatures(features, features_weights, download, features_grid).to(state.device)
    index = encode_dataset(
        network,
        open_source(data),
        out,
        image_size=size,
        tokenizer_hash=content_hash(network),
        crops=crops,
        flip=flip or crops == "ten",  # ten crops have their mirror images among them
        enlarge=enlarge,
        dtype=dtype,
        storage=storage,
        posterior=posterior,
        features=frozen,
        batch_size=batch_size,
        num_workers=num_workers,
        on_bad_image=on_bad_image,
        rank=state.process_index,
        world_size=state.num_processes,
        barrier=state.wait_for_everyone,
    )
    if state.is_main_process:
        _warn(index)
    return index


def format_encoded(index: dict[str, Any]) -> str:
    """What was stored and what it takes, for people: one line, two for discrete codes."""
    views = f"{index['views']} view{'s' if index['views'] > 1 else ''}"
    text = f"{index['num_images']} images in {views}, {index['kind']} of shape {index['code_shape']}"
    if index.get("posterior"):
        text += " with deviations"
    if features := index.get("features"):
        side = features["tokens_per_side"]
        text += f", {side} x {side} features of {features['network']}"
    if "bytes_per_image" in index:  # not of sets that earlier versions made
        text += f": {_amount(index['bytes_per_image'])} bytes an image in {views}"
        if index["source_bytes_per_image"] is not None:
            formats = index["source_formats"]
            originals = f"the {next(iter(formats))}s" if len(formats) == 1 and "other" not in formats else "the originals"
            text += f", {originals} take {_amount(index['source_bytes_per_image'])}"
    if "num_codes_in_use" in index:
        how = {"numbers": "as plain numbers", "ranks": "one byte each", "bytes": "one byte each, two beyond the first 255"}
        text += f"\n{index['num_codes_in_use']:,} of {index['codebook_size']:,} codes in use, stored {how[index['stored_as']]}"
    return text


def _amount(value: float) -> str:
    return f"{value:,.0f}"


def _warn(index: dict[str, Any]) -> None:
    if index["bad_images"]:
        print(bad_images_summary({int(i): why for i, why in index["bad_images"].items()}), file=sys.stderr)
    in_use = index.get("num_codes_in_use", 0)
    if index.get("storage") == "bytes" and in_use > MAX_STREAM_CODES:
        print(f"storage bytes holds {MAX_STREAM_CODES} codes, but {in_use:,} are in use; they are stored as plain numbers", file=sys.stderr)
