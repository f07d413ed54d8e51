"""The options of a training run: data, optimiser, loop. Model options are the model's own constructor arguments."""

from dataclasses import dataclass, field
from typing import Any, Literal

from genvision.data.transforms import MIN_AREA, Crop
from genvision.errors import UserError
from genvision.training.lora import LoRAConfig
from genvision.training.ternary import TernaryConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    spec: str
    """Where it comes from: digits, folder:PATH, parquet:GLOB, wds:GLOB, hub:NAME, ... (genvision.data.sources lists them), encoded:DIR
    for a generator, or a mixture of several, mix:..."""
    validation: str | None = None
    """The same of images or codes that are not trained on, for the loss every train.validate_every steps."""
    shuffle_window: int | None = None
    """Samples that are shuffled among each other. Unless told, a set of up to four million is shuffled as a whole, and one that is read
    over a network in windows, block by block."""
    image_size: int | None = None
    """Side of the training images in pixels; an encoded data set has its own."""
    crop: Crop = "center"
    """How images are brought to that size: ADM's centre crop, a random crop after a resize by 1.0 to 1.25, or (resized) a random part with
    sides between 3:4 and 4:3, resized."""
    min_area: float = MIN_AREA
    """For crop resized: the least part of an image's area in it. MAGE takes 0.2 for representations (strong); a larger one, 0.8 say, is
    milder (weak) and better where images are only to be drawn."""
    flip: bool = True
    """Mirror half of the images; an encoded data set has its flips inside."""
    views: Literal[1, 2] = 1
    """Of each image in a batch: 2 for the contrastive loss of mage, with a crop and flip of its own each, or two different views of an
    encoded data set."""
    num_workers: int = 2
    """Processes that decode images; 0 decodes in the training process."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an unreadable image does."""
    posterior: Literal["mean", "sample"] = "mean"
    """Latents of a variational tokenizer: its posterior's mean, or a new sample at every visit (DiT, SiT); an encoded data set for
    sampling is made with genvision encode --posterior."""

    features: str | None = None
    """REPA on images: the frozen network whose features the model is aligned with, dinov2_vitb14 for example; encoded data has its own."""
    features_weights: str | None = None
    """Local file of its weights."""
    features_download: bool = False
    """Fetch them if they are not there."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"data.num_workers must be at least 0, got {self.num_workers}")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"data.image_size must be at least 1, got {self.image_size}")
        if self.shuffle_window is not None and self.shuffle_window < 1:
            raise UserError(f"data.shuffle_window must be at least 1, got {self.shuffle_window}")
        if not 0 < self.min_area <= 1:
            raise UserError(f"data.min_area must be above 0 and at most 1, got {self.min_area}")
        if self.min_area != MIN_AREA and self.crop != "resized":
            raise UserError(f"data.min_area {self.min_area}: is for data.crop resized, not {self.crop}; set that, or leave min_area out")
        if self.views == 2 and (self.posterior == "sample" or self.features is not None):
            option = "data.posterior sample" if self.posterior == "sample" else f"data.features {self.features}"
            raise UserError(f"data.views 2: two views are for the contrastive loss of mage, {option} is for dit; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning rate over time, and clipping."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.05
    """Applied to tensors of two or more dimensions."""
    warmup_steps: int = 0
    """Steps of linear rise."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up: nothing, or half a cosine or a line down to final_lr_ratio."""
    decay_steps: int | None = None
    """Steps of that decay, the last ones of the run, with a constant rate before them (warm-up, stable, decay); null decays from the
    warm-up on."""
    final_lr_ratio: float = 0.0
    """Part of `lr` that the decay ends at."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""
    train_only: tuple[str, ...] = ()
    """Parts of the model that are trained: `attention` (its layers, whatever their names), `norms` (scales and biases of normalisation, not
    the layers that make modulations), beginnings of names (decoder, decoder.conv_out), or shell patterns of whole names
    (blocks.*.mlp.*); empty: all of it."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "warmup_steps", "final_lr_ratio"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"optim.{name} must be at least 0, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must lie in [0, 1), got {self.betas}")
        if self.decay_steps is not None and (self.decay_steps < 1 or self.schedule == "constant"):
            raise UserError(
                f"optim.decay_steps {self.decay_steps}: must be at least 1, for optim.schedule cosine or linear, which is {self.schedule}"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"optim.max_grad_norm must be above 0, got {self.max_grad_norm}; null turns it off")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Steps, batches, precision, and what is written when."""

    num_steps: int
    """Optimiser steps."""
    batch_size: int = 256
    """Samples an optimiser step, over all processes and accumulation."""
    accumulation: int = 1
    """Parts in which each process handles its share of the batch."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of forward and backward passes; weights stay float32."""
    gradient_checkpointing: Literal["none", "block", "sqrt"] = "none"
    """Recompute activations in the backward pass to save memory: of every block by itself, or of the square root of their number together,
    which keeps less."""
    compile: bool = False
    """Compile the model with torch.compile."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Averages of the weights that are kept; the first is what the saved model holds. Empty: the plain weights.
    The decay is smaller in the first steps, see genvision.training.ema."""
    ema_warmup: bool = True
    """Begin the averages with smaller decays; false keeps the decay from the first step on, as DiT does."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 5000
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    preview_every: int = 5000
    """Steps between preview pictures; 0 makes none."""
    max_skipped_steps: int = 100
    """Steps with a loss or gradient that is not finite, or has exploded (these change nothing) after which the run stops."""
    explode_factor: float | None = None
    """A loss above so many times its running mean counts as bad as one that is not finite; null lets every finite loss pass."""
    rewind_after: int = 0
    """After so many such steps in a row the run goes back to the last checkpoint before them, and on with later data; 0: never."""
    stall_seconds: float = 1800.0
    """A step that stands still for so long ends its process with status 75, with a line that names rank and phase; 0 waits for ever."""
    validate_every: int = 0
    """Steps between losses on data.validation, with the averaged weights; 0 measures none."""
    validate_num: int = 10000
    """Samples of it, spread evenly over it; of all processes together."""
    tracker: str | None = None
    """Any tracker Accelerate knows (tensorboard, wandb, trackio); metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints", "validate_num"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("preview_every", "max_skipped_steps", "rewind_after", "stall_seconds", "validate_every"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must be at least 0, got {getattr(self, name)}")
        if self.explode_factor is not None and not self.explode_factor > 1:
            raise UserError(f"train.explode_factor must be above 1, got {self.explode_factor}; null turns it off")
        for decay in self.ema_decays:
            if not 0 < decay < 1:
                raise UserError(f"train.ema_decays must lie between 0 and 1, got {decay}")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores of samples that are drawn during training with the averaged weights."""

    every: int = 0
    """Steps between scores; 0 makes none."""
    num: int = 1000
    """Samples that are scored each time."""
    reference: str | None = None
    """Real images to compare with: folder:PATH, parquet:GLOB, digits, or a file of statistics; the training images unless told."""
    extractor: str = "inception"
    """Network of the FID's features; digits for digits."""
    weights: str | None = None
    """Local file of its weights, where it is inception."""
    batch_size: int = 64
    """Samples that a process draws at a time."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"scores.every must be at least 0, got {self.every}")
        if self.num < 2:
            raise UserError(f"scores.num must be at least 2, got {self.num}")
        if self.batch_size < 1:
            raise UserError(f"scores.batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run."""

    stage: Literal["tokenizer", "generator"]
    """What is trained."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, previews and the finished model."""
    seed: int = 0
    """Of initial weights, data order and dropout."""
    model: dict[str, Any]
    """`name` of the model and its constructor arguments."""
    data: DataConfig
    """What is trained on."""
    optim: OptimConfig
    """Optimiser."""
    train: LoopConfig
    """Loop."""
    tokenizer: str | None = None
    """Generator stage: folder of the tokenizer that makes its codes."""
    init_from: str | None = None
    """Folder of a trained or imported model, or of a run, whose weights the run starts with; classes and image size may differ, see
    genvision.training.warm_start."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Generator stage: adapters that are trained in place of the weights."""
    ternary: TernaryConfig = field(default_factory=TernaryConfig)
    """Generator stage: weights of -1, 0 and 1 times a scale, in the linear layers of all blocks."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Options of the stage's objective."""
    scores: ScoresConfig = ScoresConfig()
    """Generator stage: scores of samples during training."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Generator stage: default protocol of the sampler, used for previews and saved with the model."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie in 0 .. 2^63 - 1, got {self.seed}")
        if self.stage == "tokenizer" and self.data.views != 1:
            raise UserError(f"data.views {self.data.views}: is for the contrastive loss of a generator; leave it at 1 for a tokenizer")
        if self.ternary.is_on and (self.stage == "tokenizer" or self.lora.rank):
            why = "is for generators" if self.stage == "tokenizer" else f"trains weights whole, lora.rank {self.lora.rank} does not"
            raise UserError(f"ternary.measure {self.ternary.measure}: {why}; leave one of them out")
