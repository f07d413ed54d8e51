"""`genvision import`: an official checkpoint becomes a component of a pipeline folder."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from genvision.card import write_card
from genvision.convert import FAMILIES, containers, load_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from genvision.pipeline import INDEX, ImagePipeline, read_index, save_parts
from genvision.presets import Preset, find_preset
from genvision.samplers.base import SAMPLERS, Sampler
from genvision.tokenizers.base import content_hash
from genvision.training.state import write_atomically

HUB = "hub:"
IMPORTED = "imported"
"""Key of model_index.json: to `generator` its preset, the tokenizers that it was trained with, and the hash of the one beside it; to
`tokenizer` its preset and hash."""
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DIFFUSERS_DIT = ("DiTTransformer2DModel", "Transformer2DModel")
"""Class names in the config.json of a DiT that diffusers wrote; the second is that of the files of 2022."""
SIZES = ("input_size", "in_channels", "patch_size", "hidden_dim", "depth", "num_heads", "num_classes", "learn_sigma")
"""What a folder of diffusers must agree on with the preset under whose name it is imported."""
SAMPLER_OF = {
    "llamagen-gpt": "AutoregressiveSampler",
    "dit": "DiffusionSampler",
    "diffusers-dit": "DiffusionSampler",
    "sit": "FlowSampler",
    "lightningdit": "FlowSampler",
    "repa-sit": "FlowSampler",
    "halton-maskgit": "MaskedSampler",
    "mage": "MaskedSampler",
    "maskgit-bert": "MaskedSampler",
    "rar": "AutoregressiveSampler",
}
"""Family of a generator to the class, of `genvision.samplers.base.SAMPLERS`, that draws with it."""


def import_checkpoint(name: str, file: Path | str, out: Path, *, weights: str | None = None, download: bool = False) -> list[str]:
    """Convert one file; run twice into one folder (tokenizer, generator), it makes a complete pipeline.

    Args:
        name: of a preset.
        file: the official checkpoint; of an AutoencoderKL also a diffusers folder, or hub:OWNER/NAME, which then say how it is built; of a
            DiT also the folder of a diffusers DiTPipeline, whose vae becomes the tokenizer, or its folder `transformer`.
        out: pipeline folder, new or with other components in it.
        weights: which weights of a training checkpoint to take (`model`, `ema`); the family's own choice unless told.
        download: fetch hub:OWNER/NAME if it is not in the Hub's cache.

    Returns:
        The components that are still missing.

    Raises:
        UserError: unknown preset; unreadable or unfitting file; the component is already there, or beside one that was trained with
            other codes.
    """
    preset = find_preset(name)
    _check_free(out, preset.component)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / INDEX).is_file():
        raise UserError(f"{out}: already holds something that is no model; choose another --out")
    fresh, index = not out.exists(), read_index(out) if (out / INDEX).is_file() else None
    _check_pair(out, index, name, preset)
    parts = _read(preset, file, weights, download)
    for part in parts:
        _check_free(out, part)
    label_names = None
    if preset.component == "generator":
        parts["sampler"] = default_sampler(preset)
        num_classes = parts["generator"].num_classes
        label_names = imagenet_label_names() if num_classes == 1000 else [str(i) for i in range(num_classes)]
    try:
        save_parts(out, parts, label_names)
        _record(out, name, preset, parts)
        missing = [part for part in ("tokenizer", "generator", "sampler") if not (out / part).is_dir()]
        if not missing:
            pipeline = ImagePipeline.from_pretrained(out)
            facts = {"imported": f"{name} from {Path(file).name}", "source": preset.source}
            write_card(out / "README.md", pipeline.generator, pipeline.tokenizer, pipeline.sampler, pipeline.label_names, facts)
            _check_complete(out, pipeline, came_together={"generator", "tokenizer"} <= parts.keys())
    except BaseException:
        _undo(out, list(parts), fresh, index)
        raise
    return missing


def default_sampler(preset: Preset) -> Sampler:
    """The sampler of a generator's family with the published protocol."""
    class_name = SAMPLER_OF[preset.family]
    sampler: Sampler = getattr(import_module(SAMPLERS[class_name]), class_name)(**preset.sampler)
    return sampler


def _check_pair(out: Path, index: dict[str, Any] | None, name: str, preset: Preset) -> None:
    """Raises UserError where the folder's other component was imported under a name that does not go with this one.

    Tokenizers of equal shapes differ in their codes, so that nothing else would show that a generator got the wrong one.
    """
    imported = _imported(out, index)
    generator, tokenizer = imported["generator"].get("preset"), imported["tokenizer"].get("preset")
    if preset.component == "generator":
        generator, trained_with = name, preset.tokenizer
    else:
        tokenizer, trained_with = name, tuple(imported["generator"].get("tokenizers", ()))
    if tokenizer is not None and trained_with and tokenizer not in trained_with:
        raise UserError(
            f"{out}: generator {generator} was trained on the codes of {' or '.join(trained_with)}, not on those of {tokenizer}, which "
            f"mean other images; import {generator} and {trained_with[0]} into one folder"
        )


