"""The pipeline object, its folder, and that the folder is one for diffusers too."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from genvision.errors import UserError
from genvision.images import to_uint8
from genvision.layers.ternarize import ternarize_linears
from genvision.models.llamagen import LlamaGen
from genvision.pipeline import ImagePipeline, read_index, save_parts
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.flow import FlowSampler
from genvision.tokenizers.base import content_hash
from genvision.tokenizers.pixels import PixelTokenizer
from genvision.tokenizers.titok import TiTok
from genvision.tokenizers.vq import VQTokenizer

LABELS = ["cat", "dog", "2", "1"]


def tiny_tokenizer(codebook_size: int = 16, **changes) -> VQTokenizer:
    options = {"base_channels": 4, "encoder_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 2}
    return VQTokenizer(image_size=8, codebook_size=codebook_size, codebook_dim=4, **(options | changes))


def tiny_generator(codebook_size: int = 16, **changes) -> LlamaGen:
    options = {"grid_size": 4, "hidden_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4, "mlp_multiple_of": 8, "init_std": 0.2}
    generator = LlamaGen(codebook_size=codebook_size, **(options | changes))
    torch.nn.init.normal_(generator.head.weight)  # so that not all tokens are equally likely
    return generator


def sequence_tokenizer() -> TiTok:
    """Images of 8 x 8 pixels as five tokens."""
    sizes = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("dim", 16), ("depth", 1), ("heads", 2))}
    return TiTok(image_size=8, patch_size=2, num_latent_tokens=5, token_dim=4, codebook_size=16, **sizes)


@pytest.fixture
def pipeline() -> ImagePipeline:
    return ImagePipeline(tiny_generator(), tiny_tokenizer(), AutoregressiveSampler(guidance_scale=2.0, top_k=8), LABELS)


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "model", {"trained_on": "nothing | much"})
    return tmp_path / "model"


class TestCall:
    """Arguments as diffusers' DiTPipeline names them."""

    def test_labels_are_names_or_indices(self, pipeline):
        codes = pipeline([0, 1, 3, 2]).codes
        assert torch.equal(pipeline(["cat", "dog", "1", "2"]).codes, codes)
        assert torch.equal(pipeline(class_labels=torch.tensor([0, 1, 3, 2])).codes, codes)
        assert pipeline.label_ids(["cat", 3, "1", "3"]) == [0, 3, 3, 3]  # "1" is the name of class 3
        assert torch.equal(pipeline("cat").codes, codes[:1]) and torch.equal(pipeline(0).codes, codes[:1])

    @pytest.mark.parametrize("label", [4, -1, "4", "bird", ""])
    def test_labels_that_are_none(self, pipeline, label):
        with pytest.raises(UserError, match=r"0 \.\. 3"):
            pipeline([label])

    def test_a_tensor_of_labels_is_checked_too(self, pipeline):
        with pytest.raises(UserError, match="class 4 is out of range"):
            pipeline(torch.tensor([4]))

    def test_every_output_type_shows_the_same_images(self, pipeline):
        floats = pipeline([0, 1, 2], output_type="pt").images
        assert floats.shape == (3, 3, 8, 8) and floats.dtype == torch.float32 and floats.abs().max() <= 1
        arrays = pipeline([0, 1, 2], output_type="np").images
        assert arrays.shape == (3, 8, 8, 3) and arrays.dtype == np.uint8
        np.testing.assert_array_equal(arrays, to_uint8(floats))
        pictures = pipeline([0, 1, 2]).images
        assert all(isinstance(picture, Image.Image) and picture.size == (8, 8) for picture in pictures)
        np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), arrays)
        with pytest.raises(UserError, match="output_type 'latent' is unknown; choose one of pil, np, pt"):
            pipeline([0], output_type="latent")

    def test_a_generator_gives_its_seed(self, pipeline):
        expected = pipeline([0, 1], seed=11).codes
        assert torch.equal(pipeline([0, 1], generator=torch.Generator().manual_seed(11)).codes, expected)
        assert not torch.equal(pipeline([0, 1], seed=12).codes, expected)

    def test_options_are_those_of_the_sampler_for_one_call(self, pipeline):
        greedy = pipeline([0, 0], temperature=0.0).codes
        assert torch.equal(greedy[0], greedy[1])
        assert torch.equal(pipeline([0], guidance_scale=2.0, top_k=8).codes, pipeline([0]).codes)
        assert not torch.equal(pipeline([0, 1], guidance_scale=1.0).codes, pipeline([0, 1]).codes)
        assert pipeline.sampler.config["temperature"] == 1.0
        with pytest.raises(UserError, match=r"has no option 'topk'; it has .*guidance_scale, .*top_k"):
            pipeline([0], topk=3)

    def test_steps_are_refused_by_a_sampler_that_has_none(self, pipeline):
        with pytest.raises(UserError, match="num_inference_steps: AutoregressiveSampler has no steps to choose"):
            pipeline([0], num_inference_steps=50)

    def test_known_tokens_are_kept(self, pipeline):
        whole = pipeline([0, 1, 2])
        known = whole.codes.masked_fill(torch.arange(16).view(4, 4) >= 6, -1)
        again = pipeline([0, 1, 2], known=known, output_type="pt")
        assert torch.equal(again.codes, whole.codes) and again.network_calls.tolist() == [20] * 3  # ten tokens, guided
        other = pipeline([0, 1, 2], known=known, seed=1).codes
        assert torch.equal(other.flatten(1)[:, :6], whole.codes.flatten(1)[:, :6]) and not torch.equal(other, whole.codes)
        all_known = pipeline([0, 1, 2], known=other, output_type="pt")
        assert torch.equal(all_known.codes, other) and all_known.network_calls.tolist() == [0] * 3
        with torch.no_grad():
            torch.testing.assert_close(all_known.images, pipeline.tokenizer.decode(other).clamp(-1, 1))

    def test_global_randomness_is_neither_used_nor_moved(self, pipeline):
        torch.manual_seed(1)
        first, after = pipeline([0, 1]).codes, torch.rand(3)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3), after)
        assert torch.equal(pipeline([0, 1]).codes, first)


