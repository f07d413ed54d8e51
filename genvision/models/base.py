"""What every generator answers to, and how one is found by name."""

from collections.abc import Sequence

from torch import Tensor, nn

from genvision.errors import UserError, check_rates
from genvision.layers.packed_ternary import PackedTernaryLinear

GENERATORS: dict[str, str] = {
    "LlamaGen": "genvision.models.llamagen",
    "RAR": "genvision.models.rar",
    "MaskGIT": "genvision.models.maskgit",
    "MAGE": "genvision.models.mage",
    "DiT": "genvision.models.dit",
}
"""Class name, as `config.json` records it, to the module that defines it (imported only when needed)."""


class Generator:
    """Mixed into a ModelMixin. Codes and labels come in; what comes out belongs to the family's objective and sampler."""

    num_classes: int
    code_shape: tuple[int, ...]
    """Shape of the codes of one image: (h, w), or (L,) where they are no grid; of latents (c, h, w) or (c, L)."""
    has_null_label: bool
    prefix_length: int = 0
    """Positions of the condition, which stand before those of the image in `hidden_states`."""
    is_unconditional: bool = False
    """Labels make no difference, so that there is nothing to choose and nothing to guide with."""
    is_causal: bool = False
    """A position sees only those before it; so what a prefix holds knows nothing of the image."""

    def hidden_states(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """What the network holds after some of its blocks while it reads whole images without a condition (the null one).

        No label goes in, so none can come out: what a classifier finds here was learnt from the image.

        Args:
            codes: as the tokenizer gives them, [B, ...].
            layers: 0 is what the first block reads, i what the i-th block gives.

        Returns:
            [B, P + N, C] for each layer: P positions of the condition, N of the image.

        Raises:
            UserError: the model was trained without a null condition.
        """
        raise NotImplementedError(f"{type(self).__name__} does not show its hidden states")

    def image_size(self, downsample: int, trained_size: int) -> int:
        """Side of the images that are drawn, in pixels, from the tokenizer's downsampling and the size that it was trained on."""
        return self.code_shape[-1] * downsample if len(self.code_shape) > 1 else trained_size

    @property
    def null_label(self) -> int:
        """The label that means "no class"; valid only where `has_null_label`."""
        return self.num_classes

    @property
    def num_parameters_million(self) -> float:
        assert isinstance(self, nn.Module)
        packed = sum(layer.in_features * layer.out_features for layer in self.modules() if isinstance(layer, PackedTernaryLinear))
        return (sum(p.numel() for p in self.parameters()) + packed) / 1e6


def check_class_dropout(rate: float) -> None:
    """Raises UserError where it is no probability, or leaves no label to learn from."""
    check_rates(class_dropout=rate)
    if rate == 1:
        raise UserError("class_dropout 1 drops every label, so none is learnt; give less, or train mage, which can do without classes")
