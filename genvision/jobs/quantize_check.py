"""Two pipelines that differ in the weights of their generator, on the same random numbers: predictions, images, recognised digits."""

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from genvision.eval.cache import StatisticsCache
from genvision.eval.digits import SIDE, digits_judge
from genvision.eval.job import EvaluationOptions, score_arrays
from genvision.images import to_uint8
from genvision.jobs.quantize_report import Check, Recognition
from genvision.jobs.weight_changes import distance, latent_changes, masked_changes, next_token_changes
from genvision.models.masked import MaskedGenerator
from genvision.pipeline import ImagePipeline
from genvision.progress import Progress

DIGITS = [str(digit) for digit in range(10)]


def compare_pipelines(before: ImagePipeline, after: ImagePipeline, *, num: int, seed: int, batch_size: int) -> Check:
    """Draw `num` images with both, classes in turn, by the sampler of the model, and compare.

    Predictions are compared on what the first pipeline drew: of autoregressive models the first change is what counts, the distribution
    that is drawn from; of others the mean over parts masked or levels of noise.
    """
    labels = (torch.arange(num) % before.generator.num_classes).to(before.device)
    progress = Progress(2 * num, "drawing before and after")
    (codes, images), (codes_after, images_after) = (_drawn(pipeline, labels, seed, batch_size, progress) for pipeline in (before, after))
    progress.close()
    networks, drawn_otherwise = (before.generator, after.generator), None
    if before.generator.is_causal:
        changes, drawn_otherwise = next_token_changes(*networks, before.sampler, codes, labels, seed)
    elif isinstance(before.generator, MaskedGenerator):
        changes = masked_changes(*networks, codes, labels, seed)
    else:
        changes = latent_changes(*networks, before.sampler, codes, labels, seed, batch_size)
    in_tokens = before.tokenizer.spec.discrete
    counts = changes[:1] if before.generator.is_causal else changes
    main = sum(change.mean for change in counts) / len(counts)
    error = float(np.mean((images.astype(np.float32) - images_after) ** 2))
    return Check(
        num_images=num,
        seed=seed,
        sampler={name: value for name, value in dict(before.sampler.config).items() if not name.startswith("_")},
        changes=changes,
        kl=main if in_tokens else None,
        error=None if in_tokens else main,
        drawn_otherwise=drawn_otherwise,
        codes_changed=float((codes != codes_after).double().mean() if in_tokens else distance(codes, codes_after).mean()),
        images_equal=float(np.mean((images == images_after).all(axis=(1, 2, 3)))),
        psnr=10 * float(np.log10(255**2 / error)) if error else None,
        recognition=_recognition(images, images_after, labels.cpu().numpy()) if shows_digits(before) and can_recognise() else None,
    )


def shows_digits(pipeline: ImagePipeline) -> bool:
    """Whether the images are those of the small data set of digits, which the judge knows."""
    return pipeline.label_names == DIGITS and pipeline.image_size == SIDE


def can_recognise() -> bool:
    """Whether the judge can be trained here: scikit-learn carries the digits."""
    return find_spec("sklearn") is not None


def _drawn(pipeline: ImagePipeline, labels: Tensor, seed: int, batch_size: int, progress: Progress) -> tuple[Tensor, np.ndarray]:
    """Codes [num, ...] and images uint8 [num, H, W, 3]."""
    codes, images = [], []
    for rows in torch.arange(len(labels)).split(batch_size):
        codes.append(pipeline.draw_codes(labels[rows], seed=seed, indices=rows.tolist())[0])
        images.append(to_uint8(pipeline.decode(codes[-1])))
        progress.advance(len(rows))
    return torch.cat(codes), np.concatenate(images)


def _recognition(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Recognition:
    judge = digits_judge()
    named, named_after = judge(before), judge(after)
    right, right_after = named == labels, named_after == labels
    fids = [_fid(images, labels) for images in (before, after)]
    return Recognition(
        right_before=float(right.mean()),
        right_after=float(right_after.mean()),
        lost=int((right & ~right_after).sum()),
        won=int((right_after & ~right).sum()),
        changed=int((named != named_after).sum()),
        fid_before=fids[0],
        fid_after=fids[1],
    )


def _fid(images: np.ndarray, labels: np.ndarray) -> float:
    options = EvaluationOptions(protocol="digits", metrics=("fid",), show_progress=False, cache=StatisticsCache(None))
    score = score_arrays(images, labels, "digits", name="drawn images", options=options).fid
    assert score is not None
    return score
