import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import MODELS, output, tiny

from genvision.config import MODELS as NAMES
from genvision.config import save_config
from genvision.convert import load_official
from genvision.errors import UserError
from genvision.pipeline import save_parts
from genvision.training.config import DataConfig, LoopConfig, OptimConfig, TrainConfig
from genvision.training.state import CheckpointFolder, describe
from genvision.training.warm_rules import FAMILIES
from genvision.training.warm_start import warm_start
from parity_fixtures import Fixture

LABELS = {
    "llamagen": "condition_embed.table.weight",
    "rar": "label_embed.table.weight",
    "maskgit": "label_embed.table.weight",
    "maskgit_mlm": "label_embed.table.weight",
    "dit": "label_embed.table.weight",
}
ANIMALS = ["ant", "bee", "cat", "dog", "eel"]


def saved(folder, name, label_names=None, **changes):
    """A trained model, and the pipeline folder that holds it."""
    model = tiny(name, seed=1, **changes)
    save_parts(folder, {"generator" if hasattr(model, "code_shape") else "tokenizer": model}, label_names)
    return model


def start_of(name, folder, **changes):
    """A new model, its tensors before it began with that folder, and the report."""
    label_names, tokenizer = changes.pop("label_names", None), changes.pop("tokenizer", None)
    model = tiny(name, **changes)
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return model, own, warm_start(model, folder, label_names=label_names, tokenizer=tokenizer)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_begins_bit_for_bit_as_the_other_ended(name, tmp_path):
    trained = saved(tmp_path, name)
    model, own, report = start_of(name, tmp_path)
    for key, tensor in trained.state_dict().items():
        assert model.state_dict()[key].equal(tensor), key
    assert set(report.copied) == set(own) and not report.notes
    assert report.summary().endswith(f": {len(own)} tensors as they are")


@pytest.mark.parametrize("name", LABELS)
def test_classes_keep_their_rows_by_name(name, tmp_path):
    trained = saved(tmp_path, name, ANIMALS)
    model, own, report = start_of(name, tmp_path, num_classes=4, label_names=["dog", "fox", "bee", "gnu"])
    table, old = model.state_dict()[LABELS[name]], trained.state_dict()[LABELS[name]]
    assert table[[0, 2, 4]].equal(old[[3, 1, 5]])  # the last row is that of the null class
    assert table[[1, 3]].equal(own[LABELS[name]][[1, 3]])
    if name == "maskgit_mlm":  # whose head predicts classes, too, behind 16 codes and the mask
        bias, old, fresh = model.state_dict()["to_logits.bias"], trained.state_dict()["to_logits.bias"], own["to_logits.bias"]
        assert bias[:17].equal(old[:17]) and bias[[17, 19, 21]].equal(old[[20, 18, 22]]) and bias[[18, 20]].equal(fresh[[18, 20]])
    assert "classes: 2 of 4 are known by name and keep their rows, 2 are new" in report.summary()
    assert set(report.copied) | set(report.relabelled) == set(own)


def test_of_classes_with_one_name_the_second_keeps_the_row_of_the_second(tmp_path):
    trained = saved(tmp_path, "dit", ["crane", "dog", "crane", "cat", "eel"]).label_embed.table.weight
    model, _, report = start_of("dit", tmp_path, label_names=["crane", "dog", "crane", "cat", "eel"])
    assert model.label_embed.table.weight.equal(trained) and not report.relabelled
    model, own, report = start_of("dit", tmp_path, label_names=["eel", "crane", "crane", "crane", "dog"])
    table = model.label_embed.table.weight
    assert table[[0, 1, 2, 4]].equal(trained[[4, 0, 2, 1]]) and table[3].equal(own[LABELS["dit"]][3])
    assert report.with_new_rows == report.relabelled == (LABELS["dit"],)


def test_the_words_of_mage_keep_codes_classes_null_and_mask(tmp_path):
    trained = saved(tmp_path, "mage", ANIMALS).state_dict()["words.weight"]
    model, own, report = start_of("mage", tmp_path, num_classes=3, class_slots=6, null_slot=4, label_names=["fox", "eel", "ant"])
    words = model.state_dict()["words.weight"]  # 16 codes; fox, eel, ant, two unused slots around the null class; mask
    assert words[:16].equal(trained[:16]) and words[[17, 18, 20, 22]].equal(trained[[20, 16, 21, 22]])
    assert words[[16, 19, 21]].equal(own["words.weight"][[16, 19, 21]])
    assert report.relabelled == ("words.weight",)


