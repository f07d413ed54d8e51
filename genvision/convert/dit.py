"""Weights of diffusion transformers to ours and back: DiT, SiT, Model-guidance, LightningDiT and REPA, which share their names.

Sources: facebookresearch/DiT, willisma/SiT, tzco/Diffusion-wo-CFG, hustvl/LightningDiT and sihyun-yu/REPA, each its models file.
Tables of positions (`pos_embed`, `feat_rope.*`) stand in these checkpoints but are computed here.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.models.dit import DiT

Pairs = tuple[tuple[str, str], ...]

NAMES: Pairs = (
    ("x_embedder.", "patch_embed."),
    ("t_embedder.mlp.0.", "time_embed.fc1."),
    ("t_embedder.mlp.2.", "time_embed.fc2."),
    ("s_embedder.mlp.0.", "scale_embed.fc1."),
    ("s_embedder.mlp.2.", "scale_embed.fc2."),
    ("y_embedder.embedding_table.", "label_embed.table."),
    ("final_layer.norm_final.", "head.norm."),
    ("final_layer.linear.", "head.linear."),
    ("final_layer.adaLN_modulation.1.", "head.modulation."),
)
"""How names begin there and here."""
BLOCK_NAMES: Pairs = (("adaLN_modulation.1.", "modulation."), ("mlp.w12.", "mlp.gate_up."), ("mlp.w3.", "mlp.down."))
"""The same behind `blocks.N.`."""
PROJECTOR_NAMES: Pairs = (("0.", "fc1."), ("2.", "fc2."), ("4.", "fc3."))
"""The same behind `projectors.K.`."""
PARALLEL = re.compile(r"^(module\.|_orig_mod\.)+")
"""What data parallelism and torch.compile put before names."""
TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
TABLE_TOLERANCE = 1e-5

SIT_PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
REPA_PATHS = {"linear": "linear", "cosine": "gvp"}


def dit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """DiT (facebookresearch/DiT, models.py)."""
    module = DiT(**_sizes(config), learn_sigma=config.get("learn_sigma", True), path="ddpm", time_input="step")
    return module, _renamed(module, state_dict)


def sit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """SiT (willisma/SiT, models.py), and that of Model-guidance (tzco/Diffusion-wo-CFG, models.py).

    Args:
        config: beside the constructor's arguments, `path_type` (Linear, GVP, VP) and `prediction` (velocity, noise, score) as they go to
            SiT's `create_transport`, `scale_aware` of Model-guidance, and `time`: `toward_data` is SiT's, `toward_noise` that of
            Model-guidance, and the default if `scale_aware`.
    """
    scale_aware = config.get("scale_aware", False)
    module = DiT(
        **_sizes(config),
        learn_sigma=config.get("learn_sigma", True),
        scale_conditioned=scale_aware,
        path=_path(config, SIT_PATHS, "Linear"),
        prediction=config.get("prediction", "velocity"),
        time_input=config.get("time", "toward_noise" if scale_aware else "toward_data"),
    )
    return module, _renamed(module, state_dict)


def lightningdit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """LightningDiT (hustvl/LightningDiT, models/lightningdit.py): linear path, velocity, time toward the data."""
    module = DiT(
        **_sizes(config),
        learn_sigma=config.get("learn_sigma", False),
        norm="rms" if config.get("use_rmsnorm", False) else "layer",
        mlp="swiglu" if config.get("use_swiglu", False) else "gelu",
        use_rope=config.get("use_rope", False),
        use_qk_norm=config.get("use_qknorm", False),
        use_shift=not config.get("wo_shift", False),
        path="linear",
        prediction="velocity",
        time_input="toward_data",
    )
    return module, _renamed(module, state_dict)


def repa_sit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """REPA's SiT with its projectors (sihyun-yu/REPA, models/sit.py): velocity, time toward the noise.

    Blocks behind the aligned one are called `decoder_blocks` in early files, which count them from 0.
    """
    hidden_dim, encoder_depth = config.get("hidden_size", 1152), config.get("encoder_depth", 8)
    if config.get("decoder_hidden_size", hidden_dim) != hidden_dim:
        raise UserError(f"decoder_hidden_size {config['decoder_hidden_size']} differs from hidden_size {hidden_dim}; there is one width")
    features = tuple(config.get("z_dims", (768,)))
    module = DiT(
        **_sizes(config),
        use_qk_norm=config.get("qk_norm", False),
        path=_path(config, REPA_PATHS, "linear"),
        prediction="velocity",
        time_input="toward_noise",
        align_depth=encoder_depth if features else 0,
        align_dims=features,
        align_hidden=config.get("projector_dim", 2048),
    )
    early = re.compile(r"^((?:module\.)?)decoder_blocks\.(\d+)\.")
    named = {early.sub(lambda found: f"{found[1]}blocks.{int(found[2]) + encoder_depth}.", name): x for name, x in state_dict.items()}
    return module, _renamed(module, named)


def to_official(model: DiT) -> dict[str, Tensor]:
    """The tensors of a model under the original names, tables of positions included, so that the original code loads them strictly.

    Raises:
        UserError: an option of the model is unknown to all original code.
    """
    if model.config.sequence_length is not None:
        raise UserError(f"sequence_length {model.config.sequence_length}: the original code knows latents on a square grid only")
    if model.config.time_scale != 1:
        raise UserError(f"time_scale {model.config.time_scale}: the original code feeds times as they are, which is 1.0")
    state = {_translated(name, ours=True): tensor for name, tensor in model.state_dict().items()}
    return state | _tables(model)


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that all families share; what is left out has the original default."""
    return {
        "input_size": config.get("input_size", 32),
        "in_channels": config.get("in_channels", 4),
        "patch_size": config.get("patch_size", 2),
        "hidden_dim": config.get("hidden_size", 1152),
        "depth": config.get("depth", 28),
        "num_heads": config.get("num_heads", 16),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "num_classes": config.get("num_classes", 1000),
        "class_dropout": config.get("class_dropout_prob", 0.1),
    }