class TestFolder:
    def test_a_loaded_pipeline_draws_the_same_images(self, pipeline, folder):
        loaded = ImagePipeline.from_pretrained(folder)
        assert loaded.label_names == LABELS
        assert dict(loaded.sampler.config)["guidance_scale"] == 2.0
        assert torch.equal(loaded([0, 1, 2], seed=3).codes, pipeline([0, 1, 2], seed=3).codes)
        np.testing.assert_array_equal(
            loaded([0, 1, 2], seed=3, output_type="np").images, pipeline([0, 1, 2], seed=3, output_type="np").images
        )

    def test_it_is_laid_out_as_diffusers_does(self, folder):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert names == [
            "README.md",
            "generator/config.json",
            "generator/diffusion_pytorch_model.safetensors",
            "model_index.json",
            "sampler/config.json",
            "tokenizer/config.json",
            "tokenizer/diffusion_pytorch_model.safetensors",
        ]
        index = read_index(folder)
        assert index["generator"] == ["genvision.models.llamagen", "LlamaGen"]
        assert index["tokenizer"] == ["genvision.tokenizers.vq", "VQTokenizer"]
        assert index["sampler"] == ["genvision.samplers.autoregressive", "AutoregressiveSampler"]
        assert index["id2label"] == dict(zip("0123", LABELS, strict=True))

    def test_every_component_loads_alone(self, pipeline, folder):
        generator = LlamaGen.from_pretrained(folder, subfolder="generator")
        tokenizer = VQTokenizer.from_pretrained(folder, subfolder="tokenizer")
        sampler = AutoregressiveSampler.from_pretrained(folder, subfolder="sampler")
        assert content_hash(generator) == content_hash(pipeline.generator)
        assert content_hash(tokenizer) == content_hash(pipeline.tokenizer)
        assert {name: sampler.config[name] for name in ("guidance_scale", "top_k", "top_p")} == {
            "guidance_scale": 2,
            "top_k": 8,
            "top_p": 1,
        }

    def test_diffusers_finds_the_classes_by_itself(self, pipeline, folder):
        class LabelPipeline(DiffusionPipeline):
            def __init__(self, generator, tokenizer, sampler):
                super().__init__()
                self.register_modules(generator=generator, tokenizer=tokenizer, sampler=sampler)

        loaded = LabelPipeline.from_pretrained(folder)
        parts = loaded.components
        assert {name: type(part) for name, part in parts.items()} == {
            "generator": LlamaGen,
            "tokenizer": VQTokenizer,
            "sampler": AutoregressiveSampler,
        }
        again = ImagePipeline(parts["generator"], parts["tokenizer"], parts["sampler"], LABELS)
        assert torch.equal(again([0, 1]).codes, pipeline([0, 1]).codes)

    def test_dtype_is_the_generators_alone(self, folder):
        loaded = ImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert (loaded.generator.dtype, loaded.tokenizer.dtype) == (torch.bfloat16, torch.float32)
        assert loaded([0], output_type="np").images.shape == (1, 8, 8, 3)

    def test_image_size_follows_from_the_generator(self):
        pipeline = ImagePipeline(tiny_generator(grid_size=6), tiny_tokenizer(), AutoregressiveSampler(), LABELS)
        assert pipeline.image_size == 12
        assert pipeline([0], output_type="np").images.shape == (1, 12, 12, 3)

    def test_codes_may_be_a_sequence(self, tmp_path):
        pipeline = ImagePipeline(tiny_generator(sequence_length=5), sequence_tokenizer(), AutoregressiveSampler(), LABELS)
        assert pipeline.image_size == 8
        pipeline.save_pretrained(tmp_path / "model")
        loaded = ImagePipeline.from_pretrained(tmp_path / "model")
        output, again = pipeline([0, 1], output_type="np"), loaded([0, 1], output_type="np")
        assert output.codes.shape == (2, 5) and output.images.shape == (2, 8, 8, 3)
        assert torch.equal(again.codes, output.codes) and (again.images == output.images).all()
        assert "TiTok, 16 codes, a sequence of 5 for an image." in (tmp_path / "model" / "README.md").read_text()

    def test_codes_of_another_shape_are_refused(self):
        for places, tokenizer, message in (
            ({"grid_size": 4}, sequence_tokenizer(), r"shape \[4, 4\], the tokenizer reads \[5\]; use the tokenizer that it was trained"),
            ({"sequence_length": 6}, sequence_tokenizer(), r"shape \[6\], the tokenizer reads \[5\]"),
            ({"sequence_length": 16}, tiny_tokenizer(), r"shape \[16\], the tokenizer reads \[4, 4\]"),
        ):
            with pytest.raises(UserError, match=message):
                ImagePipeline(tiny_generator(**places), tokenizer, AutoregressiveSampler(), LABELS)

    def test_a_tokenizer_of_another_codebook_is_refused(self, folder):
        with pytest.raises(UserError, match="the generator predicts 16 codes, the tokenizer has 32"):
            ImagePipeline(tiny_generator(), tiny_tokenizer(32), AutoregressiveSampler(), LABELS)
        shutil.rmtree(folder / "tokenizer")
        tiny_tokenizer(32).save_pretrained(folder / "tokenizer")
        with pytest.raises(UserError, match="use the tokenizer that it was trained with"):
            ImagePipeline.from_pretrained(folder)

    def test_names_of_other_classes_are_refused(self, folder):
        with pytest.raises(UserError, match="3 label names were given for a model of 4 classes"):
            ImagePipeline(tiny_generator(), tiny_tokenizer(), AutoregressiveSampler(), LABELS[:3])
        index = read_index(folder)
        (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "cat", "2": "dog"}}))
        with pytest.raises(UserError, match=r"model_index.json: id2label must name the classes 0 \.\. 3"):
            ImagePipeline.from_pretrained(folder)

    @pytest.mark.parametrize("part", ["generator", "tokenizer", "sampler"])
    def test_a_missing_component_is_named(self, folder, part):
        shutil.rmtree(folder / part)
        with pytest.raises(UserError, match=f"the {part} is missing"):
            ImagePipeline.from_pretrained(folder)

    def test_a_class_that_is_not_ours_is_refused(self, folder):
        path = folder / "generator" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DiTTransformer2DModel"}))
        with pytest.raises(UserError, match="class 'DiTTransformer2DModel' is no generator of genvision; known are DiT, LlamaGen"):
            ImagePipeline.from_pretrained(folder)

    def test_components_may_come_one_after_another(self, pipeline, tmp_path):
        save_parts(tmp_path / "model", {"tokenizer": pipeline.tokenizer})
        with pytest.raises(UserError, match="the generator is missing"):
            ImagePipeline.from_pretrained(tmp_path / "model")
        save_parts(tmp_path / "model", {"generator": pipeline.generator, "sampler": pipeline.sampler})
        loaded = ImagePipeline.from_pretrained(tmp_path / "model")
        assert loaded.label_names == ["0", "1", "2", "3"]
        assert torch.equal(loaded([0, 1]).codes, pipeline([0, 1]).codes)