def test_a_mage_without_classes_is_a_start_for_one_with_classes(tmp_path):
    trained = saved(tmp_path, "mage", ["image"], num_classes=1, class_dropout=1.0, class_slots=9, null_slot=6).state_dict()["words.weight"]
    model, own, report = start_of("mage", tmp_path, label_names=ANIMALS)
    words = model.state_dict()["words.weight"]
    assert words[:16].equal(trained[:16]) and words[[21, 22]].equal(trained[[22, 25]])
    assert words[16:21].equal(own["words.weight"][16:21])
    assert "classes: 5 new ones in place of 0" in report.summary()


@pytest.mark.parametrize(("theirs", "ours"), [(None, ANIMALS), (ANIMALS, None), (ANIMALS, ["a", "b", "c", "d", "e"])])
def test_as_many_classes_keep_their_numbers_where_names_say_nothing(theirs, ours, tmp_path):
    trained = saved(tmp_path, "dit", theirs)
    model, _, report = start_of("dit", tmp_path, label_names=ours)
    assert model.label_embed.table.weight.equal(trained.label_embed.table.weight)
    assert ("each with the row of its number" in report.summary()) == (None not in (theirs, ours))


def test_another_number_of_classes_without_names_starts_new(tmp_path):
    trained = saved(tmp_path, "dit")
    model, own, report = start_of("dit", tmp_path, num_classes=7)
    table = model.label_embed.table.weight
    assert table[:7].equal(own[LABELS["dit"]][:7]) and table[7].equal(trained.label_embed.table.weight[5])
    assert "classes: 7 new ones in place of 5" in report.summary()


@pytest.mark.parametrize("name", LABELS)
def test_a_null_class_may_be_missing_on_either_side(name, tmp_path):
    with_null, without = saved(tmp_path / "with", name), saved(tmp_path / "without", name, class_dropout=0.0)
    model, _, _ = start_of(name, tmp_path / "with", class_dropout=0.0)
    assert model.state_dict()[LABELS[name]].equal(with_null.state_dict()[LABELS[name]][:5])
    model, own, _ = start_of(name, tmp_path / "without")
    assert model.state_dict()[LABELS[name]][:5].equal(without.state_dict()[LABELS[name]])
    assert model.state_dict()[LABELS[name]][5].equal(own[LABELS[name]][5])


GRIDS = {
    "rar": {"position_table": 2, "next_position_table": 0},
    "maskgit": {"position_embed": 0},
    "maskgit_mlm": {"position_embed": 1},
    "mage": {"positions": 1, "decoder_positions": 1},
}


def bicubic(rows, old, new):
    """Rows [h w, C] of a grid or a line for another one, in PyTorch's words."""
    return F.interpolate(rows.T.reshape(1, -1, *old), new, mode="bicubic").flatten(2)[0].T


@pytest.mark.parametrize("name", GRIDS)
def test_tables_of_positions_are_interpolated_behind_their_prefix(name, tmp_path):
    trained = saved(tmp_path, name).state_dict()
    model, own, report = start_of(name, tmp_path, grid_size=6)
    resized = {**GRIDS[name]}
    for key, prefix in resized.items():
        table = model.state_dict()[key]
        assert table[:prefix].equal(trained[key][:prefix]) and len(table) == prefix + 36
        torch.testing.assert_close(table[prefix:], bicubic(trained[key][prefix:], (4, 4), (6, 6)))
    if name == "rar":  # the first, second, ... place of an order is no place of the grid
        torch.testing.assert_close(model.state_dict()["place_table"][2:], bicubic(trained["place_table"][2:], (1, 16), (1, 36)))
        resized["place_table"] = 2
    assert set(report.resized) == set(resized) and set(report.copied) == set(own) - set(resized)
    assert output(model).isfinite().all()


def test_a_table_of_a_sequence_is_interpolated_along_it(tmp_path):
    trained = saved(tmp_path, "mage", sequence_length=8).state_dict()
    model, _, _ = start_of("mage", tmp_path, sequence_length=12)
    torch.testing.assert_close(model.state_dict()["positions"][1:], bicubic(trained["positions"][1:], (1, 8), (1, 12)))


