"""The `genvision` command: one function per sub-command, no logic of its own.

Nothing heavy is imported here: `genvision --help` must not wait for torch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from genvision.errors import UserError


def demo(*, out: Path = Path("demo"), seed: int = 0) -> None:
    """Train, sample and score a small model on real digits: no GPU, no download, a few minutes.

    Args:
        out: new folder for samples.png, results.json and model/.
        seed: of training and sampling.
    """
    from genvision.demo import run_demo

    print(run_demo(out, seed=seed))


def train(argv: list[str]) -> None:
    """Train a tokenizer or a generator from a YAML recipe."""
    from genvision.config import load_train_config

    config, resume = load_train_config(argv)
    from genvision.jobs.train import run_training

    model = run_training(config, resume=resume)
    print(f"model: {model}" if model else f"stopped; run the same command with --resume to go on ({config.output_dir})")


def encode(
    *,
    tokenizer: Path,
    data: str,
    out: Path,
    image_size: int | None = None,
    crops: Literal["center", "ten"] = "center",
    flip: bool = False,
    enlarge: float = 1.1,
    batch_size: int = 32,
    workers: int = 2,
    on_bad_image: Literal["stop", "skip"] = "stop",
) -> None:
    """Turn images into codes once, with all crops and flips, for training a generator; goes on where it was interrupted.

    Args:
        tokenizer: folder of the tokenizer, or of a model that has one.
        data: digits, folder:PATH, parquet:GLOB or npz:FILE.
        out: folder for the encoded data set.
        image_size: side in pixels; the tokenizer's own unless told.
        crops: ADM's centre crop, or ten crops (four corners and the centre, and their mirror images).
        flip: with centre crops, also the mirror image.
        enlarge: with ten crops, the side that they are cut from, as a multiple of the image size.
        batch_size: images at a time.
        workers: processes that decode images.
        on_bad_image: stop at an unreadable image, or leave it out and list it at the end.
    """
    from genvision.jobs.encode import encode_data

    index = encode_data(
        tokenizer,
        data,
        out,
        image_size=image_size,
        crops=crops,
        flip=flip,
        enlarge=enlarge,
        batch_size=batch_size,
        num_workers=workers,
        on_bad_image=on_bad_image,
    )
    print(f"{out}: {index['num_images']} images in {index['views']} views, codes of shape {index['code_shape']}")


def reconstruct(
    *,
    tokenizer: Path,
    data: str,
    out: Path,
    image_size: int | None = None,
    extractor: str = "inception",
    inception_weights: Path | None = None,
    download: bool = False,
    num: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Measure a tokenizer on images: rFID, PSNR, SSIM, codebook usage; with a picture of what comes back.

    Args:
        tokenizer: folder of the tokenizer, or of a model that has one.
        data: digits, folder:PATH, parquet:GLOB or npz:FILE.
        out: new folder for results.json and reconstructions.png.
        image_size: side in pixels; the tokenizer's own unless told.
        extractor: features for rFID: inception, digits, or none.
        inception_weights: local file of the Inception network's weights.
        download: fetch the Inception weights if they are not there.
        num: measure the first so many images only.
        batch_size: images at a time.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.features import ExtractorOptions
    from genvision.eval.report import format_table
    from genvision.jobs.reconstruct import choose_device, reconstruct_data

    result = reconstruct_data(
        tokenizer,
        data,
        out,
        image_size=image_size,
        extractor=extractor,
        options=ExtractorOptions(inception_weights=inception_weights, download=download, device=choose_device(device)),
        num=num,
        batch_size=batch_size,
        num_workers=workers,
    )
    print(format_table(result))


def sample(
    *,
    model: Path,
    out: Path,
    classes: str = "all",
    num: int = 16,
    seed: int = 0,
    guidance: float | None = None,
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    cfg_interval: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    labels: Literal["balanced", "random"] = "balanced",
    complete: Path | None = None,
    keep: float = 0.5,
    batch_size: int = 32,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounding: Literal["trunc127.5", "trunc255", "round"] = "trunc127.5",
) -> None:
    """Draw images from a model folder.

    Args:
        model: folder written by train, demo or import.
        out: a folder for PNG files, FILE.npz (ADM's layout) or FILE.png (one grid).
        classes: indices or names, separated by commas; all of them unless told.
        num: how many images.
        seed: of the job; image i depends on (seed, i) alone, whatever the batch size or the number of processes.
        guidance: classifier-free guidance scale, 1 is off; the model's default unless told, like all sampler options.
        guidance_schedule: how the scale develops over the tokens.
        guidance_interval: parts of the tokens between which guidance is on, for example [0, 0.5].
        cfg_interval: the interval in LlamaGen's own terms; c guides the first c + 2 tokens, -1 all.
        temperature: of the draw; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; 0 from all.
        top_p: draw from the smallest set of tokens of this probability.
        labels: balanced goes through the classes in turn, random draws each label.
        complete: keep the upper part of this image and draw the rest.
        keep: the part that is kept, between 0 and 1.
        batch_size: images at a time.
        dtype: of the generator.
        rounding: how floats become bytes; trunc127.5 is what DiT, SiT and LlamaGen do.
    """
    from genvision.jobs.sample import sample_from_folder

    options = {
        "guidance_scale": guidance,
        "guidance_schedule": guidance_schedule,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    sample_from_folder(
        model,
        out,
        classes=classes,
        num=num,
        seed=seed,
        labels=labels,
        rounding=rounding,
        sampler_options=options,
        guidance_interval=guidance_interval,
        cfg_interval=cfg_interval,
        complete=complete,
        keep=keep,
        batch_size=batch_size,
        dtype=dtype,
    )
    print(out)


def evaluate(
    *,
    generated: str,
    reference: str | None = None,
    metrics: str | None = None,
    extractor: str = "inception",
    image_size: int | None = None,
    inception_weights: Path | None = None,
    download: bool = False,
    json: Path | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Score images against other images: FID, Inception Score.

    Args:
        generated: what is judged: folder:PATH, npz:FILE, parquet:GLOB, digits; or a path.
        reference: what it is compared with, in the same forms.
        metrics: names separated by commas: fid, is, class_accuracy; all that the reference and the extractor allow unless told.
        extractor: inception, or digits.
        image_size: crop both sets to this side first; without it all images must have one size.
        inception_weights: local file of the Inception network's weights.
        download: fetch the Inception weights if they are not there.
        json: file for the result with everything that moves the number.
        batch_size: images at a time.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.job import evaluate as run
    from genvision.eval.report import format_table, write_json
    from genvision.jobs.reconstruct import choose_device

    result = run(
        generated,
        reference,
        extractor=extractor,
        metrics=metrics.split(",") if metrics else None,
        batch_size=batch_size,
        num_workers=workers,
        inception_weights=inception_weights,
        download=download,
        device=choose_device(device),
        image_size=image_size,
    )
    if json is not None:
        write_json(result, json)
    print(format_table(result))


def import_(name: str, file: Path, *, out: Path, weights: Literal["model", "ema"] | None = None) -> None:
    """Turn an official checkpoint into a component of a model folder.

    Args:
        name: of a preset; `genvision presets` lists them.
        file: the downloaded checkpoint.
        out: model folder; import tokenizer and generator into the same one.
        weights: which weights of a training checkpoint to take.
    """
    from genvision.jobs.import_official import import_checkpoint

    missing = import_checkpoint(name, file, out, weights=weights)
    print(f"{out}: {name} imported" + (f"; still missing: {', '.join(missing)}" if missing else "; complete"))


def presets(name: str | None = None) -> None:
    """List the published models that can be imported, or show one in full.

    Args:
        name: of a preset.
    """
    from genvision.presets import format_preset, format_presets

    print(format_preset(name) if name else format_presets())


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "encode": encode,
    "reconstruct": reconstruct,
    "sample": sample,
    "evaluate": evaluate,
    "import": import_,
    "presets": presets,
}


def main(argv: list[str] | None = None) -> None:
    """Run a sub-command; exit status 0 when its work is done, 2 for what the user can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--"]:  # torchrun -m genvision -- sample --num 16: without it torchrun takes --num for its own --numa-binding
        words = words[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from genvision import __version__

        print(f"genvision {__version__}")
        sys.exit(0)
    try:
        _run(words[0], words[1:])
    except UserError as error:
        if debug:
            raise
        print(f"genvision: {error}", file=sys.stderr)
        sys.exit(2)
    except (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
        if debug:
            raise
        print(f"genvision: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("genvision: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(name: str, words: list[str]) -> None:
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"no sub-command '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"))
    if name == "train":
        train(words)
    else:
        from genvision.config import run_command

        run_command(name, COMMANDS[name], words)


def _help() -> str:
    lines = [
        "usage: genvision COMMAND [options]",
        "",
        "Class-conditional image synthesis: tokenizers, generators, samplers, evaluation.",
        "",
    ]
    for name, function in COMMANDS.items():
        lines.append(f"  {name:12}{(function.__doc__ or '').splitlines()[0]}")
    lines += ["", "  genvision COMMAND --help shows the options; --debug shows tracebacks; --version the version."]
    return "\n".join(lines)
