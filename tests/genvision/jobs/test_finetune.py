"""Fine-tuning trunks of every family as classifiers of 8 x 8 digits, and what is kept of them."""

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genvision.data.datasets import ImageDataset
from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.finetune_config import FinetuneConfig
from genvision.eval.finetuning import FinetuneResult, finetune, parameter_groups
from genvision.eval.mixing import mixer
from genvision.eval.result import validate
from genvision.eval.sets import ArraySource
from genvision.eval.trunk_classifier import TrunkClassifier
from genvision.images import from_uint8
from genvision.jobs.finetune import finetune_folder, load_classifier
from genvision.layers.drop_path import stochastic_depth
from genvision.models.llamagen import LlamaGen
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR
from genvision.pipeline import ImagePipeline
from genvision.tokenizers.base import load_tokenizer

DOCS = Path(__file__).resolve().parents[3] / "docs" / "representation.md"
QUICK = FinetuneConfig(epochs=1, batch_size=64, learning_rate=0.01, warmup_epochs=0.2, crop="random", flip=False)
SIZES = {"codebook_size": 16, "grid_size": 4, "hidden_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
TRUNKS: dict[str, Callable[[], torch.nn.Module]] = {
    "llamagen": lambda: LlamaGen(**SIZES, mlp_multiple_of=8),
    "maskgit": lambda: MaskGIT(**SIZES),
    "mage": lambda: MAGE(**SIZES, decoder_dim=16, decoder_depth=1, decoder_num_heads=2),
    "rar": lambda: RAR(**SIZES),
}


def few(source: str, num: int = 64) -> ArraySource:
    """The first images of a source, all in memory."""
    opened = open_source(source)
    return ArraySource(np.stack([np.asarray(opened.load(i)) for i in range(num)]), opened.labels[:num])


@pytest.fixture(scope="module")
def finished(tiny_flow, tmp_path_factory) -> tuple[Path, FinetuneResult]:
    """Four epochs of a flow transformer, without mixing."""
    out = tmp_path_factory.mktemp("finetune") / "out"
    out.mkdir()  # empty is free
    config = replace(QUICK, epochs=4, batch_size=32, learning_rate=0.04, warmup_epochs=0.5, test_every=2, crop="center")
    config = replace(config, mixup=0.0, cutmix=0.0, drop_path=0.0, label_smoothing=0.0)
    return out, finetune_folder(tiny_flow, "digits:first", "digits:second", out, config=config, device="cpu", show_progress=False)


def test_a_trunk_learns_to_name_images(finished):
    out, result = finished
    assert result.top1 > 0.3 > 2 * result.chance
    low, high = result.top1_interval
    assert low < result.top1 < high
    assert [row["epoch"] for row in result.curve] == [2, 4] and result.num_steps == result.curve[-1]["step"] == 116
    assert result.curve[-1]["loss"] < result.curve[0]["loss"] and result.curve[-1]["top1"] == result.top1
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["classifier.json", "classifier.safetensors", "curve.svg", "results.json"]


def test_the_result_is_json_of_its_schema_documented_key_by_key_with_a_chart(finished):
    out, _ = finished
    content = json.loads((out / "results.json").read_text())
    validate(content, "finetune", FinetuneResult)
    assert len(content["generator_hash"]) == 64 and (content["layer"], content["num_layers"]) == (2, 2)
    page = DOCS.read_text()
    assert [field.name for field in fields(FinetuneResult) if f"`{field.name}`" not in page] == []
    chart = ET.fromstring((out / "curve.svg").read_text())
    assert len(chart.findall(".//{http://www.w3.org/2000/svg}polyline")) == 3


def test_a_kept_classifier_gives_the_accuracy_that_was_written(finished, tiny_flow):
    out, result = finished
    classifier, names = load_classifier(out, tiny_flow)
    images = open_source("digits:second")
    array = np.stack([np.asarray(images.load(i)) for i in range(len(images))])
    with torch.no_grad():
        right = (classifier(from_uint8(array)).argmax(1).numpy() == images.labels).sum()
    assert right / len(images) == pytest.approx(result.top1, abs=2 / len(images))
    assert names == [str(i) for i in range(10)]


def test_a_classifier_of_another_model_or_with_damaged_files_is_refused(finished, tiny_flow, tiny_diffusion, tmp_path):
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    with pytest.raises(UserError, match="another generator than that of the model given"):
        load_classifier(out, tiny_diffusion)
    (out / "classifier.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"classifier.safetensors: cannot be read"):
        load_classifier(out, tiny_flow)
    (out / "classifier.json").write_text("{}")
    with pytest.raises(UserError, match="no classifier of this version"):
        load_classifier(out, tiny_flow)
    with pytest.raises(UserError, match="give a folder written by genvision finetune"):
        load_classifier(tmp_path, tiny_flow)


@pytest.mark.parametrize("family", sorted(TRUNKS))
def test_trunks_of_every_family_are_fine_tuned_with_the_same_outcome_each_time(family, tiny_tokenizer):
    outcomes = []
    for times in range(2):
        torch.manual_seed(0)
        generator, tokenizer = TRUNKS[family]().eval(), load_tokenizer(tiny_tokenizer)
        state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
        frozen = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
        torch.manual_seed(times)  # the global state does not matter, and is left alone
        before = torch.get_rng_state()
        config = replace(QUICK, layer=1, epochs=2, batch_size=32, drop_path=0.5, test_every=5)
        classifier, result = finetune(generator, tokenizer, few("digits:first"), few("digits:second"), config=config)
        assert torch.equal(torch.get_rng_state(), before)
        outcomes.append((classifier.trained_tensors(), result.curve))
    (first, curve), (second, again) = outcomes
    assert curve == again and len(curve) == 1 and all(torch.equal(first[name], second[name]) for name in first)
    moved = {name for name, tensor in generator.state_dict().items() if not torch.equal(tensor, state[name])}
    assert any(name.startswith("blocks.0.") for name in moved)
    assert not any(name.startswith(("blocks.1.", "head", "decoder")) for name in moved)
    assert moved <= {name.removeprefix("generator.") for name in first}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tokenizer.state_dict().items())


@pytest.fixture
def classifier(tiny_flow) -> TrunkClassifier:
    pipeline = ImagePipeline.from_pretrained(tiny_flow)
    return TrunkClassifier(pipeline.generator, pipeline.tokenizer, layer=2, num_classes=10)


def test_learning_rates_fall_towards_the_input_and_vectors_are_not_decayed(classifier):
    groups = parameter_groups(classifier, replace(QUICK, layer_decay=0.5, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    found = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["head.weight"] == (1.0, 0.3) and found["head.bias"] == found["norm.weight"] == (1.0, 0.0)
    assert found["generator.blocks.1.attn.qkv.weight"] == (0.5, 0.3)
    assert found["generator.blocks.0.attn.qkv.bias"] == (0.25, 0.0)
    assert found["generator.patch_embed.proj.weight"] == found["generator.label_embed.table.weight"] == (0.125, 0.3)
    assert not any(name.startswith(("generator.head", "tokenizer")) for name in found)


def test_the_rate_rises_falls_and_ends_at_the_least():
    config = FinetuneConfig(epochs=10, warmup_epochs=2, learning_rate=1e-3, batch_size=512, min_learning_rate=1e-4)
    assert config.rate(0.0) == 0.0 and config.rate(0.1) == pytest.approx(1e-3)
    assert config.rate(0.2) == config.peak == pytest.approx(2e-3)
    assert config.rate(0.6) == pytest.approx((2e-3 + 1e-4) / 2) and config.rate(1 - 1e-9) == pytest.approx(1e-4)


class TestStochasticDepth:
    def test_blocks_are_left_out_for_rows_with_their_own_chance_and_the_same_mean(self):
        class Add(torch.nn.Module):
            def forward(self, x):
                return x + 1

        blocks = torch.nn.ModuleList([Add(), Add(), Add()])
        x = torch.zeros(4000, 1)
        with stochastic_depth(blocks, 0.5):
            outputs = [block(x) for block in blocks]
            direct = blocks[2].forward(x)  # as some models call their blocks
            assert torch.equal(blocks.eval()[2](x), x + 1)
        assert torch.equal(outputs[0], x + 1)
        for output, rate in ((outputs[1], 0.25), (outputs[2], 0.5), (direct, 0.5)):
            torch.testing.assert_close(output.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
            assert (output == 0).float().mean() == pytest.approx(rate, abs=0.04)
        assert torch.equal(blocks.train()[2](x), x + 1)

    def test_a_row_whose_blocks_are_all_left_out_keeps_what_the_first_one_gave(self, classifier):
        generator = classifier.generator.train()
        with torch.no_grad(), stochastic_depth(generator.blocks, 0.999):
            first, last = generator.hidden_states(torch.randn(3, 1, 8, 8), [1, 2])
        torch.testing.assert_close(first, last)


class TestData:
    def test_mixing_blends_or_pieces_together_neighbours_with_shares_of_their_classes(self):
        images = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 6, 6)
        labels = torch.arange(8)
        blended, shares = mixer(0.8, 0.0, 8)(images, labels)
        share = shares[1, 1]
        torch.testing.assert_close(blended[1], torch.full((3, 6, 6), float(share * 1 + (1 - share) * 0)))
        pieced, shares = mixer(0.0, 1.0, 8)(images, labels)
        assert shares[1, 1] == pytest.approx((pieced[1] == 1).float().mean().item())
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        same, shares = mixer(0.0, 0.0, 8)(images, labels)
        assert torch.equal(same, images) and torch.equal(shares, torch.eye(8))

    def test_parts_belong_to_positions(self):
        crops = ImageDataset(few("digits:first", 4), 8, crop="resized", flip=False, seed=0)
        together = crops.get_batch(np.array([0, 9]), np.array([1, 1]))["images"]
        assert together.shape == (2, 3, 8, 8) and not torch.equal(together[0], together[1])
        assert torch.equal(crops.get_batch(np.array([9]), np.array([1]))["images"][0], together[1])
        mirrored = ImageDataset(few("digits:first", 4), 8, crop="resized", flip=True, seed=0)
        both = [part.get_batch(np.arange(20), np.arange(20) % 4)["images"] for part in (crops, mirrored)]
        turned = [bool(torch.equal(one.flip(-1), other)) for one, other in zip(*both, strict=True)]
        assert 4 < sum(turned) < 16 and all(torch.equal(both[0][i], both[1][i]) for i in range(20) if not turned[i])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": "left"}, "crop 'left' is unknown"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"min_learning_rate": 0.1}, "lies above the peak"),
        ({"warmup_epochs": 100.0}, "must be fewer than the 100 epochs"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ({"mixup": -1.0}, "mixup must be at least 0"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        FinetuneConfig(**wrong)


def test_bad_requests_leave_nothing_behind(tiny_model, tmp_path):
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        few("digits", 1).load(0).save(photos / name / "0.png")
    for data, config, message in (
        ("digits:first", replace(QUICK, layer=2), "layer 2 is not there; the model has 1 blocks"),
        (f"folder:{photos}", QUICK, "the training set has 2 classes, the test set has 10"),
        ("digits:third", QUICK, "part 'third' is unknown"),
        ("digits:first", replace(QUICK, learning_rate=1e30), "the loss is nan"),
    ):
        with pytest.raises(UserError, match=message):
            finetune_folder(tiny_model, data, "digits:second", tmp_path / "out", config=config, device="cpu", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    with pytest.raises(UserError, match="already holds"):
        finetune_folder(tiny_model, "digits:first", "digits:second", photos, config=QUICK, show_progress=False)


def test_a_model_without_a_null_label_is_refused(tiny_tokenizer):
    generator = LlamaGen(**SIZES, mlp_multiple_of=8, class_dropout=0.0).eval()
    with pytest.raises(UserError, match="without a null label"):
        TrunkClassifier(generator, load_tokenizer(tiny_tokenizer), layer=1, num_classes=10)
