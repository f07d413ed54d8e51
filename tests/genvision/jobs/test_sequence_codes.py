"""Tokens that are no grid, all the way: a TiTok, its codes, a LlamaGen on the sequence, images."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genvision.cli import main
from genvision.errors import UserError
from genvision.models.llamagen import LlamaGen
from genvision.pipeline import ImagePipeline
from genvision.tokenizers.titok import TiTok

TITOK = {
    "stage": "tokenizer",
    "data": {"spec": "digits", "image_size": 8, "flip": False, "num_workers": 0},
    "model": {
        "name": "titok",
        "patch_size": 2,
        "num_latent_tokens": 5,
        "codebook_size": 16,
        "token_dim": 4,
        **{f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("dim", 16), ("depth", 1), ("heads", 2))},
    },
    "optim": {"lr": 0.01},
    "train": {"num_steps": 60, "batch_size": 16, "ema_decays": [], "preview_every": 0},  # so many that other codes are other images
}
LLAMAGEN = {
    "stage": "generator",
    "model": {"name": "llamagen", "hidden_dim": 32, "depth": 1, "num_heads": 2, "mlp_multiple_of": 8, "class_dropout": 0.5},
    "train": {"num_steps": 3, "batch_size": 16, "ema_decays": [], "preview_every": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")

    def train(name, config, *words):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        main(["train", "--config", str(folder / f"{name}.yaml"), "--output_dir", str(folder / name), *words])
        return folder / name / "model"

    tokenizer = train("titok", TITOK)
    main(["encode", "--tokenizer", str(tokenizer), "--data", "digits", "--out", str(folder / "codes"), "--workers", "0"])
    return train("gen", LLAMAGEN, "--tokenizer", str(tokenizer), "--data.spec", f"encoded:{folder / 'codes'}")


def test_images_are_drawn_from_a_sequence(model, tmp_path):
    pipeline = ImagePipeline.from_pretrained(model)
    assert pipeline.generator.code_shape == (5,) and pipeline.image_size == 8
    output = pipeline([3, 1, 4, 1], seed=7, guidance_scale=1.5)
    assert output.codes.shape == (4, 5) and output.images[0].size == (8, 8)
    main(["sample", "--model", str(model), "--num", "4", "--classes", "3,1,4", "--seed", "7", "--out", str(tmp_path / "images")])
    assert np.asarray(Image.open(tmp_path / "images/000000.png")).shape == (8, 8, 3)
    alone = torch.cat([pipeline([label], seed=7, indices=[i], guidance_scale=1.5).codes for i, label in enumerate([3, 1, 4, 1])])
    assert torch.equal(alone, output.codes)


def test_the_same_files_whatever_the_batch_size(model, tmp_path):
    for size in ("1", "3", "8"):
        main(["sample", "--model", str(model), "--num", "8", "--guidance", "2", "--batch-size", size, "--out", str(tmp_path / size)])
    files = [{path.name: path.read_bytes() for path in (tmp_path / size).iterdir()} for size in ("1", "3", "8")]
    assert len(files[0]) == 8 + 2 and files[0] == files[1] == files[2]
    assert len({content for name, content in files[0].items() if name.endswith(".png")}) == 8  # not one image eight times


def test_codes_may_be_made_while_training(model, tmp_path):
    tokenizer, out = model.parents[1] / "titok" / "model", tmp_path / "gen"
    (tmp_path / "gen.yaml").write_text(yaml.safe_dump(LLAMAGEN | {"data": {"spec": "digits", "flip": False, "num_workers": 0}}))
    main(["train", "--config", str(tmp_path / "gen.yaml"), "--tokenizer", str(tokenizer), "--output_dir", str(out)])
    assert ImagePipeline.from_pretrained(out / "model").generator.code_shape == (5,)
    assert (out / "previews" / "step_00000003.png").is_file()


def test_latents_are_refused(tmp_path, capsys):
    options = {name: value for name, value in TITOK["model"].items() if name not in ("name", "codebook_size")}
    TiTok(image_size=8, quantize_mode="vae", **options).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "gen.yaml").write_text(yaml.safe_dump(LLAMAGEN | {"data": {"spec": "digits"}}))
    words = ["--config", str(tmp_path / "gen.yaml"), "--tokenizer", str(tmp_path / "tokenizer"), "--output_dir", str(tmp_path / "gen")]
    with pytest.raises(SystemExit) as stop:
        main(["train", *words])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "llamagen needs a tokenizer with a codebook" in error.splitlines()[-1]
    assert not (tmp_path / "gen").exists()


def test_no_part_of_an_image_is_kept_in_a_sequence(model, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    words = ["sample", "--model", str(model), "--num", "1", "--complete", str(tmp_path / "image.png"), "--out", str(tmp_path / "o.png")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "--complete: the tokens of this model are no grid" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_cached_and_parallel_logits_agree_on_a_sequence():
    network = LlamaGen(codebook_size=11, sequence_length=6, hidden_dim=16, depth=2, num_heads=2, num_classes=3, mlp_multiple_of=8).eval()
    torch.nn.init.normal_(network.head.weight)
    codes, labels = torch.randint(11, (2, 6)), torch.tensor([0, 2])
    with torch.inference_mode():
        whole = network(codes[:, :-1], labels)
        logits, cache = network.start(labels)
        parts = [logits] + [network.extend(codes[:, i], cache) for i in range(5)]
    torch.testing.assert_close(torch.stack(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_a_grid_and_a_sequence_of_equal_length_are_not_mixed(model):
    pipeline = ImagePipeline.from_pretrained(model)
    grid = LlamaGen(codebook_size=16, grid_size=2, hidden_dim=16, depth=1, num_heads=2, num_classes=10, mlp_multiple_of=8)
    with pytest.raises(UserError, match=r"codes of shape \[2, 2\], the tokenizer reads \[5\]"):
        ImagePipeline(grid, pipeline.tokenizer, pipeline.sampler, pipeline.label_names)
    with pytest.raises(UserError, match="sequence_length must be at least 1, got 0"):
        LlamaGen(sequence_length=0)
