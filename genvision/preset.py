"""What is known of one published checkpoint."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One official checkpoint."""

    component: Literal["tokenizer", "generator"]
    """Which part of a pipeline folder it becomes."""
    family: str
    """Of `genvision.convert.load_official`."""
    config: dict[str, Any]
    """Constructor arguments of the original implementation."""
    file: str
    """Name of the published file."""
    image_size: int
    """Side of its images in pixels."""
    million_parameters: float
    """Size."""
    source: str
    """Paper and table of the numbers."""
    tokenizer: tuple[str, ...] = ()
    """Of a generator: presets of the tokenizers whose codes it was trained on, several where only decoders differ; empty: none of ours."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Published sampling protocol."""
    published: dict[str, float] = field(default_factory=dict)
    """Reported scores under that protocol; FID against ADM's ImageNet 256 reference, rFID against the validation crops."""
    notes: str = ""
    """What must be known to repeat them."""