@pytest.mark.parametrize(("name", "size"), [("llamagen", dict(grid_size=6)), ("dit", dict(input_size=6, use_rope=True))])
def test_positions_that_are_computed_follow_the_new_size(name, size, tmp_path):
    trained = saved(tmp_path, name, **({"use_rope": True} if "use_rope" in size else {}))
    model, own, report = start_of(name, tmp_path, **size)
    fresh = tiny(name, **size)
    assert set(report.copied) == set(own) and model.rotary.equal(fresh.rotary) and len(model.rotary) > len(trained.rotary)


@pytest.mark.parametrize("table", ["learned", "dec", "sincos1d", "sincos2d"])
def test_a_vitok_begins_as_the_other_works_at_the_new_size(table, tmp_path):
    trained = saved(tmp_path, "vitok", position_embedding=table)
    model, _, _ = start_of("vitok", tmp_path, position_embedding=table, image_size=12)
    images = torch.rand(1, 3, 12, 12) * 2 - 1
    torch.testing.assert_close(model.encode(images), trained.encode(images))
    torch.testing.assert_close(model.decode(model.encode(images)), trained.decode(trained.encode(images)))


def test_titoks_patches_are_interpolated_and_its_latent_tokens_stay(tmp_path):
    trained = saved(tmp_path, "titok").state_dict()
    model, own, report = start_of("titok", tmp_path, image_size=12)
    for side in ("encoder", "decoder"):
        table, old = model.state_dict()[f"{side}.position_embed"], trained[f"{side}.position_embed"]
        assert table[0].equal(old[0])
        torch.testing.assert_close(table[1:], bicubic(old[1:], (2, 2), (3, 3)))
    assert set(report.copied) == set(own) - set(report.resized)


def test_parts_of_training_may_come_and_go(tmp_path):
    aligned = dict(align_depth=1, align_dims=(3,), align_hidden=4)
    saved(tmp_path / "plain", "dit"), saved(tmp_path / "aligned", "dit", **aligned)
    model, own, report = start_of("dit", tmp_path / "plain", scale_conditioned=True, **aligned)
    assert {name.split(".")[0] for name in report.new} == {"projectors", "scale_embed"}
    assert all(model.state_dict()[key].equal(own[key]) for key in report.new)
    _, _, report = start_of("dit", tmp_path / "aligned")
    assert {name.split(".")[0] for name in report.dropped} == {"projectors"}
    _, _, report = start_of("dit", tmp_path / "aligned", align_depth=2, align_dims=(5,), align_hidden=4)  # of another frozen network
    assert set(report.new) == {"projectors.0.fc3.weight", "projectors.0.fc3.bias"}


def test_a_diffusion_may_become_a_flow_and_says_so(tmp_path):
    saved(tmp_path, "dit")
    _, _, report = start_of("dit", tmp_path, path="linear", prediction="velocity")
    assert "model.path was ddpm, now it is linear; model.prediction was noise, now it is velocity" in report.summary()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rar", dict(hidden_dim=32), r"other options, model\.hidden_dim 16 where here it is 32; set them so, or leave init_from out"),
        ("rar", dict(depth=3, num_heads=4), r"model\.depth 2 where here it is 3, model\.num_heads 2 where here it is 4"),
        ("rar", dict(mlp_dim=48), r"other options, model\.mlp_dim null where here it is 48"),
        ("llamagen", dict(rope_base=100.0), r"model\.rope_base 10000\.0 where here it is 100\.0"),
        ("mage", dict(decoder_depth=2), r"model\.decoder_depth 1 where here it is 2"),
        ("maskgit", dict(codebook_size=32), r"the weights are for 16 codes, the tokenizer has 32; give the tokenizer that they were"),
        ("mage", dict(codebook_size=8), r"the weights are for 16 codes, the tokenizer has 8"),
        ("dit", dict(in_channels=4), r"the weights are for 2 channels, the tokenizer has 4"),
        ("llamagen", dict(sequence_length=16), r"the weights are for codes that are a grid, the tokenizer makes a sequence"),
        ("vq", dict(codebook_size=32), r"model\.codebook_size 16 where here it is 32"),
        (
            "vq",
            dict(quantizer_options={"update": "ema"}),
            r"2 tensors do not fit, quantize\.cluster_size is missing in the weights, 16 here",
        ),
        ("kl", dict(block_out_channels=(4, 16)), r"model\.block_out_channels \[4, 8\] where here it is \[4, 16\]"),
        ("titok", dict(num_latent_tokens=5), r"model\.num_latent_tokens 3 where here it is 5"),
        ("vitok", dict(code_width=4), r"model\.code_width 2 where here it is 4"),
    ],
)
def test_what_differs_is_named(name, changes, message, tmp_path):
    saved(tmp_path, name)
    model = tiny(name, **changes)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"^init_from {tmp_path}: .*{message}") as error:
        warm_start(model, tmp_path)
    assert "\n" not in str(error.value)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_a_folder_that_is_no_start_is_refused(tmp_path):
    saved(tmp_path / "rar", "rar")
    (tmp_path / "empty").mkdir()
    for folder, message in {
        "rar": "holds a RAR, this run trains a DiT; give a model of the same family",
        "empty": "holds no generator and no run",
        "nowhere": "no such folder",
    }.items():
        with pytest.raises(UserError, match=f"^init_from {tmp_path / folder}: {message}"):
            warm_start(tiny("dit"), tmp_path / folder)


