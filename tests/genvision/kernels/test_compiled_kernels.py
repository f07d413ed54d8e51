"""The kernels of attention and of modulated norms, compiled ahead of time for cards that are not here; one child compiles all."""

from math import gcd

from ahead_of_time import SHARED_MEMORY, Case, compile_ahead

from genvision.kernels.triton_attention import attention_blocks, heads_at_once, padded_size
from genvision.kernels.triton_modulate import warps_for


def test_kernels_compile_for_cards_without_spills_and_read_128_bits_at_a_time():
    cases = [attention_case(64, 1024), attention_case(72, 256), prepare_case(72), modulate_case(384), modulate_case(1152)]
    for case, found in zip(cases, compile_ahead(cases), strict=True):
        for card in found:
            assert card.shared <= SHARED_MEMORY[card.capability] and card.local == 0 and card.vector_loads >= 6, (case, card)


def attention_case(head_dim: int, length: int) -> Case:
    """A fused projection's heads in bfloat16, with the most stages that a card is given."""
    blocks = attention_blocks(head_dim, length, 2, 90)
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    lengths = ("num_queries", "num_keys")
    strides = tuple(f"{x}_{what}" for x in "qkv" for what in ("row", "token", "head"))
    return Case(
        "genvision.kernels.triton_attention:attention_kernel",
        dict.fromkeys(pointers, "*bf16") | dict.fromkeys((*lengths, "num_heads", *strides), "i32") | {"scale": "fp32"},
        {
            "GROUPS": 1,
            "D": head_dim,
            "PADDED": padded_size(head_dim),
            "QUERIES": blocks.queries,
            "KEYS": blocks.keys,
            "WHOLE": True,
            "UNIT": gcd(16, head_dim),
        },
        (*pointers, *lengths),
        blocks.num_warps,
        blocks.num_stages,
    )


def prepare_case(head_dim: int) -> Case:
    """LayerNorm with weights, and a table."""
    weights = ("q_weight_ptr", "q_bias_ptr", "k_weight_ptr", "k_bias_ptr")
    pointers = ("x_ptr", "out_ptr", *weights, "table_ptr")
    numbers = ("num_rows", "num_heads", "x_row", "x_token", "table_head")
    padded = padded_size(head_dim)
    return Case(
        "genvision.kernels.triton_attention:prepare_kernel",
        dict.fromkeys(pointers, "*bf16") | dict.fromkeys(numbers, "i32") | {"table_ptr": "*fp32", "eps": "fp32"},
        {"KIND": "layer", "D": head_dim, "PADDED": padded, "HEADS": heads_at_once(padded), "UNIT": gcd(16, head_dim)},
        (*pointers, "num_rows"),
    )


def modulate_case(width: int) -> Case:
    """The gated sum, RMSNorm and modulation with a shift."""
    pointers = ("x_ptr", "branch_ptr", "gate_ptr", "weight_ptr", "shift_ptr", "scale_ptr", "added_ptr", "out_ptr")
    numbers = ("num_tokens", "width", "gate_row", "shift_row", "scale_row")
    return Case(
        "genvision.kernels.triton_modulate:modulate_kernel",
        dict.fromkeys(pointers, "*bf16") | dict.fromkeys(numbers, "i32") | {"eps": "fp32"},
        {"KIND": "rms", "WIDTH": 1 << (width - 1).bit_length()},
        (*pointers, *numbers[1:]),
        num_warps=warps_for(width),
    )
