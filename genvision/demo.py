"""`genvision demo`: the whole path on real digits in a few minutes: generator (with its tokenizer, where it has one), new images, scores.

The real column of the table is what real digits score against other real digits, written by other people: the mark that
generated ones can be held against. How many samples copy a training image is said as well.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genvision.config import load_train_config
from genvision.data.datasets import ImageDataset
from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.job import EvaluationOptions, digits_floor, score_arrays
from genvision.images import make_grid, save_png, to_uint8
from genvision.jobs.encode import encode_data
from genvision.jobs.sample import SampleRequest, sample
from genvision.jobs.train import run_training
from genvision.pipeline import ImagePipeline
from genvision.samplers.randomness import ImageStreams
from genvision.training.state import write_atomically

NUM_SAMPLES, GRID_COLUMNS = 1000, 10
DATA = "digits"
GREY_LEVELS = 17
"""Of the digits: counts 0 .. 16."""
Family = Literal["ar", "masked", "diffusion"]
ON_CODES: dict[str, str] = {"ar": "llamagen/llamagen_digits.yaml", "masked": "maskgit/maskgit_digits.yaml"}
"""Families that are trained on the codes of a tokenizer, and their recipes."""


def run_demo(out: Path, *, family: Family = "ar", seed: int = 0) -> str:
    """Fill `out` with samples.png, samples.npz, results.json and model/; goes on where an interrupted run stopped.

    Args:
        family: `ar` trains a VQ tokenizer and an autoregressive generator on its codes, `masked` a MaskGIT on these codes, `diffusion` a
            flow transformer on pixels.

    Returns:
        The scores as a table.

    Raises:
        UserError: `out` holds a finished demo, or something else.
    """
    if (out / "results.json").exists():
        raise UserError(f"{out}: already holds a finished demo; choose another --out, or delete it")
    if out.exists() and any(out.iterdir()) and not (out / "work").is_dir():
        raise UserError(f"{out}: already holds something else; choose another --out")
    ImageStreams(seed, ())  # an impossible seed is refused before anything is written
    began = time.monotonic()
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)

    steps = 4 if family in ON_CODES else 3
    if family in ON_CODES:
        print(f"1/{steps} training a tokenizer on real digits", flush=True)
        tokenizer = _trained("vq/vq_digits.yaml", work / "tokenizer", seed, [])
        codes = work / "codes"
        encode_data(tokenizer, DATA, codes)
        print(f"2/{steps} training a generator on its codes", flush=True)
        recipe, changes = ON_CODES[family], ["--tokenizer", str(tokenizer), "--data.spec", f"encoded:{codes}"]
    else:
        print(f"1/{steps} training a flow transformer on the pixels of real digits", flush=True)
        recipe, changes = "dit/flow_digits.yaml", []
    if not (out / "model").exists():
        _trained(recipe, work / "generator", seed, changes).rename(out / "model")
    print(f"{steps - 1}/{steps} drawing 100 digits of each class", flush=True)
    pipeline = ImagePipeline.from_pretrained(out / "model")
    sample(pipeline, SampleRequest(num=NUM_SAMPLES, classes=tuple(range(10)), seed=seed), out / "samples.npz", batch_size=250)
    print(f"{steps}/{steps} scoring them", flush=True)
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    rows = [images[labels == digit][:GRID_COLUMNS] for digit in range(10)]
    save_png(make_grid(np.concatenate(rows), GRID_COLUMNS, row_names=[str(digit) for digit in range(10)]), out / "samples.png")
    results = _scores(images, labels, pipeline, seed) | {"seconds": round(time.monotonic() - began, 1), "model": str(out / "model")}
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    return _table(results, out)


def _trained(recipe: str, output: Path, seed: int, changes: list[str]) -> Path:
    config, _ = load_train_config(["--config", recipe, "--output_dir", str(output), "--seed", str(seed), *changes])
    model = run_training(config)
    if model is None:
        raise KeyboardInterrupt
    return model


def _scores(images: np.ndarray, labels: np.ndarray, pipeline: ImagePipeline, seed: int) -> dict[str, Any]:
    options = EvaluationOptions(protocol="digits", metrics=("fid", "is", "class_accuracy"), show_progress=False)
    result = score_arrays(images, labels, DATA, name="samples.npz", options=options)
    floor = digits_floor()
    return {
        "class_accuracy": result.class_accuracy,
        "fid": result.fid,
        "inception_score": result.inception_score,
        "inception_score_std": result.inception_score_std,
        "real_class_accuracy": floor.class_accuracy,
        "real_halves_fid": floor.fid,
        "copies": _copies(images, pipeline),
        "network_calls": pipeline.sampler.network_calls(pipeline.generator),
        "num_generated": result.num_generated,
        "num_reference": result.num_reference,
        "trained_on": DATA,
        "reference": DATA,
        "extractor": result.extractor,
        "extractor_hash": result.extractor_hash,
        "judge_hash": result.judge_hash,
        "sampler": {name: value for name, value in dict(pipeline.sampler.config).items() if not name.startswith("_")},
        "seed": seed,
        "versions": result.versions,
    }


@torch.inference_mode()
def _copies(images: np.ndarray, pipeline: ImagePipeline) -> float:
    """Share of the samples that equal a training image, as the tokenizer gives it back, in the grey level of every pixel."""
    dataset = ImageDataset(open_source(DATA), pipeline.image_size, flip=False)
    real = torch.stack([dataset.plain(i) for i in range(len(dataset))])
    known = {_levels(image).tobytes() for image in to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(real)))}
    return float(np.mean([_levels(image).tobytes() in known for image in images]))


def _levels(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> the nearest of the digits' grey levels, [H, W]."""
    return np.round(image.mean(axis=2) * ((GREY_LEVELS - 1) / 255)).astype(np.uint8)


def _table(results: dict[str, Any], out: Path) -> str:
    sampler = results["sampler"]
    return "\n".join(
        [
            "",
            f"                                {results['num_generated']:,} generated        real digits",
            f"  recognised as their class           {results['class_accuracy']:8.1%}           {results['real_class_accuracy']:8.1%}",
            f"  FID                                 {results['fid']:8.2f}           {results['real_halves_fid']:8.2f}  (half against half)",
            f"  Inception Score, at most 10         {results['inception_score']:8.2f}",
            f"  equal to a training image           {results['copies']:8.1%}",
            "",
            f"  {_protocol(sampler)}, {results['network_calls']} network calls an image",
            f"  seed {results['seed']}, {results['seconds']:.0f} s",
            f"  picture  {out / 'samples.png'}",
            f"  scores   {out / 'results.json'}",
            f"  model    {results['model']}",
        ]
    )


def _protocol(sampler: dict[str, Any]) -> str:
    guidance = f"guidance {sampler['guidance_scale']:g}" if sampler["guidance_scale"] != 1 else "no guidance"
    if "num_steps" not in sampler:
        return f"{guidance}, top-p {sampler['top_p']:g}"
    return f"{guidance}, {sampler['num_steps']} steps of {sampler['method'] if 'method' in sampler else sampler['order']}"
