"""`genvision export`: a model folder becomes what other software reads.

`diffusers` is a folder for `diffusers.DiTPipeline.from_pretrained`; `official` is the file of weights that the original code of DiT, SiT,
Model-guidance, LightningDiT or REPA loads strictly.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from genvision import __version__
from genvision.convert.diffusers_dit import to_diffusers
from genvision.convert.dit import to_official
from genvision.errors import UserError
from genvision.jobs.output import check_output
from genvision.layers.ternarize import plain_linears
from genvision.models.base import GENERATORS
from genvision.models.dit import DiT
from genvision.pipeline import INDEX, ImagePipeline, read_index
from genvision.tokenizers.base import content_hash, load_component
from genvision.tokenizers.kl import KLTokenizer
from genvision.training.state import PART, save_tensors, sync, write_atomically

Format = Literal["diffusers", "official"]
PIPELINE_NULL_LABEL = 1000
"""DiTPipeline takes this number for "no class", whatever the model."""
PREDICTIONS = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
"""Ours to those of diffusers' schedulers."""
SET_FREQUENCIES = """for block in pipe.transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0"""
"""What makes diffusers' network compute the time features of the original code."""


def export_model(model: Path, form: Format, out: Path) -> list[str]:
    """Write a model folder in another form; either all of it is there afterwards, or nothing.

    Args:
        model: pipeline folder; for `official` its generator is enough.
        form: `diffusers` or `official`.
        out: a new folder for `diffusers`, a new .pt or .safetensors file for `official`.

    Returns:
        Warnings: where the exported model computes otherwise than this one.

    Raises:
        UserError: there is something at `out`; the model has an option that the other software does not know.
    """
    if form not in get_args(Format):
        raise UserError(f"format '{form}' is unknown; choose one of {', '.join(get_args(Format))}")
    return _export_diffusers(model, out) if form == "diffusers" else _export_official(model, out)


def _export_official(model: Path, out: Path) -> list[str]:
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{out}: official weights are one file; give a name that ends in .pt or .safetensors")
    if out.exists():
        raise UserError(f"{out}: already there; choose another --out")
    read_index(model)
    generator = _as_dit(load_component(model / "generator", GENERATORS, "generator"))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in to_official(generator).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}{PART}")
    try:
        if out.suffix == ".safetensors":
            save_tensors(part, state)
        else:
            torch.save(state, part)
        sync(part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    config, warnings = generator.config, []
    if config.time_freq_shift:
        divisor = 128 - config.time_freq_shift
        warnings.append(f"the original code divides time frequencies by 128, this model by {divisor}: change that line, or outputs differ")
    if config.path == "ddpm" and config.prediction != "noise":
        warnings.append(f"the original sampler of DiT reads the output as noise, this model predicts {config.prediction}")
    return warnings


def _export_diffusers(model: Path, out: Path) -> list[str]:
    check_output(out)
    pipeline = ImagePipeline.from_pretrained(model)
    generator, tokenizer = _as_dit(pipeline.generator), pipeline.tokenizer
    arguments, state = to_diffusers(generator)
    _check_pipeline(generator, tokenizer)
    warnings = []
    if generator.config.time_freq_shift == 0:
        warnings.append(
            "diffusers divides time frequencies by 127, this model by 128: pictures differ unless downscale_freq_shift of each block's "
            "norm1.emb.time_proj is set to 0 after loading; README.md in the folder has the two lines that do it"
        )
    part = out.with_name(f".{out.name}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write_pipeline(part, arguments, state, generator, tokenizer, pipeline.label_names)
        (part / "README.md").write_text(_card(generator, tokenizer, bool(warnings)))
        if out.exists():  # and is empty
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return warnings


def _as_dit(generator: Any) -> DiT:
    if not isinstance(generator, DiT):
        raise UserError(f"{type(generator).__name__}: only diffusion transformers (DiT) can be exported")
    plain_linears(generator)  # no other format holds packed weights
    return generator


def _check_pipeline(generator: DiT, tokenizer: Any) -> None:
    """Raises UserError for what DiTPipeline, beside its network, cannot express."""
    if generator.num_classes != PIPELINE_NULL_LABEL:
        raise UserError(
            f"num_classes {generator.num_classes}: diffusers' DiTPipeline takes {PIPELINE_NULL_LABEL} for the null label, so only models "
            f"of {PIPELINE_NULL_LABEL:,} classes can be guided there; export with --format official"
        )
    if not isinstance(tokenizer, KLTokenizer):
        raise UserError(f"tokenizer {type(tokenizer).__name__}: diffusers' DiTPipeline decodes with an AutoencoderKL only")
    mean, std = tokenizer.config.latent_mean, tokenizer.config.latent_std
    if not isinstance(std, int | float) and len(set(std)) > 1:
        raise UserError("latent_std differs by channel: diffusers' DiTPipeline knows one scaling factor for all")
    if any([mean] if isinstance(mean, int | float) else mean):
        raise UserError(f"latent_mean {mean}: diffusers' DiTPipeline knows a scaling factor only, and adds no mean")


def _write_pipeline(
    folder: Path, arguments: dict[str, Any], state: dict[str, Any], generator: DiT, tokenizer: KLTokenizer, label_names: list[str]
) -> None:
    import diffusers

    with torch.device("meta"):  # a second set of weights would cost time and memory
        transformer = diffusers.DiTTransformer2DModel(**arguments)
    transformer.load_state_dict(state, assign=True)
    transformer.save_pretrained(str(folder / "transformer"))
    tokenizer.to_diffusers(folder / "vae")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type=PREDICTIONS[generator.config.prediction],
        timestep_spacing="leading",
    )
    scheduler.save_pretrained(str(folder / "scheduler"))
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _card(generator: DiT, tokenizer: KLTokenizer, other_frequencies: bool) -> str:
    """README.md of a folder for diffusers."""
    load = 'from diffusers import DiTPipeline\n\npipe = DiTPipeline.from_pretrained("path/to/this/folder")'
    draw = "image = pipe([207], num_inference_steps=50, guidance_scale=4.0).images[0]"
    size = generator.image_size(tokenizer.spec.downsample, tokenizer.spec.image_size)
    frequencies = ""
    if other_frequencies:
        load += "\n" + SET_FREQUENCIES
        frequencies = """
**Keep the two lines behind from_pretrained.** This model was trained with time frequencies 10000^(-k / 128), as the original code of DiT
has them; diffusers divides by 127. Without the lines the network runs, but pictures differ from those of the original.
"""
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- class-conditional-image-generation
- dit
---

# DiT, {generator.num_parameters_million:.1f}M parameters, {size} x {size} pixels

```python
{load}
{draw}
```
{frequencies}
diffusers guides all channels of the latents, and leaves a learned variance out. Labels are named in `{INDEX}` (`pipe.labels`).

| | |
|---|---|
| exported by | `genvision {__version__}` |
| generator hash | `{content_hash(generator)}` |
| tokenizer hash | `{content_hash(tokenizer)}` |
"""
