"""Rows D1 to D3: a diffusion transformer beside diffusers' DiTTransformer2DModel and DiTPipeline, with the same weights and noise.

D1 is one call of the network, every row with its own time and class. D2 draws images by guided DDIM, decoder included, as users of both
do; our tables are built again every time. Both decode with one tiny AutoencoderKL, which takes next to no time. D3 guides the second half
of the steps only, which DiTPipeline cannot do, so it gives other images; they are compared with a loop over diffusers' network and
scheduler, and their distance from fully guided ones is told.

Weights are random, those that start at zero too: the arithmetic does not depend on them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.floors import Floors, Work, counted_flops
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import by_turns
from genvision.convert.diffusers_dit import to_diffusers
from genvision.models.dit import DiT
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose

NETWORKS: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_dim=64, depth=2, num_heads=2, input_size=8),
    "s": dict(hidden_dim=384, depth=12, num_heads=6),
    "b": dict(hidden_dim=768, depth=12, num_heads=12),
    "l": dict(hidden_dim=1024, depth=24, num_heads=16),
    "xl": dict(hidden_dim=1152, depth=28, num_heads=16),
}
NUM_CLASSES = 1000
"""DiTPipeline's null label is 1000, whatever the model."""
GUIDANCE = 4.0
"""DiTPipeline's default."""
PEER, OWN, KNOWN, HALF = "diffusers", "genvision", "genvision, modulation known", "genvision, half of it guided"
Peers = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the networks, the jobs and the rounds."""

    rounds: int = 9
    network: str = "s"
    wide_network: str = "b"
    """Of row D1b."""
    depth: int | None = None
    """Blocks of both; as published unless told."""
    batch_size: int = 8
    """Rows of a call of the network."""
    loop_rounds: int = 9
    images: int = 1
    steps: int = 50


LONG = Sizes()
QUICK = Sizes(rounds=3, batch_size=2, loop_rounds=3, steps=4, depth=3)


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    """D1 and D1b each; D2 and D3 by turns with each other."""
    for row in rows:
        if row.name in ("D1", "D1b"):
            name, ours = named_dit(sizes.wide_network if row.name == "D1b" else sizes.network, sizes.depth)
            what = f"{name}, a call with {sizes.batch_size} rows"
            with torch.inference_mode():
                result = forward_result(row, what, forward_peers(ours, diffusers_twin(ours), sizes.batch_size), sizes.rounds)
            yield result
    loops = [row for row in rows if row.name in ("D2", "D3")]
    if loops:
        yield from _loops(loops, sizes)


def forward_result(row: Row, what: str, peers: Peers, rounds: int) -> Result:
    """Checks the outputs of all peers, then times them."""
    try:
        check_close(KNOWN, peers[KNOWN](), peers[PEER]())
        check = check_close("outputs", peers[OWN](), peers[PEER]())
    except WrongAnswer as error:
        return wrong(row, what, str(error))
    work = Work(counted_flops(peers[OWN]))
    floors = Floors(work)
    seconds = by_turns(peers | floors.calls, rounds, floors=list(floors.calls))
    known = measured(row, what, seconds, own=KNOWN, peer=PEER).ratio
    assert known is not None
    notes = (f"with the modulation of time and class given, as samplers do: {known.median:.2f}x [{known.low:.2f}, {known.high:.2f}]",)
    floor = floors.floor(seconds, work)
    return measured(row, what, seconds, own=OWN, peer=PEER, floor=floor, check=f"{check} of diffusers'", notes=notes)


@torch.inference_mode()
def _loops(rows: Sequence[Row], sizes: Sizes) -> list[Result]:
    results: list[Result] = []
    name, ours = named_dit(sizes.network, sizes.depth)
    loops = Loops(ours, diffusers_twin(ours), sizes.images, sizes.steps, GUIDANCE)
    peers = loops.peers()
    work = Work(counted_flops(peers[OWN]))
    own = {"D2": OWN, "D3": HALF}
    title = f"{name}, {sizes.steps} steps of DDIM, guidance {GUIDANCE:g}, {sizes.images} image(s)"
    whats = {"D2": title, "D3": f"{title} in the second half"}
    checks: dict[str, str] = {}
    for row in rows:
        try:
            checks[row.name] = check_close(whats[row.name], peers[own[row.name]](), loops.expected(own[row.name]))
        except WrongAnswer as error:
            results.append(wrong(row, whats[row.name], str(error)))
    sound = [row for row in rows if row.name in checks]
    if not sound:
        return results
    away = distance(peers[HALF](), peers[OWN]())
    floors = Floors(work)
    timed = {PEER: peers[PEER]} | {own[row.name]: peers[own[row.name]] for row in sound}
    seconds = by_turns(timed | floors.calls, sizes.loop_rounds, floors=list(floors.calls))
    for row in sound:
        half = Work(counted_flops(peers[HALF])) if row.name == "D3" else work
        notes = (f"latents lie {away:.2g} of their norm from fully guided ones",) if row.samples_differ else ()
        floor = floors.floor(seconds, half)
        check = checks[row.name].removeprefix(f"{whats[row.name]}: ") + " of diffusers'"
        result = measured(row, whats[row.name], seconds, own=own[row.name], peer=PEER, floor=floor, check=check, notes=notes)
        results.append(result)
    return results


def named_dit(network: str, depth: int | None) -> tuple[str, DiT]:
    """One of `NETWORKS`, with another number of blocks if told, and what to call it."""
    sizes = NETWORKS[network] | ({"depth": depth} if depth is not None else {})
    cut = f" of {depth} blocks" if sizes != NETWORKS[network] else ""
    return f"DiT-{network.upper()}/2{cut}", random_dit(**sizes)


def random_dit(**sizes: int) -> DiT:
    """With a learned variance, as DiT's published models; layers that start at zero, so that blocks do something, are random too."""
    torch.manual_seed(0)
    model = DiT(**sizes, num_classes=NUM_CLASSES, learn_sigma=True, norm2_eps=1e-5, time_freq_shift=1)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name.endswith("modulation") or name == "head.linear"):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.normal_(layer.bias, std=0.02)
    return model.eval()


