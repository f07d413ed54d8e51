"""Published generators of masked or permuted tokens by name: TiTok's MaskGIT, Halton-MaskGIT, MAGE, RAR.

Guidance there is added to the conditional prediction in some of them; here s = 1 is the conditional prediction in all.
"""

from typing import Any

from genvision.preset import Preset

TITOK = "TiTok, arXiv:2406.07550, and the table of its repository"
HALTON = "Halton-MaskGIT, arXiv:2503.17076, and the table of its repository"
MAGE = "MAGE, arXiv:2211.09117, and the table of its repository"
RAR = "RAR, arXiv:2411.00776, and the table of its repository"

BALANCED = "50,000 images, 50 of each class (--labels balanced)"
CONFIDENT = {"schedule": "arccos", "confidence": "logit", "softmax_annealing": True}
"""What the sampling script of TiTok sets for all of its generators."""


def _generator(family: str, config: dict[str, Any], file: str, source: str, **facts: Any) -> Preset:
    return Preset(component="generator", family=family, config=config, file=file, source=source, **({"image_size": 256} | facts))


def _titok(tokens: int, size: str, millions: float, fid: float, sampler: dict[str, Any], guidance: str, **options: Any) -> Preset:
    network = {"hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 3072} | options
    calls = 2 * sampler["num_steps"] - 1
    return _generator(
        "maskgit-bert",
        {
            "class": "UViTBert" if options else "ImageBert",
            "model": {"vq_model": {"codebook_size": 4096}, "generator": network | {"image_seq_len": tokens}},
        },
        f"generator_titok_{size}{tokens}.bin",
        TITOK,
        million_parameters=millions,
        tokenizer=(f"titok-{size}-{tokens}",),
        sampler=CONFIDENT | sampler,
        published={"fid": fid},
        notes=f"{BALANCED}, {sampler['num_steps']} steps ({calls} network calls: the first step is not guided), {guidance}.",
    )


def _linear(scale: float, num_steps: int) -> dict[str, Any]:
    """Guidance of TiTok's `linear`: c + w (c - u), where w goes from 0 at the first step to (T - 1) / T of `scale` at the last."""
    return {"num_steps": num_steps, "guidance_scale": 1 + scale * (num_steps - 1) / num_steps, "guidance_schedule": "linear"}


def _halton(name: str, side: int, millions: float, weight: float, published: dict[str, float]) -> Preset:
    width, depth, heads = {"tiny": (384, 6, 6), "small": (512, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}[name]
    return _generator(
        "halton-maskgit",
        {"input_size": side, "hidden_dim": width, "depth": depth, "heads": heads, "mlp_dim": 4 * width, "dropout": 0.1},
        f"ImageNet_{16 * side}_{name}.pth",
        HALTON,
        image_size=16 * side,
        million_parameters=millions,
        tokenizer=("llamagen-vq16",),
        sampler={"num_steps": 32, "schedule": "arccos", "order": "halton", "guidance_scale": 1 + weight},
        published=published,
        notes=f"32 steps (64 network calls). The CFG weight {weight} of the table is on top of the conditional prediction, so the scale is "
        f"{1 + weight} here. The table does not tell the temperatures, nor whether the order was shifted for each image: here they are 1, "
        "and it is not; the authors' example goes from temperature 1 to 1 / 1.2 and shifts (final_temperature 0.8333, shift_order). "
        "Scores by the authors' own evaluator. Codes of LlamaGen's tokenizer (llamagen-vq16).",
    )


def _mage(size: str, width: int, depth: int, heads: int, millions: float, published: dict[str, float], probe: str) -> Preset:
    return _generator(
        "mage",
        {"embed_dim": width, "depth": depth, "num_heads": heads, "decoder_embed_dim": width, "norm_eps": 1e-6},
        f"mage-vit{size}-1600.pth",
        MAGE,
        million_parameters=millions,
        tokenizer=("mage-vqgan",),
        sampler={"num_steps": 20, "choice_temperature": 6.0},
        published=published,
        notes="Without classes: 50,000 images, 20 steps (20 network calls), nothing to guide with. FID and IS by torch-fidelity against "
        "the 50,000 validation images (256 x 256 centre crops, PNG; a user got FID 13.7 with JPEG), not against ADM's reference: do not "
        f"compare them with the FIDs of the other models. Rounded as --rounding trunc255. {probe} Codes of MAGE's own tokenizer with "
        "strong augmentation (mage-vqgan): maskgit-vqgan fits in shape, but has other codes. The file has the tokenizer inside, which is "
        "imported by itself; its name is that in the authors' drive.",
    )


def _rar(size: str, network: tuple[int, int, int], millions: float, scale: float, power: float, temperature: float, fid: float) -> Preset:
    width, depth, mlp = network
    return _generator(
        "rar",
        {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 16, "intermediate_size": mlp},
        f"rar_{size}.bin",
        RAR,
        million_parameters=millions,
        tokenizer=("maskgit-vqgan",),
        sampler={
            "guidance_scale": scale,
            "guidance_schedule": "power-cosine",
            "guidance_power": power,
            "temperature": temperature,
        },
        published={"fid": fid},
        notes=f"{BALANCED}, in raster order (511 network calls: the first token is not guided). The tokenizer is MaskGIT's of 256 pixels "
        "(maskgit-vqgan); mage-vqgan fits in shape, but has other codes.",
    )


MASKED_PRESETS: dict[str, Preset] = {
    "maskgit-titok-l-32": _titok(
        32, "l", 177.2, 2.77, _linear(4.5, 8) | {"choice_temperature": 9.5}, "guidance that rises to 4.5 * 7/8 times the difference on top"
    ),
    "maskgit-titok-b-64": _titok(
        64, "b", 177.2, 2.48, _linear(3.0, 8) | {"choice_temperature": 11.0}, "guidance that rises to 3 * 7/8 times the difference on top"
    ),
    "maskgit-titok-s-128": _titok(
        128,
        "s",
        295.0,
        1.97,
        {
            "num_steps": 64,
            "choice_temperature": 2.8,
            "guidance_scale": 6.9,
            "guidance_schedule": "power-cosine",
            "guidance_power": 3.0,
        },
        "guidance by a cosine of progress^3 (the power is the default of the sampling code; the configuration names none)",
        hidden_size=1024,
        num_hidden_layers=20,
        intermediate_size=4096,
    ),
    "halton-maskgit-t-256": _halton("tiny", 16, 23.0, 1.5, {"fid": 10.2, "is": 185}),
    "halton-maskgit-s-256": _halton("small", 16, 69.3, 1.0, {"fid": 6.40, "is": 255}),
    "halton-maskgit-b-256": _halton("base", 16, 142.2, 0.7, {"fid": 4.17, "is": 263}),
    "halton-maskgit-s-384": _halton("small", 24, 69.5, 1.0, {"fid": 6.11, "is": 241}),
    "halton-maskgit-b-384": _halton("base", 24, 142.5, 0.7, {"fid": 4.15, "is": 257}),
    "halton-maskgit-l-384": _halton("large", 24, 480.0, 0.5, {"fid": 2.59, "is": 281}),
    "mage-b-256": _mage(
        "b", 768, 12, 12, 144.9, {"fid": 11.1, "is": 81.2}, "Published accuracy: linear probe 74.7 %, after fine-tuning 82.5 %."
    ),
    "mage-l-256": _mage(
        "l", 1024, 24, 16, 407.8, {"fid": 9.10, "is": 105.1}, "Published accuracy: linear probe 78.9 %, after fine-tuning 83.9 %."
    ),
    "rar-b-256": _rar("b", (768, 24, 3072), 259.3, 16.0, 2.75, 1.0, 1.95),
    "rar-l-256": _rar("l", (1024, 24, 4096), 459.5, 15.5, 2.5, 1.02, 1.70),
    "rar-xl-256": _rar("xl", (1280, 32, 5120), 952.7, 6.9, 1.5, 1.02, 1.50),
    "rar-xxl-256": _rar("xxl", (1408, 40, 6144), 1495.5, 8.0, 1.2, 1.02, 1.48),
}
