"""Results as an evaluation gives them, for tests of what is made of results."""

from dataclasses import replace
from typing import Any

from genvision.eval.result import EvaluationResult

FULL = EvaluationResult(
    kind="fid",
    protocol="adm",
    fid=3.9431,
    sfid=6.1402,
    inception_score=215.84,
    precision=0.8265,
    recall=0.5309,
    kid=0.000812,
    kid_std=0.000121,
    fid_interval=(3.9012, 3.9848),
    precision_interval=(0.8231, 0.8299),
    kid_interval=(0.000752, 0.000871),
    fid_bias=0.0754,
    fid_debiased=3.8677,
    fid_infinity=3.8621,
    fid_infinity_interval=(3.8203, 3.9039),
    fid_curve=[(5000, 4.6911), (10000, 4.252), (25000, 4.0201), (50000, 3.9431)],
    interval_method="95 %, jackknife",
    per_class=[
        {"label": 0, "name": "tench", "num": 25000, "precision": 0.81, "fid": 9.125, "class_accuracy": None},
        {"label": 1, "name": "goldfish", "num": 25000, "precision": 0.84, "fid": None, "class_accuracy": None},
    ],
    order_sensitive=["inception_score"],
    num_generated=50000,
    num_reference=10000,
    generated="runs/model",
    generated_hash="9f2c" * 16,
    num_duplicates=0,
    reference="imagenet256.npz",
    reference_hash="ab31" * 16,
    reference_origin="stored statistics",
    reference_cached=True,
    labels="balanced",
    order="permuted with seed 0",
    image_size=256,
    crop="none",
    extractor="inception",
    extractor_hash="6726825d" * 8,
    resize="TF1 bilinear to 299",
    feature_dim=2048,
    is_estimator="adm",
    is_splits=10,
    is_block_size=5000,
    kid_estimator="torch-fidelity",
    kid_subsets=100,
    kid_subset_size=1000,
    kid_seed=2020,
    pr_k=3,
    pr_mode="adm",
    model="runs/model",
    sampling={"seed": 0, "rounding": "trunc127.5", "sampler": {"name": "MaskedSampler", "guidance_scale": 1.5}, "network_calls": 24},
    num_processes=8,
    batch_size=64,
    device="cuda",
    seconds=1834.2,
    images_per_second=27.26,
    versions={"genvision": "0.2.0", "torch": "2.14.1"},
    notes=["Inception Score is in ADM's form"],
    warnings=["samples look sorted by class"],
)
"""Everything measured but FD-DINOv2, F score and class accuracy."""


def changed(**fields: Any) -> EvaluationResult:
    """FULL with other values."""
    return replace(FULL, **fields)
