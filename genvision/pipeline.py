"""Tokenizer, generator and sampler as one object: labels in, images out. And the folder it is kept in.

The folder is laid out as diffusers lays out a pipeline: `model_index.json`, `generator/`, `tokenizer/`, `sampler/config.json`
and a `README.md`; every component also loads on its own with its class's `from_pretrained(folder, subfolder=...)`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from genvision import __version__
from genvision.card import write_card
from genvision.errors import UserError
from genvision.images import Rounding, to_uint8
from genvision.kernels.linear import Weights
from genvision.layers.gpu_weights import quantize_on_gpu
from genvision.layers.packed import prepare_linears
from genvision.layers.packed_storage import DESCRIPTION, TENSORS, packed_layers, save_packed
from genvision.models.base import GENERATORS
from genvision.samplers.base import SAMPLERS, Sampler
from genvision.samplers.randomness import ImageStreams
from genvision.tokenizers.base import content_hash, load_component, load_tokenizer
from genvision.training.state import write_atomically

INDEX = "model_index.json"
MANY_ROWS = 1024
"""Of the products of networks that read all positions at once: so many that their number does not matter."""
OutputType = Literal["pil", "np", "pt"]


@dataclass(frozen=True)
class ImageOutput:
    """`images`: PIL images, uint8 [B, H, W, 3] or float [B, 3, H, W], as asked. `codes`: tokens or latents."""

    images: Any
    codes: Tensor
    network_calls: Tensor
    """Evaluations of the network that each image cost, int64 [B]; a conditional and a null row count one each."""


class ImagePipeline:
    """Class-conditional generation.

    Args:
        generator: predicts codes.
        tokenizer: turns codes into images.
        sampler: draws codes; its options are the default protocol.
        label_names: a name for each class.
        guide: a weaker generator to guide with instead of the null class (autoguidance); it is not saved.
    """

    def __init__(self, generator: Any, tokenizer: Any, sampler: Sampler, label_names: Sequence[str], *, guide: Any = None) -> None:
        self.generator, self.tokenizer, self.sampler = generator.eval(), tokenizer.eval(), sampler
        self.guide = guide.eval() if guide is not None else None
        self.weights: Weights = "float32"
        self._hashes: dict[str, str] | None = None
        self.label_names = list(label_names)
        if len(self.label_names) != generator.num_classes:
            raise UserError(f"{len(self.label_names)} label names were given for a model of {generator.num_classes} classes")
        wanted, made = generator.config.get("codebook_size"), tokenizer.spec.codebook_size
        if wanted != made:
            kinds = [f"{number} codes" if number is not None else "continuous latents" for number in (wanted, made)]
            raise UserError(f"the generator predicts {kinds[0]}, the tokenizer has {kinds[1]}; use the tokenizer that it was trained with")
        places = tuple(tokenizer.spec.code_shape(self.image_size))
        if tuple(generator.code_shape) != places:
            raise UserError(
                f"the generator makes codes of shape {list(generator.code_shape)}, the tokenizer reads {list(places)}; "
                "use the tokenizer that it was trained with"
            )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, torch_dtype: torch.dtype | None = None) -> "ImagePipeline":
        """Load a pipeline folder.

        Args:
            torch_dtype: of the generator; the tokenizer stays float32.

        Raises:
            UserError: the folder is not one, or incomplete or damaged.
        """
        folder = Path(path)
        index = read_index(folder)
        for part in ("generator", "tokenizer", "sampler"):
            if not (folder / part).is_dir():
                raise UserError(f"{folder}: the {part} is missing; add it, for example with genvision import ... --out {folder}")
        generator = load_component(folder / "generator", GENERATORS, "generator")
        if torch_dtype is not None and torch_dtype != generator.dtype:
            generator = torch.nn.Module.to(generator, torch_dtype)
        sampler = load_component(folder / "sampler", SAMPLERS, "sampler")
        names = index.get("id2label") or {str(i): str(i) for i in range(generator.num_classes)}
        if not isinstance(names, dict) or names.keys() != {str(i) for i in range(generator.num_classes)}:
            raise UserError(f"{folder / INDEX}: id2label must name the classes 0 .. {generator.num_classes - 1}; write the model again")
        return cls(generator, load_tokenizer(folder / "tokenizer"), sampler, [names[str(i)] for i in range(len(names))])

    def save_pretrained(self, path: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write the pipeline folder; `provenance` goes into the model card."""
        if self._hashes is not None:
            raise UserError("a pipeline that is prepared for drawing cannot be saved; save it before, or load it again")
        folder = Path(path)
        save_parts(folder, {"generator": self.generator, "tokenizer": self.tokenizer, "sampler": self.sampler}, self.label_names)
        write_card(folder / "README.md", self.generator, self.tokenizer, self.sampler, self.label_names, provenance or {})

    def to(self, device: str | torch.device) -> "ImagePipeline":
        """Move the networks."""
        if self._hashes is not None and torch.device(device).type != self.device.type:
            raise UserError("a pipeline that is prepared for drawing cannot be moved; move it before, or load it again")
        for network in (self.generator, self.tokenizer, self.guide):
            if network is not None:
                torch.nn.Module.to(network, device)  # ModelMixin's own imports the hooks of diffusers first, and with them torch's compiler
        return self

    def prepare(self, weights: Weights = "float32", *, batch_size: int = 1) -> "ImagePipeline":
        """Lay out the weights of the networks that draw, in place, where they are; they can be neither saved, moved nor trained then.

        Nothing happens where there is nothing to gain: for float32 on a GPU, and for models that do not draw token by token.

        Args:
            weights: `float32` keeps the numbers; `float16` rounds weights to 11 bits, on a CPU; `int8` rounds weights and, on a CPU,
                activations to bytes (`genvision quantize --check` says what that changes).
            batch_size: about how many images will be drawn at a time.

        Raises:
            UserError: these weights are impossible with this model.
        """
        if self._hashes is not None:
            raise UserError("this pipeline is prepared already; load it again to prepare it otherwise")
        networks = [network for network in (self.generator, self.guide) if network is not None]
        on_gpu = self.device.type != "cpu"
        if weights == "float32" and (on_gpu or not self.generator.is_causal):
            return self
        if weights != "float32":
            self._check_weights(weights, networks)
        self._hashes = self.hashes()
        for network in networks:
            if on_gpu:
                assert weights == "int8"  # as _check_weights has seen to
                quantize_on_gpu(network, weights)
            else:
                prepare_linears(network, weights, rows=self._rows(batch_size), by_token=network.is_causal)
        self.weights = weights
        return self

    def _check_weights(self, weights: Weights, networks: Sequence[Any]) -> None:
        if self.sampler.config.get("nesting", "1") != "1":
            raise UserError(f"weights '{weights}' cannot be cut into smaller networks; leave out weights, or set nesting to 1")
        if any(packed_layers(network) for network in networks):
            raise UserError(f"weights '{weights}': these weights are ternary already; leave it out")
        if self.device.type != "cpu" and weights == "float16":
            raise UserError("weights 'float16' are for CPUs; on a GPU give --dtype bfloat16, or --weights int8")
        if self.device.type == "cpu" and any(next(network.parameters()).dtype != torch.float32 for network in networks):
            raise UserError(f"weights '{weights}' are made of float32 ones; leave out dtype, or leave out weights")

    def _rows(self, batch_size: int) -> int:
        """Of the products of a step."""
        if not self.generator.is_causal:
            return MANY_ROWS
        return batch_size * (1 + (self.sampler.network_calls(self.generator) > self.generator.num_tokens))

    def hashes(self) -> dict[str, str]:
        """`content_hash` of generator, tokenizer and guide, as they were before `prepare`."""
        if self._hashes is not None:
            return self._hashes
        networks = {"generator": self.generator, "tokenizer": self.tokenizer, "guide": self.guide}
        return {name: content_hash(network) for name, network in networks.items() if network is not None}

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.generator.parameters()).device
        return device

    @property
    def image_size(self) -> int:
        """Side of the images that are drawn; the tokenizer may have been trained on another one."""
        spec = self.tokenizer.spec
        size: int = self.generator.image_size(spec.downsample, spec.image_size)
        return size

    def label_ids(self, names: Sequence[str | int]) -> list[int]:
        """Class indices of names or indices; a text is a name if there is such a class, and else an index.

        Raises:
            UserError: there is no such class.
        """
        return [self._label_id(name) for name in names]

    def _label_id(self, name: str | int) -> int:
        if isinstance(name, str) and name in self.label_names:
            return self.label_names.index(name)
        try:
            label = int(name)
        except ValueError:
            raise UserError(f"class '{name}' is unknown; give a name or an index 0 .. {len(self.label_names) - 1}") from None
        if not 0 <= label < len(self.label_names):
            raise UserError(f"class {label} is out of range; the model has classes 0 .. {len(self.label_names) - 1}")
        return label

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        known: Tensor | None = None,
        output_type: OutputType = "pil",
        rounding: Rounding = "trunc127.5",
        **sampler_options: Any,
    ) -> ImageOutput:
        """Draw one image for each label.

        Args:
            class_labels: indices or names.
            guidance_scale: 1 is off; None takes the model's own default, as do all other options left out.
            num_inference_steps: for samplers that have steps; an autoregressive one draws every token once.
            generator: its initial seed is taken as `seed`, as a convenience for callers used to diffusers.
            seed: of the job.
            indices: number of each image within the job, 0, 1, ... unless told; an image depends on (seed, number) alone.
            known: tokens to keep, int64 [B, h, w] or [B, N], -1 where one is to be drawn. An autoregressive sampler takes the first ones in
                raster order (to complete images), a masked one any, at the same places in all images (inpainting).
            output_type: `pil`, `np` (uint8 [B, H, W, 3]) or `pt` (float [B, 3, H, W] in [-1, 1]).
            rounding: how floats become bytes.
            sampler_options: of the sampler: temperature, top_k, top_p, method, guidance_schedule, guidance_start, ...
        """
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type '{output_type}' is unknown; choose one of {', '.join(get_args(OutputType))}")
        if isinstance(class_labels, str | int):
            class_labels = [class_labels]
        labels = class_labels if isinstance(class_labels, Tensor) else torch.tensor(self.label_ids(class_labels))
        if generator is not None:
            seed = generator.initial_seed()
        options = {"guidance_scale": guidance_scale, **sampler_options}
        if num_inference_steps is not None:
            if "num_steps" not in self.sampler.config:
                raise UserError(f"num_inference_steps: {type(self.sampler).__name__} has no steps to choose, it draws every token once")
            options["num_steps"] = num_inference_steps
        codes, calls = self.draw_codes(labels, seed=seed, indices=indices, known=known, **options)
        images = self.decode(codes)
        if output_type == "pt":
            return ImageOutput(images.float().clamp(-1, 1), codes, calls.cpu())
        array = to_uint8(images, rounding)
        return ImageOutput(array if output_type == "np" else _pil_images(array), codes, calls.cpu())

    @torch.inference_mode()
    def draw_codes(
        self, labels: Tensor, *, seed: int = 0, indices: Sequence[int] | None = None, known: Tensor | None = None, **sampler_options: Any
    ) -> tuple[Tensor, Tensor]:
        """The codes of the images that a call draws, not decoded, and the network calls that each cost, int64 [B]; both on the device.

        Args:
            labels: int64 [B].
            seed, indices, known: as in a call.
        """
        noise = ImageStreams(seed, range(len(labels)) if indices is None else indices)
        sampler = self.sampler.with_options(**sampler_options)
        codes = sampler.sample(self.generator, labels.to(self.device), noise, known=known, guide=self.guide)
        assert sampler.calls is not None
        return codes, sampler.calls

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes of the generator -> images, float [B, 3, H, W], near [-1, 1]."""
        images: Tensor = self.tokenizer.decode(codes)
        return images


def _pil_images(array: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(image) for image in array]


def save_parts(folder: Path, parts: dict[str, Any], label_names: Sequence[str] | None = None) -> None:
    """Write components of a pipeline folder and enter them in its index; others that are there stay.

    Args:
        parts: `generator`, `tokenizer` or `sampler` to the object.
        label_names: a name for each class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": "ImagePipeline", "_genvision_version": __version__}
    if (folder / INDEX).is_file():
        index = read_index(folder)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and packed_layers(part):
            for old in (folder / name).glob("diffusion_pytorch_model*"):
                old.unlink()
            save_packed(part, folder / name)
        else:
            for packed in (DESCRIPTION, TENSORS):
                (folder / name / packed).unlink(missing_ok=True)
            part.save_pretrained(folder / name)
        index[name] = [type(part).__module__, type(part).__name__]
    if label_names is not None:
        index["id2label"] = {str(i): name for i, name in enumerate(label_names)}
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Contents of model_index.json.

    Raises:
        UserError: there is no such folder or file, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a model folder written by genvision train, demo or import")
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no model here ({INDEX} is missing); give a folder written by genvision train, demo or import") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / INDEX}: damaged ({error}); write the model again") from error
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX}: holds no keys; write the model again")
    return index
