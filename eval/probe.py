"""What a generator has learnt to see: probes of its frozen hidden states (as MAGE, arXiv:2211.09117, section 4.2, does with its encoder).

The generator reads codes of real images under the null condition, so no label goes in. Its hidden states are pooled and classified by
k nearest neighbours, by a linear layer fitted to its optimum or trained by MAGE's recipe, or by attention with a learned query. Raw pixels
and raw codes are classified alike, since a number says something only beside theirs. All labels of the training set may be used, or a few
of each class.

Shapes: N images, L codes of an image, P positions of the condition, C channels of a layer, V codebook entries, K classes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.accuracy import INTERVAL_METHOD, match_classes
from genvision.eval.features import exact_float32
from genvision.eval.job import software_versions
from genvision.eval.probe_config import ProbeConfig
from genvision.eval.probe_features import ImageCodes, Reading
from genvision.eval.probe_heads import train_attentive_heads
from genvision.eval.probe_images import choose_images, choose_labels, hold_out
from genvision.eval.probe_judge import Judge, remarks, share_of
from genvision.progress import Progress

SCHEMA = "genvision.probe/1"
Interval = tuple[float, float]
MAX_CODE_FEATURES = 4096


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracies of all probes, the best one first, and what they depend on. None: does not apply."""

    schema: str = SCHEMA

    top1: float
    """On the test images, of the probe that does best on the training images held out."""
    top1_interval: Interval
    interval_method: str = INTERVAL_METHOD
    layer: int
    pooling: str
    probe: str
    chance: float
    """Share of the commonest class among the test images."""
    rows: list[dict[str, Any]]
    """layer, pooling, probe (knn, linear, mage, attentive), top1, interval, held_out (share of held-out training images), weight_decay (of
    linear) and training_loss (of mage)."""
    baselines: list[dict[str, Any]]
    """The same of raw inputs: `input` stands for layer and pooling."""

    model: str | None = None
    generator_hash: str | None = None
    tokenizer_hash: str | None = None
    num_layers: int
    condition: str = "null"
    train: str
    train_hash: str
    test: str
    test_hash: str
    num_train: int
    num_labels: int
    """Training images whose labels were used, those held out among them; as many as `num_train` unless few-shot."""
    label_fraction: float | None = None
    labels_per_class: int | None = None
    num_held_out: int
    num_test: int
    num_classes: int
    image_size: int
    crop: str
    k: int
    temperature: float
    weight_decays: list[float]
    attentive_epochs: int | None = None
    mage_epochs: int | None = None
    mage_batch_size: int | None = None
    mage_learning_rate: float | None = None
    seed: int

    batch_size: int
    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def probe(
    generator: Any,
    tokenizer: Any,
    train: ImageSource,
    test: ImageSource,
    *,
    config: ProbeConfig | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    model: str | None = None,
    hashes: Mapping[str, str] | None = None,
    num_workers: int = 0,
    device: str = "cpu",
    show_progress: bool = False,
) -> ProbeResult:
    """Probe a generator on real images.

    Args:
        generator: a `genvision.models.base.Generator` with `blocks`; in eval mode.
        tokenizer: makes its codes.
        num_train, num_test: images drawn at random without replacement; None takes all.
        model: its name for the result.
        hashes: `generator` and `tokenizer` to their hashes, for the result.

    Raises:
        UserError: a layer or pooling is not there, the model has no null label, the classes do not match, or images or labels are too few.
    """
    began = time.monotonic()
    config = config or ProbeConfig()
    assert not generator.training
    layers = _layers(generator, config)
    translation, matching = match_classes(train.label_names, test.label_names, "the training set", "the test set")
    warnings = [matching] if matching else []
    size = generator.image_size(tokenizer.spec.downsample, tokenizer.spec.image_size)
    reading = Reading(
        generator=generator.to(device),
        tokenizer=tokenizer.to(device),
        size=size,
        batch_size=config.batch_size,
        num_workers=num_workers,
        device=device,
        show_progress=show_progress,
    )
    train_hash, test_hash = train.content_hash(), test.content_hash()
    if train_hash == test_hash:
        warnings.append("the probes are tested on the images that they are trained on: these are no accuracies")
    with exact_float32(), torch.no_grad():
        available = choose_images(train, num_train, config.seed)
        known = reading.encode(train, choose_labels(train, available, config), "reading training images")
        unknown = reading.encode(test, choose_images(test, num_test, config.seed), "reading test images")
        known = known._replace(labels=torch.from_numpy(translation)[known.labels])
        held_out = hold_out(len(known.labels), config)
        judge = Judge(known.labels, unknown.labels, held_out, test.num_classes, config, device, show_progress)
        rows = []
        chosen = [pooling for pooling in config.poolings if pooling != "attentive"]
        if chosen:
            pooled, pooled_test = (reading.pool(codes, layers, chosen, "pooling") for codes in (known.codes, unknown.codes))
            for layer in layers:
                for pooling in chosen:
                    found = judge(pooled.pop((layer, pooling)), pooled_test.pop((layer, pooling)))
                    rows += [{"layer": layer, "pooling": pooling, **row} for row in found]
        if "attentive" in config.poolings:
            rows += _attentive_rows(reading, known, unknown, held_out, judge, layers, config)
        baselines = _baselines(known, unknown, tokenizer.spec.codebook_size, judge)
    best = max(rows, key=lambda row: (row["held_out"], -rows.index(row)))
    notes = [
        f"layer {best['layer']}, {best['pooling']} pooling and {best['probe']} did best on {int(held_out.sum()):,} held-out training images"
    ]
    more_notes, more_warnings = remarks(config, len(known.labels), len(available), int(held_out.sum()), has_choice=len(rows) > 1)
    notes, warnings = notes + more_notes, warnings + more_warnings
    if rival := next((row for row in baselines if row["top1"] >= best["top1"]), None):
        words = f"raw {rival['input']} do as well or better ({rival['probe']}, {rival['top1']:.1%})"
        warnings.append(f"{words}: so pooled, these hidden states say no more of the class than what went in")
    return ProbeResult(
        top1=best["top1"],
        top1_interval=best["interval"],
        layer=best["layer"],
        pooling=best["pooling"],
        probe=best["probe"],
        chance=float(np.bincount(unknown.labels.numpy()).max() / len(unknown.labels)),
        rows=rows,
        baselines=baselines,
        model=model,
        generator_hash=(hashes or {}).get("generator"),
        tokenizer_hash=(hashes or {}).get("tokenizer"),
        num_layers=len(generator.blocks),
        train=train.spec,
        train_hash=train_hash,
        test=test.spec,
        test_hash=test_hash,
        num_train=len(available),
        num_labels=len(known.labels),
        label_fraction=config.label_fraction,
        labels_per_class=config.labels_per_class,
        num_held_out=int(held_out.sum()),
        num_test=len(unknown.labels),
        num_classes=test.num_classes,
        image_size=size,
        crop=f"ADM centre crop to {size}",
        k=config.k,
        temperature=config.temperature,
        weight_decays=list(config.weight_decays),
        attentive_epochs=config.attentive_epochs if "attentive" in config.poolings else None,
        mage_epochs=config.mage_epochs if "mage" in config.probes else None,
        mage_batch_size=min(config.mage_batch_size, len(known.labels)) if "mage" in config.probes else None,
        mage_learning_rate=config.mage_learning_rate if "mage" in config.probes else None,
        seed=config.seed,
        batch_size=config.batch_size,
        device=device,
        seconds=round(time.monotonic() - began, 2),
        versions=software_versions(),
        notes=notes,
        warnings=warnings,
    )


