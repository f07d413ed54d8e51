"""The generator stage of `genvision train`: which model, objective and sampler belong together, and what they are trained on."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from genvision.config import model_class
from genvision.data.datasets import ImageDataset
from genvision.data.encoded import EncodedDataset
from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.images import make_grid, save_png
from genvision.objectives.base import Objective
from genvision.objectives.model_guidance import ModelGuidanceConfig
from genvision.pipeline import ImagePipeline
from genvision.processes import process_state
from genvision.samplers.base import Sampler
from genvision.tokenizers.base import TokenizerSpec, content_hash, open_tokenizer
from genvision.training import rng
from genvision.training.config import TrainConfig
from genvision.training.generator_stage import GeneratorStage

PREVIEW_COLUMNS, PREVIEW_ROWS = 8, 10
UNCONDITIONAL = "image"
"""Name of the one class of a model that knows none."""
SCORED_AT_ONCE = 250
"""Samples of one batch, where Model-guidance follows their FID."""


class GeneratorJob:
    """Codes and labels in, a pipeline folder out."""

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        if config.init_from is not None:
            raise UserError(
                f"init_from {config.init_from}: is for the tokenizer stage; a generator starts from new weights, or goes on by --resume"
            )
        if config.tokenizer is None:
            raise UserError("tokenizer is missing; give the folder of the tokenizer, for example --tokenizer runs/vq/model")
        self.dataset: Any
        if data.spec.startswith("encoded:"):
            folder = Path(data.spec.removeprefix("encoded:"))
            size = EncodedDataset(folder).index["image_size"]
            self.tokenizer = open_tokenizer(config.tokenizer, size)
            aligned = bool(config.model.get("align_depth"))
            self.dataset = EncodedDataset(
                folder, expected_tokenizer_hash=content_hash(self.tokenizer), seed=config.seed, with_features=aligned, views=data.views
            )
            code_shape = tuple(self.dataset.code_shape)
            self.num_workers = data.num_workers if self.dataset.has_posterior else 0  # memory-mapped codes need no decoding
        else:
            self.tokenizer = open_tokenizer(config.tokenizer, data.image_size)
            size = data.image_size or self.tokenizer.spec.image_size
            self.tokenizer.check_image_size(size)
            self.dataset = image_dataset(config, size)
            code_shape = self.tokenizer.spec.code_shape(size)
            self.num_workers = data.num_workers
        _check_posterior(config, self.tokenizer.spec, self.dataset)
        names = list(self.dataset.label_names)
        num_classes = config.model.get("num_classes") or len(names)
        highest = int(self.dataset.labels.max())
        if highest >= num_classes:
            raise UserError(f"{data.spec}: has label {highest}, but model.num_classes is {num_classes}; it must be at least {highest + 1}")
        self.label_names = (names + [str(i) for i in range(len(names), num_classes)])[:num_classes]
        build = BUILDERS[config.model["name"]]
        self.model, objective, self.sampler = build(config, self.tokenizer.spec, code_shape, num_classes)
        if self.model.is_unconditional:
            self.label_names = [UNCONDITIONAL]
        _check_views(config)
        scale = self.sampler.config["guidance_scale"]
        if scale != 1 and not self.model.has_null_label:
            raise UserError(
                f"sampler.guidance_scale {scale}: model.class_dropout is 0, so there is no null class to guide with; "
                "raise it, or set the scale to 1"
            )
        self.sampler.check(self.model)
        if objective.needs_average and not config.train.ema_decays:
            raise UserError("loss.guidance is made with the average of the weights, but train.ema_decays is empty; give it one, 0.9999 say")
        self.stage = GeneratorStage(
            self.model,
            objective,
            self.tokenizer,
            features=_features(config, self.model, self.dataset),
            sample_posterior=data.posterior == "sample",
            seed=config.seed,
            fid=self._scorer(config, objective),
        )

    def preview(self, folder: Path, step: int) -> None:
        """Some images of some classes, a class a row; the same numbers at every step."""
        classes = np.linspace(0, len(self.label_names) - 1, min(PREVIEW_ROWS, len(self.label_names))).astype(int)
        pipeline = self.pipeline()
        pipeline.tokenizer.to(self.model.device)
        images = pipeline(np.repeat(classes, PREVIEW_COLUMNS).tolist(), output_type="np").images
        names = [self.label_names[i] for i in classes]
        save_png(make_grid(images, PREVIEW_COLUMNS, row_names=names), folder / f"step_{step:08d}.png")

    def pipeline(self) -> ImagePipeline:
        return ImagePipeline(self.model, self.tokenizer, self.sampler, self.label_names)

    def export(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.pipeline().save_pretrained(folder, {"trained_on": provenance.pop("data"), **provenance})

    def _scorer(self, config: TrainConfig, objective: Objective) -> "_SampleFID | None":
        """What Model-guidance follows with its scale, if it does."""
        if objective.guidance is None or not objective.guidance.config.auto_every:
            return None
        return _SampleFID(config, objective.guidance.config, self.pipeline())


class _SampleFID:
    """FID of new samples of a model in training: the same sample numbers every time, each process draws its share.

    Raises:
        UserError: the reference or the extractor cannot be used; before the first step.
    """

    def __init__(self, config: TrainConfig, guidance: ModelGuidanceConfig, pipeline: ImagePipeline) -> None:
        from genvision.eval.features import ExtractorOptions
        from genvision.eval.job import EvaluationOptions
        from genvision.jobs.fid import SampledSet, plan_sampled
        from genvision.jobs.sample import SampleRequest

        reference = guidance.auto_reference or config.data.spec
        if reference.startswith("encoded:"):
            raise UserError("loss.guidance.auto_reference is missing; the data holds codes, so name real images to score samples against")
        weights = Path(guidance.auto_weights) if guidance.auto_weights is not None else None
        options = EvaluationOptions(
            protocol="digits" if guidance.auto_extractor == "digits" else "adm",
            metrics=("fid",),
            extractor=guidance.auto_extractor,
            networks=ExtractorOptions(inception_weights=weights, device=str(process_state().device)),
            show_progress=False,
        )
        request = SampleRequest(num=guidance.auto_num, classes=tuple(range(len(pipeline.label_names))), seed=config.seed)
        self.sampled = SampledSet(pipeline=pipeline, request=request, model="the model in training")
        self.plan = plan_sampled(self.sampled, reference, options)

    def __call__(self) -> float:
        """For all processes at once; the same number in each."""
        from genvision.eval.distributed import same_everywhere
        from genvision.eval.hygiene import hash_images
        from genvision.eval.measurement import shares
        from genvision.eval.moments import frechet_distance

        state, plan, num = process_state(), self.plan, self.sampled.request.num
        pipeline = self.sampled.pipeline
        pipeline.tokenizer.to(pipeline.device)
        measurement = plan.measurement()
        for chunk in shares(num, min(SCORED_AT_ONCE, -(-num // state.num_processes)))[state.process_index :: state.num_processes]:
            images, _ = self.sampled.draw(chunk)
            measurement.add(np.arange(chunk.start, chunk.stop), plan.networks.rows(images, plan.rows), hash_images(images))
        measured, score = measurement.finish(num), 0.0
        if state.is_main_process:  # which alone has the reference
            assert plan.reference is not None
            score = frechet_distance(measured.moments("pool"), plan.reference.statistics["pool"])
        known = same_everywhere(score)
        assert isinstance(known, float)
        return known


class _Parts(NamedTuple):
    model: Any
    objective: Objective
    sampler: Sampler


def _llamagen(config: TrainConfig, spec: TokenizerSpec, code_shape: tuple[int, ...], num_classes: int) -> _Parts:
    from genvision.models.llamagen import LlamaGen
    from genvision.objectives.next_token import NextToken
    from genvision.samplers.autoregressive import AutoregressiveSampler

    options = _model_options(config)
    if options.get("condition", "class") != "class":
        raise UserError(f"model.condition {options['condition']}: the data has labels only; set it to class")
    places = _token_places(config, spec, code_shape)
    with rng.seeded(config.seed):
        model = LlamaGen(num_classes=num_classes, **places, **options)
    return _Parts(model, NextToken(places["codebook_size"]), AutoregressiveSampler(**config.sampler))


def _rar(config: TrainConfig, spec: TokenizerSpec, code_shape: tuple[int, ...], num_classes: int) -> _Parts:
    from genvision.models.rar import RAR
    from genvision.objectives.permuted import PermutedLossConfig, PermutedTokens
    from genvision.samplers.autoregressive import AutoregressiveSampler

    places = _token_places(config, spec, code_shape)
    with rng.seeded(config.seed):
        model = RAR(num_classes=num_classes, **places, **_model_options(config))
    objective = PermutedTokens(PermutedLossConfig(**config.loss), model, seed=config.seed)
    return _Parts(model, objective, AutoregressiveSampler(**config.sampler))


def _masked(config: TrainConfig, spec: TokenizerSpec, code_shape: tuple[int, ...], num_classes: int) -> _Parts:
    from genvision.objectives.masked import MaskedLossConfig, MaskedTokens
    from genvision.samplers.masked import MaskedSampler

    options = _token_places(config, spec, code_shape) | _model_options(config)
    if options["class_dropout"] == 1:
        num_classes = 1  # labels are never shown
    with rng.seeded(config.seed):
        model = model_class(config.model["name"])(num_classes=num_classes, **options)
    objective = MaskedTokens(MaskedLossConfig(**config.loss), model, seed=config.seed, num_steps=config.train.num_steps)
    return _Parts(model, objective, MaskedSampler(**config.sampler))


def _token_places(config: TrainConfig, spec: TokenizerSpec, code_shape: tuple[int, ...]) -> dict[str, int]:
    """What the tokenizer says of a model of tokens: how many codes there are, and where they stand."""
    name = config.model["name"]
    if spec.codebook_size is None:
        raise UserError(f"{config.tokenizer}: makes continuous latents, but {name} needs a tokenizer with a codebook")
    if len(code_shape) > 2 or (len(code_shape) == 2 and code_shape[0] != code_shape[1]):
        raise UserError(f"{config.data.spec}: codes of shape {code_shape} are neither a square grid nor a sequence, which {name} needs")
    places = {"grid_size": code_shape[0]} if len(code_shape) == 2 else {"sequence_length": code_shape[0]}
    return {"codebook_size": spec.codebook_size, **places}


def _dit(config: TrainConfig, spec: TokenizerSpec, code_shape: tuple[int, ...], num_classes: int) -> _Parts:
    from genvision.models.dit import DiT

    if spec.discrete:
        raise UserError(f"{config.tokenizer}: makes discrete codes, but dit needs a tokenizer with continuous latents, or pixels")
    if len(code_shape) == 3 and code_shape[1] != code_shape[2]:
        raise UserError(f"{config.data.spec}: latents of shape {code_shape} are neither a square grid nor a sequence, which dit needs")
    places = {"input_size": code_shape[1]} if len(code_shape) == 3 else {"sequence_length": code_shape[1]}
    with rng.seeded(config.seed):
        model = DiT(in_channels=code_shape[0], num_classes=num_classes, **places, **_model_options(config))
    run = {"seed": config.seed, "batch_size": config.train.batch_size}
    if model.config.path == "ddpm":
        from genvision.objectives.diffusion import DiffusionLoss, DiffusionLossConfig
        from genvision.samplers.diffusion import DiffusionSampler

        return _Parts(model, DiffusionLoss(DiffusionLossConfig(**config.loss), model, **run), DiffusionSampler(**config.sampler))
    from genvision.objectives.flow import FlowLossConfig, FlowMatching
    from genvision.samplers.flow import FlowSampler

    return _Parts(model, FlowMatching(FlowLossConfig(**config.loss), model, **run), FlowSampler(**config.sampler))


BUILDERS = {"llamagen": _llamagen, "rar": _rar, "maskgit": _masked, "mage": _masked, "dit": _dit}
"""`model.name` to a function that makes model, objective and sampler."""


def _model_options(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in config.model.items() if name not in ("name", "num_classes")}


def _features(config: TrainConfig, model: Any, dataset: Any) -> nn.Module | None:
    """The frozen network that a model is aligned with (REPA), for training on images; None where features are stored, or not wanted.

    Raises:
        UserError: the model is aligned with nothing, or features and model do not fit.
    """
    data, align_depth = config.data, config.model.get("align_depth")
    if data.features is None and (data.features_weights is not None or data.features_download):
        raise UserError("data.features_weights and data.features_download are for the network of data.features; name it, or leave them out")
    if not align_depth:
        if data.features is not None:
            raise UserError(
                f"data.features {data.features}: the model is not aligned with features; set model.align_depth, or leave them out"
            )
        return None
    network: Any = None
    if isinstance(dataset, EncodedDataset):
        if dataset.features is None:
            raise UserError(
                f"model.align_depth {align_depth}: {data.spec} has no features of a frozen network; encode again with --features"
            )
        if data.features is not None:
            raise UserError(f"data.features {data.features}: {data.spec} has features of its own; leave data.features out")
        num_tokens, dim = dataset.features.shape
    elif data.features is None:
        raise UserError(f"model.align_depth {align_depth}: data.features is missing; name a frozen network, dinov2_vitb14 for example")
    else:
        from genvision.data.alignment import FrozenFeatures

        weights = Path(data.features_weights) if data.features_weights is not None else None
        network = FrozenFeatures(data.features, weights, data.features_download, tokens_per_side=model.grid[0])
        num_tokens, dim = network.num_tokens, network.dim
    rows, columns = model.grid
    if num_tokens != rows * columns:
        raise UserError(
            f"{data.spec}: features stand at {num_tokens} places, the model has {rows * columns} tokens; encode with --features-grid {rows}"
        )
    if tuple(model.config.align_dims) != (dim,):
        raise UserError(f"model.align_dims {list(model.config.align_dims)}: the features have {dim} channels; set it to [{dim}]")
    return network


def _check_posterior(config: TrainConfig, spec: TokenizerSpec, dataset: Any) -> None:
    """Latents that are sampled need a posterior; an encoded data set says itself whether it has one, and must not be contradicted."""
    wanted = config.data.posterior
    if spec.discrete and wanted == "sample":
        raise UserError(f"data.posterior sample: {config.tokenizer} makes discrete codes, which have no posterior; leave it out")
    if not isinstance(dataset, EncodedDataset):
        return
    stored = "sample" if dataset.has_posterior else "mean"
    if wanted != stored:
        mend = "encode again with --posterior" if stored == "mean" else "set data.posterior to sample"
        raise UserError(f"data.posterior {wanted}: {config.data.spec} holds what gives the posterior's {stored}; {mend}")


def _check_views(config: TrainConfig) -> None:
    """Two views are for the loss that compares them, which needs them."""
    views, weight = config.data.views, config.loss.get("contrastive_weight")
    if views == 2 and not weight:
        raise UserError("data.views 2: only mage's contrastive loss compares views; set loss.contrastive_weight above 0, or views to 1")
    if weight and views == 1:
        raise UserError(f"loss.contrastive_weight {weight}: compares two views of each image; set data.views to 2, or the weight to 0")


def image_dataset(config: TrainConfig, image_size: int) -> ImageDataset:
    """The images of a run, cropped and flipped as its configuration says."""
    data = config.data
    source = open_source(data.spec)
    return ImageDataset(
        source,
        image_size,
        crop=data.crop,
        flip=data.flip,
        min_area=data.min_area,
        seed=config.seed,
        views=data.views,
        on_bad_image=data.on_bad_image,
    )
