"""Scores of a model while it is trained: FID, and the accuracy of its classes where images are digits, of few samples drawn anew each time.

The samples have the same numbers every time, so that scores of different steps differ by the model alone. With few samples FID is far too
high, and not to be compared with that of 50,000: it shows whether a model gets better.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np

from genvision.data.mixture import is_encoded
from genvision.errors import UserError
from genvision.eval.cache import StatisticsCache
from genvision.eval.features import ExtractorOptions
from genvision.eval.hygiene import hash_images
from genvision.eval.job import EvaluationOptions
from genvision.eval.measurement import shares
from genvision.eval.moments import frechet_distance
from genvision.jobs.fid import SampledSet, plan_sampled
from genvision.jobs.sample import SampleRequest
from genvision.pipeline import ImagePipeline
from genvision.processes import from_main, process_state
from genvision.samplers.graphed_step import forget_steps
from genvision.training.config import ScoresConfig


class OnlineScores:
    """Draws samples of a model by all processes together, each its share, and scores them.

    Args:
        pipeline: tokenizer, sampler and classes; its generator is replaced by the model that is scored.
        data: the training set, for a reference that is not told.
        seed: of the samples.
        key: where the reference stands in the configuration, for messages.

    Raises:
        UserError: the reference or the extractor cannot be used; before the first step.
    """

    def __init__(self, options: ScoresConfig, pipeline: ImagePipeline, *, data: str, seed: int, key: str = "scores.reference") -> None:
        self.options = options
        reference = options.reference or data
        if is_encoded(reference):
            raise UserError(f"{key} is missing; the data holds codes, so name real images to score samples against")
        protocol = "digits" if options.extractor == "digits" else "adm"
        self.digits = [int(name) for name in pipeline.label_names if name in set("0123456789")]
        judged = protocol == "digits" and len(self.digits) == len(pipeline.label_names)
        self.metrics = ("fid", "class_accuracy") if judged else ("fid",)
        weights = Path(options.weights) if options.weights is not None else None
        evaluation = EvaluationOptions(
            protocol=protocol,
            metrics=self.metrics,
            extractor=options.extractor,
            networks=ExtractorOptions(inception_weights=weights, device=str(process_state().device)),
            cache=StatisticsCache(),
            show_progress=False,
        )
        request = SampleRequest(num=options.num, classes=tuple(range(len(pipeline.label_names))), seed=seed)
        self.sampled = SampledSet(pipeline=copy.copy(pipeline), request=request, model="the model in training")
        self.plan = plan_sampled(self.sampled, reference, evaluation)

    def __call__(self, model: Any) -> dict[str, float]:
        """`fid`, and `class_accuracy` where classes and extractor are those of digits; for all processes at once, the same in each.

        Args:
            model: a whole generator with the weights that are to be scored, on every process.
        """
        state, plan, num = process_state(), self.plan, self.options.num
        pipeline = self.sampled.pipeline
        pipeline.generator, was_training = model, model.training
        model.eval()
        pipeline.tokenizer.to(pipeline.device)
        measurement = plan.measurement()
        # no more than a process's share, so that all of them draw
        batch_size = min(self.options.batch_size, -(-num // state.num_processes))
        for chunk in shares(num, batch_size)[state.process_index :: state.num_processes]:
            images, _ = self.sampled.draw(chunk)
            measurement.add(np.arange(chunk.start, chunk.stop), plan.networks.rows(images, plan.rows), hash_images(images))
        forget_steps(model)  # the training needs the memory
        model.train(was_training)
        measured, scores = measurement.finish(num), {}
        if state.is_main_process:  # which alone has the reference
            assert plan.reference is not None
            scores["fid"] = float(frechet_distance(measured.moments("pool"), plan.reference.statistics["pool"]))
            if "class_accuracy" in self.metrics:
                wanted = np.array(self.digits)[self.sampled.request.labels_of(range(num)).numpy()]
                scores["class_accuracy"] = float(np.mean(measured.rows["judged"] == wanted))
        known = from_main(lambda: scores)
        assert isinstance(known, dict)
        return known
