"""Weights of diffusers' DiTTransformer2DModel to ours and back.

It holds DiT (arXiv:2212.09748) with two differences: time frequencies divide by 127 instead of 128, and the second norm of a block has
eps 1e-5. Every block holds a copy of the embedders of time and class; queries, keys and values are three matrices. Positions are
computed there, too.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genvision.convert.dit import Pairs, swap_beginning
from genvision.errors import UserError
from genvision.models.dit import DiT

NAMES: Pairs = (("pos_embed.", "patch_embed."), ("proj_out_1.", "head.modulation."), ("proj_out_2.", "head.linear."))
"""How names begin there and here."""
BLOCK_NAMES: Pairs = (
    ("norm1.linear.", "modulation."),
    ("attn1.to_out.0.", "attn.proj."),
    ("ff.net.0.proj.", "mlp.fc1."),
    ("ff.net.2.", "mlp.fc2."),
)
"""The same behind `transformer_blocks.N.` and `blocks.N.`."""
EMBEDDERS = {
    "timestep_embedder.linear_1.weight": "time_embed.fc1.weight",
    "timestep_embedder.linear_1.bias": "time_embed.fc1.bias",
    "timestep_embedder.linear_2.weight": "time_embed.fc2.weight",
    "timestep_embedder.linear_2.bias": "time_embed.fc2.bias",
    "class_embedder.embedding_table.weight": "label_embed.table.weight",
}
"""Behind `transformer_blocks.N.norm1.emb.` in every block, to ours."""
FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "dropout": 0.0,
}
"""Options of DiTTransformer2DModel that have one value here."""


def diffusers_dit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """DiTTransformer2DModel of diffusers (models/transformers/dit_transformer_2d.py), computed as diffusers computes it.

    Args:
        config: its config.json; what is left out has diffusers' default.

    Raises:
        UserError: an option has a value that the network here does not know; the copies of an embedder differ between blocks.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]}; only {value} is supported")
    in_channels = config.get("in_channels", 4)
    out_channels = config.get("out_channels") or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise UserError(f"out_channels is {out_channels}; in_channels {in_channels} or, with learned variance, twice that is expected")
    num_heads, depth = config.get("num_attention_heads", 16), config.get("num_layers", 28)
    module = DiT(
        input_size=config.get("sample_size", 32),
        in_channels=in_channels,
        patch_size=config.get("patch_size", 2),
        hidden_dim=num_heads * config.get("attention_head_dim", 72),
        depth=depth,
        num_heads=num_heads,
        num_classes=config.get("num_embeds_ada_norm", 1000),
        class_dropout=0.1,  # fixed there
        learn_sigma=out_channels != in_channels,
        norm2_eps=config.get("norm_eps", 1e-5),
        time_freq_shift=1,
        path="ddpm",
        time_input="step",
    )
    return module, _packed(_one_embedder(state_dict, depth))


def to_diffusers(model: DiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and tensors of the DiTTransformer2DModel that is this model, but for `time_freq_shift`, which is always 1 there.

    Raises:
        UserError: an option of the model is unknown to diffusers.
    """
    config = model.config
    known = {
        "path": "ddpm",
        "norm": "layer",
        "mlp": "gelu",
        "mlp_ratio": 4.0,
        "use_rope": False,
        "use_qk_norm": False,
        "use_shift": True,
        "scale_conditioned": False,
        "time_scale": 1.0,
        "sequence_length": None,
    }
    for name, value in known.items():
        if config[name] != value:
            raise UserError(f"{name} {config[name]}: diffusers' DiTTransformer2DModel knows {value} only; export with --format official")
    if not model.has_null_label:
        raise UserError("class_dropout 0: diffusers' DiTTransformer2DModel always has a null class; export with --format official")
    if config.time_freq_shift not in (0, 1):
        raise UserError(f"time_freq_shift {config.time_freq_shift}: diffusers' has 1, and 0 can be set there; others cannot be exported")
    arguments = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_dim // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": model.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm2_eps,
        **FIXED,
    }
    return arguments, _unpacked(model.state_dict(), config.depth)


def _one_embedder(state_dict: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors with one embedder, that of the first block, instead of one in every block."""
    state = dict(state_dict)
    for theirs, ours in EMBEDDERS.items():
        copies = {i: state.pop(name) for i in range(depth) if (name := _embedder_name(i, theirs)) in state}
        if copies and len(copies) < depth:
            lacking = next(i for i in range(depth) if i not in copies)
            raise UserError(f"{_embedder_name(lacking, theirs)} is missing; every block holds a copy, so fetch the file again")
        for i, copy in copies.items():
            if copy.shape != copies[0].shape or not (copy.is_meta or torch.equal(copy, copies[0])):
                raise UserError(
                    f"{_embedder_name(i, theirs)} differs from that of block 0: each block was trained with an embedder of its own, "
                    "and one is shared here"
                )
        if copies:
            state[ours] = copies[0]
    return state


def _packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; queries, keys and values as one matrix. Tensors that are none of diffusers' keep their names."""
    result = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(transformer_blocks\.(\d+)\.attn1\.)to_([qkv])\.(weight|bias)", name)
        parts = [f"{found[1]}to_{part}.{found[4]}" for part in "qkv"] if found else []
        if found is None or not all(part in state for part in parts):
            result[_translated(name, ours=False)] = tensor
        elif found[3] == "q":
            result[f"blocks.{found[2]}.attn.qkv.{found[4]}"] = torch.cat([state[part] for part in parts])
    return result


def _unpacked(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """diffusers' names; a copy of the embedders in every block. Projectors are for training and stay behind."""
    result: dict[str, Tensor] = {}
    shared = {ours: theirs for theirs, ours in EMBEDDERS.items()}
    for name, tensor in state.items():
        if name in shared:
            result |= {_embedder_name(i, shared[name]): tensor.clone() for i in range(depth)}  # files refuse tensors that share memory
        elif found := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            result |= {f"transformer_blocks.{found[1]}.attn1.to_{part}.{found[2]}": rows.clone() for part, rows in parts}
        elif not name.startswith("projectors."):
            result[_translated(name, ours=True)] = tensor
    return result


def _embedder_name(block: int, name: str) -> str:
    return f"transformer_blocks.{block}.norm1.emb.{name}"


def _translated(name: str, *, ours: bool) -> str:
    """The other name of a tensor; `ours` says whose this one is."""
    here, there = "blocks.", "transformer_blocks."
    old, new = (here, there) if ours else (there, here)
    if numbered := re.match(rf"{old}(\d+\.)", name):
        return new + numbered[1] + swap_beginning(name.removeprefix(numbered[0]), BLOCK_NAMES, ours=ours)
    return swap_beginning(name, NAMES, ours=ours)
