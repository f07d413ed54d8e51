"""`genvision encode`: images through a tokenizer into an encoded data set, on one or many processes."""

import sys
from pathlib import Path
from typing import Any, Literal

from genvision.data.datasets import bad_images_summary
from genvision.data.encoded import encode_dataset
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
    batch_size: int = 32,
    num_workers: int = 0,
    on_bad_image: OnBadImage = "stop",
) -> dict[str, Any]:
    """Returns the index of the encoded data set.

    Raises:
        UserError: see `encode_dataset`; or the tokenizer cannot take images of this size.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {num_workers}")
    state = process_state()
    network = load_tokenizer(tokenizer).to(state.device)
    size = network.spec.image_size if image_size is None else image_size
    network.check_image_size(size)
    index = encode_dataset(
        network,
        open_source(data),
        out,
        image_size=size,
        tokenizer_hash=content_hash(network),
        crops=crops,
        flip=flip or crops == "ten",  # ten crops have their mirror images among them
        enlarge=enlarge,
        batch_size=batch_size,
        num_workers=num_workers,
        on_bad_image=on_bad_image,
        rank=state.process_index,
        world_size=state.num_processes,
        barrier=state.wait_for_everyone,
    )
    if index["bad_images"] and state.is_main_process:
        print(bad_images_summary({int(i): why for i, why in index["bad_images"].items()}), file=sys.stderr)
    return index
