"""The step of a token as a CUDA graph: one launch in place of some hundred, which at small sizes take longer than what they launch."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genvision.kernels.decode import decode_backend

GRAPHS_OF_A_MODEL = 4
"""Kept for batches to come; each keeps the memory of its cache."""

_kept: "WeakKeyDictionary[Any, dict[tuple[Any, ...], GraphedStep]]" = WeakKeyDictionary()


class GraphedStep:
    """`generator.extend` for caches of one shape, captured at its first call and replayed afterwards.

    One graph serves every position: the kernel of `decode_attention` reads the position from memory and attends to exactly the keys that
    are there, so there is neither a mask nor a graph for each length. It is bound to the memory of the weights and of one cache, into which
    others are moved.
    """

    WARM_UPS = 3

    def __init__(self, cache: Any) -> None:
        self.store = cache.store
        self.place = torch.zeros(1, dtype=torch.int32, device=cache.store.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.logits: Tensor | None = None

    def adopt(self, cache: Any) -> None:
        """Move what a cache holds to where the graph reads it; the cache lies there from now on."""
        if cache.store is not self.store:
            self.store[..., : cache.filled, :] = cache.store[..., : cache.filled, :]
        cache.store, cache.place = self.store, self.place

    def extend(self, generator: Any, codes: Tensor, cache: Any) -> Tensor:
        """Read one more token of each row, int64 [B]; logits of the next, float32 [B, V], are valid until the next call."""
        inputs = generator.step_inputs(codes, cache)
        self.place.fill_(cache.filled)
        if self.graph is None:
            self._capture(generator, inputs, cache)
        assert self.graph is not None and self.logits is not None
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.graph.replay()
        cache.filled += 1
        return self.logits

    def _capture(self, generator: Any, inputs: tuple[Tensor, ...], cache: Any) -> None:
        self.inputs = tuple(given.clone() for given in inputs)
        # kernels are compiled, and libraries warmed up, on a stream of its own before the capture; each run writes what the first replay
        # writes again
        device = self.store.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                generator.step(cache, *self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # its own stream, since torch's default one for captures belongs to one device; other threads, which pin memory, may allocate
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = generator.step(cache, *self.inputs)
        self.graph = graph


def graphed_step(generator: Any, cache: Any, condition_mask: Tensor | None) -> GraphedStep | None:
    """The step for this cache, which is moved to the step's memory; None where a step cannot be captured.

    A step is kept for later batches of the same shape as long as the weights stay where they are; one thread at a time may draw from a
    model, then.

    Args:
        generator: a causal model in eval mode.
        cache: as its `start` gives it, or a part of such a one.
        condition_mask: of padded text, if there is some.
    """
    if cache.store.device.type != "cuda" or not can_capture(cache, condition_mask):
        return None
    steps = _kept.setdefault(generator, {})
    key = (cache.store.shape, cache.store.dtype, cache.store.device, *_addresses(generator))
    if key not in steps:
        if len(steps) == GRAPHS_OF_A_MODEL:
            steps.pop(next(iter(steps)))  # the oldest
        steps[key] = GraphedStep(cache)
    steps[key].adopt(cache)
    return steps[key]


def forget_steps(generator: Any) -> None:
    """Free the graphs of a model and the memory of their caches; for who draws once in a while and needs the memory in between."""
    _kept.pop(generator, None)


def _addresses(generator: Any) -> list[int]:
    tensors = [*generator.parameters(), *generator.buffers()]
    return [tensor.data_ptr() for tensor in tensors if tensor.layout == torch.strided]


def can_capture(cache: Any, condition_mask: Tensor | None) -> bool:
    """On a GPU, where the attention of a step is our kernel (others need the position on the host), without padded text."""
    keys = cache.store[0, :, 0]
    return keys.device.type == "cuda" and condition_mask is None and decode_backend(keys[:, :, 0], keys) == "triton"
