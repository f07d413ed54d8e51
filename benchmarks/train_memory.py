"""How much memory a training step takes and how long, for each way of keeping activations and of computing the loss of tokens.

A step is a forward and a backward pass in float32 (bf16 autocast on CUDA), dropout on, random data. Each cell runs in a process of its own.
Gradients of weights are let go as soon as they are there, and there is no optimiser: both are the same everywhere and come on top, 4 and 8
bytes a weight with AdamW.

kept: bytes saved for the backward pass, besides weights. peak: most bytes of tensors alive at once beside the weights; on CUDA what the
allocator says. RSS: by how much the step raised the largest resident size of its process (CPU only). `head` is the output layer of a
LlamaGen and its loss alone, for 16 times as many images. Memory on a CPU is the same in every run; times are those of a busy machine where
it is one.

    python benchmarks/train_memory.py --sizes tiny                                    # one thread; about 3 minutes
    python benchmarks/train_memory.py --models llamagen,dit --sizes B --policies none,sqrt
    python benchmarks/train_memory.py --device cuda --batch 32 --chunk 33554432
"""

import argparse
import multiprocessing
import resource
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from genvision.bench.timing import NUM_THREADS, machine_load

# isort: split
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genvision.layers import token_loss
from genvision.layers.checkpointing import POLICIES, set_checkpointing
from genvision.layers.token_loss import TokenTargets, layer_loss
from genvision.models.dit import DiT
from genvision.models.llamagen import LlamaGen
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR
from genvision.objectives.diffusion import DiffusionLoss, DiffusionLossConfig
from genvision.objectives.masked import MaskedLossConfig, MaskedTokens
from genvision.objectives.next_token import NextToken
from genvision.objectives.permuted import PermutedLossConfig, PermutedTokens
from genvision.tokenizers.titok import TiTok
from genvision.tokenizers.vit import ViTok
from genvision.tokenizers.vq import VQTokenizer

TINY = {"grid_size": 8, "hidden_dim": 192, "depth": 6, "num_heads": 3}
TINY_VIT = {
    "image_size": 64,
    "patch_size": 8,
    **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("depth", 4), ("heads", 3))},
}
MAGE_LOSS = MaskedLossConfig(mask_law="truncated_normal", min_ratio=0.5, drop_ratio=0.5, reduction="batch")
Loss = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