def diffusers_twin(model: DiT) -> DiTTransformer2DModel:
    arguments, state = to_diffusers(model)
    twin = DiTTransformer2DModel(**arguments)
    twin.load_state_dict(state)
    return twin.eval()


def forward_peers(ours: DiT, peer: DiTTransformer2DModel, batch_size: int) -> Peers:
    x = torch.randn(batch_size, *ours.code_shape)
    t = torch.linspace(999, 0, batch_size).long()
    labels = torch.arange(batch_size) * 97 % (NUM_CLASSES + 1)
    rows = ours.modulation_rows(t, labels)
    return {
        PEER: lambda: peer(x, timestep=t, class_labels=labels).sample,
        OWN: lambda: ours(x, t, labels),
        KNOWN: lambda: ours(x, t, labels, modulation=rows),
    }


class Loops:
    """Whole samplings from one noise: every call draws the same images and returns their latents.

    Args:
        images: B; guided steps have twice as many rows.
    """

    def __init__(self, ours: DiT, peer: DiTTransformer2DModel, images: int, steps: int, scale: float) -> None:
        self.ours, self.steps, self.scale = ours, steps, scale
        self.labels = [97 * i % NUM_CLASSES for i in range(images)]
        self.vae = TinyVAE().eval()
        self.pipeline = DiTPipeline(peer, self.vae, DDIMScheduler(clip_sample=False))  # the scheduler of the published DiT pipelines
        self.pipeline.set_progress_bar_config(disable=True)
        self.generator = torch.Generator().manual_seed(0)
        self.noise = GivenStart(torch.randn(images, *ours.code_shape, generator=self.generator))

    def peers(self) -> Peers:
        return {PEER: self.by_diffusers, OWN: lambda: self.by_genvision(0.0), HALF: lambda: self.by_genvision(0.5)}

    def expected(self, name: str) -> Tensor:
        """What our sampler of this name must give, by diffusers' network and scheduler."""
        return self.half_guided() if name == HALF else self.by_diffusers()

    def by_diffusers(self) -> Tensor:
        self.pipeline(
            self.labels,
            guidance_scale=self.scale,
            num_inference_steps=self.steps,
            generator=self.generator.manual_seed(0),
            output_type="pt",
        )
        return self.vae.latest

    def by_genvision(self, start: float, **options: Any) -> Tensor:
        """Guided from progress `start` on."""
        guided = {"guidance_scale": self.scale, "guidance_start": start}
        sampler = DiffusionSampler(method="ddim", num_steps=self.steps, spacing="leading", **guided, **options)
        latents = sampler.sample(self.ours, torch.tensor(self.labels), self.noise)
        (self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return latents

    def half_guided(self) -> Tensor:
        """Latents by diffusers' network and scheduler, guided at the cleaner half of the 1,000 steps."""
        x, scheduler = self.noise.start, self.pipeline.scheduler
        conditional, null = torch.tensor(self.labels), torch.full((len(self.labels),), NUM_CLASSES)

        def noise(step: Tensor, classes: Tensor) -> Tensor:
            output: Tensor = self.pipeline.transformer(x, timestep=step.expand(len(x)), class_labels=classes).sample
            return output[:, : x.shape[1]]

        scheduler.set_timesteps(self.steps)
        for step in scheduler.timesteps:
            output = noise(step, conditional)
            if step < 999 / 2:
                base = noise(step, null)
                output = base + self.scale * (output - base)
            x = scheduler.step(output, step, x).prev_sample
        return x


class GivenStart(ImageStreams):
    """Streams whose first noise is the one that DiTPipeline draws."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(0, range(len(start)))
        self.start = start

    def normal(self, purpose: Purpose, shape: Any, *, step: int = 0) -> Tensor:
        assert purpose is Purpose.START_NOISE and tuple(shape) == tuple(self.start.shape[1:])
        return self.start


class TinyVAE(AutoencoderKL):
    """Hardly any work, and it keeps the latents that it is given: DiTPipeline returns none."""

    latest: Tensor

    def __init__(self) -> None:
        super().__init__(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.latest = z * self.config.scaling_factor
        return super().decode(z, *args, **kwargs)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to that of the expected numbers."""
    return ((found - expected).norm() / expected.norm()).item()
