"""A generator's lower blocks as the trunk of an image classifier (MAGE, arXiv:2211.09117, section 4.3).

The frozen tokenizer makes codes, the generator reads them without a label, and the mean over the image's positions of what a block gives
goes through a norm and a linear layer.

Shapes: B images, P positions of the condition, N of the image, C channels of the layer, K classes.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genvision.errors import UserError

HEAD_STD = 2e-5
NORM_EPS = 1e-6
BLOCK_NAME = re.compile(r"generator\.blocks\.(\d+)\.")


class TrunkClassifier(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits float [B, K].

    Args:
        generator: a `genvision.models.base.Generator` with `blocks` and a null label.
        tokenizer: makes its codes; frozen.
        layer: the block whose outputs are pooled, 1 to the number of blocks; 0 is what the first block reads.

    Raises:
        UserError: the layer is not there, or the model has no null label.
    """

    def __init__(self, generator: Any, tokenizer: Any, *, layer: int, num_classes: int) -> None:
        super().__init__()
        depth = len(generator.blocks)
        if not 0 <= layer <= depth:
            raise UserError(f"layer {layer} is not there; the model has {depth} blocks, choose from 0 (before the first) to {depth}")
        if not generator.has_null_label:
            raise UserError("the model was trained without a null label (class_dropout 0); a classifier would have to tell it the class")
        self.generator, self.layer = generator, layer
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        device = next(generator.parameters()).device
        self.norm = nn.LayerNorm(self._width(device), eps=NORM_EPS).to(device)
        self.head = nn.Linear(self.norm.normalized_shape[0], num_classes).to(device)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.trained = self._reached(device)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            codes = self.tokenizer.encode(images)
        return self.classify(codes)

    def classify(self, codes: Tensor) -> Tensor:
        """Codes as the tokenizer gives them, [B, ...] -> logits float [B, K]."""
        states = self.generator.hidden_states(codes, [self.layer])[0]  # [B, P + N, C]
        logits: Tensor = self.head(self.norm(states[:, self.generator.prefix_length :].mean(dim=1)))
        return logits

    def train(self, mode: bool = True) -> "TrunkClassifier":
        """Training mode never reaches the tokenizer."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def depth_of(self, name: str) -> int:
        """How deep a trained parameter lies: 0 before the blocks, i + 1 in block i, one more than the last in norm and head."""
        if not name.startswith("generator."):
            return self.layer + 1
        block = BLOCK_NAME.match(name)
        return int(block[1]) + 1 if block else 0

    def trained_tensors(self) -> dict[str, Tensor]:
        """The parameters that training moves, by name."""
        parameters = dict(self.named_parameters())
        return {name: parameters[name].detach() for name in self.trained}

    def load_trained(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take over what `trained_tensors` gave.

        Args:
            source: what to call it in a message.

        Raises:
            UserError: names or shapes are others.
        """
        mine = self.trained_tensors()
        wrong = sorted(set(mine) ^ set(tensors)) or [name for name in mine if mine[name].shape != tensors[name].shape]
        if wrong:
            raise UserError(f"{source}: '{wrong[0]}' does not fit the classifier; fine-tune again with the model that is given")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def _width(self, device: torch.device) -> int:
        with torch.no_grad():
            return int(self.generator.hidden_states(self._any_codes(device), [self.layer])[0].shape[-1])

    def _reached(self, device: torch.device) -> list[str]:
        """Names of the parameters on which the logits depend; the others (heads, decoders, later blocks) stay as they are."""
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        parameters = dict(self.named_parameters())
        with torch.enable_grad():
            outcome = self.classify(self._any_codes(device)).sum()
            gradients = torch.autograd.grad(outcome, [parameters[name] for name in names], allow_unused=True)
        return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]

    def _any_codes(self, device: torch.device) -> Tensor:
        dtype = torch.int64 if self.tokenizer.spec.discrete else torch.float32
        return torch.zeros(1, *self.generator.code_shape, dtype=dtype, device=device)