def test_a_folder_may_stand_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trained = saved(tmp_path / "dit", "dit")
    model, _, _ = start_of("dit", "~/dit")
    assert model.label_embed.table.weight.equal(trained.label_embed.table.weight)
    run_config(tmp_path / "run", (), tokenizer="~/vq")
    checkpoint(tmp_path / "run", 1, tiny("rar").state_dict(), "model")
    save_parts(tmp_path / "vq", {"tokenizer": tiny("vq", seed=1)})
    with pytest.raises(UserError, match=rf"was trained on the codes of {tmp_path}/vq, which makes others than this run's tokenizer"):
        start_of("rar", "~/run", tokenizer=tiny("vq", seed=2))


def test_every_model_that_can_be_trained_is_declared():
    assert {family.model_name: kind for kind, family in FAMILIES.items()} == {name: kind for name, (_, _, kind) in NAMES.items()}


def checkpoint(run, step, tensors, name):
    """A whole checkpoint of a run."""
    folder = CheckpointFolder(run / "checkpoints", keep=9)
    part = folder.begin(step)
    save_file(tensors, part / f"{name}.safetensors")
    folder.finish(step, {}, {f"{name}.safetensors": describe(part / f"{name}.safetensors")})
    return folder.path(step)


def run_config(run, ema_decays, stage="generator", tokenizer=None):
    _, options = MODELS["rar"]
    given = {name: value for name, value in options.items() if name not in ("codebook_size", "grid_size", "num_classes")}
    config = TrainConfig(
        stage=stage,
        output_dir=str(run),
        tokenizer=tokenizer,
        model={"name": "rar", "num_classes": None, "mlp_dim": None, "class_dropout": 0.1, **given},
        data=DataConfig(spec="digits"),
        optim=OptimConfig(),
        train=LoopConfig(num_steps=9, ema_decays=ema_decays),
    )
    save_config(config, run / "config.yaml")


def test_a_run_that_is_not_finished_gives_the_first_average_of_its_newest_whole_checkpoint(tmp_path):
    run_config(tmp_path, (0.9, 0.99))
    models = {step: tiny("rar", seed=step).state_dict() for step in (1, 2, 3)}
    folders = {step: checkpoint(tmp_path, step, state, "ema_0.9") for step, state in models.items()}
    (folders[3] / "ema_0.9.safetensors").write_bytes(b"cut short")
    model, _, report = start_of("rar", tmp_path)
    assert all(model.state_dict()[key].equal(tensor) for key, tensor in models[2].items())
    assert report.summary().startswith(f"init_from {tmp_path} (average 0.9 of step 2): ")
    assert folders[3].is_dir()  # that run may still be on
    model, _, _ = start_of("rar", folders[1], grid_size=5, num_classes=7)
    assert model.token_embed.weight.equal(models[1]["token_embed.weight"])
    with pytest.raises(UserError, match=r"the weights are for 16 codes, the tokenizer has 8"):
        start_of("rar", tmp_path, codebook_size=8)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        start_of("rar", folders[3])


