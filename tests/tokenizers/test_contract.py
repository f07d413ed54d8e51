"""What holds for every tokenizer, whatever its family: the contract of genvision.tokenizers.base."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genvision.data.encoded import EncodedDataset
from genvision.data.encoding import encode_dataset
from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.tokenizers.base import TOKENIZERS, TokenizerOutput, content_hash, load_tokenizer
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.pixels import PixelTokenizer
from genvision.tokenizers.titok import TiTok
from genvision.tokenizers.vit import ViTok
from genvision.tokenizers.vq import VQTokenizer

VQ = dict(image_size=8, codebook_size=24, codebook_dim=4, base_channels=8, encoder_multipliers=(1, 2), z_channels=8, num_res_blocks=1)
VIT = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("width", 16), ("depth", 1), ("heads", 2))}
WIDE = VIT | {"encoder_width": 24, "decoder_width": 24}
TITOK = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("dim", 16), ("depth", 1), ("heads", 2))}
STATISTICS = dict(latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(1.5, 0.5, 2.0, 1.0))
EVERY = {
    "vq": lambda: VQTokenizer(**VQ, norm_groups=4),
    "vq, maskgit": lambda: VQTokenizer(**VQ | dict(z_channels=4, use_quant_conv=False, unit_range=True, style="maskgit"), norm_groups=4),
    "vq, lfq": lambda: VQTokenizer(**VQ | dict(codebook_size=16, quantizer="lfq"), norm_groups=4),
    "vitok": lambda: ViTok(image_size=8, patch_size=2, code_width=4, **VIT, **STATISTICS),
    "vitok, a sequence": lambda: ViTok(image_size=8, patch_size=2, code_length=5, code_width=4, position_embedding="learned", **WIDE),
    "kl": lambda: KLTokenizer(image_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **STATISTICS),
    "titok": lambda: TiTok(image_size=8, patch_size=2, num_latent_tokens=5, token_dim=4, codebook_size=24, **TITOK),
    "titok, vae": lambda: TiTok(image_size=8, patch_size=2, num_latent_tokens=5, token_dim=4, quantize_mode="vae", **TITOK, **STATISTICS),
    "pixels": lambda: PixelTokenizer(image_size=8, latent_mean=(0.1, -0.2, 0.3), latent_std=(1.5, 0.5, 2.0)),
    "pixels, gray": lambda: PixelTokenizer(image_size=8, channels=1, latent_mean=-0.4, latent_std=0.7),
}
every = pytest.mark.parametrize("name", EVERY)
every_network = pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("pixels")])


def make(name: str):
    torch.manual_seed(0)
    return EVERY[name]().eval()


def pictures(num: int) -> torch.Tensor:
    source = open_source("digits")
    return from_uint8(np.stack([np.asarray(source.load(i)) for i in range(num)]))


def test_every_class_is_among_them():
    assert {type(make(name)).__name__ for name in EVERY} | {"AutoencoderKL"} == set(TOKENIZERS)


@every
def test_codes_are_as_the_spec_says(name):
    model, images = make(name), pictures(3)
    with torch.inference_mode():
        codes = model.encode(images)
        again = model.decode(codes)
    assert codes.shape == (3, *model.spec.code_shape()) and again.shape == images.shape
    assert codes.dtype == (torch.int64 if model.spec.discrete else torch.float32)
    assert (model.spec.codebook_size is None) != (model.spec.channels is None)


@every
def test_an_image_has_the_same_code_in_every_batch(name):
    model, images = make(name), pictures(4)
    with torch.inference_mode():
        together, alone = model.encode(images), torch.cat([model.encode(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@every
def test_images_come_back_the_same_through_files_and_through_an_encoded_set(name, tmp_path):
    model, images = make(name), pictures(6)
    with torch.inference_mode():
        codes = model.encode(images)
        decoded = model.decode(codes)
    model.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert content_hash(loaded) == content_hash(model)
    encode_dataset(
        loaded, open_source("digits"), tmp_path / "set", image_size=8, tokenizer_hash=content_hash(loaded), flip=False, batch_size=6
    )
    stored = EncodedDataset(tmp_path / "set", expected_tokenizer_hash=content_hash(model))
    with torch.inference_mode():
        kept = torch.stack([stored.get(i, i)["codes"] for i in range(6)])
        assert torch.equal(kept, loaded.encode(images)) and torch.equal(loaded.decode(kept), loaded.decode(loaded.encode(images)))
        # some matrix products on CPUs round by where in memory their operands lie, which differs from one instance to another
        torch.testing.assert_close(kept, codes, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.decode(kept), decoded, atol=5e-6, rtol=0)


@every_network
def test_a_step_of_training_has_its_terms_and_moves_the_last_layer(name):
    model, images = make(name).train(), pictures(4)
    output = model(images)
    assert isinstance(output, TokenizerOutput) and output.reconstruction.shape == images.shape
    assert (output.codes is not None) == (output.z is not None) == model.spec.discrete
    assert output.losses and all(term.dim() == 0 and term.isfinite() for term in output.losses.values())
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert model.last_layer.grad is not None and model.last_layer.grad.abs().sum() > 0


@every
def test_wrong_images_and_codes_are_told_in_one_line(name):
    model = make(name)
    with pytest.raises(UserError, match=r"images of shape \[1, 1, 8, 8\]"):
        model.encode(torch.zeros(1, 1, 8, 8))
    if model.spec.downsample > 1:
        with pytest.raises(UserError, match="7"):
            model.encode(torch.zeros(1, 3, 7, 7))
    shape = model.spec.code_shape()
    if model.spec.discrete:
        with pytest.raises(UserError, match=f"but the tokenizer has codes 0 .. {model.spec.codebook_size - 1}"):
            model.decode(torch.full((1, *shape), model.spec.codebook_size))
    else:
        with pytest.raises(UserError, match=f"{shape[0]} channels"):
            model.decode(torch.zeros(1, 5, *shape[1:]))


@every
def test_weights_that_are_not_finite_are_refused(name, tmp_path):
    model = make(name)
    with torch.no_grad():
        next(iter(model.state_dict().values())).view(-1)[0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="1 tensors of the tokenizer hold NaN or infinity"):
        load_tokenizer(tmp_path)


def test_weights_that_are_missing_are_named(tmp_path):
    model = make("vitok")
    model.save_pretrained(tmp_path)
    first, *others = model.state_dict()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: model.state_dict()[name] for name in others}, file)
    with pytest.raises(UserError, match=f"1 tensors of the tokenizer are missing, {first} first"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vitok", "vitok, a sequence", "kl", "titok, vae"])
def test_statistics_belong_to_the_tokenizer(name):
    """They change what a generator sees, never the images that come back."""
    plain, images = make(name), pictures(4)
    plain.register_to_config(latent_mean=0.0, latent_std=1.0)
    other = make(name)
    other.register_to_config(latent_mean=[0.5] * 4, latent_std=[0.1] * 4)
    with torch.inference_mode():
        z, latents = plain.encode(images), other.encode(images)
        torch.testing.assert_close(latents, (z - 0.5) / 0.1)
        torch.testing.assert_close(other.decode(latents), plain.decode(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vitok", "vitok, a sequence", "kl", "titok, vae"])
def test_a_posterior_has_the_latents_for_mean_and_is_standardised_like_them(name):
    model, images = make(name), pictures(4)
    with torch.inference_mode():
        latents, (mean, std) = model.encode(images), model.posterior(images)
        network_mean, logvar = model.moments(images)
        assert torch.equal(mean, latents) and std.shape == mean.shape and std.dtype == torch.float32
        assert (std > 0).all() and std.std() > 0
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        z = network_mean + (0.5 * logvar).exp() * noise  # as training draws it
        torch.testing.assert_close(mean + std * noise, model.normalize(z), atol=1e-5, rtol=1e-5)


def test_a_folder_of_diffusers_is_a_tokenizer(tmp_path):
    model = make("kl")
    model.register_to_config(latent_mean=0.0, latent_std=2.0)
    model.to_diffusers(tmp_path)
    loaded = load_tokenizer(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded.encode(pictures(2)), model.encode(pictures(2)))
