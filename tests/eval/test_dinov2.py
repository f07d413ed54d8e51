import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genvision.errors import UserError
from genvision.eval.dinov2 import MEAN, STD, DINOv2Extractor, VisionTransformer, normalised, resized
from genvision.eval.features import ExtractorOptions, load_extractor, tensors_hash
from parity_fixtures import Fixture


class TinyDINOv2Extractor(DINOv2Extractor):
    feature_dim = 12
    depth = 2
    num_heads = 3
    learned_side = 21


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Random weights of a tiny network under the official names."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        network = VisionTransformer(12, 2, 3, 21)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def weights_file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "weights.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(1)
    colours = rng.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)  # large patches: fine noise would look the same in every image
    return colours.repeat(10, axis=1).repeat(10, axis=2)


@pytest.mark.parametrize("image", ["img0", "img1", "img2"])
def test_images_are_resized_as_edm2_does(image):
    fixture = Fixture("eval_preprocess")
    found = resized(fixture.inputs[image].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    for view, pixels in (("stride7", found[::7, ::7]), ("top_left16", found[:16, :16]), ("bottom_right16", found[-16:, -16:])):
        torch.testing.assert_close(pixels, fixture.outputs[f"edm2_dinov2_torch224/{image}/{view}"], atol=1e-3, rtol=0)
    assert found.double().mean().item() == pytest.approx(fixture.outputs[f"edm2_dinov2_torch224/{image}/mean"].item(), abs=1e-3)


def test_colours_are_normalised_by_imagenets_mean_and_deviation():
    found = normalised(torch.full((1, 3, 30, 30), 51, dtype=torch.uint8))
    for channel in range(3):
        wanted = torch.full((224, 224), (0.2 - MEAN[channel]) / STD[channel])
        torch.testing.assert_close(found[0, channel], wanted, atol=1e-5, rtol=0)


def test_the_network_has_the_tensors_of_the_official_file():
    with torch.device("meta"):
        network = VisionTransformer(
            DINOv2Extractor.feature_dim, DINOv2Extractor.depth, DINOv2Extractor.num_heads, DINOv2Extractor.learned_side
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 304_368_640
    assert len(shapes) == 7 + 24 * 14
    outside = {
        "cls_token": (1, 1, 1024),
        "pos_embed": (1, 1370, 1024),
        "mask_token": (1, 1024),
        "patch_embed.proj.weight": (1024, 3, 14, 14),
        "patch_embed.proj.bias": (1024,),
        "norm.weight": (1024,),
        "norm.bias": (1024,),
    }
    last_block = {
        "norm1.weight": (1024,),
        "norm1.bias": (1024,),
        "attn.qkv.weight": (3072, 1024),
        "attn.qkv.bias": (3072,),
        "attn.proj.weight": (1024, 1024),
        "attn.proj.bias": (1024,),
        "ls1.gamma": (1024,),
        "norm2.weight": (1024,),
        "norm2.bias": (1024,),
        "mlp.fc1.weight": (4096, 1024),
        "mlp.fc1.bias": (4096,),
        "mlp.fc2.weight": (1024, 4096),
        "mlp.fc2.bias": (1024,),
        "ls2.gamma": (1024,),
    }
    assert {name: shape for name, shape in shapes.items() if not name.startswith("blocks.")} == outside
    assert {name.removeprefix("blocks.23."): shape for name, shape in shapes.items() if name.startswith("blocks.23.")} == last_block


def cubic_rows(learned: int, side: int) -> np.ndarray:
    """Weights [side, learned] of Keys' cubic convolution with a = -0.75 at half-pixel centres and the scale (side + 0.1) / learned."""

    def kernel(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    weights = np.zeros((side, learned))
    for i in range(side):
        place = (i + 0.5) * learned / (side + 0.1) - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(j, 0), learned - 1)] += kernel(place - j)
    return weights


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias


def plain_class_token(tensors: dict[str, torch.Tensor], image: np.ndarray, depth: int, num_heads: int, learned: int) -> np.ndarray:
    """The paper's encoder in float64, token by token: image [3, 224, 224] -> [C]."""
    p = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    dim, side = p["cls_token"].shape[-1], 16
    rows = cubic_rows(learned, side)
    learned_grid = p["pos_embed"][0, 1:].reshape(learned, learned, dim)
    positions = np.einsum("ya,xb,abc->yxc", rows, rows, learned_grid).reshape(side * side, dim)
    patches = image.reshape(3, side, 14, side, 14).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    patches = patches @ p["patch_embed.proj.weight"].reshape(dim, -1).T + p["patch_embed.proj.bias"]
    x = np.concatenate([p["cls_token"][0] + p["pos_embed"][0, :1], patches + positions])
    for index in range(depth):
        b = {name.removeprefix(f"blocks.{index}."): value for name, value in p.items() if name.startswith(f"blocks.{index}.")}
        y = norm(x, b["norm1.weight"], b["norm1.bias"]) @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        q, k, v = np.split(y, 3, axis=1)
        heads = []
        for head in range(num_heads):
            one = slice(head * dim // num_heads, (head + 1) * dim // num_heads)
            scores = np.exp(q[:, one] @ k[:, one].T / math.sqrt(dim // num_heads))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, one])
        x = x + b["ls1.gamma"] * (np.concatenate(heads, 1) @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        y = norm(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + b["ls2.gamma"] * (y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    return norm(x[0], p["norm.weight"], p["norm.bias"])


def test_features_equal_a_plain_forward(tensors, weights_file, images):
    extractor = TinyDINOv2Extractor(ExtractorOptions(dinov2_weights=weights_file))
    found = extractor(images)
    pixels = normalised(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    wanted = torch.from_numpy(np.stack([plain_class_token(tensors, image, 2, 3, 21) for image in pixels])).float()
    torch.testing.assert_close(found.features, wanted, atol=2e-5, rtol=0)
    assert found.logits is None
    assert found.spatial is None
    assert found.features.std(dim=0).min() > 1e-3  # the class token sees the image, fifty times the tolerance


def test_positions_that_fit_are_left_alone():
    network = VisionTransformer(12, 0, 3, 16)
    torch.nn.init.normal_(network.pos_embed)
    before = network.pos_embed.clone()
    network.resample_positions(16)
    assert torch.equal(network.pos_embed, before)


def test_weights_have_one_hash_and_the_global_random_state_stays(tensors, weights_file, tmp_path):
    save_file(tensors, tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    hashes = {
        TinyDINOv2Extractor(ExtractorOptions(dinov2_weights=path)).weights_hash for path in (weights_file, tmp_path / "weights.safetensors")
    }
    assert hashes == {tensors_hash(tensors)}
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_size_does_not_matter(weights_file, images):
    extractor = TinyDINOv2Extractor(ExtractorOptions(dinov2_weights=weights_file))
    one_by_one = torch.cat([extractor(images[i : i + 1]).features for i in range(len(images))])
    torch.testing.assert_close(one_by_one, extractor(images).features, atol=1e-5, rtol=1e-5)


def test_without_weights_the_official_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no DINOv2 ViT-L/14 weights; give `--dinov2-weights FILE` or `--download`") as caught:
        load_extractor("dinov2")
    assert "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth" in str(caught.value)


def test_weights_of_the_variant_with_registers_are_refused(tensors, tmp_path):
    torch.save({**tensors, "register_tokens": torch.zeros(1, 4, 12)}, tmp_path / "registers.pth")
    with pytest.raises(UserError, match=r"not the 35 tensors of DINOv2 ViT-L/14: 1 unexpected \(register_tokens\)"):
        TinyDINOv2Extractor(ExtractorOptions(dinov2_weights=tmp_path / "registers.pth"))


@pytest.mark.slow
def test_the_published_size_reads_its_file_and_gives_1024_features(tmp_path, images):
    with torch.device("meta"):
        shapes = VisionTransformer(1024, 24, 16, 37).state_dict()
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(each.shape, generator=generator) * 0.02 for name, each in shapes.items()}, tmp_path / "l.safetensors")
    extractor = load_extractor("dinov2", ExtractorOptions(dinov2_weights=tmp_path / "l.safetensors"))
    features = extractor(images[:2]).features
    assert features.shape == (2, extractor.feature_dim) == (2, 1024)
    assert torch.isfinite(features).all()
