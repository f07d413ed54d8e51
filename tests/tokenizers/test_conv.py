"""The convolutional networks by themselves: their styles, and that the ways of inference equal those of training."""

import copy

import pytest
import torch
import torch.nn.functional as F

from genvision.tokenizers.conv import MASKGIT, STYLES, VQGAN, Decoder, Downsample, Encoder, ResBlock, Upsample
from genvision.tokenizers.vq import VQTokenizer


def make(kind, style, **changes):
    torch.manual_seed(0)
    options = dict(base=8, multipliers=(1, 2), num_blocks=2, z_channels=6, groups=4, dropout=0.0, style=STYLES[style])
    return kind(**(options | changes))


def inputs(kind, patch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 8 * patch, 12 * patch) if kind is Encoder else (2, 6, 4, 6)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [Encoder, Decoder])
class TestInference:
    def test_equals_training_whatever_the_layout(self, kind, style, patch):
        network, x = make(kind, style, patch=patch), inputs(kind, patch)
        expected = network(x)
        assert expected.requires_grad
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        x_last = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for model, images in ((network, x), (network, x_last), (last, x), (last, x_last)):
                torch.testing.assert_close(model(images), expected.detach(), atol=2e-6, rtol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(network(x), expected.detach(), atol=2e-6, rtol=1e-5)

    def test_leaves_its_input_as_it_was(self, kind, style, patch):
        network, x = make(kind, style, patch=patch), inputs(kind, patch)
        for images in (x, x.contiguous(memory_format=torch.channels_last)):
            before = images.clone()
            with torch.no_grad():
                network(images)
            assert torch.equal(images, before)

    def test_shapes_follow_levels_and_patch(self, kind, style, patch):
        with torch.no_grad():
            out = make(kind, style, patch=patch)(inputs(kind, patch))
        assert out.shape == ((2, 6, 4, 6) if kind is Encoder else (2, 3, 8 * patch, 12 * patch))


@pytest.mark.parametrize("style", STYLES)
def test_parts_leave_their_input_as_it_was(style):
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    same, wider = ResBlock(8, 8, 4, 0.0, STYLES[style]), ResBlock(8, 16, 4, 0.0, STYLES[style])
    for block in (same, wider):
        expected = block(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected)
        assert torch.equal(x, before)


@pytest.mark.parametrize("style", STYLES)
def test_half_precision_decodes_to_nearly_the_same(style):
    network, x = make(Decoder, style), inputs(Decoder)
    with torch.no_grad():
        expected = network(x)
        out = network.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_decoded_images_are_contiguous():
    with torch.no_grad():
        assert make(Decoder, "vqgan")(inputs(Decoder)).is_contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (5, 1)])
def test_doubling_and_convolution_in_one_are_exact_on_whole_numbers(layout, shape):
    generator = torch.Generator().manual_seed(0)
    upsample = Upsample(6)
    for parameter in upsample.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape, generator=generator).float()
    x = torch.randint(-4, 5, (2, 6, *shape), generator=generator).float().contiguous(memory_format=layout)
    with torch.no_grad():
        together = upsample(x)
    assert torch.equal(together, upsample(x))
    upsample.conv.weight.data[0, 0, 0, 0] += 1  # it keeps no old kernel
    with torch.no_grad():
        assert torch.equal(upsample(x), upsample.conv(F.interpolate(x, scale_factor=2.0)))


def test_gradients_reach_every_parameter_and_checkpointing_changes_none():
    x = inputs(Encoder)
    for style in STYLES:
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = VQTokenizer(
                image_size=8,
                codebook_size=8,
                codebook_dim=4,
                base_channels=8,
                encoder_multipliers=(1, 2),
                num_res_blocks=1,
                z_channels=8,
                norm_groups=4,
                style=style,
            )
            if checkpointing:
                model.enable_gradient_checkpointing()
                assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
            model(x).reconstruction.square().sum().backward()
            gradients.append({name: p.grad for part in (model.encoder, model.decoder) for name, p in part.named_parameters()})
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)


class TestStyles:
    def test_maskgit_has_no_attention_and_few_biases(self):
        names = dict(make(Encoder, "maskgit").named_parameters())
        biases = {name for name in names if name.endswith("bias") and "norm" not in name}
        assert not any("attn" in name or name.startswith("mid.1.q") for name in names)
        assert biases == {"conv_out.bias"}
        assert names["conv_out.weight"].shape[2:] == (1, 1)

    def test_vqgan_attends_at_the_lowest_resolution_and_in_the_middle(self):
        names = {name for name, _ in make(Decoder, "vqgan").named_parameters()}
        assert {name.rsplit(".", 2)[0] for name in names if ".q." in name} == {"mid.1", *(f"conv_blocks.0.attn.{i}" for i in range(3))}

    @pytest.mark.parametrize(("style", "blocks"), [("vqgan", 3), ("maskgit", 2)])
    def test_decoders_of_vqgan_have_a_block_more(self, style, blocks):
        assert [len(level.res) for level in make(Encoder, style).conv_blocks] == [2, 2]
        assert [len(level.res) for level in make(Decoder, style).conv_blocks] == [blocks, blocks]

    def test_only_vqgan_has_a_way_around_a_block_that_widens(self):
        x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        for style in (VQGAN, MASKGIT):
            block = ResBlock(8, 16, 4, 0.0, style)
            for parameter in block.conv2.parameters():
                torch.nn.init.zeros_(parameter)
            expected = block.nin_shortcut(x) if style is VQGAN else torch.zeros(1, 16, 4, 4)
            torch.testing.assert_close(block(x), expected)

    def test_maskgit_halves_by_averages(self):
        x = torch.arange(16.0).reshape(1, 1, 4, 4)
        assert torch.equal(Downsample(1, pool=True)(x), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))

    def test_vqgan_pads_at_the_bottom_and_right_alone(self):
        halve = Downsample(1, pool=False)
        torch.nn.init.ones_(halve.conv.weight)
        torch.nn.init.zeros_(halve.conv.bias)
        x = torch.zeros(1, 1, 4, 4)
        x[0, 0, 3, 3] = 1  # seen by the last output alone, which reaches over the border
        x[0, 0, 0, 0] = 10  # no output has it anywhere but in its corner
        assert torch.equal(halve(x), torch.tensor([[[[10.0, 0.0], [0.0, 1.0]]]]))


def test_patch_channels_become_squares_of_pixels():
    decoder = make(Decoder, "vqgan", patch=2)
    torch.nn.init.zeros_(decoder.conv_out.weight)
    decoder.conv_out.bias.data = torch.arange(12.0)  # channel 4 c + 2 i + j is row i, column j of colour c
    with torch.no_grad():
        images = decoder(inputs(Decoder))
    for colour in range(3):
        square = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 4 * colour
        assert torch.equal(images[1, colour], square.repeat(8, 12))
