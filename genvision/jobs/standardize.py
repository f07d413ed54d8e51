"""Latents of mean 0 and deviation 1 in every channel, as generators like them (VA-VAE, arXiv:2501.01423).

Shapes: B images of a batch, latents [B, c, h, w] or [B, c, L].
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from genvision.data.datasets import ordered_batches
from genvision.data.sources import ImageSource, open_source
from genvision.errors import UserError
from genvision.eval.distributed import sum_moments
from genvision.eval.moments import Moments
from genvision.eval.report import write_json
from genvision.images import from_uint8
from genvision.jobs.output import check_output
from genvision.processes import choose_device, process_state
from genvision.progress import Progress
from genvision.tokenizers.base import ContinuousTokenizer, content_hash, load_tokenizer

FACTS = "latent_statistics.json"
"""Beside the weights: where the numbers come from."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """What the latents of a tokenizer are like before standardisation, and what was measured."""

    latent_mean: tuple[float, ...]
    """One a channel."""
    latent_std: tuple[float, ...]
    """One a channel; the root of the mean squared deviation."""
    num_images: int
    image_size: int
    crop: str
    data: str
    data_fingerprint: str
    tokenizer: str | None = None
    tokenizer_hash: str | None = None


def standardize_tokenizer(
    tokenizer: Path,
    data: str,
    out: Path,
    *,
    image_size: int | None = None,
    num: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | None = None,
) -> str:
    """Measure a tokenizer's latents on images, and write a copy of its folder that standardises them, on one or many processes.

    Args:
        tokenizer: its folder, a pipeline folder, or whatever else `load_tokenizer` takes; statistics that it has are replaced.
        image_size: both sides of ADM's centre crop; None takes the tokenizer's.
        num: so many images, spread evenly over the set, since sets are often sorted by class; None measures all.

    Returns:
        One line for the user.

    Raises:
        UserError: `out` is occupied; the tokenizer is discrete; or see `measure_latents`.
    """
    check_output(out)
    chosen = choose_device(device)
    state = process_state(chosen)
    where = str(state.device) if state.num_processes > 1 and torch.device(chosen).type != "cpu" else chosen
    network = load_tokenizer(tokenizer).to(where)
    found = measure_latents(
        network,
        open_source(data),
        image_size=image_size,
        num=num,
        batch_size=batch_size,
        num_workers=num_workers,
        device=where,
        tokenizer_name=str(tokenizer),
        show_progress=True,
    )
    if state.is_main_process:
        network.register_to_config(latent_mean=found.latent_mean, latent_std=found.latent_std)
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as part:  # so that no half-written folder bears the name
            network.save_pretrained(Path(part) / "tokenizer")
            write_json(found, Path(part) / "tokenizer" / FACTS)
            (Path(part) / "tokenizer").replace(out)
    state.wait_for_everyone()
    means, stds = found.latent_mean, found.latent_std
    return (
        f"{out}: latents of {found.num_images:,} images of {found.image_size}x{found.image_size} pixels have {len(means)} channels, "
        f"means {min(means):.3g} .. {max(means):.3g} and deviations {min(stds):.3g} .. {max(stds):.3g}; the copy standardises them"
    )


@torch.no_grad()
def measure_latents(
    tokenizer: Any,
    source: ImageSource,
    *,
    image_size: int | None = None,
    num: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    tokenizer_name: str | None = None,
    show_progress: bool = False,
) -> LatentStatistics:
    """Mean and deviation of every channel, over images and places, of the latents as the network makes them; sums in float64.

    Every process measures its share of the batches.

    Args:
        tokenizer: a ContinuousTokenizer in eval mode, on `device` already.

    Returns:
        The same on every process, and but for the last bits whatever their number.

    Raises:
        UserError: the tokenizer is discrete or cannot take images of this size, an image cannot be read, or the latents are not finite
            or constant in a channel.
    """
    if batch_size < 1 or num_workers < 0 or (num is not None and num < 1):
        raise UserError(f"batch_size and num must be at least 1 and workers at least 0, got {batch_size}, {num} and {num_workers}")
    name = tokenizer_name or type(tokenizer).__name__
    if not isinstance(tokenizer, ContinuousTokenizer) or tokenizer.spec.channels is None:
        raise UserError(f"{name}: its codes are discrete, so there is nothing to standardise; give a tokenizer with continuous latents")
    size = tokenizer.spec.image_size if image_size is None else image_size
    tokenizer.check_image_size(size)
    count = len(source) if num is None else min(num, len(source))
    order = np.arange(count)
    state = process_state(device)
    share = order[order // batch_size % state.num_processes == state.process_index] * len(source) // count
    moments = Moments(tokenizer.spec.channels)
    progress = Progress(len(share), "latents", show=show_progress and state.is_main_process)
    for batch in ordered_batches(source, size, batch_size=batch_size, num_workers=num_workers, indices=share):
        latents = tokenizer.denormalize(tokenizer.encode(from_uint8(batch["images"]).to(device)).cpu().double())
        if not bool(latents.isfinite().all()):
            raise UserError(f"{name}: latents are not finite; its weights are damaged or its training diverged")
        moments.update(latents.movedim(1, -1).flatten(0, -2))  # [B * places, c]
        progress.advance(len(latents))
    progress.close()
    whole = sum_moments(moments)
    mean, std = whole.mu, np.sqrt(np.diag(whole.scatter) / whole.count)
    constant = np.flatnonzero(std <= 1e-7 * np.abs(mean))  # what float32 cannot tell from a constant
    if len(constant):
        raise UserError(
            f"{name}: {len(constant)} of {len(std)} latent channels are constant on {source.spec}, {constant[0]} first; "
            "give more images, or train the tokenizer further"
        )
    return LatentStatistics(
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(std.tolist()),
        num_images=count,
        image_size=size,
        crop=f"ADM centre crop to {size}",
        data=source.spec,
        data_fingerprint=source.fingerprint(),
        tokenizer=tokenizer_name,
        tokenizer_hash=content_hash(tokenizer),
    )
