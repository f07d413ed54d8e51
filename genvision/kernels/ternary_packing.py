"""Ternary codes -1, 0 and 1 in bytes: four of two bits each, or five digits of base 3 (3^5 = 243 values fit a byte).

A code t is stored as the digit t + 1, the first in the lowest place; places that are left over at the end of a row hold the digit 0.
Unpacking is one look-up a byte.

Shapes: K codes in a row, P bytes that hold them.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from genvision.errors import UserError

Packing = Literal["2bit", "base3"]
CODES_PER_BYTE = {"2bit": 4, "base3": 5}
BASE = {"2bit": 4, "base3": 3}
WIDE = {1: torch.int32, 2: torch.int64, 4: torch.complex128}
"""Bytes of a code to the type that is as large as four of them: a look-up of one such value takes half the time of one of four."""


def packed_length(length: int, packing: Packing = "2bit") -> int:
    """P, the bytes of a row of so many codes."""
    return -(-length // CODES_PER_BYTE[packing])


def pack_ternary(codes: Tensor, packing: Packing = "2bit") -> Tensor:
    """Codes [..., K] of any type -> uint8 [..., P].

    Raises:
        UserError: a value is none of -1, 0, 1.
    """
    digits = codes.to(torch.int16) + 1
    if not bool(((digits - 1 == codes) & (digits >= 0) & (digits <= 2)).all()):
        raise UserError("codes to be packed must be -1, 0 or 1; round and clip them first")
    count, base = CODES_PER_BYTE[packing], BASE[packing]
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[-1] % count)).unflatten(-1, (-1, count))
    places = torch.tensor([base**place for place in range(count)], dtype=torch.int16, device=codes.device)
    return (digits * places).sum(-1).to(torch.uint8)


def unpack_ternary(packed: Tensor, length: int, packing: Packing = "2bit", dtype: torch.dtype = torch.int8) -> Tensor:
    """uint8 [..., P] -> codes [..., K] of a type.

    Args:
        length: K.

    Raises:
        UserError: the bytes are not those of so many codes.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_length(length, packing):
        raise UserError(
            f"packed codes are {packed.dtype} with {packed.shape[-1]} bytes a row; {length} codes as {packing} take "
            f"{packed_length(length, packing)} bytes of torch.uint8; pack them again"
        )
    table, places = _table(packing, dtype, packed.device), packed.reshape(-1).int()
    if packing == "2bit" and table.device.type == "cpu" and not torch.compiler.is_compiling() and dtype.itemsize in WIDE:
        codes = table.view(WIDE[dtype.itemsize]).view(-1).index_select(0, places).view(dtype)
    else:
        codes = table.index_select(0, places)
    return codes.view(*packed.shape[:-1], -1)[..., :length]


def check_packed(packed: Tensor, packing: Packing = "2bit") -> None:
    """Raises UserError where a byte holds a digit that no code has: the file it comes from is damaged."""
    highest = 242 if packing == "base3" else None
    bad = packed > highest if highest is not None else (packed & (packed >> 1) & 0b01010101) != 0
    if bool(bad.any()):
        raise UserError(f"packed codes hold {int(bad.sum())} bytes that no {packing} code makes; write them again")


@cache
def _table(packing: Packing, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Codes of every byte, [256, codes a byte]."""
    with torch.inference_mode(False):
        base, values = BASE[packing], torch.arange(256)
        digits = torch.stack([values // base**place % base for place in range(CODES_PER_BYTE[packing])], dim=1)
        return (digits - 1).to(device=device, dtype=dtype).contiguous()
