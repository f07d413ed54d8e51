"""Published models by name: how they are built, where they come from, what was reported for them."""

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from genvision.errors import UserError

LLAMAGEN = "LlamaGen, arXiv:2406.06525"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One official checkpoint."""

    component: Literal["tokenizer", "generator"]
    """Which part of a pipeline folder it becomes."""
    family: str
    """Of `genvision.convert.load_official`."""
    config: dict[str, Any]
    """Constructor arguments of the original implementation."""
    file: str
    """Name of the published file."""
    image_size: int
    """Side of its images in pixels."""
    million_parameters: float
    """Size."""
    source: str
    """Paper and table of the numbers."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Published sampling protocol."""
    published: dict[str, float] = field(default_factory=dict)
    """Reported scores under that protocol; FID against ADM's ImageNet 256 reference, rFID against the validation crops."""
    notes: str = ""
    """What must be known to repeat them."""


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
        sampler={"guidance_scale": guidance},
        published=published,
        notes="Samples at 384 are resized to 256 (bicubic, before rounding) for these scores." if image_size == 384 else "",
    )


PRESETS: dict[str, Preset] = {
    "llamagen-vq16": _vq((1, 1, 2, 2, 4), "vq_ds16_c2i.pt", 71.9, {"rfid": 2.19, "psnr": 20.79, "ssim": 0.675, "codebook_usage": 0.97}),
    "llamagen-vq8": _vq((1, 2, 2, 4), "vq_ds8_c2i.pt", 70.1, {"rfid": 0.59, "psnr": 24.45, "ssim": 0.813, "codebook_usage": 0.976}),
    "vqgan-imagenet-f16-1024": _vqgan(1024, {"rfid": 7.94}, 72.1),
    "vqgan-imagenet-f16-16384": _vqgan(16384, {"rfid": 4.98}, 76.1),
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
    facts: dict[str, Any] = {
        "component": preset.component,
        "family": preset.family,
        "file": preset.file,
        "image size": preset.image_size,
        "parameters": f"{preset.million_parameters:,.1f} million",
        "original arguments": preset.config,
        "sampling protocol": preset.sampler or "-",
        "published scores": preset.published or "none published for this size and resolution",
        "source": preset.source,
        "notes": preset.notes or "-",
        "import": f"genvision import {name} {preset.file} --out DIR",
    }
    return "\n".join([name, *(f"  {key:20}{value}" for key, value in facts.items())])