def test_a_run_without_averages_gives_its_weights_and_a_finished_one_its_model(tmp_path):
    run_config(tmp_path, ())
    newest = tiny("rar", seed=3).state_dict()
    checkpoint(tmp_path, 3, newest, "model")
    model, _, _ = start_of("rar", tmp_path)
    assert model.head.linear.weight.equal(newest["head.linear.weight"])
    trained = saved(tmp_path / "model", "rar", ANIMALS)
    model, _, report = start_of("rar", tmp_path, label_names=ANIMALS[::-1])
    assert model.label_embed.table.weight[:5].equal(trained.label_embed.table.weight[:5].flip(0))
    assert report.relabelled == ("label_embed.table.weight",) and not report.with_new_rows


def test_a_run_of_another_stage_or_with_adapters_or_without_a_checkpoint_is_refused(tmp_path):
    run_config(tmp_path, ())
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="the run is not finished and has no whole checkpoint yet"):
        start_of("rar", tmp_path)
    folder = checkpoint(tmp_path, 1, {"head.linear.base_layer.weight": torch.zeros(1)}, "model")
    with pytest.raises(UserError, match=r"holds adapters \(lora\) beside their base; let that run finish"):
        start_of("rar", tmp_path)
    run_config(tmp_path, (), stage="tokenizer")
    with pytest.raises(UserError, match="is the run of a tokenizer, a generator is needed"):
        start_of("rar", folder)


OFFICIAL = {
    "llamagen-gpt": ("llamagen_gpt_c2i", {"grid_size"}),
    "rar": ("rar", {"grid_size"}),
    "halton-maskgit": ("halton_maskgit", {"grid_size"}),
    "mage": ("mage_pretrain", {"grid_size"}),
    "dit": ("dit_forward", {"input_size"}),
}


@pytest.mark.parametrize("family", OFFICIAL)
def test_an_imported_official_model_is_a_start_for_other_classes_at_another_resolution(family, tmp_path):
    name, size = OFFICIAL[family]
    fixture = Fixture(name)
    official = load_official(family, fixture.state, fixture.config)
    save_parts(tmp_path, {"generator": official})
    options = {key: value for key, value in dict(official.config).items() if not key.startswith("_")}
    options |= {key: 2 * options[key] for key in size} | {"num_classes": 3, "class_dropout": 0.1}
    options |= {"class_slots": None, "null_slot": None} if family == "mage" else {}
    model = type(official)(**options)
    report = warm_start(model, tmp_path, label_names=ANIMALS[:3])
    changed = {*report.resized, *report.relabelled}
    assert not report.new and not report.dropped and all(re.search("table|embed|positions|words", key) for key in changed)
    for key, tensor in official.state_dict().items():
        assert key in changed or model.state_dict()[key].equal(tensor), key
    assert f"classes: 3 new ones in place of {0 if family == 'mage' else official.num_classes}" in report.summary()


def test_the_codes_of_another_tokenizer_are_refused(tmp_path):
    saved(tmp_path, "rar")
    first, second = tiny("vq", seed=1), tiny("vq", seed=2)
    save_parts(tmp_path, {"tokenizer": first})
    _, _, report = start_of("rar", tmp_path, tokenizer=first)
    assert report.copied
    with pytest.raises(UserError, match=rf"was trained on the codes of {tmp_path}/tokenizer, which makes others than this run's tokenizer"):
        start_of("rar", tmp_path, tokenizer=second)
    assert start_of("rar", tmp_path / "generator", tokenizer=second)[2].copied
    with torch.no_grad():
        first.decoder.conv_out.weight.zero_()  # a decoder that was trained on makes the same codes
    assert start_of("rar", tmp_path, tokenizer=first)[2].copied


def test_latents_of_another_scale_are_refused_and_the_same_of_larger_images_are_not(tmp_path):
    saved(tmp_path, "dit", in_channels=4)
    save_parts(tmp_path, {"tokenizer": tiny("kl")})
    assert start_of("dit", tmp_path, in_channels=4, input_size=8, tokenizer=tiny("kl", image_size=16))[2].copied
    with pytest.raises(UserError, match="which makes others than this run's tokenizer"):
        start_of("dit", tmp_path, in_channels=4, tokenizer=tiny("kl", latent_std=5.0))
