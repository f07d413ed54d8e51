"""Scores during training are those of `genvision fid` on the same images."""

import pytest

from genvision.errors import UserError
from genvision.eval.job import EvaluationOptions
from genvision.jobs.fid import SampledSet, fid, plan_sampled
from genvision.jobs.online_scores import OnlineScores
from genvision.jobs.sample import SampleRequest
from genvision.pipeline import ImagePipeline
from genvision.training.config import ScoresConfig

OPTIONS = ScoresConfig(every=1, num=30, extractor="digits", batch_size=7)


@pytest.fixture
def pipeline(tiny_flow):
    return ImagePipeline.from_pretrained(tiny_flow)


def test_they_are_those_of_a_job_and_move_with_the_model_alone(pipeline, tmp_path):
    scores = OnlineScores(OPTIONS, pipeline, data="digits", seed=3)
    trained, other = pipeline.generator.train(), type(pipeline.generator).from_config(pipeline.generator.config)
    first, others = scores(trained), scores(other)
    assert scores(trained) == first and trained.training
    assert others != first and pipeline.generator is trained
    request = SampleRequest(num=30, classes=tuple(range(10)), seed=3)
    sampled = SampledSet(pipeline=pipeline, request=request, model="model")
    options = EvaluationOptions(protocol="digits", metrics=("fid", "class_accuracy"), show_progress=False)
    trained.eval()
    result = fid(sampled, plan_sampled(sampled, "digits", options), tmp_path / "fid", page=False)
    assert first == pytest.approx({"fid": result.fid, "class_accuracy": result.class_accuracy}, rel=1e-4)


def test_codes_are_no_reference(pipeline):
    with pytest.raises(UserError, match=r"^loss\.guidance\.auto_reference is missing; the data holds codes"):
        OnlineScores(OPTIONS, pipeline, data="encoded:codes", seed=0, key="loss.guidance.auto_reference")


@pytest.mark.parametrize("options", [{"every": -1}, {"num": 1}, {"batch_size": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=f"^scores.{next(iter(options))} must be at least"):
        ScoresConfig(**options)
