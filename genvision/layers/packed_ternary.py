"""A linear layer for inference that holds its ternary weights packed: 2 bits each in place of 32.

Shapes: O outputs, K inputs, P bytes a row, x [..., K].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.kernels.ternary_packing import Packing, check_packed, pack_ternary, packed_length, unpack_ternary
from genvision.layers.ternary import Measure, TernaryLinear, own_scale, ternary_codes, ternary_scale

BLOCK = 2**18
"""Weights that are unpacked at a time: 1 MiB in float32, which stays in the cache until the product is done."""


class PackedTernaryLinear(nn.Module):
    """y = scale (t x) + bias. Rows are unpacked a block at a time, so that the float matrix never exists as a whole.

    Codes are fixed; scales and bias are parameters, so that they can be trained behind a conversion.

    Args:
        in_features: K.
        out_features: O.
        bias: add one.
        per_row: a scale for every row, [O], instead of one, [1].
        packing: `2bit`, or `base3`, which takes 0.8 of the memory and 1.5 times as long (on a CPU, 2 rows).
    """

    codes: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, per_row: bool = True, packing: Packing = "2bit") -> None:
        super().__init__()
        self.in_features, self.out_features, self.packing = in_features, out_features, packing
        self.register_buffer("codes", torch.zeros(out_features, packed_length(in_features, packing), dtype=torch.uint8))
        self.scale = nn.Parameter(torch.ones(out_features if per_row else 1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def of(cls, layer: nn.Linear, *, measure: Measure = "mean", per_row: bool = True, packing: Packing = "2bit") -> "PackedTernaryLinear":
        """The ternary form of a layer.

        Args:
            measure, per_row: for a layer of floats. A TernaryLinear has its own, and weights that are ternary already keep their scales.

        Raises:
            UserError: the layer does more than a ternary product and a bias.
        """
        if isinstance(layer, TernaryLinear):
            if layer.activation_bits is not None or layer.bias_before_scale:
                raise UserError("a TernaryLinear with activation_bits or bias_before_scale cannot be packed; pack one that has neither")
            measure, per_row = layer.measure, layer.per_row
        scale = None if isinstance(layer, TernaryLinear) else own_scale(layer.weight)
        if scale is None:
            scale = ternary_scale(layer.weight, measure, per_row)
        elif not per_row and bool(((scale == scale.max()) | (scale == 0)).all()):
            scale = scale.max().view(1)
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, per_row=len(scale) > 1, packing=packing)
        # a row of zeros has the scale 0 where scales are kept
        new.codes = pack_ternary(ternary_codes(layer.weight, torch.where(scale > 0, scale, 1.0)), packing)
        new.scale = nn.Parameter(scale, requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = max(1, BLOCK // self.in_features)
        parts = [F.linear(x, self._unpacked(block, x.dtype)) for block in self.codes.split(rows)]
        y = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The float matrix [O, K], for models that read it themselves (nested networks)."""
        return self._unpacked(self.codes, self.scale.dtype) * self.scale.unsqueeze(1)

    def ternary_weight(self) -> Tensor:
        """The same, as every ternary layer has it."""
        return self.weight

    def _unpacked(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return unpack_ternary(codes, self.in_features, self.packing, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(codes := state_dict.get(f"{prefix}codes"), Tensor):
            check_packed(codes, self.packing)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, packing={self.packing}"
