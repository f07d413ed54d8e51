"""Official TiTok weights to ours (bytedance/1d-tokenizer, modeling/titok.py)."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.titok import TiTok

SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads of the transformers by name."""

MIN_HEAD_DIM = 16
"""No head of the original has fewer channels; the published ones have 64."""

NAMES = {
    r"^latent_tokens$": "encoder.latent_tokens",
    r"^(encoder|decoder)\.class_embedding$": r"\1.class_token",
    r"^(encoder|decoder)\.positional_embedding$": r"\1.position_embed",
    r"^(encoder|decoder)\.latent_token_positional_embedding$": r"\1.latent_position_embed",
    r"^(encoder|decoder)\.ln_pre\.": r"\1.norm_in.",
    r"^(encoder|decoder)\.ln_post\.": r"\1.norm_out.",
    r"^(encoder|decoder)\.transformer\.(\d+)\.ln_([12])\.": r"\1.blocks.\2.norm\3.",
    r"^(encoder|decoder)\.transformer\.(\d+)\.attn\.in_proj_": r"\1.blocks.\2.attn.qkv.",
    r"^(encoder|decoder)\.transformer\.(\d+)\.attn\.out_proj\.": r"\1.blocks.\2.attn.proj.",
    r"^(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_fc\.": r"\1.blocks.\2.mlp.0.",
    r"^(encoder|decoder)\.transformer\.(\d+)\.mlp\.c_proj\.": r"\1.blocks.\2.mlp.2.",
    r"^encoder\.conv_out\.": "encoder.proj.",
    r"^decoder\.decoder_embed\.": "decoder.embed.",
    r"^decoder\.conv_out\.": "head.conv_out.",
    r"^pixel_quantize\.embedding\.": "head.codebook.",
    r"^pixel_decoder\.up\.(\d+)\.block\.": r"head.pixel_decoder.conv_blocks.\1.res.",
    r"^pixel_decoder\.up\.(\d+)\.upsample_conv\.": r"head.pixel_decoder.conv_blocks.\1.upsample.conv.",
    r"^pixel_decoder\.": "head.pixel_decoder.",
}
"""The first that matches counts; numbers of the pixel decoder's levels are turned round afterwards."""

POINTWISE = {"encoder.conv_out.weight", "decoder.ffn.0.weight", "decoder.ffn.2.weight"}
"""1x1 convolutions over single tokens, which are linear layers here."""


def titok(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """TiTok of the first release with its pixel decoder (stage 2), and of the later single-stage ones, "vq" and "vae".

    `config` is the official configuration (`model.vq_model`, `dataset.preprocessing.crop_size`), or its `vq_model` part alone for 256
    pixels. `patched_constants` in it replaces sizes that the original has no option for: `width_NAME`, `layers_NAME` and `heads_NAME` of a
    transformer size, `pixel_codebook` (number, width), `pixel_decoder`.
    """
    options = config["model"]["vq_model"] if "model" in config else config
    image_size = config["dataset"]["preprocessing"]["crop_size"] if "dataset" in config else 256
    constants = config.get("patched_constants", {})
    is_legacy, mode = options.get("is_legacy", True), options.get("quantize_mode", "vq")
    if options.get("finetune_decoder", True) != is_legacy:
        raise UserError(
            f"finetune_decoder must be {is_legacy} where is_legacy is: checkpoints of the first release make pixels only after stage 2, "
            "and later ones have no second stage"
        )
    if options["vit_enc_patch_size"] != options["vit_dec_patch_size"]:
        raise UserError(
            f"vit_enc_patch_size {options['vit_enc_patch_size']} and vit_dec_patch_size {options['vit_dec_patch_size']} must be equal"
        )
    sizes: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        name = options[f"vit_{side[:3]}_model_size"]
        if name not in SIZES:
            raise UserError(f"vit_{side[:3]}_model_size '{name}' is unknown; known are {', '.join(SIZES)}")
        sizes |= {
            f"{side}_{ours}": constants.get(f"{theirs}_{name}", published)
            for ours, theirs, published in zip(("dim", "depth", "heads"), ("width", "layers", "heads"), SIZES[name], strict=True)
        }
        # recorded small configurations keep the published number of heads beside a smaller width, but were run with heads of 16 channels
        sizes[f"{side}_heads"] = min(sizes[f"{side}_heads"], max(1, sizes[f"{side}_dim"] // MIN_HEAD_DIM))
    pixel_codebook_size, pixel_codebook_dim = constants.get("pixel_codebook", (1024, 256))
    pixel = constants.get("pixel_decoder", {})
    multipliers = tuple(pixel.get("channel_mult", (1, 1, 2, 2, 4)))
    module = TiTok(
        image_size=image_size,
        patch_size=options["vit_enc_patch_size"],
        num_latent_tokens=options["num_latent_tokens"],
        token_dim=options["token_size"],
        quantize_mode=mode,
        codebook_size=options.get("codebook_size", 4096),
        codebook_l2_norm=options.get("use_l2_norm", False),
        commitment_beta=options.get("commitment_cost", 0.25),
        **sizes,
        is_legacy=is_legacy,
        pixel_codebook_size=pixel_codebook_size,
        pixel_codebook_dim=pixel_codebook_dim,
        pixel_base_channels=pixel.get("hidden_channels", 128),
        pixel_multipliers=multipliers,
        pixel_num_res_blocks=pixel.get("num_res_blocks", 2),
        pixel_norm_groups=pixel.get("num_groups", 32),
    )
    head, deepest = "head.mlp." if is_legacy else "head.proj.", len(multipliers) - 1
    renamed = {}
    for name, tensor in state_dict.items():
        new = next((re.sub(pattern, ours, name) for pattern, ours in NAMES.items() if re.search(pattern, name)), name)
        new = re.sub(r"^decoder\.ffn\.(\d+)\.", lambda match: f"{head}{match[1]}." if is_legacy else head, new)
        new = re.sub(r"conv_blocks\.(\d+)", lambda match: f"conv_blocks.{deepest - int(match[1])}", new)
        renamed[new] = tensor.flatten(1) if name in POINTWISE and tensor.dim() == 4 else tensor
    return module, renamed
