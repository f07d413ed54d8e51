"""The options of a tokenizer's loss: reconstruction, perceptual distance, adversary, and codes that are kept alive."""

from dataclasses import dataclass, field
from typing import Literal

from genvision.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A discriminator that is trained against the tokenizer (VQGAN, arXiv:2012.09841 section 3.1)."""

    discriminator: Literal["none", "patchgan", "stylegan"] = "none"
    """Which one; none trains without."""
    width: int = 64
    """Channels of PatchGAN's first layer (64 as published), or of StyleGAN's deepest layers (512)."""
    num_layers: int = 3
    """Halvings of PatchGAN; images of 32 pixels allow 3 and give a map of 2 x 2."""
    blur: Literal["1331", "121"] = "1331"
    """Of StyleGAN's blocks: ViTok's, or LlamaGen's."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """Of both sides."""
    weight: float = 0.5
    """Of the term that moves the tokenizer."""
    adaptive: bool = False
    """Multiply it by |gradient of reconstruction| / |gradient of the term| at the last layer, as VQGAN does."""
    start: int = 0
    """Step from which the term counts."""
    ramp: int = 0
    """Steps in which its weight rises from 0 then."""
    discriminator_start: int = 0
    """Step from which the discriminator is trained. Published recipes wait until `start`; begun earlier, it knows more when it counts."""
    lr: float | None = None
    """Learning rate of the discriminator; null takes the tokenizer's, as for betas."""
    betas: tuple[float, float] | None = None
    """Decay rates of its optimiser's moments."""
    r1_weight: float = 0.0
    """Of the squared gradient of its logits at real images (R1); 0 leaves it out."""
    lecam_weight: float = 0.0
    """Of LeCam's regulariser; 0 leaves it out."""
    feature_matching_weight: float = 0.0
    """Of the distance between its mean features of images and of reconstructions, for the tokenizer; 0 leaves it out."""

    def __post_init__(self) -> None:
        for name in ("width", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"loss.adversarial.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight", "start", "ramp", "discriminator_start", "r1_weight", "lecam_weight", "feature_matching_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"loss.adversarial.{name} must be at least 0, got {getattr(self, name)}")
        if self.discriminator != "none" and self.discriminator_start > self.start:
            raise UserError(
                f"loss.adversarial.discriminator_start {self.discriminator_start} is after start {self.start}: "
                "the tokenizer would follow an untrained discriminator; set it to at most start"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Terms of the tokenizer's loss; those of its bottleneck (codebook, commitment, KL) are weighted by the model's own options."""

    reconstruction: Literal["l2", "l1", "smooth_l1"] = "l2"
    """Mean squared error, mean absolute error, or quadratic below a difference of 0.05 (ViTok's code)."""
    reconstruction_weight: float = 1.0
    """Its weight."""
    perceptual: Literal["none", "lpips", "timm"] = "none"
    """Distance in the features of a frozen network: LPIPS on VGG16, or any model of timm."""
    perceptual_weight: float = 1.0
    """Its weight."""
    perceptual_model: str = "convnext_small"
    """Name of the timm model."""
    perceptual_image_size: int | None = None
    """Side that images are resized to for the timm model; null leaves them."""
    perceptual_weights: str | None = None
    """Local file of the timm model's weights, or of LPIPS's linear layers; null looks in the usual caches."""
    vgg_weights: str | None = None
    """Local file of torchvision's VGG16 for LPIPS."""
    perceptual_download: bool = False
    """Fetch weights that are not there."""
    lpips_dropout: float = 0.0
    """Dropout inside LPIPS; 0.5 is what VQGAN and LlamaGen were trained with by accident."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The discriminator and its terms."""
    revive_every: int = 0
    """After this many steps, codes not used since the last time move onto encoder outputs; 0 never does it."""
    revive_until: float = 0.8
    """Part of the run after which codes are left in peace."""

    def __post_init__(self) -> None:
        if isinstance(self.adversarial, dict):  # as a saved configuration has it
            object.__setattr__(self, "adversarial", AdversarialConfig(**self.adversarial))
        if self.revive_every < 0 or not 0 <= self.revive_until <= 1:
            raise UserError("loss.revive_every must be 0 or more, and loss.revive_until must lie in 0 .. 1")
        for name in ("reconstruction_weight", "perceptual_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"loss.{name} must be at least 0, got {getattr(self, name)}")
