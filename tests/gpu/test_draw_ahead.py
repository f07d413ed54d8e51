"""On a real card the tokenizer decodes one batch beside the drawing of the next: the images stay those of one batch after the other."""

import numpy as np
import pytest
import torch

from genvision.jobs.draw_ahead import draw_batches
from genvision.jobs.sample import SampleRequest
from genvision.models.mage import MAGE
from genvision.pipeline import ImagePipeline
from genvision.samplers.masked import MaskedSampler
from genvision.tokenizers.vq import VQTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_images_decoded_beside_the_sampler_are_those_of_one_batch_after_the_other():
    sizes = {"hidden_dim": 64, "depth": 2, "num_heads": 2, "decoder_dim": 64, "decoder_depth": 2, "decoder_num_heads": 2}
    generator = MAGE(codebook_size=64, num_classes=10, **sizes)
    tokenizer = VQTokenizer(codebook_size=64, base_channels=32, z_channels=64)  # large enough to be at work while the next codes are drawn
    pipeline = ImagePipeline(generator, tokenizer, MaskedSampler(num_steps=4), [str(i) for i in range(10)]).to("cuda")
    request = SampleRequest(num=30, classes=tuple(range(10)), seed=3)
    chunks = [range(i, min(i + 4, 30)) for i in range(0, 30, 4)]
    found = list(draw_batches(pipeline, request, chunks))
    assert [chunk for chunk, _ in found] == chunks
    for chunk, images in found:
        expected = pipeline(request.labels_of(chunk), seed=3, indices=chunk, output_type="np").images
        difference = np.abs(images.astype(int) - expected)  # convolutions of cuDNN need not repeat to the last bit
        assert images.shape == (len(chunk), 256, 256, 3) and difference.max() <= 1
