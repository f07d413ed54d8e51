"""The generator stage of `genvision train`: which model, objective and sampler belong together, and what they are trained on."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from genvision.config import model_class
from genvision.data.datasets import ImageDataset
from genvision.data.mixture import is_encoded, open_encoded
from genvision.errors import UserError
from genvision.images import make_grid, save_png
from genvision.jobs.online_scores import OnlineScores
from genvision.jobs.train_data import data_hashes, held_out_batches, held_out_images, image_dataset
from genvision.jobs.train_start import start_weights
from genvision.layers.ternarize import plain_linears
from genvision.objectives.base import Objective
from genvision.pipeline import ImagePipeline
from genvision.samplers.base import Sampler
from genvision.samplers.graphed_step import forget_steps
from genvision.tokenizers.base import TokenizerSpec, content_hash, open_tokenizer
from genvision.training import rng
from genvision.training.config import ScoresConfig, TrainConfig
from genvision.training.generator_stage import GeneratorStage
from genvision.training.lora import merge_lora, save_adapter
from genvision.training.ternary import make_ternary
from genvision.training.ternary_stage import TernaryStage
from genvision.training.throughput import training_flops

PREVIEW_COLUMNS, PREVIEW_ROWS = 8, 10
UNCONDITIONAL = "image"
"""Name of the one class of a model that knows none."""


class GeneratorJob:
    """Codes and labels in, a pipeline folder out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, data = config, config.data
        if config.tokenizer is None:
            raise UserError("tokenizer is missing; give the folder of the tokenizer, for example --tokenizer runs/vq/model")
        self.dataset: Any
        if is_encoded(data.spec):
            self.dataset = _encoded_dataset(config, data.spec)
            size = self.dataset.image_size
            self.tokenizer = open_tokenizer(config.tokenizer, size)
            self.tokenizer_hash = content_hash(self.tokenizer)
            self.dataset.check_tokenizer(self.tokenizer_hash)
            code_shape = tuple(self.dataset.code_shape)
            self.num_workers = data.num_workers if self.dataset.has_posterior else 0  # memory-mapped codes need no decoding
        else:
            self.tokenizer = open_tokenizer(config.tokenizer, data.image_size)
            self.tokenizer_hash = content_hash(self.tokenizer)
            size = data.image_size or self.tokenizer.spec.image_size
            self.tokenizer.check_image_size(size)
            self.dataset = image_dataset(config, size)
            code_shape = self.tokenizer.spec.code_shape(size)
            self.num_workers = data.num_workers
        _check_posterior(config, self.tokenizer.spec, self.dataset)
        names = list(self.dataset.label_names)
        num_classes = config.model.get("num_classes") or len(names)
        highest = self.dataset.highest_label
        if highest >= num_classes:
            raise UserError(f"{data.spec}: has label {highest}, but model.num_classes is {num_classes}; it must be at least {highest + 1}")
        self.label_names = (names + [str(i) for i in range(len(names), num_classes)])[:num_classes]
        build = BUILDERS[config.model["name"]]
        self.model, objective, self.sampler = build(config, self.tokenizer.spec, code_shape, num_classes)
        if self.model.is_unconditional:
            self.label_names = [UNCONDITIONAL]
        start_weights(config, self.model, label_names=self.label_names, tokenizer=self.tokenizer)
        self.has_adapters, self.is_ternary = bool(config.lora.rank), config.ternary.is_on
        stage: Callable[..., GeneratorStage] = GeneratorStage
        if self.is_ternary:
            make_ternary(self.model, config.ternary, config.loss)
            stage = partial(TernaryStage, ternary=config.ternary)
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
        self.stage = stage(
            self.model,
            objective,
            self.tokenizer,
            features=_features(config, self.model, self.dataset),
            sample_posterior=data.posterior == "sample",
            seed=config.seed,
            fid=self._guidance_scores(config, objective),
        )
        self.scores = None
        if config.scores.every:
            self.scores = OnlineScores(config.scores, self.pipeline(self.model), data=data.spec, seed=config.seed)
        self.held_out = held_out_batches(config, self._held_out_dataset(config, size), self.num_workers)

    def hashes(self) -> dict[str, str]:
        return data_hashes(self.config, self.dataset) | {"tokenizer": self.tokenizer_hash}

    def preview(self, folder: Path, step: int, model: Any) -> None:
        """Some images of some classes, a class a row; the same numbers at every step."""
        classes = np.linspace(0, len(self.label_names) - 1, min(PREVIEW_ROWS, len(self.label_names))).astype(int)
        pipeline = self.pipeline(model)
        pipeline.tokenizer.to(model.device)
        images = pipeline(np.repeat(classes, PREVIEW_COLUMNS).tolist(), output_type="np").images
        forget_steps(model)  # the training needs the memory
        names = [self.label_names[i] for i in classes]
        save_png(make_grid(images, PREVIEW_COLUMNS, row_names=names), folder / f"step_{step:08d}.png")

    def pipeline(self, model: Any) -> ImagePipeline:
        return ImagePipeline(model, self.tokenizer, self.sampler, self.label_names)

    def export(self, folder: Path, model: Any, provenance: dict[str, Any]) -> None:
        if self.has_adapters:
            try:
                save_adapter(model, folder / "adapter")
            except UserError as error:  # the merged model holds all of it
                print(f"warning: {error}", file=sys.stderr, flush=True)
            merge_lora(model)
        if self.is_ternary:
            plain_linears(model)
            provenance["ternary"] = self.config.ternary.summary
        self.pipeline(model).save_pretrained(folder, {"trained_on": provenance.pop("data"), **provenance})

    def flops_per_sample(self) -> float:
        """Of forward and backward pass of the generator."""
        with torch.no_grad():
            batch = self.stage.coded(self.dataset.get_batch(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)))
        self.model.eval()
        try:
            return training_flops(lambda: self.stage.objective(self.model, batch))
        finally:
            self.model.train()

    def _guidance_scores(self, config: TrainConfig, objective: Objective) -> Callable[[nn.Module], float] | None:
        """What Model-guidance follows with its scale, if it does."""
        if objective.guidance is None or not objective.guidance.config.auto_every:
            return None
        auto = objective.guidance.config
        options = ScoresConfig(num=auto.auto_num, reference=auto.auto_reference, extractor=auto.auto_extractor, weights=auto.auto_weights)
        pipeline, key = self.pipeline(self.model), "loss.guidance.auto_reference"
        scores = OnlineScores(options, pipeline, data=config.data.spec, seed=config.seed, key=key)
        return lambda model: scores(model)["fid"]

    def _held_out_dataset(self, config: TrainConfig, image_size: int) -> Any:
        """What the validation loss is measured on, if it is; of the kind that is trained on."""
        spec = config.data.validation
        if spec is None or not config.train.validate_every:
            return None
        if is_encoded(spec) != is_encoded(config.data.spec):
            raise UserError(f"data.validation {spec}: must hold codes if and only if data.spec {config.data.spec} does; encode it alike")
        dataset: Any = _encoded_dataset(config, spec) if is_encoded(spec) else held_out_images(config, image_size)
        if dataset.label_names != self.dataset.label_names:
            raise UserError(
                f"data.validation {spec}: its classes are not those of data.spec {config.data.spec}; give images of the same ones"
            )
        if is_encoded(spec):
            dataset.check_tokenizer(self.tokenizer_hash)
            _check_posterior(config, self.tokenizer.spec, dataset)
        return dataset


def _encoded_dataset(config: TrainConfig, spec: str) -> Any:
    aligned, data = bool(config.model.get("align_depth")), config.data
    return open_encoded(spec, seed=config.seed, with_features=aligned, views=data.views, shuffle_window=data.shuffle_window)


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
    if not isinstance(dataset, ImageDataset):
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
    if isinstance(dataset, ImageDataset):
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
