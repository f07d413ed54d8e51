"""Published models by name: how they are built, where they come from, what was reported for them."""

import difflib
from typing import Any

from genvision.errors import UserError
from genvision.preset import Preset
from genvision.presets_diffusion import DIFFUSION_PRESETS
from genvision.presets_masked import MASKED_PRESETS

LLAMAGEN = "LlamaGen, arXiv:2406.06525"


def _vq(multipliers: tuple[int, ...], file: str, size: float, published: dict[str, float]) -> Preset:
    return Preset(
        component="tokenizer",
        family="llamagen-vq",
        config={"encoder_ch_mult": multipliers, "decoder_ch_mult": multipliers},
        file=file,
        image_size=256,
        million_parameters=size,
        source=f"{LLAMAGEN}, tables 2-4",
        published=published,
    )


def _vqgan(codebook_size: int, published: dict[str, float], size: float) -> Preset:
    network = {"z_channels": 256, "resolution": 256, "ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,)}
    return Preset(
        component="tokenizer",
        family="taming-vqgan",
        config={"ddconfig": network, "n_embed": codebook_size, "embed_dim": 256},
        file="last.ckpt",
        image_size=256,
        million_parameters=size,
        source="VQGAN, arXiv:2012.09841, and the table of its repository",
        published=published,
        notes="rFID by torch-fidelity against the validation images.",
    )


def _maskgit_style(family: str, file: str, config: dict[str, Any], source: str, published: dict[str, float], notes: str) -> Preset:
    return Preset(
        component="tokenizer",
        family=family,
        config=config,
        file=file,
        image_size=256,
        million_parameters=54.5,
        source=source,
        published=published,
        notes=notes,
    )


MAGE_NETWORK = {"z_channels": 256, "resolution": 256, "ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2}

SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
"""config.json of stabilityai/sd-vae-ft-ema and sd-vae-ft-mse."""
COMPVIS_KL_F8 = {"double_z": True, "z_channels": 4, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}


def _kl(config: dict[str, Any], file: str, source: str, published: dict[str, float], notes: str = "") -> Preset:
    return Preset(
        component="tokenizer",
        family="autoencoder-kl",
        config=config,
        file=file,
        image_size=256,
        million_parameters=83.7,
        source=source,
        published=published,
        notes=notes,
    )


def _titok(sizes: str, tokens: int, published: dict[str, float], millions: float, **options: Any) -> Preset:
    names = {"s": "small", "b": "base", "l": "large"}
    config = {"vit_enc_model_size": names[sizes[0]], "vit_dec_model_size": names[sizes[-1]], "num_latent_tokens": tokens}
    legacy = {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "commitment_cost": 0.25, "finetune_decoder": True}
    return Preset(
        component="tokenizer",
        family="titok",
        config={"vit_enc_patch_size": 16, "vit_dec_patch_size": 16} | config | (options or legacy),
        file="model.safetensors",
        image_size=256,
        million_parameters=millions,
        source="TiTok, arXiv:2406.07550, and the table of its repository",
        published=published,
        notes="rFID by the repository's own evaluator, 256 x 256 centre crops of the validation images.",
    )


TITOK_VQ8K = {
    "codebook_size": 8192,
    "token_size": 64,
    "use_l2_norm": False,
    "commitment_cost": 0.25,
    "finetune_decoder": False,
    "is_legacy": False,
}
TITOK_VAE = {"quantize_mode": "vae", "token_size": 16, "finetune_decoder": False, "is_legacy": False}

SIZES = {
    "b": (12, 12, 768, 110.9),
    "l": (24, 16, 1024, 342.9),
    "xl": (36, 20, 1280, 774.7),
    "xxl": (48, 24, 1536, 1411.0),
    "3b": (24, 32, 3200, 3096.7),
}
"""LlamaGen: layers, heads, width, million parameters."""


def _gpt(size: str, image_size: int, guidance: float, published: dict[str, float]) -> Preset:
    depth, heads, width, millions = SIZES[size]
    return Preset(
        component="generator",
        family="llamagen-gpt",
        config={"n_layer": depth, "n_head": heads, "dim": width, "block_size": (image_size // 16) ** 2},
        file=f"c2i_{size.upper()}_{image_size}.pt",
        image_size=image_size,
        million_parameters=millions,
        source=f"{LLAMAGEN}, tables 6 and 8-10",
        tokenizer=("llamagen-vq16",),
        sampler={"guidance_scale": guidance},
        published=published,
        notes="Samples at 384 are resized to 256 (bicubic, before rounding) for these scores." if image_size == 384 else "",
    )


PRESETS: dict[str, Preset] = {
    "llamagen-vq16": _vq((1, 1, 2, 2, 4), "vq_ds16_c2i.pt", 71.9, {"rfid": 2.19, "psnr": 20.79, "ssim": 0.675, "codebook_usage": 0.97}),
    "llamagen-vq8": _vq((1, 2, 2, 4), "vq_ds8_c2i.pt", 70.1, {"rfid": 0.59, "psnr": 24.45, "ssim": 0.813, "codebook_usage": 0.976}),
    "vqgan-imagenet-f16-1024": _vqgan(1024, {"rfid": 7.94}, 72.1),
    "vqgan-imagenet-f16-16384": _vqgan(16384, {"rfid": 4.98}, 76.1),
    "maskgit-vqgan": _maskgit_style(
        "maskgit-vqgan",
        "maskgit-vqgan-imagenet-f16-256.bin",
        {},
        "MaskGIT, arXiv:2202.04200; the port to PyTorch of bytedance/1d-tokenizer",
        {"rfid": 2.28},
        "",
    ),
    "mage-vqgan": _maskgit_style(
        "mage-vqgan",
        "vqgan_jax_strongaug.ckpt",
        {"ddconfig": MAGE_NETWORK, "n_embed": 1024, "beta": 0.25},
        "MAGE, arXiv:2211.09117",
        {},
        "Has the shapes of maskgit-vqgan, but other codes: a generator needs the tokenizer that it was trained with.",
    ),
    "sd-vae-ft-ema": _kl(SD_VAE, "diffusion_pytorch_model.safetensors", "model card of stabilityai/sd-vae-ft-ema", {}),
    "sd-vae-ft-mse": _kl(
        SD_VAE,
        "diffusion_pytorch_model.safetensors",
        "model card of stabilityai/sd-vae-ft-mse",
        {},
        "Smoother images; the encoder is that of ft-ema.",
    ),
    "sd-vae-kl-f8": _kl(
        {"ddconfig": COMPVIS_KL_F8, "embed_dim": 4, "scale_factor": 0.18215},
        "model.ckpt",
        "Latent diffusion, arXiv:2112.10752",
        {},
        "The autoencoder alone, or a whole Stable Diffusion checkpoint, of which it is taken.",
    ),
    "titok-l-32": _titok("l", 32, {"rfid": 2.21}, 641.1),
    "titok-b-64": _titok("b", 64, {"rfid": 1.70}, 204.8),
    "titok-s-128": _titok("s", 128, {"rfid": 1.71}, 83.7),
    "titok-bl-64-vq8k": _titok("bl", 64, {"rfid": 2.06}, 390.0, **TITOK_VQ8K),
    "titok-bl-128-vq8k": _titok("bl", 128, {"rfid": 1.49}, 390.2, **TITOK_VQ8K),
    "titok-bl-64-vae-c16": _titok("bl", 64, {"rfid": 1.25}, 389.4, **TITOK_VAE),
    "titok-bl-128-vae-c16": _titok("bl", 128, {"rfid": 0.84}, 389.6, **TITOK_VAE),
    "llamagen-c2i-b-256": _gpt("b", 256, 2.0, {"fid": 5.46, "is": 193.61, "precision": 0.83, "recall": 0.45}),
    "llamagen-c2i-b-384": _gpt("b", 384, 2.25, {"fid": 6.09, "is": 182.54, "precision": 0.845, "recall": 0.416}),
    "llamagen-c2i-l-256": _gpt("l", 256, 1.75, {"fid": 3.80, "is": 248.28, "precision": 0.833, "recall": 0.515}),
    "llamagen-c2i-l-384": _gpt("l", 384, 2.0, {"fid": 3.07, "is": 256.06, "precision": 0.83, "recall": 0.52}),
    "llamagen-c2i-xl-256": _gpt("xl", 256, 1.75, {}),
    "llamagen-c2i-xl-384": _gpt("xl", 384, 1.75, {"fid": 2.62, "is": 244.08, "precision": 0.80, "recall": 0.57}),
    "llamagen-c2i-xxl-256": _gpt("xxl", 256, 1.75, {}),
    "llamagen-c2i-xxl-384": _gpt("xxl", 384, 1.75, {"fid": 2.34, "is": 253.90, "precision": 0.80, "recall": 0.59}),
    "llamagen-c2i-3b-256": _gpt("3b", 256, 1.65, {}),
    "llamagen-c2i-3b-384": _gpt("3b", 384, 1.65, {"fid": 2.18, "is": 263.33, "precision": 0.81, "recall": 0.58}),
    **MASKED_PRESETS,
    **DIFFUSION_PRESETS,
}


def find_preset(name: str) -> Preset:
    """Raises UserError with the nearest name where there is none of this one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(PRESETS)}"
        raise UserError(f"preset '{name}' is unknown; {hint}")
    return PRESETS[name]


def format_presets() -> str:
    """All presets as a table."""
    rows = [("name", "file", "pixels", "parameters", "published")]
    for name, preset in PRESETS.items():
        scores = ", ".join(f"{score} {value:g}" for score, value in list(preset.published.items())[:2])
        rows.append((name, preset.file, str(preset.image_size), f"{preset.million_parameters:,.1f}M", scores))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def format_preset(name: str) -> str:
    """One preset in full."""
    preset = find_preset(name)
    trained_on = {"tokenizer": " or ".join(preset.tokenizer) or "none of these presets"} if preset.component == "generator" else {}
    facts: dict[str, Any] = {
        "component": preset.component,
        "family": preset.family,
        "file": preset.file,
        "image size": preset.image_size,
        "parameters": f"{preset.million_parameters:,.1f} million",
        "original arguments": preset.config,
        **trained_on,
        "sampling protocol": preset.sampler or "-",
        "published scores": preset.published or "none published for this size and resolution",
        "source": preset.source,
        "notes": preset.notes or "-",
        "import": f"genvision import {name} {preset.file} --out DIR",
    }
    return "\n".join([name, *(f"  {key:20}{value}" for key, value in facts.items())])
