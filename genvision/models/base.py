"""What every generator answers to, and how one is found by name."""

from torch import nn

GENERATORS: dict[str, str] = {"LlamaGen": "genvision.models.llamagen"}
"""Class name, as `config.json` records it, to the module that defines it (imported only when needed)."""


class Generator:
    """Mixed into a ModelMixin. Codes and labels come in; what comes out belongs to the family's objective and sampler."""

    num_classes: int
    has_null_label: bool

    @property
    def null_label(self) -> int:
        """The label that means "no class"; valid only where `has_null_label`."""
        return self.num_classes

    @property
    def num_parameters_million(self) -> float:
        assert isinstance(self, nn.Module)
        return sum(p.numel() for p in self.parameters()) / 1e6
