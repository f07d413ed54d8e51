"""Which facts forbid that two scores stand in one table, and which call for care.

A score depends on more than the model. Each rule names a fact, the scores that it moves, and whether they can be compared where it differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from genvision.eval.report import SCORES, field_title, flatten, value_text

LOSSY = ("JPEG", "WEBP")
COUNTS, COUNT_TOLERANCE = ("num_generated", "num_reference", "num_images"), 0.01
_FRECHET = frozenset({"fid", "sfid", "fd_dinov2", "rfid"})
_NEIGHBOURS = frozenset({"precision", "recall", "f_score"})
_DERIVED = frozenset({"fid_infinity", "fid_debiased"})
_OF_FEATURES = frozenset({"fid", "sfid", "rfid", "inception_score", "kid"}) | _NEIGHBOURS | _DERIVED
_OF_REFERENCE = frozenset({"fid", "sfid", "fd_dinov2", "kid"}) | _NEIGHBOURS | _DERIVED
_ALL = frozenset(score.key for score in SCORES if score.better)


class Rule(NamedTuple):
    """A fact that moves scores."""

    key: str
    scores: frozenset[str]
    is_strict: bool
    """Scores with different facts are not comparable; otherwise they are, with care."""
    why: str


RULES = (
    Rule("schema", _ALL, True, "these are results of different kinds"),
    Rule("protocol", _ALL, True, "each protocol has a resize, extractor and estimators of its own"),
    Rule("image_size", _ALL, True, "scores are of images of one size"),
    Rule("extractor_hash", _OF_FEATURES, True, "features of other weights have another scale"),
    Rule("resize", _OF_FEATURES, True, "another resize gives other features for the same images"),
    Rule("dinov2_hash", frozenset({"fd_dinov2"}), True, "features of other weights have another scale"),
    Rule("judge_hash", frozenset({"class_accuracy"}), True, "another judge sees other classes"),
    Rule("lpips_hash", frozenset({"lpips"}), True, "distances of other weights have another scale"),
    Rule("reference_hash", _OF_REFERENCE, True, "they are distances to different references"),
    Rule("reference_origin", _OF_REFERENCE, True, "statistics of a whole training set and of some images differ"),
    Rule("num_reference", _NEIGHBOURS, True, "the balls around reference images shrink as their number grows"),
    Rule(
        "num_generated",
        frozenset({"fid", "sfid", "fd_dinov2", "inception_score"}) | _NEIGHBOURS,
        True,
        "the score itself changes with the number of images; FID has an extrapolation to infinitely many for this",
    ),
    Rule("is_estimator", frozenset({"inception_score"}), True, "the estimators differ"),
    Rule("is_splits", frozenset({"inception_score"}), True, "the score grows with the images in a split"),
    Rule("is_block_size", frozenset({"inception_score"}), True, "the score grows with the images in a block"),
    Rule("kid_estimator", frozenset({"kid"}), True, "the estimators differ"),
    Rule("pr_k", _NEIGHBOURS, True, "balls to another neighbour have another size"),
    Rule("pr_mode", _NEIGHBOURS, True, "float16 and float32 distances shift precision by half a point"),
    Rule("data_hash", _ALL, True, "different images were reconstructed"),
    Rule("data_fingerprint", _ALL, True, "different images were reconstructed"),
    Rule(
        "num_images",
        frozenset({"rfid", "codebook_usage", "codebook_perplexity", "codebook_entropy"}),
        True,
        "it grows or falls with their number",
    ),
    Rule(
        "labels", _FRECHET | _NEIGHBOURS | _DERIVED | {"inception_score"}, False, "balanced labels give slightly better and steadier scores"
    ),
    Rule("crop", _ALL, False, "crops of one size can still show other pixels"),
    Rule("generated_formats", _ALL, False, "lossy formats change pixels, and scores see it"),
    Rule("sampling.rounding", _ALL, False, "another rounding darkens every image by half a level"),
    Rule("rounding", _ALL, False, "another rounding darkens every image by half a level"),
    Rule("feature_dtype", _OF_FEATURES, False, "features in low precision are off systematically"),
)


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """A fact that differs and moves scores."""

    rule: Rule
    scores: tuple[str, ...]
    """Those that were measured in two results or more."""
    values: tuple[str, ...]
    """Of each result, as text."""

    @property
    def line(self) -> str:
        """`FID, sFID: num generated is 50,000 / 10,000 (why)`."""
        titles = ", ".join(score.title for score in SCORES if score.key in self.scores)
        return f"{titles}: {field_title(self.rule.key)} is {' / '.join(self.values)} ({self.rule.why})"


def find_obstacles(contents: Sequence[Mapping[str, Any]]) -> list[Obstacle]:
    """Facts in which results differ and that move a score which two of them have; strict ones first.

    Args:
        contents: what the result files hold.
    """
    obstacles = [obstacle for rule in RULES if (obstacle := _find(rule, contents))]
    return sorted(obstacles, key=lambda obstacle: not obstacle.rule.is_strict)


def _find(rule: Rule, contents: Sequence[Mapping[str, Any]]) -> Obstacle | None:
    """The rule's fact, if it differs among results that have one of its scores in common."""
    flat = [flatten(content, "") for content in contents]
    facts = [_fact(content, one, rule.key) for content, one in zip(contents, flat, strict=True)]
    shared = []
    for score in SCORES:
        if score.key not in rule.scores:
            continue
        having = [fact for content, fact in zip(contents, facts, strict=True) if content.get(score.key) is not None]
        if len(having) > 1 and any(_differ(rule.key, fact, having[0]) for fact in having):
            shared.append(score.key)
    if rule.key == "schema" and any(fact != facts[0] for fact in facts):  # they have no score in common, and should say so all the same
        shared = [score.key for score in SCORES if score.better and any(content.get(score.key) is not None for content in contents)]
    return Obstacle(rule=rule, scores=tuple(shared), values=tuple(value_text(rule.key, fact) for fact in facts)) if shared else None


def _fact(content: Mapping[str, Any], flat: Mapping[str, Any], key: str) -> Any:
    if key == "generated_formats":  # how many files there are is said elsewhere; whether a PNG or an array held them moves nothing
        formats = content.get(key) or {}
        lossy = sum(number for name, number in formats.items() if name.upper() in LOSSY)
        return f"{lossy / sum(formats.values()):.0%} {' or '.join(LOSSY)}" if lossy else "lossless"
    return content[key] if key in content else flat.get(key)


def _differ(key: str, fact: Any, first: Any) -> bool:
    """Whether two facts are not the same; a per cent more images moves scores by far less than their noise."""
    if key in COUNTS and isinstance(fact, int) and isinstance(first, int):
        return abs(fact - first) > COUNT_TOLERANCE * max(fact, first)
    return bool(fact != first)
