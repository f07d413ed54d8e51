"""The `genvision` command: one function per sub-command, no logic of its own.

Nothing heavy is imported here: `genvision --help` must not wait for torch.
"""

import errno
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from genvision.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Options of everything that scores images."""

    protocol: str | None = None
    """adm, torch-fidelity, clean, edm2, first-is or digits; adm unless the extractor is digits."""
    metrics: str | None = None
    """names separated by commas: fid, sfid, is, pr, kid, fd_dinov2, class_accuracy; the protocol's own unless told."""
    extractor: str | None = None
    """another one than the protocol's: inception, inception-clean, dinov2, digits, or fidelity:NAME."""
    inception_weights: Path | None = None
    """local file of the Inception network's weights."""
    dinov2_weights: Path | None = None
    """local file of the weights of DINOv2 ViT-L/14."""
    download: bool = False
    """fetch weights that are not there."""
    cache: Path | None = None
    """folder in which statistics of references are kept; one of the user's unless told."""
    no_cache: bool = False
    """measure the reference anew and keep nothing."""
    batch_size: int = 64
    """images at a time."""
    workers: int = 2
    """processes that decode images."""
    device: str | None = None
    """cuda, cpu, ...; the best there is unless told."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Options of everything that draws images; those of the sampler are the model's own unless told."""

    classes: str = "all"
    """indices or names, separated by commas; all of them unless told."""
    seed: int = 0
    """of the job; image i depends on (seed, i) alone, whatever the batch size or the number of processes."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced goes through the classes in turn, random draws each label."""
    guidance_schedule: Literal["constant", "linear", "cosine", "power-cosine"] | None = None
    """how the guidance scale develops over tokens, steps or time."""
    guidance_power: float | None = None
    """tokens: the power of progress in power-cosine."""
    guidance_interval: tuple[float, float] | None = None
    """where guidance is on, in parts of the tokens or steps, or of the time from noise (0) to data (1), for example [0, 0.5]."""
    guidance_channels: int | None = None
    """latents: guide only the first so many channels; the published DiT, SiT and LightningDiT figures guide 3."""
    guide: Path | None = None
    """latents: folder of a weaker model to guide with, instead of the null class."""
    method: str | None = None
    """latents: ddpm, ddim, dpm++ (diffusion); euler, heun, midpoint, dopri5, euler-maruyama, stochastic-heun (flow)."""
    time_shift: float | None = None
    """flows: above 1 takes more steps at the noise."""
    cache_interval: int | None = None
    """latents: run the blocks of the network at every so many calls only and guess them at the others; what that changes is printed."""
    scale_condition: float | None = None
    """guidance scale that a scale-conditioned model is told."""
    order: Literal["confidence", "halton", "random"] | None = None
    """masked tokens: in which order they are settled."""
    choice_temperature: float | None = None
    """masked tokens: of the noise in the order confidence; 0 settles the surest ones first."""
    nesting: str | None = None
    """masked tokens: which part of the network draws in how many steps; 8x3,4x3,2x3,1x3 is 3 steps with an eighth of it, and so on."""
    kv_cache: Literal["on", "off"] | None = None
    """masked tokens: keep what was computed of tokens that are long known, which saves work and changes little."""
    cfg_interval: int | None = None
    """the interval in LlamaGen's own terms; c guides the first c + 2 tokens, -1 all."""
    rounding: Literal["trunc127.5", "trunc255", "round"] = "trunc127.5"
    """how floats become bytes; trunc127.5 is what DiT, SiT and LlamaGen do."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the generator."""
    weights: Literal["float32", "float16", "int8"] = "float32"
    """round the generator's weights to read less, float16 on CPUs alone; genvision quantize --check says what that changes."""


def demo(*, out: Path = Path("demo"), family: Literal["ar", "masked", "diffusion"] = "ar", seed: int = 0) -> None:
    """Train, sample and score a small model on real digits: no GPU, no download, a few minutes.

    Args:
        out: new folder for samples.png, results.json and model/.
        family: ar, an autoregressive transformer on the codes of a VQ tokenizer; masked, a MaskGIT on these codes; or diffusion, a flow
            transformer on pixels.
        seed: of training and sampling.
    """
    from genvision.demo import run_demo

    print(run_demo(out, family=family, seed=seed))


