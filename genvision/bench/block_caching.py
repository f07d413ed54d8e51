"""Row D3c: block caching of DiffusionSampler beside cache-dit's on DiTPipeline, with the same weights and noise, at equal distance.

Both leave out blocks and so change images: the fewer blocks, the farther. Of cache-dit's settings (DBCache with the first block always
computed, several thresholds, as it is and with TaylorSeer), the row takes the fastest whose latents lie no farther from uncached ones than
ours; if none does, the nearest, and says so. The network's weights are random, with outputs as large as noise: how far images of trained
networks change is told in genvision.samplers.block_cache.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.diffusion import GUIDANCE, OWN, PEER, Loops, diffusers_twin, distance, named_dit
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import by_turns
from genvision.models.dit import DiT

WARM_UP = 3
"""Steps that both compute in full first; ours the last ones, too."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the network, the job, the settings of caching and the rounds."""

    rounds: int = 9
    network: str = "s"
    depth: int | None = None
    images: int = 1
    steps: int = 50
    interval: int = 3
    """Our blocks run in every so many steps."""
    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """Of cache-dit, that are tried."""


LONG = Sizes()
QUICK = Sizes(rounds=2, depth=3, steps=10, thresholds=(0.1, 0.5))


class Tried(NamedTuple):
    """A setting of cache-dit."""

    name: str
    loops: Loops
    away: float
    """Of its latents from uncached ones."""
    seconds: float


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    for row in rows:
        yield _caching(row, sizes)


@torch.inference_mode()
def _caching(row: Row, sizes: Sizes) -> Result:
    name, ours = named_dit(sizes.network, sizes.depth)
    what = f"{name}, {sizes.steps} steps of DDIM, guidance {GUIDANCE:g}, {sizes.images} image(s), blocks in every {sizes.interval} steps"
    scale_to_noise(ours)
    loops = Loops(ours, diffusers_twin(ours), sizes.images, sizes.steps, GUIDANCE)
    uncached = loops.by_diffusers()
    try:
        check = check_close("without caching", loops.by_genvision(0.0), uncached)
    except WrongAnswer as error:
        return wrong(row, what, str(error))
    away = distance(loops.by_genvision(0.0, cache_interval=sizes.interval), uncached)
    peer = fairest(cache_dit_settings(ours, sizes), away)
    calls = {OWN: lambda: loops.by_genvision(0.0, cache_interval=sizes.interval), PEER: peer.loops.by_diffusers}
    seconds = by_turns(calls | {"uncached": lambda: loops.by_genvision(0.0)}, sizes.rounds)
    gained = measured(row, what, seconds, own=OWN, peer="uncached").ratio
    assert gained is not None
    farther = "" if peer.away <= away else ", which is farther: none that was tried is as near"
    notes = (
        f"latents lie {away:.1e} of their norm from uncached ones, those of {peer.name} {peer.away:.1e}{farther}",
        f"{gained.median:.2f}x as fast as without caching",
    )
    return measured(row, what, seconds, own=OWN, peer=PEER, check=f"{check} of diffusers'", notes=notes)


def scale_to_noise(model: DiT) -> None:
    """Random weights predict little; with outputs of deviation 1, what caching changes is seen in the latents."""
    x = torch.randn(4, *model.code_shape)
    predicted = model(x, torch.tensor([10, 300, 600, 900]), torch.arange(4))[:, : x.shape[1]]
    for parameter in model.head.linear.parameters():
        parameter.div_(predicted.std())


def cache_dit_settings(model: DiT, sizes: Sizes) -> list[Tried]:
    """Each draws once, and once more for its time."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read at its import; it tells every layer that it wraps
    import cache_dit

    tried = []
    uncached = Loops(model, diffusers_twin(model), sizes.images, sizes.steps, GUIDANCE).by_diffusers()
    for threshold in sizes.thresholds:
        for predicts in (False, True):
            loops = Loops(model, diffusers_twin(model), sizes.images, sizes.steps, GUIDANCE)
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=WARM_UP, residual_diff_threshold=threshold
            )
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if predicts else None
            cache_dit.enable_cache(loops.pipeline, cache_config=config, calibrator_config=calibrator)
            away = distance(loops.by_diffusers(), uncached)
            began = time.process_time()
            loops.by_diffusers()
            name = f"cache-dit with threshold {threshold:g}" + (" and TaylorSeer" if predicts else "")
            tried.append(Tried(name, loops, away, time.process_time() - began))
    return tried


def fairest(tried: Sequence[Tried], away: float) -> Tried:
    """The fastest that is no farther than `away`, or the nearest."""
    near = [setting for setting in tried if setting.away <= away]
    return min(near, key=lambda setting: setting.seconds) if near else min(tried, key=lambda setting: setting.away)
