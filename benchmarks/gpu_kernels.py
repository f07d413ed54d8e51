"""On a real card: what our kernels and the graph of a decoding step reach of what the card can do, beside torch's own operations.

First the ceilings are measured, never read from a data sheet: bytes a second of a large copy, and bfloat16 products a second. Then, each as
a CUDA graph and compared with the formula before it is timed:

decode: one new token of LlamaGen-B (12 heads of 64) against a cache of 64 or 257 positions, 1 to 256 rows: `kernels.decode` as one kernel,
    the same in torch's operations (rotary, write to the cache, SDPA), and SDPA alone; the floor reads keys and values once.
modulate: gated sum and modulated norm of DiT-XL/2 (256 tokens of width 1152); the floor reads both inputs and writes both outputs once.
draw: guidance, top-k, top-p and the draw from 16,384 logits; the floor reads the logits once.
step: a whole step of LlamaGen-B, L and XL at position 128 of 257, captured and eager; the floor reads weights and cache once.

A time is the median of 50 runs between CUDA events; 256 MB are written before each, so that nothing is left in the L2 cache.

    python benchmarks/gpu_kernels.py                                  # a few minutes
    python benchmarks/gpu_kernels.py --page docs/performance.md       # and write the tables there
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from genvision.bench.page import GPU, marked_page, write_between
from genvision.kernels.decode import decode_attention, decode_backend, plain_decode_attention
from genvision.kernels.draw import draw_plainly
from genvision.kernels.modulate import add_gated, modulate
from genvision.models.llamagen import LlamaGen
from genvision.samplers.graphed_step import graphed_step

RUNS, WARM_UPS = 50, 5
FLUSH = 2**28
"""Bytes written between runs; L2 caches hold less."""
ROWS = (1, 2, 8, 32, 64, 128, 256)
HEADS, HEAD_DIM, LENGTH = 12, 64, 257
GPT = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 36, 20)}
"""Width, depth and heads."""
TOLERANCE = 2e-2
"""Of bfloat16 outputs, relative to the largest."""


@dataclass(frozen=True)
class Line:
    """A row of the table; times in microseconds."""

    name: str
    ours: float
    others: dict[str, float]
    floor: float

    def cells(self) -> list[str]:
        others = "; ".join(f"{name} {time:.1f} ({time / self.ours:.2f}x)" for name, time in self.others.items())
        return [self.name, f"{self.ours:.1f}", others, f"{self.floor:.1f}", f"{self.floor / self.ours:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="decode,modulate,draw,step", help="several by commas")
    parser.add_argument("--page", type=Path, help="page that the tables are written to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure")
    if arguments.page is not None:
        marked_page(arguments.page, GPU)
    if decode_backend(*torch.empty(2, 1, 1, 64, device="cuda", dtype=torch.bfloat16).unbind()) != "triton":
        raise SystemExit("our kernels are not chosen here: install triton, and unset GENVISION_ATTENTION")
    parts = {"decode": decode_lines, "modulate": modulate_lines, "draw": draw_lines, "step": step_lines}
    bandwidth, products = ceilings()
    properties = torch.cuda.get_device_properties(0)
    head = (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, torch {torch.__version__}: "
        f"{bandwidth / 1e9:,.0f} GB/s copied, {products / 1e12:,.0f} TFLOP/s of bfloat16 products; both measured."
    )
    table = ["| what | ours, us | others, us | floor, us | part of the floor |", "|---|---|---|---|---|"]
    print(f"{head}\n\n" + "\n".join(table), flush=True)
    with torch.inference_mode():
        for part in arguments.parts.split(","):
            for line in parts[part](bandwidth):
                table.append(f"| {' | '.join(line.cells())} |")
                print(table[-1], flush=True)
    if arguments.page is not None:
        write_between(arguments.page, GPU, f"{head}\n\n" + "\n".join(table))


def ceilings() -> tuple[float, float]:
    """Bytes a second read and written by a copy, and floating-point operations a second of a bfloat16 product."""
    source, target = torch.ones(2, 2**28, device="cuda").unbind()
    bandwidth = 2 * source.nbytes / (1e-6 * microseconds(lambda: target.copy_(source)))
    side = 8192
    left, right = torch.randn(2, side, side, device="cuda", dtype=torch.bfloat16).unbind()
    return bandwidth, 2 * side**3 / (1e-6 * microseconds(lambda: left @ right))


def decode_lines(bandwidth: float) -> Iterator[Line]:
    rotary = torch.randn(LENGTH, HEAD_DIM // 2, 2, device="cuda")
    for length in (64, LENGTH):
        place = torch.tensor([length - 1], device="cuda", dtype=torch.int32)
        for rows in ROWS:
            heads = torch.randn(rows, 3 * HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            keys, values = torch.randn(2, rows, HEADS, LENGTH, HEAD_DIM, device="cuda", dtype=torch.bfloat16).unbind()
            query, seen = heads[:, :HEADS].unsqueeze(2), (keys[:, :, :length], values[:, :, :length])

            def ours(heads: Any = heads, keys: Any = keys, values: Any = values, place: Any = place) -> Any:
                return decode_attention(heads, keys, values, place, rotary=rotary)

            def torch_ops(heads: Any = heads, keys: Any = keys, values: Any = values, length: int = length) -> Any:
                return plain_decode_attention(heads, keys, values, length - 1, rotary=rotary)

            def sdpa(query: Any = query, seen: Any = seen) -> Any:
                return F.scaled_dot_product_attention(query, *seen)

            compare(f"decode, {rows} rows", ours(), torch_ops())
            others = {"torch": microseconds(graphed(torch_ops)), "SDPA alone": microseconds(graphed(sdpa))}
            floor = 1e6 * 2 * rows * HEADS * length * HEAD_DIM * 2 / bandwidth
            yield Line(f"decode attention, {rows} rows, {length} positions", microseconds(graphed(ours)), others, floor)


def modulate_lines(bandwidth: float) -> Iterator[Line]:
    from genvision.kernels.triton_modulate import fused_add_gated_norm_modulate

    for rows in (2, 16, 64):
        x, branch = torch.randn(2, rows, 256, 1152, device="cuda", dtype=torch.bfloat16).unbind()
        shift, scale, gate = torch.randn(3, rows, 1152, device="cuda", dtype=torch.bfloat16).unbind()

        def ours(x: Any = x, gate: Any = gate, branch: Any = branch, shift: Any = shift, scale: Any = scale) -> Any:
            return fused_add_gated_norm_modulate(x, gate, branch, shift, scale, kind="layer", weight=None, eps=1e-6)

        def torch_ops(x: Any = x, gate: Any = gate, branch: Any = branch, shift: Any = shift, scale: Any = scale) -> Any:
            added = add_gated(x, gate, branch)
            return added, modulate(F.layer_norm(added, added.shape[-1:], eps=1e-6), shift, scale)

        for found, expected in zip(ours(), torch_ops(), strict=True):
            compare(f"modulate, {rows} rows", found, expected)
        floor = 1e6 * 4 * x.nbytes / bandwidth
        yield Line(
            f"gated sum and modulated norm, {rows} x 256 x 1152",
            microseconds(graphed(ours)),
            {"torch": microseconds(graphed(torch_ops))},
            floor,
        )


def draw_lines(bandwidth: float) -> Iterator[Line]:
    from genvision.kernels.triton_draw import draw_in_one_kernel

    for images in (1, 16, 128):
        logits = torch.randn(2 * images, 16384, device="cuda")
        uniform = torch.rand(images, device="cuda", dtype=torch.float64)
        for top_k, top_p in ((2000, 1.0), (0, 0.95)):

            def ours(logits: Any = logits, uniform: Any = uniform, top_k: int = top_k, top_p: float = top_p) -> Any:
                return draw_in_one_kernel(logits, uniform, guidance_scale=4.0, temperature=1.0, top_k=top_k, top_p=top_p)

            def torch_ops(logits: Any = logits, uniform: Any = uniform, top_k: int = top_k, top_p: float = top_p) -> Any:
                conditional, null = logits.chunk(2)
                return draw_plainly((conditional - null).mul_(4.0).add_(null), uniform, temperature=1.0, top_k=top_k, top_p=top_p)

            if not torch.equal(ours(), torch_ops()):
                raise SystemExit(f"draw, {images} images, top_k {top_k}, top_p {top_p}: tokens differ; nothing more is timed")
            others = {"torch": microseconds(torch_ops)}  # eager: sorting allocates as it goes
            floor = 1e6 * logits.nbytes / bandwidth
            yield Line(f"draw, {images} images, top-k {top_k}, top-p {top_p:g}", microseconds(graphed(ours)), others, floor)


def step_lines(bandwidth: float) -> Iterator[Line]:
    for name, (width, depth, heads) in GPT.items():
        torch.manual_seed(0)
        model = LlamaGen(hidden_dim=width, depth=depth, num_heads=heads).eval()
        torch.nn.init.normal_(model.head.weight, std=0.02)
        model = model.to("cuda", torch.bfloat16)
        weights = sum(2 * parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name)
        for rows in (2, 32, 256):
            known = torch.randint(16384, (rows, 127), device="cuda")
            caches = [model.start(torch.zeros(rows, dtype=torch.int64, device="cuda"), codes=known)[1] for _ in range(2)]
            filled, token = caches[0].filled, known[:, 0]
            step = graphed_step(model, caches[1], None)
            assert step is not None

            def captured(step: Any = step, model: Any = model, cache: Any = caches[1], filled: int = filled, token: Any = token) -> Any:
                cache.filled = filled
                return step.extend(model, token, cache)

            def eager(model: Any = model, cache: Any = caches[0], filled: int = filled, token: Any = token) -> Any:
                cache.filled = filled
                return model.extend(token, cache)

            compare(f"step of LlamaGen-{name}, {rows} rows", captured(), eager())
            cache_bytes = 2 * depth * rows * width * filled * 2
            floor = 1e6 * (weights + cache_bytes) / bandwidth
            yield Line(f"step of LlamaGen-{name}, {rows} rows", microseconds(captured), {"eager": microseconds(eager)}, floor)


def microseconds(call: Callable[[], Any]) -> float:
    """Median time between CUDA events."""
    flush = torch.empty(FLUSH // 4, dtype=torch.int32, device="cuda")
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(RUNS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """Replays the call's kernels with one launch, so that a short kernel is not timed with the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compare(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"{what}: differs by {difference:.1e} of the largest number, {TOLERANCE:g} is allowed; nothing more is timed")


if __name__ == "__main__":
    main()
