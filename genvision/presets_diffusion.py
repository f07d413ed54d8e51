"""Published diffusion transformers by name: DiT, SiT, REPA, Model-guidance and LightningDiT.

A score belongs to its sampler: steps, guidance and which channels it covers, the law of the labels and the rounding to bytes all move it.
"""

from typing import Any

from genvision.preset import Preset

DIT = "DiT, arXiv:2212.09748"
SIT = "SiT, arXiv:2401.08740"
REPA = "REPA, arXiv:2410.06940, as later papers quote it"
MODEL_GUIDANCE = "Model-guidance, arXiv:2502.12154"
LIGHTNINGDIT = "LightningDiT, arXiv:2501.01423"

XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "num_classes": 1000}
DDPM_250 = {"method": "ddpm", "num_steps": 250, "spacing": "even"}
SDE_250 = {"method": "euler-maruyama", "num_steps": 250, "diffusion": "linear"}

PROTOCOL = "50,000 images with labels drawn at random (--labels random)"
THREE_CHANNELS = "guidance on the first three channels only; on all of them the same scale is stronger"
SD_VAE = "Decoder sd-vae-ft-ema."
SD_LATENTS = ("sd-vae-ft-ema", "sd-vae-ft-mse", "sd-vae-kl-f8")
"""One encoder; fine-tuning changed the decoders only."""


def _generator(family: str, config: dict[str, Any], file: str, source: str, **facts: Any) -> Preset:
    common: dict[str, Any] = {"image_size": 256, "million_parameters": 674.8, "tokenizer": SD_LATENTS}
    return Preset(component="generator", family=family, config=XL | config, file=file, source=source, **(common | facts))


def _lightningdit(epochs: int, scale: float, start: float, published: dict[str, float]) -> Preset:
    return _generator(
        "lightningdit",
        {
            "input_size": 16,
            "patch_size": 1,
            "in_channels": 32,
            "learn_sigma": False,
            "use_qknorm": False,
            "use_swiglu": True,
            "use_rope": True,
            "use_rmsnorm": True,
            "wo_shift": False,
        },
        f"lightningdit-xl-imagenet256-{epochs}ep.pt",
        LIGHTNINGDIT,
        million_parameters=675.0,
        tokenizer=(),
        sampler={
            "method": "euler",
            "num_steps": 249,
            "time_shift": 1 / 0.3,
            "guidance_scale": scale,
            "guidance_channels": 3,
            "guidance_start": start,
        },
        published=published,
        notes=f"The checkpoint of {epochs} epochs. {PROTOCOL}, Euler on 250 points of time, t' = 0.3 t / (1 - 0.7 t) from noise to data: "
        f"249 steps, and twice as many network calls from t = {start} on, where guidance begins. Guidance on the first three of 32 "
        "channels only, hence the high scale: on all of them about 4 looks right. The latents are VA-VAE's (f16d32), standardised by "
        "channel: its means and deviations belong to the tokenizer. Rounded as --rounding trunc127.5.",
    )


