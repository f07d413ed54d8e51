"""Official checkpoints: every published size has exactly our tensors, every container is read, and nothing in a file is run."""

import argparse
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.cli import main
from genvision.convert import FAMILIES, load_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from genvision.jobs.import_official import import_checkpoint
from genvision.pipeline import ImagePipeline
from genvision.presets import PRESETS, Preset
from parity_fixtures import FOLDER, Fixture, manifest

MANIFESTS = sorted(
    {path.stem.removeprefix("manifest_") for family in ("llamagen", "taming") for path in FOLDER.glob(f"manifest_{family}_*.json")}
    - {"llamagen_patchgan"}  # a discriminator
)


def family_and_config(recorded: dict) -> tuple[str, dict]:
    """What `load_official` takes, from the recorded arguments of the original."""
    config = dict(recorded["config"])
    if "ddconfig" in config:
        return "taming-vqgan", config
    if "ch_mult" in config:
        multipliers = config.pop("ch_mult")
        return "llamagen-vq", config | {"encoder_ch_mult": multipliers, "decoder_ch_mult": multipliers}
    return "llamagen-gpt", config


@pytest.fixture(scope="module")
def gpt() -> Fixture:
    return Fixture("llamagen_gpt_c2i")


@pytest.fixture(scope="module")
def vq() -> Fixture:
    return Fixture("llamagen_vq")


def equal_states(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestSizes:
    """On the meta device: shapes without memory, so that 3 billion parameters cost nothing."""

    @pytest.mark.parametrize("name", MANIFESTS)
    def test_our_module_has_exactly_the_recorded_tensors(self, name):
        recorded = manifest(name)
        family, config = family_and_config(recorded)
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in recorded["tensors"].items()}
            module = load_official(family, state, config)  # strict: refuses what is missing, left over or of another shape
        assert sum(p.numel() for p in module.parameters()) == recorded["params"]
        ours = sum(tensor.numel() for tensor in module.state_dict().values())
        left_behind = ("quantize.codebook_used", "loss.")
        theirs = sum(math.prod(shape) for key, shape in recorded["tensors"].items() if not key.startswith(left_behind))
        assert ours == theirs
        assert all(p.is_meta for p in module.parameters())

    @pytest.mark.parametrize("name", ["llamagen_gpt_b_c2i_256", "llamagen_vq8"])
    def test_one_tensor_less_or_more_is_noticed(self, name):
        recorded = manifest(name)
        family, config = family_and_config(recorded)
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in recorded["tensors"].items()}
            for key in list(state)[::40]:
                less = {other: tensor for other, tensor in state.items() if other != key}
                with pytest.raises(UserError, match="1 tensors do not fit"):
                    load_official(family, less, config)
            with pytest.raises(UserError, match="unexpected surprise 2x3"):
                load_official(family, state | {"surprise": torch.empty(2, 3)}, config)


