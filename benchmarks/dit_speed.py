"""How fast is a diffusion transformer: ours beside that of diffusers, with the same weights, the same noise and the same numbers out?

forward: one call of DiT and of DiTTransformer2DModel, every row with its own time and class. `modulation known` is given what
    depends on time and class, as samplers do.
loop: images by guided DDIM, decoder included, by DiffusionSampler and by DiTPipeline as its users call it; and by DiffusionSampler with
    guidance in the second half of the steps only, which DiTPipeline cannot do. Every run is a job of its own: our tables are built
    again. Both decode with one tiny AutoencoderKL, which takes next to no time.

Before anything is timed, outputs are compared: a difference above 1e-4 of the largest number ends the run. The guided half is compared
with a loop over diffusers' network and scheduler. Peers then run in this process by turns, in float32, and what counts is the median of
ratios taken within a round, of CPU time. Weights are random, those that start at zero too: the arithmetic does not depend on them.

    python benchmarks/dit_speed.py                                           # S/2, one thread: forward 8 rows, loop 4 images; 30 minutes
    python benchmarks/dit_speed.py --parts forward --size b --batch-size 4 --rounds 15
    python benchmarks/dit_speed.py --parts loop --size tiny --steps 10       # a minute
"""

import argparse
from collections.abc import Callable
from typing import Any

from timing import NUM_THREADS, by_turns, print_comparison

# isort: split
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from genvision.convert.diffusers_dit import to_diffusers
from genvision.models.dit import DiT
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_dim=64, depth=2, num_heads=2, input_size=8),
    "s": dict(hidden_dim=384, depth=12, num_heads=6),
    "b": dict(hidden_dim=768, depth=12, num_heads=12),
    "l": dict(hidden_dim=1024, depth=24, num_heads=16),
    "xl": dict(hidden_dim=1152, depth=28, num_heads=16),
}
NUM_CLASSES = 1000
"""DiTPipeline's null label is 1000, whatever the model."""
TOLERANCE = 1e-4
PEER = "diffusers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="forward,loop", help="forward, loop or both")
    parser.add_argument("--size", default="s", choices=SIZES, help="of the network; patches of 2 x 2")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of the forward pass")
    parser.add_argument("--rounds", type=int, default=15, help="times that each peer is timed on the forward pass, after one to warm up")
    parser.add_argument("--images", type=int, default=4, help="of the loop; guided steps have twice as many rows")
    parser.add_argument("--steps", type=int, default=50, help="of the loop")
    parser.add_argument("--loop-rounds", type=int, default=5, help="the same for the loop")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="4 is DiTPipeline's default")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    ours = random_dit(**SIZES[arguments.size])
    peer = diffusers_twin(ours)
    name = f"DiT-{arguments.size.upper()}/2"
    with torch.inference_mode():
        if "forward" in arguments.parts.split(","):
            peers = forward_peers(ours, peer, arguments.batch_size)
            print_comparison(f"forward of {name}, {arguments.batch_size} rows", by_turns(peers, arguments.rounds), PEER)
        if "loop" in arguments.parts.split(","):
            peers = loop_peers(ours, peer, arguments.images, arguments.steps, arguments.guidance_scale)
            title = f"DDIM of {name}, {arguments.steps} steps, guidance {arguments.guidance_scale:g}, {arguments.images} images"
            print_comparison(title, by_turns(peers, arguments.loop_rounds), PEER)


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


def forward_peers(ours: DiT, peer: DiTTransformer2DModel, batch_size: int) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(batch_size, *ours.code_shape)
    t = torch.linspace(999, 0, batch_size).long()
    labels = torch.arange(batch_size) * 97 % (NUM_CLASSES + 1)
    rows = ours.modulation_rows(t, labels)
    peers: dict[str, Callable[[], Tensor]] = {
        PEER: lambda: peer(x, timestep=t, class_labels=labels).sample,
        "genvision": lambda: ours(x, t, labels),
        "genvision, modulation known": lambda: ours(x, t, labels, modulation=rows),
    }
    for name in list(peers)[1:]:
        check(f"forward, {name}", peers[name](), peers[PEER]())
    return peers


def loop_peers(ours: DiT, peer: DiTTransformer2DModel, images: int, steps: int, scale: float) -> dict[str, Callable[[], Tensor]]:
    """Each draws the same images from the same noise and returns their latents."""
    labels = [97 * i % NUM_CLASSES for i in range(images)]
    vae = TinyVAE().eval()
    pipeline = DiTPipeline(peer, vae, DDIMScheduler(clip_sample=False))  # the scheduler of the published DiT pipelines
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise = GivenStart(torch.randn(images, *ours.code_shape, generator=generator))

    def by_diffusers() -> Tensor:
        pipeline(labels, guidance_scale=scale, num_inference_steps=steps, generator=generator.manual_seed(0), output_type="pt")
        return vae.latest

    def by_genvision(start: float) -> Tensor:
        sampler = DiffusionSampler(method="ddim", num_steps=steps, spacing="leading", guidance_scale=scale, guidance_start=start)
        latents = sampler.sample(ours, torch.tensor(labels), noise)
        (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return latents

    peers: dict[str, Callable[[], Tensor]] = {
        PEER: by_diffusers,
        "genvision": lambda: by_genvision(0.0),
        "genvision, half of it guided": lambda: by_genvision(0.5),
    }
    check("loop", peers["genvision"](), peers[PEER]())
    check("loop, half of it guided", peers["genvision, half of it guided"](), half_guided(pipeline, noise.start, labels, steps, scale))
    return peers


def half_guided(pipeline: DiTPipeline, x: Tensor, labels: list[int], steps: int, scale: float) -> Tensor:
    """Latents by diffusers' network and scheduler, guided at the cleaner half of the 1,000 steps."""
    conditional, null = torch.tensor(labels), torch.full((len(labels),), NUM_CLASSES)

    def noise(step: Tensor, classes: Tensor) -> Tensor:
        output: Tensor = pipeline.transformer(x, timestep=step.expand(len(x)), class_labels=classes).sample
        return output[:, : x.shape[1]]

    pipeline.scheduler.set_timesteps(steps)
    for step in pipeline.scheduler.timesteps:
        output = noise(step, conditional)
        if step < 999 / 2:
            base = noise(step, null)
            output = base + scale * (output - base)
        x = pipeline.scheduler.step(output, step, x).prev_sample
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


def check(what: str, found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item() / scale
    print(f"{what}: the outputs differ by {difference:.1e} of the largest, {scale:.3g}", flush=True)
    if not difference <= TOLERANCE:  # not finite ones included
        raise SystemExit(f"{what}: {TOLERANCE:g} is allowed; nothing was timed")


if __name__ == "__main__":
    main()
