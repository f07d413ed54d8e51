"""`genvision import`: an official checkpoint becomes a component of a pipeline folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from genvision.card import write_card
from genvision.convert import load_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from genvision.pipeline import INDEX, ImagePipeline, read_index, save_parts
from genvision.presets import Preset, find_preset
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.training.state import write_atomically

HUB = "hub:"


def import_checkpoint(name: str, file: Path | str, out: Path, *, weights: str | None = None, download: bool = False) -> list[str]:
    """Convert one file; run twice into one folder (tokenizer, generator), it makes a complete pipeline.

    Args:
        name: of a preset.
        file: the official checkpoint; of an AutoencoderKL also a diffusers folder, or hub:OWNER/NAME, which then say how it is built.
        out: pipeline folder, new or with other components in it.
        weights: which weights of a training checkpoint to take (`model`, `ema`).
        download: fetch hub:OWNER/NAME if it is not in the Hub's cache.

    Returns:
        The components that are still missing.

    Raises:
        UserError: unknown preset; unreadable or unfitting file; the component is already there.
    """
    preset = find_preset(name)
    if (out / preset.component).exists():
        raise UserError(f"{out / preset.component}: already there; choose another --out, or delete it first")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / INDEX).is_file():
        raise UserError(f"{out}: already holds something that is no model; choose another --out")
    module = _read(preset, file, weights, download)
    parts: dict[str, Any] = {preset.component: module}
    label_names = None
    if preset.component == "generator":
        parts["sampler"] = AutoregressiveSampler(**preset.sampler)
        label_names = imagenet_label_names() if module.num_classes == 1000 else None
    fresh, index = not out.exists(), read_index(out) if (out / INDEX).is_file() else None
    try:
        save_parts(out, parts, label_names)
        missing = [part for part in ("tokenizer", "generator", "sampler") if not (out / part).is_dir()]
        if not missing:
            pipeline = ImagePipeline.from_pretrained(out)
            facts = {"imported": f"{name} from {Path(file).name}", "source": preset.source}
            write_card(out / "README.md", pipeline.generator, pipeline.tokenizer, pipeline.sampler, pipeline.label_names, facts)
    except BaseException:
        _undo(out, list(parts), fresh, index)
        raise
    return missing


def _read(preset: Preset, file: Path | str, weights: str | None, download: bool) -> Any:
    """The component, from a file, a folder of diffusers or the Hub."""
    folder = _from_hub(str(file).removeprefix(HUB), download) if str(file).startswith(HUB) else Path(file)
    if not folder.is_dir():
        return load_official(preset.family, read_state_dict(folder, weights), preset.config, source=str(file))
    if preset.family != "autoencoder-kl":
        raise UserError(f"{file}: is a folder; give the checkpoint file, {preset.file}")
    from genvision.tokenizers.kl import KLTokenizer

    return KLTokenizer.from_diffusers(folder)


def _from_hub(name: str, download: bool) -> Path:
    """Folder of a diffusers AutoencoderKL in the Hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "diffusion_pytorch_model.safetensors"]
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=not download))
    except Exception as error:  # the Hub's client raises many types; whatever it is, the files are not there
        reason = " ".join(str(error).split())[:200]
        mend = "check name and network" if download else "fetch it with --download"
        raise UserError(f"{HUB}{name}: is not in the Hub's cache ({reason}); {mend}") from error


def _undo(out: Path, parts: list[str], fresh: bool, index: dict[str, Any] | None) -> None:
    """Leave the folder as it was found."""
    for path in [out] if fresh else [out / part for part in parts]:
        shutil.rmtree(path, ignore_errors=True)
    if index is not None:
        write_atomically(out / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (out / INDEX).unlink(missing_ok=True)


def imagenet_label_names() -> list[str]:
    """The 1,000 ImageNet class names by index, that is, in the order of sorted WordNet ids."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)
