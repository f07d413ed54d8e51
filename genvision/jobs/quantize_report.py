"""What `genvision quantize` found, as a result that can be written to JSON and as a table of at most 80 columns."""

import math
from dataclasses import dataclass, field
from typing import Any

from genvision.jobs.weight_changes import Change

TITLE, KIND, COLUMN = 40, 36, 11
GRADES = ((0.001, "negligible"), (0.01, "slight"), (0.1, "noticeable"), (math.inf, "large"))
"""Bounds of a mean KL in nats a token, and of a mean relative distance of predictions, and what we call less than that: rules of thumb."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the generator's weights take."""

    bytes_before: int
    bytes_after: int
    layers: int
    """Linear layers that are rounded."""
    rounded_share: float
    """Part of all weights that stands in them."""

    @property
    def ratio(self) -> float:
        return self.bytes_before / self.bytes_after


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a process that draws two images, beyond what it took before it loaded the model; bytes."""

    loaded_before: int
    """Resident with the float32 model."""
    loaded_after: int
    peak_before: int
    """Highest while drawing."""
    peak_after: int


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """Digits as the judge of `genvision evaluate` names them, the same images before and after."""

    right_before: float
    right_after: float
    lost: int
    """Images that show their class before only."""
    won: int
    """Images that show their class after only."""
    changed: int
    """Images that are named otherwise."""
    fid_before: float
    fid_after: float

    @property
    def is_chance(self) -> bool:
        """Whether lost and won images differ by no more than two standard deviations of equally likely ones."""
        return abs(self.lost - self.won) <= 2 * math.sqrt(self.lost + self.won)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What changes in predictions and images."""

    num_images: int
    seed: int
    sampler: dict[str, Any]
    changes: list[Change]
    """Of predictions. The first is the one that counts for tokens; of latents the mean of all counts."""
    kl: float | None
    """Mean KL in nats a token of the first change; None of latents."""
    error: float | None
    """Mean relative distance of predictions of latents; None of tokens."""
    drawn_otherwise: float | None
    """Part of the tokens of an autoregressive model that come out otherwise from the same uniform number after the same tokens."""
    codes_changed: float
    """Of whole images from the same numbers: part of the tokens that differ, or mean relative distance of latents."""
    images_equal: float
    """Part of the images that are the same in every byte."""
    psnr: float | None
    """Of all images together, dB; None where all are equal."""
    recognition: Recognition | None

    @property
    def grade(self) -> str:
        value = self.kl if self.kl is not None else self.error
        assert value is not None
        return next(name for bound, name in GRADES if value < bound or bound == math.inf)


@dataclass(frozen=True, kw_only=True)
class QuantizationResult:
    """Everything that a run of `genvision quantize` found."""

    model: str
    weights: str
    measure: str | None
    scales: str | None
    exclude: list[str]
    distill_steps: int
    distill_loss: tuple[float, float] | None
    """Mean of the first and of the last tenth of the steps."""
    storage: Storage
    check: Check | None
    memory: Memory | None
    out: str | None
    seconds: float
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


def format_result(result: QuantizationResult) -> str:
    """The table."""
    how = f"{result.weights} weights"
    if result.measure is not None:
        how += f" ({result.measure} of |W| by {result.scales}"
        how += f", {result.distill_steps} steps of calibration)" if result.distill_steps else ")"
    lines = [f"{how} in place of float32", ""]
    if result.check is not None:
        lines += [*_check_lines(result.check), ""]
    storage = result.storage
    lines.append(_row("weights", f"{_mb(storage.bytes_before)} -> {_mb(storage.bytes_after)} MB, {storage.ratio:.1f} times less"))
    lines.append(_row("  rounded", f"{storage.layers} layers, {storage.rounded_share:.1%} of all weights"))
    if (memory := result.memory) is not None:
        lines.append(_row("memory beside the program, loaded", f"{_mb(memory.loaded_before)} -> {_mb(memory.loaded_after)} MB"))
        lines.append(_row("  while two images are drawn, peak", f"{_mb(memory.peak_before)} -> {_mb(memory.peak_after)} MB"))
    if result.distill_loss is not None:
        first, last = result.distill_loss
        lines.append(_row("calibration loss, first and last tenth", f"{first:.4g} -> {last:.4g}"))
    lines += [f"note: {note}" for note in result.notes]
    if result.check is not None:
        lines += ["", verdict(result.weights, result.check)]
    return "\n".join(lines)


def verdict(weights: str, check: Check) -> str:
    """One line."""
    what = f"KL {check.kl:.2g} nats a token" if check.kl is not None else f"predictions {check.error:.2g} apart"
    line = f"{weights}: {check.grade} ({what})"
    if (seen := check.recognition) is not None:
        line += ", " + ("recognition within chance" if seen.is_chance else f"recognised {seen.right_before:.1%} -> {seen.right_after:.1%}")
    return line


def _check_lines(check: Check) -> list[str]:
    in_tokens = check.kl is not None
    title = "KL in nats a token" if in_tokens else "relative distance of predictions"
    columns = ["mean", "99 % below", "largest", *(["same best"] if in_tokens else [])]
    lines = [title.ljust(KIND) + "".join(name.rjust(COLUMN) for name in columns)]
    for change in check.changes:
        numbers = [f"{value:.2g}" if value < 1e4 else f"{value:.0f}" for value in (change.mean, change.high, change.largest)]
        if change.same_best is not None:
            numbers.append(f"{change.same_best:.1%}")
        lines.append(f"  {change.what}".ljust(KIND) + "".join(number.rjust(COLUMN) for number in numbers))
    lines.append("")
    if check.drawn_otherwise is not None:
        lines.append(_row("drawn otherwise after the same tokens", f"{check.drawn_otherwise:.2%}"))
    name = "tokens that differ in whole images" if in_tokens else "relative distance of drawn latents"
    lines.append(_row(name, f"{check.codes_changed:.2%}" if in_tokens else f"{check.codes_changed:.3g}"))
    psnr = "" if check.psnr is None else f", PSNR of all {check.psnr:.1f} dB"
    lines.append(_row("images equal in every byte", f"{check.images_equal:.1%}{psnr}"))
    if (seen := check.recognition) is not None:
        lines.append(_row("digits recognised as their class", f"{seen.right_before:.1%} -> {seen.right_after:.1%}"))
        lines.append(_row("  named otherwise", f"{seen.changed} of {check.num_images}, {seen.lost} lost and {seen.won} won"))
        lines.append(_row("  FID by digits features", f"{seen.fid_before:.2f} -> {seen.fid_after:.2f}"))
    lines.append(f"({check.num_images} images, seed {check.seed}, the model's own sampler options)")
    return lines


def _row(title: str, value: str) -> str:
    return f"{title:<{TITLE}}{value}"


def _mb(count: int) -> str:
    size = count / 1e6
    return f"{size:,.1f}" if size >= 10 else f"{size:.3g}"