def reconstruction(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    output = model(batch["images"])
    return {"loss": (output.reconstruction - batch["images"]).square().mean() + sum(output.losses.values())}


def head_alone(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": layer_loss(model, batch["hidden"], TokenTargets(batch["codes"])).loss}


NETWORKS: dict[str, tuple[dict[str, Callable[[], Any]], Callable[[Any, int], Loss]]] = {
    "llamagen": (
        {"tiny": lambda: LlamaGen(**TINY), "B": LlamaGen},
        lambda model, batch: NextToken(model.config.codebook_size),
    ),
    "rar": (
        {"tiny": lambda: RAR(**TINY), "B": RAR},
        lambda model, batch: PermutedTokens(PermutedLossConfig(), model, seed=0),
    ),
    "maskgit": (
        {"tiny": lambda: MaskGIT(**TINY), "B": MaskGIT},
        lambda model, batch: MaskedTokens(MaskedLossConfig(), model, seed=0, num_steps=1),
    ),
    "mage": (
        {"tiny": lambda: MAGE(**TINY, decoder_dim=192, decoder_depth=4, decoder_num_heads=3), "B": MAGE},
        lambda model, batch: MaskedTokens(MAGE_LOSS, model, seed=0, num_steps=1),
    ),
    "dit": (
        {"tiny": lambda: DiT(input_size=16, hidden_dim=192, depth=6, num_heads=3), "B": lambda: DiT(hidden_dim=768, num_heads=12)},
        lambda model, batch: DiffusionLoss(DiffusionLossConfig(), model, seed=0, batch_size=batch),
    ),
    "vq": (
        {"tiny": lambda: VQTokenizer(image_size=64, base_channels=32), "B": lambda: VQTokenizer(image_size=128)},
        lambda model, batch: reconstruction,
    ),
    "vitok": (
        {"tiny": lambda: ViTok(encoder_width=192, decoder_width=192, **TINY_VIT), "B": ViTok},
        lambda model, batch: reconstruction,
    ),
    "titok": (
        {"tiny": lambda: TiTok(encoder_dim=192, decoder_dim=192, **TINY_VIT), "B": TiTok},
        lambda model, batch: reconstruction,
    ),
    "head": (
        {"B": lambda: nn.Linear(768, 16384, bias=False)},
        lambda model, batch: head_alone,
    ),
}
"""For each model how it is built in each size, and its loss. Sizes B are the defaults: the papers' at 256 pixels, VQ-16 at 128."""
LARGE_CODEBOOKS = ("llamagen", "maskgit", "head")
"""16384 codes; with the 1024 of the others a small batch's logits fit into any chunk."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--sizes", default="tiny,B")
    parser.add_argument("--policies", default=",".join(POLICIES), help="of gradient checkpointing")
    parser.add_argument("--batch", type=int, default=2, help="of size B; four times that of tiny")
    parser.add_argument("--chunk", type=int, default=2**21, help="logits held at once where they are chunked; the program has 2^25")
    parser.add_argument("--rounds", type=int, default=1, help="timed steps, of which the shortest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    print(f"{arguments.device}, {NUM_THREADS} thread(s), PyTorch {torch.__version__}; {machine_load()}\n")
    print("| model | size | weights M | batch | policy | logits | kept MB | peak MB | RSS MB | step s |")
    print("|---|---|---:|---:|---|---|---:|---:|---:|---:|")
    for size in arguments.sizes.split(","):
        batch = arguments.batch * (4 if size == "tiny" else 1)
        for name in (name for name in arguments.models.split(",") if size in NETWORKS[name][0]):
            for logits in ("whole", "chunks") if name in LARGE_CODEBOOKS else ("",):
                for policy in arguments.policies.split(",") if name != "head" else ("none",):
                    cell = in_a_process(measure, name, size, batch, policy, logits, arguments)
                    print(f"| {name} | {size} | {cell[0]:.1f} | {batch} | {policy} | {logits} | {' | '.join(cell[1:])} |", flush=True)


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """A fork, so that imports are there already and memory begins anew."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *args))
    process.start()
    sender.close()
    result = receiver.recv()  # EOFError where the process died
    process.join()
    return result


def _send(sender: Connection, function: Callable[..., Any], *args: Any) -> None:
    sender.send(function(*args))


def measure(name: str, size: str, batch: int, policy: str, logits: str, arguments: argparse.Namespace) -> list[Any]:
    """Parameters in millions, then the columns of the table."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    token_loss.CHUNK = arguments.chunk if logits == "chunks" else 2**62
    sizes, objective = NETWORKS[name]
    model = sizes[size]().train().to(device)
    if policy != "none":
        set_checkpointing(model, policy)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(let_go)
    loss, data = objective(model, batch), random_batch(model, batch, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total = loss(model, data)["loss"]
        total.backward()

    kept = Kept(model)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with kept.hooks():
            step()
        peak, rss = torch.cuda.max_memory_allocated() - weights, "-"
    else:
        with kept.hooks(), Alive() as alive:
            step()
        peak, rss = alive.peak, f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024:.0f}"
    seconds = []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return [parameters, f"{kept.bytes / 2**20:.0f}", f"{peak / 2**20:.0f}", rss, f"{min(seconds):.2f}"]


def let_go(parameter: Tensor) -> None:
    parameter.grad = None


def random_batch(model: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Codes or latents with labels, or images, or hidden states."""
    if isinstance(model, nn.Linear):
        hidden = torch.randn(16 * batch, 256, model.in_features, device=device, requires_grad=True)
        return {"hidden": hidden, "codes": torch.randint(model.out_features, hidden.shape[:2], device=device)}
    if not hasattr(model, "code_shape"):
        return {"images": torch.rand(batch, 3, model.spec.image_size, model.spec.image_size, device=device) * 2 - 1}
    places = (batch, *model.code_shape)
    codes = torch.randn(places) if isinstance(model, DiT) else torch.randint(model.config.codebook_size, places)
    told = {"codes": codes, "labels": torch.arange(batch) % model.num_classes, "positions": torch.arange(batch)}
    return {name: tensor.to(device) for name, tensor in told.items()}


class Kept:
    """Bytes of the storages that autograd saves outside of recomputed parts; weights do not count."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.seen.values())

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # what made it must not be held by itself


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in given:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return output

    def _freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


if __name__ == "__main__":
    main()
