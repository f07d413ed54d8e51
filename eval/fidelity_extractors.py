"""torch-fidelity's feature extractors under our contract: `fidelity:NAME` for `vgg16`, `clip-...`, `dinov2-vit-...` and any that a user
registered through torch_fidelity.register_feature_extractor.

What an extractor calls its default layer for FID gives the features, its default layer for the Inception Score the logits. Files of
weights are read by torch-fidelity itself from torch hub's folder, and DINOv2's even come with code: what the network sends is trusted
only with `download`. torch-fidelity resizes every image like TensorFlow 1, so `fidelity:dinov2-vit-l-14` is not FD-DINOv2 as published.

Shapes: B images, D features, K logits.
"""

import hashlib
import io
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.eval.features import FIDELITY_PREFIX, Extractor, ExtractorOptions, Features, tensors_hash

INCEPTION = "inception-v3-compat"


class FidelityExtractor(Extractor):
    """One of torch-fidelity's extractors.

    Args:
        name: as torch-fidelity knows it, without `fidelity:`.

    Raises:
        UserError: torch-fidelity knows no such name, its weights would have to be downloaded, or it has no layer for FID.
    """

    def __init__(self, name: str, options: ExtractorOptions | None = None) -> None:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        options = options or ExtractorOptions()
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(FIDELITY_PREFIX + each for each in sorted(FEATURE_EXTRACTORS_REGISTRY))
            raise UserError(f"torch-fidelity has no extractor '{name}'; choose one of {known}, or register yours before")
        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        feature_layer, logit_layer = _default_layer(kind, "fid"), _default_layer(kind, "isc")
        if feature_layer is None:
            raise UserError(f"torch-fidelity's extractor '{name}' names no default layer for fid; let its class name one")
        # An extractor without classes says the same layer twice: its features are no scores of classes.
        self.layers = [feature_layer] if logit_layer in (None, feature_layer) else [feature_layer, logit_layer]
        weights = _weights(name, options)
        try:
            with torch.random.fork_rng(devices=[]):  # constructors first fill their layers with random numbers
                network = kind(name, list(self.layers), **weights, verbose=False)
        except URLError as error:
            raise UserError(f"the weights of torch-fidelity's '{name}' could not be downloaded ({error}); try again later") from error
        self.name = FIDELITY_PREFIX + name
        self.resize = f"inside torch-fidelity's {name}"
        digest = hashlib.sha256(f"{name} {self.layers} {tensors_hash(network.state_dict())}".encode()).hexdigest()
        super().__init__(network, options, digest)
        shown = self(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
        self.feature_dim = shown.features.shape[1]
        self.num_logits = 0 if shown.logits is None else shown.logits.shape[1]

    def forward(self, pixels: Tensor, *, want_logits: bool, want_spatial: bool) -> Features:
        found = dict(zip(self.layers, self.network(pixels.contiguous()), strict=True))
        for layer, tensor in found.items():
            if tensor.ndim != 2 or len(tensor) != len(pixels):
                raise UserError(f"layer '{layer}' of {self.name} gave {list(tensor.shape)} for {len(pixels)} images, expected [B, D]")
        return Features(found[self.layers[0]], found[self.layers[1]] if want_logits and len(self.layers) == 2 else None)


def _default_layer(kind: Any, metric: str) -> str | None:
    """None: the class knows none; its own classes answer with KeyError, the base class with NotImplementedError."""
    try:
        layer: str = kind.get_default_feature_layer_for_metric(metric)
    except (KeyError, NotImplementedError):
        return None
    return layer


def _weights(name: str, options: ExtractorOptions) -> dict[str, Any]:
    """Keyword arguments of the constructor that name the weights; sees to it that nothing is fetched unless asked for."""
    if name == INCEPTION:
        from genvision.eval.inception import INCEPTION_WEIGHTS, inception_shapes

        path = INCEPTION_WEIGHTS.find(options.inception_weights, options.download)
        # torch-fidelity unpickles without restraint, so it gets a copy in memory of tensors that were read safely
        copy_in_memory = io.BytesIO()
        torch.save(INCEPTION_WEIGHTS.check(INCEPTION_WEIGHTS.read(path), inception_shapes(), path), copy_in_memory)
        copy_in_memory.seek(0)
        return {"feature_extractor_weights_path": copy_in_memory}
    file = _downloaded_file(name)
    if file is not None and not options.download and not (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file():
        instead = "; the extractor dinov2 needs no code from there" if name.startswith("dinov2") else ""
        raise UserError(f"torch-fidelity would download the weights of '{name}' ({file}); allow it with `--download`{instead}")
    return {}


def _downloaded_file(name: str) -> str | None:
    """What torch-fidelity downloads for one of its own extractors; None for those of users, who see to their weights themselves."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINOV2

    if name == "vgg16":
        return "vgg16-397923af.pth"
    if name in CLIP:
        return f"{name}-{CLIP[name]['hash']}.pt"
    if name in DINOV2:
        return f"code and weights of {DINOV2[name]} from torch hub"  # no file of that name is ever there
    return None