def _path(config: Mapping[str, Any], paths: Mapping[str, str], default: str) -> str:
    name = config.get("path_type", default)
    if name not in paths:
        raise UserError(f"path_type '{name}' is unknown; choose one of {', '.join(paths)}")
    return paths[name]


def _renamed(module: DiT, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, without tables of positions once these are known to equal ours."""
    parallel = all(PARALLEL.match(name) for name in state_dict)
    names = {name: PARALLEL.sub("", name) if parallel else name for name in state_dict}
    renamed = {_translated(name, ours=False): state_dict[stored] for stored, name in names.items()}
    tables = {name: renamed.pop(name) for name in TABLES if name in renamed}
    if renamed.keys() == module.state_dict().keys():  # else the file is another model's, and that says more than its tables
        _check_tables(module, tables)
    return renamed


def _check_tables(module: DiT, stored: Mapping[str, Tensor]) -> None:
    ours = _tables(module)
    for name, table in stored.items():
        if name not in ours:
            raise UserError(f"{name} is in the checkpoint, but use_rope is off; import it under a name whose arguments have it on")
        wanted = ours[name]
        if table.shape[-1] != wanted.shape[-1]:
            continue  # another width: every weight is of another shape, too, and all are listed together
        if table.shape != wanted.shape:
            raise UserError(
                f"{name} has {table.shape[-2]} positions, expected {wanted.shape[-2]}: the checkpoint is for latents of another size than "
                f"{module.config.input_size} x {module.config.input_size}; import it under the name of its image size"
            )
        if table.is_meta or wanted.is_meta:
            continue
        difference = (table.to(wanted) - wanted).abs().max().item()
        if not difference <= max(TABLE_TOLERANCE, torch.finfo(table.dtype).eps):
            raise UserError(
                f"{name} differs by {difference:.2g} from the table of sines and cosines that the network computes; "
                f"{TABLE_TOLERANCE:g} is allowed, and other positions cannot be imported"
            )


def _tables(module: DiT) -> dict[str, Tensor]:
    """What the original code stores of positions: [1, N, C], and [N, D] where heads turn."""
    tables = {TABLES[0]: module.positions.unsqueeze(0)}
    if module.rotary is not None:
        cos, sin = module.rotary.unbind(-1)  # each [N, D / 2], a number for each pair of channels
        tables |= {TABLES[1]: cos.repeat_interleave(2, 1), TABLES[2]: sin.repeat_interleave(2, 1)}
    return tables


def _translated(name: str, *, ours: bool) -> str:
    """The other name of a tensor; `ours` says whose this one is."""
    if numbered := re.match(r"(blocks|projectors)\.\d+\.", name):
        pairs = BLOCK_NAMES if numbered[1] == "blocks" else PROJECTOR_NAMES
        return numbered[0] + swap_beginning(name.removeprefix(numbered[0]), pairs, ours=ours)
    return swap_beginning(name, NAMES, ours=ours)


def swap_beginning(name: str, pairs: Pairs, *, ours: bool) -> str:
    """A name with its beginning replaced by the other of the first pair that fits; names that none fits stay.

    Args:
        pairs: beginnings there and here.
        ours: the name is from here.
    """
    for theirs, here in pairs:
        old, new = (here, theirs) if ours else (theirs, here)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
