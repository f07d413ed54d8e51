"""What every sampler answers to: a generator, conditions and per-image noise in, codes out."""

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.samplers.randomness import ImageStreams

SAMPLERS: dict[str, str] = {
    "AutoregressiveSampler": "genvision.samplers.autoregressive",
    "DiffusionSampler": "genvision.samplers.diffusion",
    "FlowSampler": "genvision.samplers.flow",
    "MaskedSampler": "genvision.samplers.masked",
}
"""Class name, as `config.json` records it, to the module that defines it (imported only when needed)."""

Self = TypeVar("Self", bound="Sampler")


class Sampler(ABC, ConfigMixin):
    """Options are constructor arguments, saved in `sampler/config.json` as the model's default protocol."""

    config_name = "config.json"
    calls: Tensor | None = None
    """Network evaluations that each image of the latest batch cost, int64 [B]."""

    @abstractmethod
    def sample(
        self,
        generator: Any,
        condition: Tensor,
        noise: ImageStreams,
        *,
        condition_mask: Tensor | None = None,
        known: Tensor | None = None,
        guide: Any = None,
    ) -> Tensor:
        """Draw codes for the conditions [B, ...]; row i uses the streams of image `noise.indices[i]` only.

        Codes are tokens [B, h, w] or [B, L], or latents [B, c, h, w] or [B, c, L]. `known` are tokens to keep, as `read_known` takes
        them. `guide` is a weaker model to guide with.
        """

    @abstractmethod
    def network_calls(self, generator: Any) -> int | None:
        """Evaluations of the network that one image costs; a conditional and a null row count one each. None: it differs by image."""

    def multiply_adds(self, generator: Any) -> int | None:
        """Multiply-adds that one image costs in the network, conditional and null rows together. None: they are not counted."""
        return None

    def read_known(self, generator: Any, known: Tensor, num_images: int) -> Tensor:
        """Known tokens as int64 [B, N], on their own device.

        Args:
            known: int64 [B, h, w] or [B, N]; -1 where a token is to be drawn.
            num_images: B.

        Raises:
            UserError: this sampler cannot take them, or they are no tokens of this generator.
        """
        shape, codebook_size = tuple(generator.code_shape), generator.config["codebook_size"]
        if known.dtype != torch.int64 or tuple(known.shape) not in ((num_images, *shape), (num_images, generator.num_tokens)):
            expected = f"int64 {[num_images, *shape]}, -1 where a token is to be drawn, is expected"
            raise UserError(f"known tokens are {str(known.dtype).removeprefix('torch.')} {list(known.shape)}; {expected}")
        if known.numel() and not -1 <= int(known.min()) <= int(known.max()) < codebook_size:
            limits = f"{int(known.min())} .. {int(known.max())}"
            raise UserError(f"known tokens lie in {limits}; the model has tokens 0 .. {codebook_size - 1}, and -1 is one to be drawn")
        tokens = known.flatten(1)
        if ((tokens >= 0) != (tokens[:1] >= 0)).any():
            raise UserError("known tokens must stand at the same places in all images of a batch; draw the others in another one")
        return tokens

    def check(self, generator: Any, guide: Any = None) -> None:
        """Raises UserError where these options are impossible with this generator, or with a guide."""

    def with_options(self: Self, **options: Any) -> Self:
        """The same sampler with some options changed; those given as None stay."""
        ours = {name: value for name, value in dict(self.config).items() if not name.startswith("_")}
        for name, value in options.items():
            if value is None:
                continue
            if name not in ours:
                raise UserError(f"{type(self).__name__} has no option '{name}'; it has {', '.join(sorted(ours))}")
            ours[name] = value
        return type(self)(**ours)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises UserError for a class index outside 0 .. num_classes - 1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(f"class {int(wrong[0])} is out of range; the model has classes 0 .. {num_classes - 1}")
