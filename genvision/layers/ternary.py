"""Linear layers with weights s t, t in {-1, 0, 1}, and their training (BitNet b1.58, arXiv:2402.17764; Reloaded, arXiv:2407.09527).

t = clip(round(W / s), -1, 1), with halves rounded to even. s is the mean of |W|, or its median, over the whole matrix or each output row.
In training W stays a float matrix: the forward pass sees s t, and the gradient goes to W as if nothing had been rounded.

Shapes: W [O, K]; scales [1], or [O] where every row has its own; x [..., K].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Measure = Literal["mean", "median"]
FLOOR, ROW_FLOOR = 1e-5, 1e-8
"""Least scale of a matrix, and of a row."""
ACTIVATION_FLOOR = 1e-5
"""Least absolute maximum of a token."""


def ternary_scale(weight: Tensor, measure: Measure = "mean", per_row: bool = False) -> Tensor:
    """s, float32 [1], or [O] with `per_row`; the median of an even number of values is the lower one of the two in the middle."""
    size = weight.detach().float().abs()
    size = size if per_row else size.flatten().unsqueeze(0)
    scale = size.mean(1) if measure == "mean" else size.median(1).values
    return scale.clamp(min=ROW_FLOOR if per_row else FLOOR)


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """t, float32 [O, K] of -1, 0 and 1."""
    return (weight.detach().float() / scale.unsqueeze(1)).round().clamp(-1, 1)


def own_scale(weight: Tensor) -> Tensor | None:
    """s, float32 [O], of a matrix that is ternary already: in each row all that is not 0 has one size. None where it is not.

    Measuring it would give less, since the zeros count there.
    """
    size = weight.detach().float().abs()
    largest = size.amax(1, keepdim=True)
    return largest.squeeze(1) if bool(((size == 0) | (size == largest)).all()) else None


def quantized_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as 8-bit codes: float32 [..., K] of integers in -128 .. 127 (the largest value is 127 or -128), and what 1 means, [..., 1]."""
    largest = x.detach().float().abs().amax(-1, keepdim=True).clamp(min=ACTIVATION_FLOOR)
    return (128 * x.detach().float() / largest).round().clamp(-128, 127), largest / 128


def straight_through(z: Tensor, rounded: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """z + strength (rounded - z), with the gradient of z; exactly `rounded` at 1 and z at 0."""
    # z - z is 0 in the forward pass, and carries the gradient
    return torch.lerp(z.detach(), rounded.detach(), strength) + (z - z.detach())


class TernaryLinear(nn.Linear):
    """nn.Linear whose weight is ternary in the forward pass; its state dict is that of nn.Linear, with W in it.

    Args:
        in_features: K.
        out_features: O.
        bias: add one.
        measure: of |W|, which gives the scale.
        per_row: a scale for every output row instead of one for the matrix.
        activation_bits: 8 puts a LayerNorm without weights in front, and rounds what comes out of it to 8 bits a token; None does neither.
        bias_before_scale: add the bias to the product of codes, before that is scaled, so that it is scaled, too; the published code does.

    Attributes:
        strength: lambda of the straight-through rounding in training, 0 .. 1; a tensor, so that a change compiles nothing anew. In eval
            mode it has no effect: there the weight is ternary.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        measure: Measure = "mean",
        per_row: bool = False,
        activation_bits: Literal[8] | None = None,
        bias_before_scale: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.measure, self.per_row = measure, per_row
        self.activation_bits, self.bias_before_scale = activation_bits, bias_before_scale
        self.strength = torch.ones((), device=device)  # not a buffer: those count as running statistics, which processes share

    @classmethod
    def of(cls, layer: nn.Linear, *, measure: Measure = "mean", per_row: bool = False) -> "TernaryLinear":
        """A layer with the parameters of another, not copies of them."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta", measure=measure, per_row=per_row)
        new.weight, new.bias = layer.weight, layer.bias
        new.strength = torch.ones((), device=layer.weight.device)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        strength = self.strength if self.training else 1.0
        weight = straight_through(self.weight.float(), scale.unsqueeze(1) * ternary_codes(self.weight, scale), strength)
        if self.activation_bits is not None:
            normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-5)
            codes, step = quantized_activations(normed)
            x, scale = straight_through(normed, codes * step, strength).to(x.dtype), scale * step
        if self.bias is None or not self.bias_before_scale:
            return F.linear(x, weight.to(x.dtype), self.bias)
        return F.linear(x, weight.to(x.dtype)) + self.bias * scale

    def scale(self) -> Tensor:
        """s, see `ternary_scale`."""
        return ternary_scale(self.weight, self.measure, self.per_row)

    def codes(self) -> Tensor:
        """t, see `ternary_codes`."""
        return ternary_codes(self.weight, self.scale())

    def ternary_weight(self) -> Tensor:
        """s t, [O, K], in the type of W."""
        return (self.scale().unsqueeze(1) * self.codes()).to(self.weight.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.strength = self.strength.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, measure={self.measure}, per_row={self.per_row}"