def train(argv: list[str]) -> None:
    """Train a tokenizer or a generator from a YAML recipe."""
    from genvision.config import load_train_config

    config, allow_change = load_train_config(argv)
    from genvision.jobs.train import run_training

    model = run_training(config, allow_change=allow_change)
    print(f"model: {model}" if model else f"stopped; run the same command again to go on ({config.output_dir})")


def runs(folder: Path = Path("runs"), *, json: bool = False, html: Path | None = None) -> None:
    """List training runs: how far they are, their loss, their last checkpoint, and which of them is running.

    Args:
        folder: what they lie below.
        json: print a JSON list.
        html: also write a page with the curves of their losses.
    """
    from genvision.jobs.runs import show_runs

    print(show_runs(folder, as_json=json, html=html))


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
    dtype: Literal["float32", "float16"] = "float32",
    storage: Literal["auto", "bytes"] = "auto",
    posterior: bool = False,
    features: str | None = None,
    features_weights: Path | None = None,
    features_grid: int = 16,
    download: bool = False,
) -> None:
    """Turn images into codes once, with all crops and flips, for training a generator; goes on where it was interrupted.

    Args:
        tokenizer: folder of the tokenizer, or of a model that has one.
        data: digits, folder:PATH, parquet:GLOB, wds:SHARDS, hub:NAME, ...; see docs/data.md.
        out: folder for the encoded data set.
        image_size: side in pixels; the tokenizer's own unless told.
        crops: ADM's centre crop, or ten crops (four corners and the centre, and their mirror images).
        flip: with centre crops, also the mirror image.
        enlarge: with ten crops, the side that they are cut from, as a multiple of the image size.
        batch_size: images at a time.
        workers: processes that decode images.
        on_bad_image: stop at an unreadable image, or leave it out and list it at the end.
        dtype: of stored latents and deviations; float16 takes half the space. (Discrete codes are whole numbers.)
        storage: of discrete codes: one byte each where at most 256 are in use; bytes also up to 510, slower to read.
        posterior: store the standard deviations of the latents, too; training then draws a sample at every visit, as DiT and SiT do.
        features: store patch tokens of this frozen network for REPA: dinov2_vitb14 (s, l, g) or a vision transformer of timm's.
            dinov2_vitb14 takes 0.4 MB a view.
        features_weights: local file of its weights under timm's names.
        features_grid: tokens of it a side, as many as the model that is trained has; 16 for DiT/2 at 256 pixels, 32 at 512.
        download: fetch its weights if no file is given.
    """
    from genvision.jobs.encode import encode_data, format_encoded

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
        dtype=dtype,
        storage=storage,
        posterior=posterior,
        features=features,
        features_weights=features_weights,
        features_grid=features_grid,
        download=download,
    )
    _say(f"{out}: {format_encoded(index)}")