def _record(out: Path, name: str, preset: Preset, parts: dict[str, Any]) -> None:
    """Enter into the index under which name each component was imported."""
    imported = _imported(out, read_index(out))
    if "generator" in parts:
        imported["generator"] = {"preset": name, "tokenizers": list(preset.tokenizer)}
    if "tokenizer" in parts:  # one that came along with a generator has no name of its own
        named = {"preset": name} if preset.component == "tokenizer" else {}
        imported["tokenizer"] = {**named, "hash": content_hash(parts["tokenizer"])}
    _write_imported(out, imported)


def _check_complete(out: Path, pipeline: ImagePipeline, came_together: bool) -> None:
    """Enter the tokenizer's hash beside the generator, and say so where nothing tells that it is the one of the generator's training."""
    imported, tokenizer_hash = _imported(out, read_index(out)), content_hash(pipeline.tokenizer)
    generator, tokenizer = imported["generator"], imported["tokenizer"]
    trained_with = generator.get("tokenizers", ())
    if not came_together and not (tokenizer.get("preset") in trained_with and tokenizer.get("hash") == tokenizer_hash):
        print(
            f"warning: {out}: nothing shows that the tokenizer (hash {tokenizer_hash}) is the one that the generator (hash "
            f"{content_hash(pipeline.generator)}) was trained with; that is {' or '.join(trained_with) or 'not known by name'}",
            file=sys.stderr,
        )
    _write_imported(out, imported | {"generator": {**generator, "tokenizer_hash": tokenizer_hash}})


def _imported(out: Path, index: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What the index says of the `generator` and the `tokenizer` that are there; nothing of what was not imported."""
    entry = (index or {}).get(IMPORTED, {})
    if not isinstance(entry, dict) or not all(isinstance(facts, dict) for facts in entry.values()):
        raise UserError(f"{out / INDEX}: '{IMPORTED}' is damaged; delete that entry")
    return {part: entry.get(part, {}) if (out / part).is_dir() else {} for part in ("generator", "tokenizer")}


def _write_imported(out: Path, imported: dict[str, dict[str, Any]]) -> None:
    entry = {part: facts for part, facts in imported.items() if facts}
    write_atomically(out / INDEX, json.dumps(read_index(out) | {IMPORTED: entry}, indent=2) + "\n")


def _check_free(out: Path, part: str) -> None:
    if (out / part).exists():
        raise UserError(f"{out / part}: already there; choose another --out, or delete it first")


def _read(preset: Preset, file: Path | str, weights: str | None, download: bool) -> dict[str, Any]:
    """The components that a file, a folder of diffusers or the Hub holds."""
    from_hub = str(file).startswith(HUB)
    if from_hub and preset.family != "autoencoder-kl":
        raise UserError(f"{file}: only an AutoencoderKL is fetched from the Hub; give the downloaded file or folder, {preset.file}")
    path = _from_hub(str(file).removeprefix(HUB), download) if from_hub else Path(file)
    if not path.is_dir():
        state = read_state_dict(path, weights, prefer=containers(preset.family))
        return {preset.component: load_official(preset.family, state, preset.config, source=str(file))}
    if preset.family in ("dit", "diffusers-dit"):
        return _read_diffusers_dit(preset, path)
    if preset.family != "autoencoder-kl":
        raise UserError(f"{file}: is a folder; give the checkpoint file, {preset.file}")
    from genvision.tokenizers.kl import KLTokenizer

    return {preset.component: KLTokenizer.from_diffusers(path)}


def _read_diffusers_dit(preset: Preset, folder: Path) -> dict[str, Any]:
    """The DiT of a folder, which says itself how it is built, and the tokenizer that stands beside it in a whole pipeline."""
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    generator = _read_diffusers(transformer, "diffusers-dit", DIFFUSERS_DIT, {})
    with torch.device("meta"):
        published, _ = FAMILIES[preset.family]({}, preset.config)
    ours, wanted = dict(generator.config), dict(published.config)  # type: ignore[arg-type]
    for key in SIZES:
        if ours[key] != wanted[key]:
            raise UserError(
                f"{transformer}: {key} is {ours[key]}, the published model has {wanted[key]}; import it under the name of its size"
            )
    if transformer == folder or not (folder / "vae").is_dir():
        return {"generator": generator}
    tokenizer = _read_diffusers(folder / "vae", "autoencoder-kl", ("AutoencoderKL",), {"sample_size": preset.image_size})
    return {"generator": generator, "tokenizer": tokenizer}


def _read_diffusers(folder: Path, family: str, class_names: tuple[str, ...], changes: dict[str, Any]) -> Any:
    """One model of diffusers, built as its config.json says but for `changes`."""
    try:
        config = json.loads((folder / "config.json").read_text())
        class_name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise UserError(
            f"{folder / 'config.json'}: {why}; give the folder of a diffusers DiTPipeline, or its folder transformer"
        ) from error
    if class_name not in class_names:
        raise UserError(f"{folder / 'config.json'}: describes a {class_name}, expected {' or '.join(class_names)}")
    file = next((folder / name for name in DIFFUSERS_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds none of {', '.join(DIFFUSERS_WEIGHTS)}; fetch the folder again")
    return load_official(family, read_state_dict(file), config | changes, source=str(file))


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