DIFFUSION_PRESETS: dict[str, Preset] = {
    "dit-xl-2-256": _generator(
        "dit",
        {"input_size": 32, "patch_size": 2, "learn_sigma": True},
        "DiT-XL-2-256x256.pt",
        DIT,
        sampler=DDPM_250 | {"guidance_scale": 1.5, "guidance_channels": 3},
        published={"fid": 2.27, "sfid": 4.60, "is": 278.24, "precision": 0.83, "recall": 0.57},
        notes=f"{PROTOCOL}, 250 ancestral steps with learned variance (500 network calls), {THREE_CHANNELS} (1.5 here is about 1.375 "
        "there). Without guidance FID 9.62, sFID 6.85, IS 121.50; at 1.25 FID 3.22, sFID 5.28, IS 201.77. Rounded as --rounding "
        f"trunc127.5. {SD_VAE} A folder of diffusers' DiTPipeline is imported, too, with its vae; its network divides time "
        "frequencies by 127, not 128.",
    ),
    "dit-xl-2-512": _generator(
        "dit",
        {"input_size": 64, "patch_size": 2, "learn_sigma": True},
        "DiT-XL-2-512x512.pt",
        DIT,
        image_size=512,
        sampler=DDPM_250 | {"guidance_scale": 1.5, "guidance_channels": 3},
        published={"fid": 3.04, "sfid": 5.02, "is": 240.82, "precision": 0.84, "recall": 0.54},
        notes=f"{PROTOCOL}, against ADM's reference of 512 pixels. 250 ancestral steps with learned variance (500 network calls), "
        f"{THREE_CHANNELS}. Rounded as --rounding trunc127.5. {SD_VAE}",
    ),
    "dit-xl-2-256-diffusers": Preset(
        component="generator",
        family="diffusers-dit",
        config={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        file="DiT-XL-2-256",
        image_size=256,
        million_parameters=674.8,
        source="pipeline of diffusers, model facebook/DiT-XL-2-256",
        tokenizer=SD_LATENTS,
        sampler={"method": "ddim", "num_steps": 50, "spacing": "leading", "guidance_scale": 4.0},
        notes="The folder of a DiTPipeline (its vae becomes the tokenizer), its folder `transformer`, or the file of weights in it. "
        "Drawn as diffusers draws by default: 50 steps of DDIM (100 network calls), guidance 4.0 on all channels, no learned "
        "variance; that is for pictures, not for FID. The numbers of dit-xl-2-256, but time frequencies divide by 127 instead "
        "of 128, so pictures differ from the original's.",
    ),
    "sit-xl-2-256": _generator(
        "sit",
        {"input_size": 32, "patch_size": 2, "learn_sigma": True, "path_type": "Linear", "prediction": "velocity", "time": "toward_data"},
        "SiT-XL-2-256x256.pt",
        SIT,
        sampler={"method": "heun", "num_steps": 125, "guidance_scale": 1.5, "guidance_channels": 3},
        published={"fid": 2.15, "sfid": 4.60, "is": 258.09, "precision": 0.81, "recall": 0.60},
        notes=f"{PROTOCOL}, the ODE by 125 steps of Heun (500 network calls), {THREE_CHANNELS}. Without guidance FID 9.35. By the SDE "
        "(euler-maruyama, 250 steps: 500 network calls) FID 2.06, sFID 4.49, IS 277.50, and 8.26 without "
        "guidance, with a diffusion coefficient chosen for it; the paper's w is twice the coefficient here. Rounded as "
        f"--rounding trunc127.5. {SD_VAE}",
    ),
    "sit-xl-2-mg-256": _generator(
        "sit",
        # labels are dropped by the training step there, and the row of the null class exists whatever the network's own dropout is
        {"input_size": 32, "patch_size": 2, "learn_sigma": False, "path_type": "Linear", "prediction": "velocity", "time": "toward_noise"},
        "SiT-XL-2-MG.pt",
        MODEL_GUIDANCE,
        sampler=SDE_250,
        published={"fid": 1.34, "sfid": 4.58, "is": 321.5, "precision": 0.81, "recall": 0.65},
        notes="50,000 images, 50 of each class (--labels balanced), the SDE by Euler-Maruyama: 250 network calls, no guidance, which "
        "is trained into the model. torch-fidelity's Inception network against ADM's statistics (--protocol torch-fidelity); "
        f"the authors themselves get 1.34 to 1.39, by the number of processes. Rounded as --rounding trunc255. {SD_VAE}",
    ),
    "repa-sit-xl-2-256": _generator(
        "repa-sit",
        {"input_size": 32, "patch_size": 2, "encoder_depth": 8, "z_dims": (768,), "projector_dim": 2048, "path_type": "linear"},
        "last.pt",
        REPA,
        million_parameters=682.9,
        sampler=SDE_250 | {"guidance_scale": 1.8, "guidance_start": 0.3},
        published={"fid": 1.42, "sfid": 4.70, "is": 305.7, "precision": 0.80, "recall": 0.65},
        notes=f"{PROTOCOL}, the SDE by Euler-Maruyama in 250 steps, guidance on all channels where the noise has t <= 0.7, which is "
        "the part of the way from noise to data from 0.3 on: two network calls there, one before. With a constant scale FID "
        f"1.80; without guidance 5.90. Rounded as --rounding trunc255. {SD_VAE} The projectors (8 million parameters) are for "
        "training only.",
    ),
    "lightningdit-xl-1-256": _lightningdit(800, 6.7, 0.125, {"fid": 1.35, "sfid": 4.15, "is": 295.3, "precision": 0.79, "recall": 0.65}),
    "lightningdit-xl-1-256-64ep": _lightningdit(
        64, 10.0, 0.10, {"fid": 2.11, "sfid": 4.16, "is": 252.3, "precision": 0.81, "recall": 0.58}
    ),
}