class TestLatents:
    """Pipelines of diffusion transformers."""

    @pytest.fixture(params=["tiny_flow", "tiny_diffusion"])
    def latent_folder(self, request, tmp_path) -> Path:
        return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model"))

    def test_images_latents_and_calls_come_out(self, latent_folder):
        pipeline = ImagePipeline.from_pretrained(latent_folder)
        output = pipeline(["3", 7], output_type="pt", guidance_scale=2.0)
        assert output.images.shape == (2, 3, 8, 8) and output.codes.shape == (2, 1, 8, 8)
        assert output.codes.dtype == torch.float32 and output.network_calls.tolist() == [12, 12]
        torch.testing.assert_close(output.images, output.codes.clamp(-1, 1).expand(-1, 3, -1, -1))
        assert pipeline([3], num_inference_steps=9).network_calls.tolist() == [9]
        assert torch.equal(pipeline(["3", 7], seed=2).codes, pipeline([3, 7], generator=torch.Generator().manual_seed(2)).codes)

    def test_a_saved_pipeline_draws_the_same(self, latent_folder, tmp_path):
        pipeline = ImagePipeline.from_pretrained(latent_folder)
        pipeline.save_pretrained(tmp_path / "again")
        again = ImagePipeline.from_pretrained(tmp_path / "again")
        assert torch.equal(again([0, 1, 2]).codes, pipeline([0, 1, 2]).codes)
        assert "latents of 1 channels" in (tmp_path / "again" / "README.md").read_text()

    def test_steps_outside_their_range(self, latent_folder):
        pipeline = ImagePipeline.from_pretrained(latent_folder)
        with pytest.raises(UserError, match="steps"):
            pipeline([0], num_inference_steps=0)
        if pipeline.generator.config.path == "ddpm":
            with pytest.raises(UserError, match=r"1 \.\. 1000"):
                pipeline([0], num_inference_steps=1001)

    def test_latents_have_no_known_tokens(self, latent_folder):
        with pytest.raises(UserError, match="draws latents, which have no known tokens"):
            ImagePipeline.from_pretrained(latent_folder)([0], known=torch.zeros(1, 1, 8, 8, dtype=torch.int64))

    def test_a_tokenizer_of_other_latents_is_refused(self, latent_folder):
        generator = ImagePipeline.from_pretrained(latent_folder).generator
        for tokenizer, message in (
            (PixelTokenizer(image_size=8), r"codes of shape \[1, 8, 8\], the tokenizer reads \[3, 8, 8\]; use the tokenizer that it was"),
            (tiny_tokenizer(), "the generator predicts continuous latents, the tokenizer has 16 codes; use the tokenizer that it was"),
        ):
            shutil.rmtree(latent_folder / "tokenizer")
            tokenizer.save_pretrained(latent_folder / "tokenizer")
            with pytest.raises(UserError, match=message):
                ImagePipeline.from_pretrained(latent_folder)
        with pytest.raises(UserError, match="the generator predicts 16 codes, the tokenizer has continuous latents"):
            ImagePipeline(tiny_generator(), PixelTokenizer(image_size=4, channels=1), AutoregressiveSampler(), LABELS)
        names = [str(i) for i in range(10)]
        tokens = ImagePipeline(generator, PixelTokenizer(image_size=8, channels=1), AutoregressiveSampler(), names)
        with pytest.raises(UserError, match="draws tokens"):
            tokens([0])

    def test_a_sampler_of_another_path_is_refused(self, latent_folder):
        pipeline = ImagePipeline.from_pretrained(latent_folder)
        other, message = (
            (FlowSampler(), "has path ddpm; use DiffusionSampler")
            if pipeline.generator.config.path == "ddpm"
            else (DiffusionSampler(), "has path linear; use FlowSampler")
        )
        wrong = ImagePipeline(pipeline.generator, pipeline.tokenizer, other, pipeline.label_names)
        with pytest.raises(UserError, match=message):
            wrong([0])


