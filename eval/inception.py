"""Inception of 2015-12-05, the network of every published FID, as torch-fidelity, ADM and EDM2 read it, in a fast forward of our own.

`inception` resizes to 299x299 bilinearly as TensorFlow 1 did (no half-pixel centres, no antialiasing); `inception-clean` resizes as
clean-fid's mode `clean` does (arXiv:2104.11222). The network is that of torch-fidelity's FeatureExtractorInceptionV3, whose file of
weights it reads: features after the last pooling, logits without bias, and ADM's features for sFID.

What makes it twice as fast as the original on one CPU thread (2.1 times at batches of 64), at features that differ by 1e-5 of their
deviation: batch norms are folded into the convolutions, channels come last in memory, all 1x1 convolutions of one input run as one,
average pooling comes after its 1x1 convolution (both are linear and leave constants alone, so they commute) and works on fewer channels,
ReLU comes after max pooling and concatenation, and a CPU sees few images at a time.

Shapes: B images, H x W pixels, C channels, h x w places.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.eval.features import Extractor, ExtractorOptions, Features, tensors_hash
from genvision.weights import PublishedWeights

INCEPTION_WEIGHTS = PublishedWeights(
    network="Inception",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    option="--inception-weights",
)
SIDE = 299
SPATIAL_CHANNELS = 7
"""ADM keeps so many channels of the 1x1 branch of Mixed_6d, 17 x 17 places of each."""
BATCH_NORM = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var")
BATCH_NORM_EPS = 1e-3
CPU_BATCH = 8
"""Images that pass through the network together on a CPU: more do not fit its caches and give nothing."""


class InceptionExtractor(Extractor):
    """Inception of 2015-12-05: 2048 features after pooling, 1008 logits without bias, 2023 spatial features."""

    name = "inception"
    feature_dim = 2048
    num_logits = 1008
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS
    resize = "TensorFlow 1 bilinear to 299x299, no antialiasing"
    network: "Inception"

    def __init__(self, options: ExtractorOptions | None = None) -> None:
        options = options or ExtractorOptions()
        path = INCEPTION_WEIGHTS.find(options.inception_weights, options.download)
        tensors = INCEPTION_WEIGHTS.check(INCEPTION_WEIGHTS.read(path), inception_shapes(), path)
        super().__init__(Inception(tensors).to(memory_format=torch.channels_last), options, tensors_hash(tensors))

    def forward(self, pixels: Tensor, *, want_logits: bool, want_spatial: bool) -> Features:
        batches = pixels.split(CPU_BATCH) if pixels.device.type == "cpu" else (pixels,)
        pooled, spatial = (torch.cat(parts) for parts in zip(*(self.network(self.resized(batch)) for batch in batches), strict=True))
        return Features(pooled, self.network.logits(pooled) if want_logits else None, spatial if want_spatial else None)

    def resized(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in [0, 255]."""
        return resize_like_tensorflow1(pixels, SIDE)


class CleanInceptionExtractor(InceptionExtractor):
    """The same network on images that were resized as clean-fid's mode `clean` does: Pillow's bicubic in floats, clipped, never rounded."""

    name = "inception-clean"
    resize = "bicubic with antialiasing to 299x299, clipped to [0, 255], not rounded (clean-fid)"

    def resized(self, pixels: Tensor) -> Tensor:
        # torch's filter is Pillow's: in float64 they differ by 2e-5 grey levels, in float32 by 4e-3
        return F.interpolate(pixels.double(), size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255).float()


class Inception(nn.Module):
    """The network: float32 [B, 3, 299, 299] in [0, 255] -> features [B, 2048], spatial features [B, 2023].

    Args:
        tensors: float32, under the names and in the shapes of `inception_shapes`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = nn.ModuleList(Convolution(tensors, [layer.name], layer.stride, layer.padding) for layer in STEM)
        self.blocks = nn.ModuleDict({name: Block(tensors, name, layout) for name, layout in LAYOUTS.items()})
        self.register_buffer("head", tensors["fc.weight"].T.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        first, second, third, fourth, fifth = self.stem
        x = third(second(first(x).relu_()).relu_())  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, 2).relu_()
        x = fifth(fourth(x).relu_())  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, 2).relu_()  # [B, 192, 35, 35]
        for name, block in self.blocks.items():
            x = block(x)
            if name == "Mixed_6d":
                # the 1x1 branch comes first in the block; the stored statistics want places before channels
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)), spatial

    def logits(self, pooled: Tensor) -> Tensor:
        """Features [B, 2048] -> logits [B, 1008], without the bias as in ADM and torch-fidelity."""
        return pooled @ cast(Tensor, self.head)


class Layer(NamedTuple):
    """A convolution of the original, with batch norm and ReLU behind it."""

    name: str
    outputs: int
    height: int = 1
    """Of the kernel; inside a block the kernel's own width unless told."""
    width: int = 0
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    beside: bool = False
    """It runs on the input of the layer before it, and both outputs are kept."""

    @property
    def kernel(self) -> tuple[int, int]:
        return self.height, self.width or self.height


