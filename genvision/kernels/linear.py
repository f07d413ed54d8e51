"""x W^T + b with weights that are laid out once, for inference on a CPU.

Decoding token by token multiplies every weight with a few rows, and what counts is how the weight is read. On one thread of a CPU with
AVX2, the linear layers of LlamaGen-B (390 MB in float32) take, in milliseconds:

    rows  F.linear  inputs first  oneDNN  float16  int8   reading float32 once
    1         27.4          22.3    26.2     17.3   9.8   21.2
    2         52.5          36.6    30.8     17.4  10.0   20.3
    8         74.4          70.0    52.2     31.7  13.1   22.4

Some of the operations are private to torch: `has` says whether this build has them with the arguments that are given here, and
`choose_layout` takes another where it does not.

Shapes: x [..., I], W [O, I], b [O].
"""

import mmap
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["float32", "float16", "int8"]
"""The numbers that weights are kept in; activations and sums stay float32, but for int8 activations have 8 bits a row."""
Layout = Literal["as is", "inputs first", "onednn", "float16", "int8", "int8 in float32"]
Product = Callable[[Tensor], Tensor]

FEW_ROWS = 48
"""With more rows F.linear is about as fast as oneDNN's layout."""
ACTIVATION_LEVELS = 127
WEIGHT_LEVELS = 63
"""Without better instructions a CPU adds two products of bytes in 16 bits, and 2 * 63 * (127 + 128) is what fits. A sum is exact then,
and the same on every machine."""

_TINY = torch.tensor(1e-30)
"""Scale of a row of zeros."""

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "mkldnn._reorder_linear_weight": ("self", "batch_size"),
    "mkldnn._linear_pointwise": ("X", "W", "B", "attr", "scalars", "algorithm"),
    "quantized.linear_prepack": ("W", "B"),
    "quantized.linear_with_input_q_dq_qweight_dq_output_fp32": ("X", "X_scale", "X_zero_point", "W_prepack"),
    "quantized.linear_prepack_fp16": ("W", "B"),
    "quantized.linear_dynamic_fp16": ("X", "W_prepack"),
}
_NEEDED: dict[Layout, tuple[str, ...]] = {
    "onednn": ("mkldnn._reorder_linear_weight", "mkldnn._linear_pointwise"),
    "float16": ("quantized.linear_prepack_fp16", "quantized.linear_dynamic_fp16"),
    "int8": ("quantized.linear_prepack", "quantized.linear_with_input_q_dq_qweight_dq_output_fp32"),
}


def pack(weight: Tensor, bias: Tensor | None, weights: Weights, rows: int) -> Product | None:
    """The product of a layer, for float32 x on a CPU without gradients; None where F.linear is the best there is.

    Args:
        weight: float32 [O, I], on the CPU.
        bias: float32 [O].
        weights: in which numbers W is kept.
        rows: about how many rows x will have; any number works.

    Raises:
        ValueError: weights is none of these.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights '{weights}' is unknown; choose one of {', '.join(get_args(Weights))}")
    layout = choose_layout(weights, rows, is_wide=weight.shape[0] < weight.shape[1])
    weight = weight.detach()
    bias = bias.detach() if bias is not None else None
    return _PACKERS[layout](weight, bias, rows) if layout != "as is" else None


def choose_layout(weights: Weights, rows: int, *, is_wide: bool = False) -> Layout:
    """The fastest layout of those that this build of torch has.

    Args:
        is_wide: O < I.
    """
    if weights == "int8":
        return "int8" if has("int8") else "int8 in float32"
    if weights == "float16" and has("float16"):
        return "float16"
    if rows == 1:
        return "as is" if is_wide else "inputs first"
    if rows <= FEW_ROWS:
        return "onednn" if has("onednn") else "inputs first"
    return "as is"


@lru_cache
def has(layout: Layout) -> bool:
    """Whether this build of torch has the operations of a layout, with the arguments that are given here."""
    if layout == "onednn" and not torch.backends.mkldnn.is_available():
        return False
    if layout in ("float16", "int8") and "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    if layout == "int8" and not hasattr(torch, "_make_per_channel_quantized_tensor"):
        return False
    return all(_arguments(name) == _ARGUMENTS[name] for name in _NEEDED.get(layout, ()))


def _arguments(name: str) -> tuple[str, ...] | None:
    namespace, operation = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), operation, None)
    return tuple(argument.name for argument in packet.default._schema.arguments) if packet is not None else None


def _inputs_first(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    transposed = _in_large_pages(weight.t())
    if bias is None:
        return lambda x: x @ transposed
    return lambda x: torch.addmm(bias, x.flatten(0, -2), transposed).unflatten(0, x.shape[:-1])


def _in_large_pages(x: Tensor) -> Tensor:
    """A contiguous copy in pages of 2 MB where the system has them (Linux): one row then reads it 3 to 5 % faster."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or x.numel() == 0:
        return x.contiguous()
    memory = mmap.mmap(-1, x.numel() * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a hint; some kernels have no such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(memory, dtype=x.dtype).view(x.shape)  # which keeps the memory
    return copy.copy_(x)


def _onednn(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, max(rows, 2))
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _float16(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    with _Engine("fbgemm"):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: multiply(x, packed)


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of -levels .. levels, as floats, and the scale of each row of x, [..., 1]; their product is about x."""
    scale = _row_scale(x, levels)
    return (x / scale).round_(), scale


def _row_scale(x: Tensor, levels: int) -> Tensor:
    return torch.add(_TINY, x.abs().amax(-1, keepdim=True), alpha=1 / levels)


def _int8(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    codes, scale = quantize_rows(weight, WEIGHT_LEVELS)
    with _Engine("fbgemm"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")  # `has` says when they are gone
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(codes.to(torch.int8), scale[:, 0].double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def product(x: Tensor) -> Tensor:
        # a scale for each row, so that a row is worth the same alone and among others; the operation rounds
        rows = _row_scale(x, ACTIVATION_LEVELS)
        out = multiply(x / rows, 1.0, ACTIVATION_LEVELS + 1, packed).mul_(rows)
        return out if bias is None else out.add_(bias)

    return product


def _int8_in_float32(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """The arithmetic of `_int8` where the CPU's instructions are not at hand: no faster than float32."""
    codes, scale = quantize_rows(weight, WEIGHT_LEVELS)
    scale = scale[:, 0]

    def product(x: Tensor) -> Tensor:
        levels, rows = quantize_rows(x, ACTIVATION_LEVELS)
        out = F.linear(levels, codes).mul_(scale).mul_(rows)
        return out if bias is None else out.add_(bias)

    return product


_PACKERS: dict[Layout, Callable[[Tensor, Tensor | None, int], Product]] = {
    "inputs first": _inputs_first,
    "onednn": _onednn,
    "float16": _float16,
    "int8": _int8,
    "int8 in float32": _int8_in_float32,
}


class _Engine:
    """Weights are packed for torch's current engine, which is a setting of the process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.name

    def __exit__(self, *error: object) -> None:
        torch.backends.quantized.engine = self.before