def _attentive_rows(
    reading: Reading, known: ImageCodes, unknown: ImageCodes, held_out: Tensor, judge: Judge, layers: Sequence[int], config: ProbeConfig
) -> list[dict[str, Any]]:
    """A row for each layer; the heads never see the held-out images."""
    prefix = reading.generator.prefix_length
    codes, labels = known.codes[~held_out], known.labels[~held_out]

    def image_tokens(codes: Tensor) -> dict[int, Tensor]:
        return {layer: states[:, prefix:] for layer, states in zip(layers, reading.tokens(codes, layers), strict=True)}

    batch_size = min(config.batch_size, len(codes))
    num_steps = -(-config.attentive_epochs * len(codes) // batch_size)
    progress = Progress(num_steps * batch_size, "training attentive pooling", show=reading.show_progress)
    heads = train_attentive_heads(
        lambda rows: image_tokens(codes[rows]),
        {layer: states.shape[-1] for layer, states in image_tokens(codes[:1]).items()},
        labels.to(reading.device),
        judge.num_classes,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=config.seed,
        advance=progress.advance,
    )
    progress.close()
    guesses: dict[str, dict[int, list[Tensor]]] = {name: {layer: [] for layer in layers} for name in ("held_out", "test")}
    for name, part in (("held_out", known.codes[held_out]), ("test", unknown.codes)):
        for batch in reading.batches(part, f"classifying {name.replace('_', '-')} images"):
            for layer, tokens in image_tokens(batch).items():
                guesses[name][layer].append(heads[layer](tokens).argmax(dim=1).cpu())
    rows = []
    for layer in layers:
        share = share_of(torch.cat(guesses["held_out"][layer]) == known.labels[held_out])
        rows.append({"layer": layer, "pooling": "attentive", **judge.row("attentive", torch.cat(guesses["test"][layer]), share)})
    return rows


def _baselines(known: ImageCodes, unknown: ImageCodes, codebook_size: int | None, judge: Judge) -> list[dict[str, Any]]:
    """Probes of what the generator was given."""
    inputs = {"pixels": (known.pixels, unknown.pixels)}
    num_codes = known.codes[0].numel()
    if codebook_size is None:
        if num_codes <= MAX_CODE_FEATURES:
            inputs["latents"] = known.codes.flatten(1), unknown.codes.flatten(1)
    elif num_codes * codebook_size <= MAX_CODE_FEATURES:
        inputs["codes (one-hot)"] = _one_hot(known.codes, codebook_size), _one_hot(unknown.codes, codebook_size)
    elif codebook_size <= MAX_CODE_FEATURES:
        inputs["codes (histogram)"] = _histogram(known.codes, codebook_size), _histogram(unknown.codes, codebook_size)
    return [{"input": name, **row} for name, (train, test) in inputs.items() for row in judge(train, test)]


def _one_hot(codes: Tensor, codebook_size: int) -> Tensor:
    return F.one_hot(codes, codebook_size).flatten(1).float()


def _histogram(codes: Tensor, codebook_size: int) -> Tensor:
    """Square roots of how often each code occurs in an image, [N, V]: their cosine is that of Hellinger."""
    counts = torch.zeros(len(codes), codebook_size)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32)).sqrt()


def _layers(generator: Any, config: ProbeConfig) -> list[int]:
    """The layers to be probed; refuses what the model does not have."""
    depth = len(generator.blocks)
    layers = list(range(depth + 1)) if config.layers is None else sorted(set(config.layers))
    if wrong := [layer for layer in layers if not 0 <= layer <= depth]:
        raise UserError(f"layer {wrong[0]} is not there; the model has {depth} blocks, choose from 0 (before the first) to {depth}, or all")
    if not generator.has_null_label:
        raise UserError("the model was trained without a null label (class_dropout 0); a probe would have to tell it the class")
    if "class" in config.poolings and (generator.is_causal or not generator.prefix_length):
        kind = type(generator).__name__
        why = "stands before the image and sees nothing of it" if generator.prefix_length else "has no position of its own"
        raise UserError(f"pooling class: the condition of {kind} {why}; choose mean or attentive")
    return layers
