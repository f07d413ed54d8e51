"""How fast a device could be, how much a training sample costs, and so how well a device is used: MFU (PaLM, arXiv:2204.02311, appendix B).

A multiply-add is two FLOPs. What counts is what the model needs, not what was computed: activations that gradient checkpointing computes
a second time add nothing, and attention counts in full, whatever its mask lets a kernel leave out.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
BACKWARD_COST = 2
"""Of a backward pass, in forward passes: each product has two gradients."""


class Peak(NamedTuple):
    """10^12 FLOP/s of matrix products without sparsity, accumulated in float32; None where the device has no such arithmetic."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float


PEAKS: tuple[tuple[str, Peak], ...] = (
    # the first whose words all stand in the name counts; figures of data sheets and papers on the architecture, half of those with sparsity
    ("GB200", Peak(2500, 2500, 1250, 80)),
    ("B200", Peak(2250, 2250, 1125, 75)),
    ("GH200", Peak(989.5, 989.5, 494.7, 67)),
    ("H200 NVL", Peak(835.5, 835.5, 417.5, 60)),
    ("H200", Peak(989.5, 989.5, 494.7, 67)),
    ("H100 NVL", Peak(835.5, 835.5, 417.5, 60)),
    ("H100 PCIe", Peak(756.5, 756.5, 378, 51)),
    ("H100", Peak(989.5, 989.5, 494.7, 67)),  # SXM5, whose name says "80GB HBM3"
    ("A100", Peak(312, 312, 156, 19.5)),
    ("A10G", Peak(70, 70, 35, 35)),
    ("A10", Peak(125, 125, 62.5, 31.2)),
    ("L40S", Peak(362.05, 362.05, 183, 91.6)),
    ("L4", Peak(121, 121, 60, 30.3)),
    ("T4", Peak(None, 65, None, 8.1)),
    ("V100 PCIE", Peak(None, 112, None, 14)),
    ("V100", Peak(None, 125, None, 15.7)),
    ("RTX 3090", Peak(71, 71, 35.6, 35.6)),
    ("RTX 4090", Peak(165.2, 165.2, 82.6, 82.6)),
    ("RTX 5090", Peak(209.5, 209.5, 104.8, 104.8)),
    # AMD's data sheets; matrix cores also in float32. Of an MI250X each half is a device, with half of the card's figures
    ("MI250X", Peak(191.5, 191.5, None, 47.9)),
    ("MI300X", Peak(1307.4, 1307.4, 653.7, 163.4)),
)
OTHER_DEVICES = frozenset({"MIG", "LAPTOP", "MAX-Q", "D", "TI"})
"""Words of names that say less, or more, than the whole device of the table."""


def peak_of(name: str, precision: Precision) -> float | None:
    """FLOP/s of a device at most, by the name that `torch.cuda.get_device_name` gives; None where it is not known."""
    words = set(re.split(r"[\s/-]+", name.upper()))
    for model, peak in PEAKS:
        if set(model.upper().split()) <= words and not words & OTHER_DEVICES:
            found: float | None = getattr(peak, precision)
            return None if found is None else found * 1e12
    return None


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """FLOP/s that a device could do in the mixed precision of Accelerate (`no`, `bf16`, `fp16`); None where it is not known, or no GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if mixed_precision == "bf16":
        return peak_of(name, "bf16")
    if mixed_precision == "fp16":
        return peak_of(name, "fp16")
    if mixed_precision != "no":
        return None
    tf32 = peak_of(name, "tf32") if torch.get_float32_matmul_precision() != "highest" else None
    return tf32 or peak_of(name, "fp32")


def mfu(flops_per_second: float, peak: float, num_devices: int = 1) -> float:
    """Model FLOPs utilisation: part of what the devices could do that the model needed."""
    return flops_per_second / (peak * num_devices)


def count_flops(function: Callable[[], object]) -> float:
    """FLOPs of matrix products, convolutions and attention in a call of `function`; whatever else it does happens, too.

    Attention is computed in its plain form, since a fused kernel of a CPU would not be counted.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return float(counter.get_total_flops())


def training_flops(forward: Callable[[], object]) -> float:
    """FLOPs of a forward and backward pass, from a forward pass alone, which so counts nothing twice whatever is checkpointed.

    `forward` should call the trained model, not yet compiled or sharded, and no frozen one, of which there is no backward pass. Random
    numbers stay as they are.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        return (1 + BACKWARD_COST) * count_flops(forward)