class TestContainers:
    @pytest.fixture
    def other(self, gpt) -> dict:
        """The same tensors with other values."""
        return {name: tensor + 1 for name, tensor in gpt.state.items()}

    @pytest.mark.parametrize("container", [None, "model", "ema", "module", "state_dict"])
    def test_weights_are_found_in_every_official_container(self, gpt, tmp_path, container):
        extras = {
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "steps": 300_000,
            "args": argparse.Namespace(gpt_model="GPT-B", lr=1e-4),
        }
        torch.save(gpt.state if container is None else {container: gpt.state, **extras}, tmp_path / "file.pt")
        assert equal_states(read_state_dict(tmp_path / "file.pt"), gpt.state)

    def test_the_weights_that_are_asked_for_are_taken(self, gpt, other, tmp_path):
        torch.save({"ema": other, "model": gpt.state, "steps": 3}, tmp_path / "file.pt")
        assert equal_states(read_state_dict(tmp_path / "file.pt", "ema"), other)
        assert equal_states(read_state_dict(tmp_path / "file.pt", "model"), gpt.state)
        assert equal_states(read_state_dict(tmp_path / "file.pt"), gpt.state)
        with pytest.raises(UserError, match="has no 'module' weights; it holds model, ema"):
            read_state_dict(tmp_path / "file.pt", "module")

    def test_old_and_new_file_formats_are_read(self, gpt, tmp_path):
        from safetensors.torch import save_file

        torch.save(gpt.state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        save_file({name: tensor.contiguous() for name, tensor in gpt.state.items()}, tmp_path / "new.safetensors")
        assert equal_states(read_state_dict(tmp_path / "old.pth"), gpt.state)
        assert equal_states(read_state_dict(tmp_path / "new.safetensors"), gpt.state)

    def test_logs_and_tables_beside_the_weights_are_left_behind(self, gpt, vq):
        generator = load_official("llamagen-gpt", gpt.state | {"freqs_cis": torch.zeros(17, 8, 2)}, gpt.config)
        assert equal_states(generator.state_dict(), load_official("llamagen-gpt", gpt.state, gpt.config).state_dict())
        tokenizer = load_official("llamagen-vq", vq.state | {"quantize.codebook_used": torch.zeros(65536)}, vq.config)
        assert equal_states(tokenizer.state_dict(), vq.state)
        assert not generator.training and not tokenizer.training

    def test_weights_of_half_precision_become_float32(self, gpt):
        half = {name: tensor.bfloat16() for name, tensor in gpt.state.items()}
        module = load_official("llamagen-gpt", half, gpt.config)
        assert module.dtype == torch.float32
        assert torch.equal(module.head.weight, gpt.state["output.weight"].bfloat16().float())


class TestDamage:
    def test_code_in_a_pickle_is_not_run(self, gpt, tmp_path):
        witness = tmp_path / "witness"

        class Malicious:
            def __reduce__(self):
                return os.mkdir, (str(witness),)

        torch.save({"model": gpt.state, "args": Malicious()}, tmp_path / "zip.pt")
        torch.save({"model": gpt.state, "args": Malicious()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
        for name in ("zip.pt", "old.pt", "bare.pt"):
            with pytest.raises(UserError, match=f"{name}: not a readable weight file") as caught:
                read_state_dict(tmp_path / name)
            assert "\n" not in str(caught.value)
        assert not witness.exists()
        pickle.loads((tmp_path / "bare.pt").read_bytes())  # the proof that it would have been
        assert witness.exists()

    @pytest.mark.parametrize("kind", ["new.pt", "old.pt", "x.safetensors"])
    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
    def test_a_truncated_file_is_named(self, gpt, tmp_path, kind, keep):
        from safetensors.torch import save_file

        path = tmp_path / kind
        if kind.endswith(".pt"):
            torch.save(gpt.state, path, _use_new_zipfile_serialization=kind == "new.pt")
        else:
            save_file({name: tensor.contiguous() for name, tensor in gpt.state.items()}, path)
        os.truncate(path, int(path.stat().st_size * keep))
        with pytest.raises(UserError, match=f"{kind}: not a readable weight file") as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)

    def test_files_that_hold_no_weights_are_named(self, tmp_path):
        torch.save([torch.zeros(3)], tmp_path / "list.pt")
        torch.save({"steps": 3}, tmp_path / "none.pt")
        (tmp_path / "page.pt").write_text("<html>404</html>")
        with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
            archive.writestr("readme.txt", "hello")
        for name, expected in (
            ("list.pt", "holds a list"),
            ("none.pt", "holds no tensors"),
            ("page.pt", "not a readable weight file"),
            ("archive.pt", "not a readable weight file"),
            ("nothing.pt", "no such file"),
        ):
            with pytest.raises(UserError, match=f"{name}: {expected}"):
                read_state_dict(tmp_path / name)

    def test_everything_that_does_not_fit_is_listed_at_once(self, gpt):
        state = dict(gpt.state)
        del state["norm.weight"], state["layers.1.attention.wo.weight"]
        state["output.weight"] = torch.zeros(3, 64)
        state["tok_embeddings.weight"] = torch.zeros(5)
        state["layers.2.attention.wo.weight"] = torch.zeros(64, 64)
        state["banana"] = torch.zeros(())
        with pytest.raises(UserError) as caught:
            load_official("llamagen-gpt", state, gpt.config, source="x.pt")
        message = str(caught.value)
        assert message.startswith("x.pt: 6 tensors do not fit LlamaGen: ") and "\n" not in message
        for problem in (
            "missing norm.weight 64",
            "missing blocks.1.attention.proj.weight 64x64",
            "unexpected blocks.2.attention.proj.weight 64x64",
            "unexpected banana scalar",
            "head.weight is 3x64, expected 64x64",
            "token_embed.weight is 5, expected 64x64",
        ):
            assert problem in message

    def test_an_unknown_family_is_told_the_known(self):
        with pytest.raises(UserError, match=f"family 'vqgan' is unknown; known are {', '.join(sorted(FAMILIES))}"):
            load_official("vqgan", {}, {})


class TestImport:
    """`genvision import`, with presets of the fixtures' sizes beside the published ones."""

    @pytest.fixture(autouse=True)
    def tiny_presets(self, gpt, vq, monkeypatch):
        common = {"million_parameters": 0.1, "source": "nowhere, table 0"}
        tokenizer = Preset(component="tokenizer", family="llamagen-vq", config=vq.config, file="vq.pt", image_size=64, **common)
        generator = Preset(
            component="generator",
            family="llamagen-gpt",
            config=gpt.config,
            file="gpt.pt",
            image_size=64,
            sampler={"guidance_scale": 1.5, "top_k": 10},
            **common,
        )
        small = Preset(
            component="tokenizer", family="llamagen-vq", config=vq.config | {"codebook_size": 32}, file="vq.pt", image_size=64, **common
        )
        monkeypatch.setattr("genvision.presets.PRESETS", PRESETS | {"tiny-vq": tokenizer, "tiny-c2i": generator, "tiny-vq-small": small})

    @pytest.fixture
    def files(self, gpt, vq, tmp_path) -> dict[str, Path]:
        """Files as they were published: the tokenizer with its log of codes, the generator with its rotary table."""
        torch.save({"model": vq.state | {"quantize.codebook_used": torch.zeros(65536)}}, tmp_path / "vq.pt")
        torch.save(
            {"model": gpt.state | {"freqs_cis": torch.zeros(17, 8, 2)}, "steps": 5, "args": argparse.Namespace(lr=1)}, tmp_path / "gpt.pt"
        )
        small = dict(vq.state)
        small["quantize.embedding.weight"] = small["quantize.embedding.weight"][:32]
        torch.save(small, tmp_path / "small.pt")
        return {name: tmp_path / f"{name}.pt" for name in ("vq", "gpt", "small")}

    @pytest.mark.parametrize("order", ["tokenizer first", "generator first"])
    def test_two_imports_make_a_pipeline_that_draws(self, files, gpt, vq, tmp_path, capsys, order):
        out = tmp_path / "model"
        steps = [("tiny-vq", files["vq"], "generator, sampler"), ("tiny-c2i", files["gpt"], "tokenizer")]
        for i, (name, file, missing) in enumerate(steps if order == "tokenizer first" else reversed(steps)):
            main(["import", name, str(file), "--out", str(out)])
            said = capsys.readouterr().out
            assert f"{name} imported" in said and (f"still missing: {missing}" in said if i == 0 else "complete" in said)
        pipeline = ImagePipeline.from_pretrained(out)
        assert pipeline.sampler.config["guidance_scale"] == 1.5 and pipeline.sampler.config["top_k"] == 10
        assert torch.equal(pipeline.generator.head.weight, gpt.state["output.weight"])
        assert torch.equal(pipeline.tokenizer.decoder.conv_out.weight, vq.state["decoder.conv_out.weight"])
        card = (out / "README.md").read_text()
        assert "nowhere, table 0" in card and "imported" in card

        main(["sample", "--model", str(out), "--num", "2", "--out", str(tmp_path / "images")])
        images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").glob("*.png"))]
        assert [image.shape for image in images] == [(64, 64, 3)] * 2
        np.testing.assert_array_equal(images, pipeline([0, 1], output_type="np").images)

    def test_a_component_that_is_there_stays(self, files, tmp_path):
        import_checkpoint("tiny-vq", files["vq"], tmp_path / "model")
        before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="tokenizer: already there"):
            import_checkpoint("tiny-vq-small", files["small"], tmp_path / "model")
        assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()} == before

    def test_a_file_that_does_not_fit_leaves_nothing(self, files, tmp_path):
        for name, file in (("tiny-vq", "gpt"), ("tiny-c2i", "vq"), ("tiny-vq", "small")):
            why = "tensors? do not fit" if file == "small" else f"looks like a checkpoint of llamagen-{file}, not of llamagen-"
            with pytest.raises(UserError, match=f"{file}.pt: .*{why}"):
                import_checkpoint(name, files[file], tmp_path / "model")
            assert not (tmp_path / "model").exists()

    def test_a_tokenizer_of_another_generator_leaves_the_folder_as_it_was(self, files, tmp_path):
        out = tmp_path / "model"
        import_checkpoint("tiny-c2i", files["gpt"], out)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="the generator predicts 64 codes, the tokenizer has 32"):
            import_checkpoint("tiny-vq-small", files["small"], out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert import_checkpoint("tiny-vq", files["vq"], out) == []

    def test_imagenet_classes_get_their_names(self, gpt, tmp_path, monkeypatch):
        state = gpt.state | {"cls_embedding.embedding_table.weight": torch.zeros(1001, 64)}
        torch.save(state, tmp_path / "gpt.pt")
        preset = Preset(
            component="generator",
            family="llamagen-gpt",
            config=gpt.config | {"num_classes": 1000},
            file="gpt.pt",
            image_size=64,
            million_parameters=0.1,
            source="nowhere",
        )
        monkeypatch.setattr("genvision.presets.PRESETS", {"tiny": preset})
        assert import_checkpoint("tiny", tmp_path / "gpt.pt", tmp_path / "model") == ["tokenizer"]
        names = json.loads((tmp_path / "model" / "model_index.json").read_text())["id2label"]
        assert len(names) == 1000
        assert (names["0"], names["207"], names["360"], names["999"]) == ("tench", "golden retriever", "otter", "toilet tissue")