class Layout(NamedTuple):
    """A block: branches side by side, each a chain of layers, and pooled input behind them."""

    pooling: Literal["average", "max", "reduce"]
    """`average` and `max` are 3x3 and a 1x1 layer called branch_pool follows; `reduce` is a max that halves the sides, as the last layer
    of every branch then does, and nothing follows."""
    num_pooled: int
    """Output channels of branch_pool; 0: none."""
    branches: tuple[tuple[Layer, ...], ...]


class Block(nn.Module):
    """[B, C, h, w] -> the outputs of all branches one after the other, then the pooled input."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, layout: Layout) -> None:
        super().__init__()
        self.pooling = layout.pooling
        pointwise = [branch[0].name for branch in layout.branches if branch[0].kernel == (1, 1)]
        if layout.pooling == "average":
            pointwise.append("branch_pool")
        self.heads = Convolution(tensors, [f"{name}.{head}" for head in pointwise])
        self.pool = Convolution(tensors, [f"{name}.branch_pool"]) if layout.pooling == "max" else None
        self.has_head = [branch[0].kernel == (1, 1) for branch in layout.branches]
        self.tails = nn.ModuleList(
            Tail(tensors, name, branch[has_head:], reduces=layout.pooling == "reduce")
            for branch, has_head in zip(layout.branches, self.has_head, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = list(self.heads(x).split(self.heads.widths, dim=1))
        if self.pooling == "average":
            # TensorFlow leaves the border out of its averages
            pooled = F.avg_pool2d(heads.pop(), 3, stride=1, padding=1, count_include_pad=False)
        elif self.pool is not None:
            pooled = self.pool(F.max_pool2d(x, 3, stride=1, padding=1))
        else:
            pooled = F.max_pool2d(x, 3, stride=2)
        outputs: list[Tensor] = []
        for has_head, tail in zip(self.has_head, self.tails, strict=True):
            outputs += tail(heads.pop(0) if has_head else x, follows_head=has_head)
        return torch.cat([*outputs, pooled], dim=1).relu_()


class Tail(nn.Module):
    """What follows a branch's 1x1 layer; gives its outputs before the last ReLU, several if the last layers run beside each other."""

    def __init__(self, tensors: Mapping[str, Tensor], block: str, layers: tuple[Layer, ...], reduces: bool) -> None:
        super().__init__()
        convolutions = [
            Convolution(
                tensors,
                [f"{block}.{layer.name}"],
                stride=2 if reduces and layer is layers[-1] else 1,
                padding=(0, 0) if reduces and layer is layers[-1] else (layer.kernel[0] // 2, layer.kernel[1] // 2),
            )
            for layer in layers
        ]
        num_first = max(len(layers) - _num_last(layers), 0)
        self.first, self.last = nn.ModuleList(convolutions[:num_first]), nn.ModuleList(convolutions[num_first:])

    def forward(self, x: Tensor, follows_head: bool) -> list[Tensor]:
        if len(self.last) == 0:
            return [x]
        if follows_head:
            x = x.relu()
        for convolution in self.first:
            x = convolution(x).relu_()
        return [convolution(x) for convolution in self.last]


class Convolution(nn.Module):
    """Layers of one input as one convolution with the batch norms folded in, before their ReLU: [B, C, h, w] -> outputs in order."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str], stride: int = 1, padding: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        weights, biases = zip(*(_fold(tensors, name) for name in names), strict=True)
        self.register_buffer("weight", torch.cat(weights))
        self.register_buffer("bias", torch.cat(biases))
        self.stride, self.padding = stride, padding
        self.widths = [len(bias) for bias in biases]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, cast(Tensor, self.weight), cast(Tensor, self.bias), self.stride, self.padding)


def _num_last(layers: tuple[Layer, ...]) -> int:
    """Of how many layers at the end the outputs are kept."""
    return 1 + sum(layer.beside for layer in layers)


def _fold(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what convolution and batch norm did."""
    weight, bias, gain, mean, variance = (tensors[f"{name}.{part}"] for part in ("conv.weight", *BATCH_NORM))
    # Scale and shift in float32, as torch's batch norm rounds them: an error of a whole channel does not average out, so the original's
    # FID is met more closely than by folding in float64 (4e-7 instead of 9e-7 relatively in benchmarks/evaluate_speed.py).
    scale = gain * (1 / torch.sqrt(variance + BATCH_NORM_EPS))
    return weight * scale[:, None, None, None], bias - mean * scale


STEM = (
    Layer("Conv2d_1a_3x3", 32, 3, stride=2),
    Layer("Conv2d_2a_3x3", 32, 3),
    Layer("Conv2d_2b_3x3", 64, 3, padding=(1, 1)),
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, 3),
)


