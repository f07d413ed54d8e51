"""Named protocols: everything that moves a score and that papers seldom say, fixed under one name.

Scores of two protocols must never stand in one table: another resize, another extractor or another estimator gives another number for
the same images. `docs/evaluation.md` says whose published numbers each protocol reproduces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genvision.errors import UserError

ScoreEstimator = Literal["adm", "torch-fidelity", "first-is"]
NeighbourMode = Literal["adm", "float32"]
METRICS = {
    "fid": "Frechet Inception Distance",
    "sfid": "FID on spatial features",
    "is": "Inception Score",
    "pr": "precision and recall",
    "kid": "Kernel Inception Distance",
    "fd_dinov2": "Frechet distance on DINOv2 features",
    "class_accuracy": "fraction of images in which the judge sees the class that was asked for",
}
COMPARING = frozenset({"fid", "sfid", "pr", "kid", "fd_dinov2"})
"""Metrics that need a reference."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to score a set of images."""

    name: str
    extractor: str
    """Name in genvision.eval.features.EXTRACTORS; gives the features of all metrics but fd_dinov2."""
    default_metrics: tuple[str, ...]
    """Measured unless told otherwise."""
    metrics: tuple[str, ...]
    """All that can be asked for."""
    score_estimator: ScoreEstimator = "torch-fidelity"
    """Of the Inception Score."""
    neighbour_mode: NeighbourMode = "float32"
    """Arithmetic of precision and recall."""
    kernel_variant: Literal["torch-fidelity", "clean"] = "torch-fidelity"
    """Of KID."""
    source: str
    """Whose numbers it reproduces."""

    def choose(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """The metrics asked for, or the default ones.

        Raises:
            UserError: one is unknown, or no part of this protocol.
        """
        if wanted is None:
            return self.default_metrics
        if not wanted:
            raise UserError(f"no metric was asked for; choose from {', '.join(self.metrics)}")
        for metric in wanted:
            if metric not in METRICS:
                raise UserError(f"metric '{metric}' is unknown; choose from {', '.join(self.metrics)}")
            if metric not in self.metrics:
                others = [name for name, protocol in PROTOCOLS.items() if metric in protocol.metrics]
                raise UserError(f"metric '{metric}' is no part of protocol {self.name}; use --protocol {' or '.join(others)}")
        return tuple(metric for metric in METRICS if metric in wanted)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="adm",
            extractor="inception",
            default_metrics=("fid", "sfid", "is", "pr"),
            metrics=("fid", "sfid", "is", "pr", "kid"),
            score_estimator="adm",
            neighbour_mode="adm",
            source="the TensorFlow evaluator of ADM (arXiv:2105.05233), used by DiT, SiT, LlamaGen, MAGE and most ImageNet papers",
        ),
        Protocol(
            name="torch-fidelity",
            extractor="inception",
            default_metrics=("fid", "is", "pr", "kid"),
            metrics=("fid", "is", "pr", "kid"),
            source="torch-fidelity 0.4, with Inception features for precision and recall, too",
        ),
        Protocol(
            name="clean",
            extractor="inception-clean",
            default_metrics=("fid", "kid"),
            metrics=("fid", "kid"),
            kernel_variant="clean",
            source="clean-fid's mode clean (arXiv:2104.11222)",
        ),
        Protocol(
            name="edm2",
            extractor="inception",
            default_metrics=("fid", "fd_dinov2"),
            metrics=("fid", "fd_dinov2"),
            source="EDM2 (arXiv:2312.02696)",
        ),
        Protocol(
            name="first-is",
            extractor="inception",
            default_metrics=("is",),
            metrics=("is",),
            score_estimator="first-is",
            source="the code of the first Inception Score (arXiv:1606.03498)",
        ),
        Protocol(
            name="digits",
            extractor="digits",
            default_metrics=("fid", "is", "pr", "class_accuracy"),
            metrics=("fid", "is", "pr", "kid", "class_accuracy"),
            source="no paper: an offline stand-in for 8x8 digits",
        ),
    )
}


def load_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol '{name}' is unknown; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