def decode(
    *,
    encoded: Path,
    tokenizer: Path,
    out: Path,
    num: int | None = None,
    view: int = 0,
    batch_size: int = 32,
    rounding: Literal["trunc127.5", "trunc255", "round"] = "trunc127.5",
    device: str | None = None,
) -> None:
    """Decode an encoded data set to pictures, to look at what was stored.

    Args:
        encoded: folder written by encode.
        tokenizer: folder of the tokenizer that made it.
        out: a folder for PNG files, FILE.npz (ADM's layout) or FILE.png (one grid).
        num: so many, the classes in turn; all unless told (of a grid, about 64).
        view: which crop or flip, from 0.
        batch_size: images at a time.
        rounding: how floats become bytes.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.jobs.decode import decode_encoded

    decode_encoded(encoded, out, tokenizer=tokenizer, num=num, view=view, batch_size=batch_size, rounding=rounding, device=device)
    print(out)


def reconstruct(
    *,
    tokenizer: Path,
    data: str,
    out: Path,
    image_size: int | None = None,
    extractor: str = "inception",
    inception_weights: Path | None = None,
    lpips: bool = False,
    lpips_weights: Path | None = None,
    vgg_weights: Path | None = None,
    perceptual: str | None = None,
    perceptual_weights: Path | None = None,
    perceptual_size: int | None = None,
    download: bool = False,
    num: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Measure a tokenizer on images: rFID, PSNR, SSIM, LPIPS, codebook usage; with a picture of what comes back.

    Args:
        tokenizer: folder of the tokenizer, or of a model that has one.
        data: digits, folder:PATH, parquet:GLOB, wds:SHARDS, hub:NAME, ...; see docs/data.md.
        out: new folder for results.json, reconstructions.png and, for discrete codes, codes.npz.
        image_size: side in pixels; the tokenizer's own unless told.
        extractor: features for rFID: inception, digits, ... or none.
        inception_weights: local file of the Inception network's weights.
        lpips: measure LPIPS, too; a file of its weights says so as well.
        lpips_weights: local file of the linear layers of LPIPS 0.1, or of all its weights.
        vgg_weights: local file of torchvision's VGG16, where the other does not hold it.
        perceptual: measure the distance on the features of this timm model, too, where LPIPS cannot be had.
        perceptual_weights: local file of its weights.
        perceptual_size: side that images are resized to for it.
        download: fetch the weights of Inception, and of LPIPS or the timm model where they are asked for, if they are not there.
        num: measure the first so many images only.
        batch_size: images at a time.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.features import ExtractorOptions
    from genvision.eval.report import format_table
    from genvision.jobs.reconstruct import reconstruct_data
    from genvision.processes import choose_device

    result = reconstruct_data(
        tokenizer,
        data,
        out,
        image_size=image_size,
        extractor=extractor,
        options=ExtractorOptions(inception_weights=inception_weights, download=download, device=choose_device(device)),
        lpips=lpips,
        lpips_weights=lpips_weights,
        vgg_weights=vgg_weights,
        perceptual=perceptual,
        perceptual_weights=perceptual_weights,
        perceptual_size=perceptual_size,
        num=num,
        batch_size=batch_size,
        num_workers=workers,
    )
    _say(format_table(result))


def sample(
    *,
    model: Path,
    out: Path,
    num: int = 16,
    guidance: float | None = None,
    steps: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    complete: Path | None = None,
    keep: float | None = None,
    init: Path | None = None,
    mask: Path | None = None,
    batch_size: int = 32,
    drawing: Drawing,
) -> None:
    """Draw images from a model folder.

    Args:
        model: folder written by train, demo or import.
        out: a folder for PNG files, FILE.npz (ADM's layout) or FILE.png (one grid).
        num: how many images.
        guidance: classifier-free guidance scale, 1 is off; the model's default unless told, like all sampler options.
        steps: of samplers of latents and of masked tokens.
        temperature: of the draw of tokens; 0 takes the most likely one.
        top_k: draw from the k most likely tokens; 0 from all.
        top_p: draw from the smallest set of tokens of this probability.
        complete: keep the upper part of this image and draw the rest.
        keep: the part of it that is kept, between 0 and 1; half unless told.
        init: draw this image anew where the mask is white, and keep the tokens of the rest; both are cropped to the centre alike.
        mask: image of the same size; a token is drawn anew if any pixel of its cell is white (128 to 255). All white is plain sampling;
            nothing white gives the image back as the tokenizer reconstructs it. Autoregressive models only draw the end in raster order.
        batch_size: images at a time.
    """
    from genvision.jobs.sample import sample_from_folder

    options = _drawing_options(drawing, guidance_scale=guidance, num_steps=steps, temperature=temperature, top_k=top_k, top_p=top_p)
    sample_from_folder(model, out, complete=complete, keep=keep, init=init, mask=mask, batch_size=batch_size, num=num, **options)
    print(out)


def evaluate(
    *,
    generated: str,
    reference: str | None = None,
    image_size: int | None = None,
    json: Path | None = None,
    html: Path | None = None,
    scoring: Scoring,
) -> None:
    """Score images against a reference: FID, sFID, Inception Score, precision and recall, KID, FD-DINOv2; with intervals.

    Args:
        generated: what is judged: folder:PATH, npz:FILE, parquet:GLOB, digits, wds:SHARDS, ...; or a path.
        reference: images in the same forms, or a file of statistics: ADM's npz, statistics written by genvision statistics.
        image_size: crop both sets to this side first; without it all images must have one size.
        json: file for the result with everything that moves the numbers.
        html: file for the result as a page to look at.
    """
    from genvision.eval.report import format_table
    from genvision.jobs.evaluate import evaluate_data, evaluation_options

    options = evaluation_options(image_size=image_size, **asdict(scoring))
    _say(format_table(evaluate_data(generated, reference, json=json, html=html, options=options)))


def statistics(
    *,
    data: str,
    out: Path,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    num: int | None = None,
    scoring: Scoring,
) -> None:
    """Measure a data set once and write its statistics, a reference that can be kept; or, with --tokenizer, those of its latents.

    Args:
        data: digits, folder:PATH, parquet:GLOB, wds:SHARDS, hub:NAME, ...; see docs/data.md.
        out: new file, NAME.safetensors; with --tokenizer, a new folder for the same tokenizer with standardised latents.
        image_size: crop to this side first; without it all images must have one size.
        tokenizer: folder of a continuous tokenizer: mean and deviation of each channel of its latents are measured and become its own.
        num: with --tokenizer, measure so many images, evenly spread; all unless told.
    """
    if tokenizer is not None:
        from genvision.jobs.standardize import standardize_tokenizer

        size, workers = scoring.batch_size, scoring.workers
        _say(
            standardize_tokenizer(
                tokenizer, data, out, image_size=image_size, num=num, batch_size=size, num_workers=workers, device=scoring.device
            )
        )
        return
    if num is not None:
        raise UserError("--num goes with --tokenizer; the statistics of a reference are those of all its images")
    from genvision.jobs.evaluate import evaluation_options
    from genvision.jobs.statistics import write_data_statistics

    _say(write_data_statistics(data, out, options=evaluation_options(image_size=image_size, **asdict(scoring))))


def fid(
    *,
    model: Path,
    out: Path,
    num: int = 50_000,
    reference: str | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    keep: bool = False,
    drawing: Drawing,
    scoring: Scoring,
) -> None:
    """Draw images from a model and score them in one job, on any number of processes; goes on where it was interrupted.

    Args:
        model: folder written by train, demo or import.
        out: folder for results.json, page.html and what a killed job needs to go on.
        num: how many images; published numbers take 50,000. A larger number takes over what is there.
        reference: images, or a file of statistics, as for evaluate.
        guidance: classifier-free guidance scale, 1 is off; the model's default unless told, like all sampler options.
        steps: of samplers of latents and of masked tokens.
        temperature: of the draw of tokens; 0 takes the most likely one.
        top_k: draw from the k most likely tokens; 0 from all.
        top_p: draw from the smallest set of tokens of this probability.
        keep: keep the images, too, as PNG files in OUT/images.
    """
    from genvision.eval.report import format_table
    from genvision.jobs.evaluate import evaluation_options
    from genvision.jobs.fid import fid_from_folder

    drawn = _drawing_options(drawing, guidance_scale=guidance, num_steps=steps, temperature=temperature, top_k=top_k, top_p=top_p)
    options = evaluation_options(image_size=None, **asdict(scoring))
    result = fid_from_folder(model, reference, out, batch_size=scoring.batch_size, keep=keep, options=options, num=num, **drawn)
    _say(f"{format_table(result)}\n{out}")


def sweep(
    *,
    model: Path,
    out: Path,
    reference: str,
    num: int = 5000,
    guidance: str | None = None,
    temperature: str | None = None,
    top_k: str | None = None,
    top_p: str | None = None,
    steps: str | None = None,
    drawing: Drawing,
    scoring: Scoring,
) -> None:
    """Score a model at several settings of its sampler: the curve of FID and Inception Score, and the best setting.

    Args:
        model: folder written by train, demo or import.
        out: folder for sweep.json, sweep.html and a folder of each setting, which genvision fid --out takes over.
        reference: images, or a file of statistics, as for evaluate.
        num: images of each setting; those that are there are not drawn again.
        guidance: scales to try: FIRST:LAST:STEP, or numbers separated by commas; with several options every combination is tried.
        temperature: temperatures to try.
        top_k: numbers of tokens to try.
        top_p: probabilities to try.
        steps: numbers of steps to try, for samplers that have steps.
    """
    from genvision.jobs.evaluate import evaluation_options
    from genvision.jobs.sweep import format_sweep, parse_values
    from genvision.jobs.sweep import sweep as run

    given = {"guidance": guidance, "temperature": temperature, "top-k": top_k, "top-p": top_p, "steps": steps}
    names = {"guidance": "guidance_scale", "top-k": "top_k", "top-p": "top_p", "steps": "num_steps"}
    tried = {names.get(option, option): parse_values(text, option) for option, text in given.items() if text is not None}
    options = evaluation_options(image_size=None, **asdict(scoring))
    drawn = _drawing_options(drawing)
    done = run(model, reference, out, options_to_try=tried, batch_size=scoring.batch_size, options=options, num=num, **drawn)
    _say(f"{format_sweep(done)}\n{out}")


def compare(*results: Path, html: Path | None = None) -> None:
    """Put result files side by side, with the fields that differ marked.

    Args:
        results: JSON files written by evaluate, fid or reconstruct.
        html: file for the comparison as a page to look at.
    """
    from genvision.eval.compare import compare as run
    from genvision.eval.compare import format_comparison, write_comparison_page

    comparison = run(list(results))
    if html is not None:
        write_comparison_page(html, comparison)
    _say(format_comparison(comparison))


def cas(
    *,
    generated: str,
    real: str,
    out: Path,
    baseline: str | None = None,
    image_size: int | None = None,
    architecture: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet20"] = "resnet18",
    epochs: int = 90,
    steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 1e-4,
    label_smoothing: float = 0.0,
    crop: Literal["center", "random"] = "random",
    no_flip: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Train a classifier on generated images only and test it on real ones: the Classification Accuracy Score.

    Args:
        generated: labelled images to learn from: folder:PATH, npz:FILE, parquet:GLOB, digits, wds:SHARDS, ...; or a path.
        real: labelled real images to be tested on, in the same forms; the classes are matched by name.
        out: new folder for results.json.
        baseline: real images to train on in the same way, none of those tested on; the gap to them is stated.
        image_size: side to which all images are cropped; that of the real images unless told.
        architecture: resnet50 is the published protocol, resnet20 a quick one for images of at most 64 pixels.
        epochs: passes over the generated images.
        steps: batches instead of epochs.
        batch_size: images at a time.
        learning_rate: peak for 256 images a batch, scaled with the batch size.
        weight_decay: of kernels and matrices.
        label_smoothing: part of a label that is spread over all classes.
        crop: of training images; random crops come from an image enlarged by up to a quarter.
        no_flip: do not mirror images; for digits and letters.
        dtype: of the products; bfloat16 is for GPUs.
        seed: of the first weights, the order, crops and flips.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.classification_accuracy import format_cas
    from genvision.eval.classifier import ClassifierConfig
    from genvision.jobs.cas import score_by_classifier

    config = ClassifierConfig(
        architecture=architecture,
        num_epochs=epochs,
        num_steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        crop=crop,
        flip=not no_flip,
        dtype=dtype,
        seed=seed,
    )
    result = score_by_classifier(
        generated, real, out, baseline=baseline, image_size=image_size, config=config, num_workers=workers, device=device
    )
    _say(f"{format_cas(result)}\n{out}")


def probe(
    *,
    model: Path,
    train: str,
    test: str,
    out: Path,
    layer: str = "all",
    pooling: str = "mean",
    probe: str = "knn,linear",
    k: int = 20,
    temperature: float = 0.07,
    epochs: int = 30,
    mage_epochs: int = 90,
    mage_lr: float = 0.1,
    mage_batch_size: int = 4096,
    label_fraction: float | None = None,
    labels_per_class: int | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Probe what a generator has learnt to see: k-NN and linear accuracy of its frozen features, layer by layer.

    Args:
        model: folder written by train, demo or import.
        train: labelled real images on which the probes are fitted: digits, folder:PATH, parquet:GLOB, wds:SHARDS, ...; see docs/data.md.
        test: other labelled real images of the same classes.
        out: new folder for results.json and probe.svg.
        layer: all, a number, or numbers separated by commas; 0 is what the first block reads.
        pooling: mean, class, attentive, or several separated by commas.
        probe: of features that are pooled: knn, linear (fitted to its optimum), mage (trained by MAGE's recipe), or several.
        k: neighbours that vote.
        temperature: of their votes.
        epochs: passes over the training images, for attentive pooling.
        mage_epochs: passes over the training images, for the probe mage.
        mage_lr: its peak learning rate for 256 images a batch; 0.1 is for ImageNet, small sets need far more.
        mage_batch_size: its batches, at most.
        label_fraction: use the labels of this part of each class only, at least one; 0.01 is the usual few-shot setting.
        labels_per_class: use so many labels of each class instead.
        num_train: so many training images, drawn at random; all of them unless told.
        num_test: so many test images, likewise.
        seed: of the images that are held out, of subsets, of the labels that are used and of training.
        batch_size: images at a time.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.probe_report import format_probe
    from genvision.jobs.probe import probe_config, probe_folder

    config = probe_config(
        layer=layer,
        pooling=pooling,
        probe=probe,
        k=k,
        temperature=temperature,
        attentive_epochs=epochs,
        mage_epochs=mage_epochs,
        mage_learning_rate=mage_lr,
        mage_batch_size=mage_batch_size,
        label_fraction=label_fraction,
        labels_per_class=labels_per_class,
        batch_size=batch_size,
        seed=seed,
    )
    result = probe_folder(
        model, train, test, out, config=config, num_train=num_train, num_test=num_test, num_workers=workers, device=device
    )
    _say(f"{format_probe(result)}\n{out}")


def finetune(
    *,
    model: Path,
    data: str,
    test: str,
    out: Path,
    layer: int | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 2.5e-4,
    min_lr: float = 1e-6,
    warmup_epochs: float = 5.0,
    weight_decay: float = 0.05,
    layer_decay: float = 0.65,
    drop_path: float = 0.1,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    smoothing: float = 0.1,
    crop: Literal["center", "random", "resized"] = "resized",
    no_flip: bool = False,
    test_every: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Fine-tune a generator as an image classifier: accuracy of its trunk with a new head, layer by layer slower towards the input.

    Args:
        model: folder written by train, demo or import; it stays as it is.
        data: labelled real images to learn from: digits, folder:PATH, parquet:GLOB, wds:SHARDS, hub:NAME, ...; see docs/data.md.
        test: other labelled real images of the same classes.
        out: new folder for results.json, curve.svg, classifier.json and classifier.safetensors.
        layer: whose outputs are classified, 0 (what the first block reads) to the number of blocks; the last unless told.
        epochs: passes over the images.
        batch_size: images at a time.
        lr: peak learning rate of the head for 256 images a batch, scaled with the batch size.
        min_lr: what it falls to along a cosine.
        warmup_epochs: epochs of rise before.
        weight_decay: of kernels and matrices.
        layer_decay: factor of the learning rate from each layer to the one below; 1 is none.
        drop_path: probability with which the last block is left out for an image, rising from 0 in the first.
        mixup: parameter of the shares in which two images are blended; 0 is off.
        cutmix: parameter of the shares in which two images are pieced together; 0 is off.
        smoothing: part of a label that is spread over all classes.
        crop: of training images: resized, from a fifth of the image on; random, from an image enlarged by up to a quarter; or center.
        no_flip: do not mirror images; for digits and letters.
        test_every: epochs between tests.
        dtype: of the products; bfloat16 is for GPUs.
        seed: of the head, the order, crops, mirroring, mixing and what is left out.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.finetune_config import FinetuneConfig
    from genvision.eval.finetune_report import format_finetune
    from genvision.jobs.finetune import finetune_folder

    config = FinetuneConfig(
        layer=layer,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        min_learning_rate=min_lr,
        warmup_epochs=warmup_epochs,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        drop_path=drop_path,
        mixup=mixup,
        cutmix=cutmix,
        label_smoothing=smoothing,
        crop=crop,
        flip=not no_flip,
        test_every=test_every,
        dtype=dtype,
        seed=seed,
    )
    result = finetune_folder(model, data, test, out, config=config, num_workers=workers, device=device)
    _say(f"{format_finetune(result)}\n{out}")


def neighbours(
    *,
    generated: str,
    train: str,
    out: Path,
    held_out: str | None = None,
    extractor: str = "inception",
    inception_weights: Path | None = None,
    dinov2_weights: Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    metric: Literal["cosine", "l2"] = "cosine",
    num: int = 1000,
    num_neighbours: int = 5,
    rows: int = 16,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Find the training images that generated ones resemble most: does the model copy? With a picture to look at.

    Args:
        generated: folder:PATH, npz:FILE, parquet:GLOB, digits, wds:SHARDS, ...; or a path.
        train: what the model was trained on, in the same forms.
        out: new folder for results.json, neighbours.png and neighbours.npz.
        held_out: real images that the model has not seen; without them no distance can be called small.
        extractor: inception, inception-clean, dinov2, digits or fidelity:NAME; none compares pixels only.
        inception_weights: local file of the Inception network's weights.
        dinov2_weights: local file of the weights of DINOv2 ViT-L/14.
        download: fetch weights that are not there.
        image_size: crop all sets to this side first; without it all images must have one size.
        metric: of features; pixels are compared by root mean square.
        num: generated images, drawn at random, and as many held-out ones.
        num_neighbours: training images that are kept for each.
        rows: generated images in the picture, half of them those nearest to the training set.
        seed: of the images that are drawn.
        batch_size: images at a time.
        workers: processes that decode images.
        device: cuda, cpu, ...; the best there is unless told.
    """
    from genvision.eval.features import ExtractorOptions
    from genvision.eval.neighbours import NeighbourConfig, format_neighbours
    from genvision.jobs.neighbours import search_neighbours
    from genvision.processes import choose_device

    networks = ExtractorOptions(
        inception_weights=inception_weights, dinov2_weights=dinov2_weights, download=download, device=choose_device(device)
    )
    config = NeighbourConfig(num=num, num_neighbours=num_neighbours, metric=metric, batch_size=batch_size, seed=seed)
    result = search_neighbours(
        generated,
        train,
        out,
        held_out=held_out,
        extractor=extractor,
        options=networks,
        image_size=image_size,
        config=config,
        num_shown=rows,
        num_workers=workers,
    )
    _say(f"{format_neighbours(result)}\n{out}")


def import_(name: str, file: str, *, out: Path, weights: Literal["model", "ema"] | None = None, download: bool = False) -> None:
    """Turn an official checkpoint into a component of a model folder.

    Args:
        name: of a preset; `genvision presets` lists them.
        file: the downloaded checkpoint; of an sd-vae also a diffusers folder, or hub:OWNER/NAME; of a dit also a diffusers DiTPipeline
            folder, whose vae becomes the tokenizer, or its folder transformer.
        out: model folder; import tokenizer and generator into the same one.
        weights: which weights of a training checkpoint to take; those that were published unless told (ema of diffusion transformers).
        download: fetch hub:OWNER/NAME if it is not there.
    """
    from genvision.jobs.import_official import import_checkpoint

    missing = import_checkpoint(name, file, out, weights=weights, download=download)
    print(f"{out}: {name} imported" + (f"; still missing: {', '.join(missing)}" if missing else "; complete"))


def export(*, model: Path, format: Literal["diffusers", "official"], out: Path) -> None:
    """Write a diffusion transformer as diffusers or the original code reads it.

    Args:
        model: model folder.
        format: diffusers writes a folder for DiTPipeline.from_pretrained, official one file of weights under the original names.
        out: new folder, or new file that ends in .pt or .safetensors.
    """
    from genvision.jobs.export import export_model

    for warning in export_model(model, format, out):
        print(f"warning: {warning}")
    print(f"{out}: {model} exported")


def quantize(
    *,
    model: Path,
    weights: Literal["float16", "int8", "ternary"],
    out: Path | None = None,
    check: bool = False,
    max_kl: float | None = None,
    max_error: float | None = None,
    memory: bool = False,
    json: Path | None = None,
    measure: Literal["mean", "median"] = "mean",
    scales: Literal["row", "matrix"] = "row",
    exclude: str | None = None,
    distill_steps: int = 0,
    distill_lr: float = 1e-3,
    distill_images: int = 4096,
    num: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Say what rounding a model's weights changes, and write it with ternary weights of 2 bits.

    Args:
        model: folder written by train, demo or import; it stays as it is.
        weights: what the generator's weights become. float16 and int8 are made when a model is loaded: sample --weights.
        out: new model folder with ternary weights.
        check: compare predictions and images with those of float32, with equal random numbers; digits are recognised as well.
        max_kl: tokens: end with exit status 2, and write nothing, where the mean KL in nats a token is above this; includes --check.
        max_error: latents: the same for the mean relative distance of predictions.
        memory: measure what drawing two images takes in processes of their own; needs --out for ternary weights.
        json: file for the result.
        measure: ternary: what of |W| gives the scale.
        scales: ternary: a scale for every output row, or one for each matrix.
        exclude: ternary: layers that stay floats besides, separated by commas: parts by name (blocks.0) or patterns (blocks.*.mlp.down).
        distill_steps: ternary: steps of calibration, in which the weights learn to say what the float model says on its own images.
        distill_lr: its highest learning rate.
        distill_images: images that the float model draws for it, at most.
        num: images of the check.
        seed: of all images.
        batch_size: images at a time.
        device: cuda, cpu, ...; for ternary weights the best there is unless told, for others the CPU.
    """
    from genvision.jobs.quantize import QuantizationOptions, quantize_folder

    options = QuantizationOptions(
        weights=weights,
        measure=measure,
        scales=scales,
        exclude=tuple(name.strip() for name in exclude.split(",")) if exclude is not None else (),
        distill_steps=distill_steps,
        distill_lr=distill_lr,
        distill_images=distill_images,
        num=num,
        seed=seed,
        batch_size=batch_size,
        device=device,
    )
    quantize_folder(model, options, out=out, check=check, max_kl=max_kl, max_error=max_error, memory=memory, json_file=json)


def presets(name: str | None = None) -> None:
    """List the published models that can be imported, or show one in full.

    Args:
        name: of a preset.
    """
    from genvision.presets import format_preset, format_presets

    print(format_preset(name) if name else format_presets())


def benchmark(
    rows: str | None = None, *, quick: bool = False, long: bool = False, out: Path | None = None, page: Path | None = None
) -> None:
    """Measure speed beside transformers, diffusers, torch-fidelity and cache-dit; what gives other results is not timed.

    Args:
        rows: names of rows separated by commas, A1,A2m for example; docs/performance.md says which there are. All unless told.
        quick: few rounds of small work, two to three minutes in all; this is what is done unless told.
        long: at least 9 rounds of the full work, over an hour for all rows; figures to publish.
        out: JSON file of results, to which these are added.
        page: page with marked room for the table, docs/performance.md; with --long.
    """
    from genvision.jobs.benchmark import run_benchmark

    run_benchmark(rows, quick=quick, long=long, out=out, page=page)


NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "runs": runs,
    "encode": encode,
    "decode": decode,
    "reconstruct": reconstruct,
    "sample": sample,
    "fid": fid,
    "sweep": sweep,
    "evaluate": evaluate,
    "statistics": statistics,
    "compare": compare,
    "cas": cas,
    "probe": probe,
    "finetune": finetune,
    "neighbours": neighbours,
    "import": import_,
    "quantize": quantize,
    "export": export,
    "presets": presets,
    "benchmark": benchmark,
}
LEAN = {"sample"}
"""Commands that import less of diffusers, in a process of their own."""


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
        _run(words[0], words[1:], own_process=argv is None)
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
    except OSError as error:
        if debug or error.errno not in NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"genvision: {where}{error.strerror}; make room, then run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("genvision: interrupted", file=sys.stderr)
        sys.exit(130)


def _drawing_options(drawing: Drawing, **sampler_options: float | None) -> dict[str, Any]:
    """As genvision.jobs.sample.open_job takes them."""
    options = asdict(drawing)
    cache = options.pop("kv_cache")
    of_latents = ("guidance_channels", "method", "time_shift", "scale_condition", "cache_interval")
    names = ("guidance_schedule", "guidance_power", "order", "choice_temperature", "nesting", *of_latents)
    chosen = {name: options.pop(name) for name in names} | {"use_cache": None if cache is None else cache == "on"}
    return options | {"sampler_options": chosen | sampler_options}


def _say(text: str) -> None:
    """Print for a job that may run on several processes; one of them speaks."""
    from genvision.processes import process_state

    if process_state().is_main_process:
        print(text)


def _run(name: str, words: list[str], *, own_process: bool) -> None:
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"no sub-command '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"))
    if name == "train":
        train(words)
    else:
        from genvision.config import run_command
        from genvision.lean_import import without_unused

        lean = own_process and name in LEAN
        run_command(name, without_unused(COMMANDS[name]) if lean else COMMANDS[name], words)


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