def _block_35(num_pooled: int) -> Layout:
    return Layout(
        "average",
        num_pooled,
        (
            (Layer("branch1x1", 64),),
            (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, 5)),
            (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)),
        ),
    )


def _block_17(narrow: int) -> Layout:
    return Layout(
        "average",
        192,
        (
            (Layer("branch1x1", 192),),
            (Layer("branch7x7_1", narrow), Layer("branch7x7_2", narrow, 1, 7), Layer("branch7x7_3", 192, 7, 1)),
            (
                Layer("branch7x7dbl_1", narrow),
                Layer("branch7x7dbl_2", narrow, 7, 1),
                Layer("branch7x7dbl_3", narrow, 1, 7),
                Layer("branch7x7dbl_4", narrow, 7, 1),
                Layer("branch7x7dbl_5", 192, 1, 7),
            ),
        ),
    )


def _block_8(pooling: Literal["average", "max"]) -> Layout:
    return Layout(
        pooling,
        192,
        (
            (Layer("branch1x1", 320),),
            (Layer("branch3x3_1", 384), Layer("branch3x3_2a", 384, 1, 3), Layer("branch3x3_2b", 384, 3, 1, beside=True)),
            (
                Layer("branch3x3dbl_1", 448),
                Layer("branch3x3dbl_2", 384, 3),
                Layer("branch3x3dbl_3a", 384, 1, 3),
                Layer("branch3x3dbl_3b", 384, 3, 1, beside=True),
            ),
        ),
    )


LAYOUTS = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": Layout(
        "reduce",
        0,
        (
            (Layer("branch3x3", 384, 3),),
            (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)),
        ),
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": Layout(
        "reduce",
        0,
        (
            (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, 3)),
            (
                Layer("branch7x7x3_1", 192),
                Layer("branch7x7x3_2", 192, 1, 7),
                Layer("branch7x7x3_3", 192, 7, 1),
                Layer("branch7x7x3_4", 192, 3),
            ),
        ),
    ),
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),  # a quirk of the graph of 2015
}


def inception_shapes() -> dict[str, torch.Size]:
    """Name to shape of the 472 tensors of the official file."""
    shapes: dict[str, torch.Size] = {}

    def add(name: str, inputs: int, layer: Layer) -> int:
        shapes[f"{name}.conv.weight"] = torch.Size((layer.outputs, inputs, *layer.kernel))
        shapes.update({f"{name}.{part}": torch.Size((layer.outputs,)) for part in BATCH_NORM})
        return layer.outputs

    channels = 3
    for layer in STEM:
        channels = add(layer.name, channels, layer)
    for name, layout in LAYOUTS.items():
        block_outputs = layout.num_pooled or channels
        if layout.num_pooled:
            add(f"{name}.branch_pool", channels, Layer("branch_pool", layout.num_pooled))
        for branch in layout.branches:
            inputs = outputs = channels
            for layer in branch:
                inputs = inputs if layer.beside else outputs
                outputs = add(f"{name}.{layer.name}", inputs, layer)
            block_outputs += sum(layer.outputs for layer in branch[-_num_last(branch) :])
        channels = block_outputs
    return {**shapes, "fc.weight": torch.Size((1008, channels)), "fc.bias": torch.Size((1008,))}


def resize_like_tensorflow1(pixels: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1's ResizeBilinear: source coordinate i * in / out in float32, no half-pixel centres, edges repeated.

    Args:
        pixels: uint8 [B, 3, H, W], fastest where channels come last in memory.

    Returns:
        float32 [B, 3, side, side], channels last in memory, within 1e-4 of the original.
    """
    num, _, height, width = pixels.shape
    x = pixels.permute(0, 2, 3, 1).reshape(num, height, width * 3)
    above, below, part = (table.to(x.device) for table in _neighbours(height, side))
    x = _mix(x.index_select(1, above).float(), x.index_select(1, below).float(), part[:, None])  # [B, side, W * 3]
    left, right, part = (table.to(x.device) for table in _neighbours(width, side))
    # gather takes half the time of index_select along the last axis, a third of that of products with a sparse matrix
    left, right = ((3 * column[:, None] + torch.arange(3, device=x.device)).flatten().expand(num, side, -1) for column in (left, right))
    x = _mix(x.gather(2, left), x.gather(2, right), part.repeat_interleave(3))  # [B, side, side * 3]
    return x.unflatten(2, (side, 3)).permute(0, 3, 1, 2)


@cache
def _neighbours(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output place the two sources and the part of the second: int64, int64 and float32 [side]."""
    coordinate = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    first = coordinate.long()
    return first, (first + 1).clamp_max(size - 1), coordinate - first.float()


def _mix(first: Tensor, second: Tensor, part: Tensor) -> Tensor:
    return second.sub_(first).mul_(part).add_(first)