class TestCard:
    def test_it_has_the_hubs_header(self, folder):
        _, header, body = (folder / "README.md").read_text().split("---\n", 2)
        metadata = yaml.safe_load(header)
        assert metadata["library_name"] == "genvision"
        assert metadata["pipeline_tag"] == "unconditional-image-generation"
        assert "llamagen" in metadata["tags"]
        assert body.lstrip().startswith("# LlamaGen, ")

    def test_it_says_what_the_model_is_and_where_it_comes_from(self, pipeline, folder):
        card = (folder / "README.md").read_text()
        assert content_hash(pipeline.generator) in card and content_hash(pipeline.tokenizer) in card
        assert "8 x 8 pixels" in card and "4 classes (cat, dog, 2, 1)" in card
        assert "| trained on | `nothing \\| much` |" in card
        protocol = json.loads(card.split("```json\n")[1].split("```")[0])
        assert protocol["guidance_scale"] == 2.0 and protocol["top_k"] == 8

    def test_its_example_runs(self, folder):
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        scope: dict = {}
        exec(code.replace("path/to/this/folder", str(folder)), scope)
        assert len(scope["images"]) == 4


class TestPrepare:
    """Weights laid out for drawing on a CPU."""

    @pytest.mark.parametrize("weights", ["float32", "float16"])
    def test_draws_the_images_of_the_pipeline_as_it_is(self, folder, weights):
        plain, prepared = (ImagePipeline.from_pretrained(folder) for _ in range(2))
        prepared.prepare(weights, batch_size=2)
        assert [type(module).__name__ for module in prepared.generator.blocks[0].mlp.children()] == ["PackedLinear", "PackedLinear"]
        drawn = [pipeline([0, 1], temperature=0.0, output_type="np").images for pipeline in (plain, prepared)]
        assert np.array_equal(*drawn)
        assert prepared.hashes() == plain.hashes()

    def test_int8_moves_the_logits_a_little(self, folder):
        plain, prepared = (ImagePipeline.from_pretrained(folder) for _ in range(2))
        prepared.prepare("int8")
        codes, labels = torch.randint(16, (2, 15)), torch.tensor([0, 3])
        with torch.inference_mode():
            expected, found = (pipeline.generator(codes, labels) for pipeline in (plain, prepared))
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05

    def test_is_for_drawing_alone(self, pipeline, tmp_path):
        pipeline.prepare(batch_size=4)
        with pytest.raises(UserError, match="cannot be saved"):
            pipeline.save_pretrained(tmp_path / "again")
        with pytest.raises(UserError, match="cannot be moved"):
            pipeline.to("meta")
        assert pipeline.to("cpu") is pipeline
        with pytest.raises(UserError, match="prepared already"):
            pipeline.prepare("int8")

    def test_refuses_what_it_cannot_round(self, folder):
        with pytest.raises(UserError, match="weights 'int8' are made of float32 ones"):
            ImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).prepare("int8")

    def test_leaves_a_model_alone_that_does_not_draw_token_by_token(self, tiny_flow, tmp_path):
        pipeline = ImagePipeline.from_pretrained(tiny_flow)
        pipeline.prepare(batch_size=4).save_pretrained(tmp_path / "again")
        before = pipeline([3], output_type="pt").images
        pipeline.prepare("int8", batch_size=4)
        after = pipeline([3], output_type="pt").images
        assert 0 < (after - before).abs().max() < 0.2


def test_packed_and_float_weights_replace_one_another_in_a_folder(pipeline, tmp_path):
    packed = ImagePipeline(tiny_generator(), tiny_tokenizer(), AutoregressiveSampler(), LABELS)
    ternarize_linears(packed.generator)
    for first, second in ((pipeline, packed), (packed, pipeline)):
        folder = tmp_path / type(first.generator.blocks[0].mlp.gate).__name__
        first.save_pretrained(folder)
        second.save_pretrained(folder)
        assert content_hash(ImagePipeline.from_pretrained(folder).generator) == content_hash(second.generator)
        assert len(list((folder / "generator").glob("*.safetensors"))) == 1
    with pytest.raises(UserError, match="ternary already"):
        packed.prepare("int8")
