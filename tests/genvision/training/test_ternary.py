import pytest
import torch
from safetensors.torch import load_file
from started_processes import GATHERED, run
from tiny_models import tiny
from torch import nn
from training_examples import Runs, assert_equal_weights, assert_same_run, weights

from genvision.errors import UserError
from genvision.layers.ternarize import ternarize_linears
from genvision.layers.ternary import own_scale
from genvision.models.llamagen import LlamaGen
from genvision.objectives.next_token import NextToken
from genvision.pipeline import ImagePipeline
from genvision.training.config import OptimConfig
from genvision.training.ema import EMA
from genvision.training.optim import learning_rate
from genvision.training.ternary import TernaryConfig, make_ternary, set_strength
from genvision.training.ternary_stage import TernaryStage

STEPS = 8
RUN = {
    "stage": "generator",
    "seed": 4,
    "model": {"name": "llamagen", "hidden_dim": 16, "depth": 2, "num_heads": 2, "mlp_multiple_of": 8},
    "optim": {"lr": 5.0e-3},
    "ternary": {"measure": "mean", "per_row": True, "warmup_steps": 6},
    "train": {"num_steps": STEPS, "batch_size": 8, "ema_decays": [0.9], "checkpoint_every": 3, "preview_every": 0},
}
LAYERS = {f"blocks.{i}.{name}" for i in range(2) for name in ("attention.qkv", "attention.proj", "mlp.gate", "mlp.up", "mlp.down")}


@pytest.fixture
def train(tmp_path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def on_codes(tiny_tokenizer, tiny_codes) -> dict:
    return {"tokenizer": str(tiny_tokenizer), "data": {"spec": f"encoded:{tiny_codes}", "num_workers": 0}}


@pytest.fixture(scope="module")
def whole(on_codes, tmp_path_factory):
    """Folder of an undisturbed run."""
    return Runs(tmp_path_factory.mktemp("whole"))("whole", RUN | on_codes)


def test_a_run_that_stops_within_the_warm_up_goes_on_bit_for_bit(train, on_codes, whole):
    train("stopped", RUN | on_codes, "--train.num_steps", 4)
    assert_same_run(whole, train("stopped", RUN | on_codes))
    other = train("other", RUN | on_codes, "--ternary.warmup_steps", 5)
    assert any(not tensor.equal(weights(whole)[name]) for name, tensor in weights(other).items())  # it decides about the weights


def test_a_finished_run_leaves_a_plain_model_of_ternary_weights(whole):
    model = ImagePipeline.from_pretrained(whole / "model").generator
    average = load_file(max((whole / "checkpoints").iterdir()) / "ema_0.9.safetensors")
    assert average.keys() == model.state_dict().keys()
    ternary = {name for name, module in model.named_modules() if type(module) is nn.Linear and own_scale(module.weight) is not None}
    assert ternary == LAYERS
    for name, tensor in model.state_dict().items():
        assert tensor.equal(average[name]) == (name.removesuffix(".weight") not in LAYERS)
    assert all(len(model.get_submodule(name).weight.unique()) > 3 for name in LAYERS)  # every row has its own scale
    assert "ternary" in (whole / "model" / "README.md").read_text()


def test_packing_a_finished_model_changes_nothing(whole):
    model = ImagePipeline.from_pretrained(whole / "model").generator
    codes, labels = torch.randint(16, (3, 15)), torch.arange(3)
    before, plain = model(codes, labels), {name: model.get_submodule(name).weight for name in LAYERS}
    assert set(ternarize_linears(model)) == LAYERS
    assert all(model.get_submodule(name).weight.equal(plain[name]) for name in LAYERS)
    torch.testing.assert_close(model(codes, labels), before, rtol=1e-4, atol=1e-5)


def test_a_float_model_can_start_a_ternary_training_and_a_ternary_one_a_float_training(train, on_codes, whole):
    start = train("float", {key: value for key, value in RUN.items() if key != "ternary"} | on_codes, "--train.num_steps", 1)
    went_on = train("ternary", RUN | on_codes, "--init_from", start / "model", "--train.num_steps", 1, "--optim.lr", 0)
    for name, tensor in weights(went_on, "ema_0.9.safetensors").items():
        assert tensor.equal(weights(start, "ema_0.9.safetensors")[name]), name
    train(
        "plain",
        {key: value for key, value in RUN.items() if key != "ternary"} | on_codes,
        "--init_from",
        whole / "model",
        "--train.num_steps",
        1,
    )


def test_two_processes_with_split_weights_train_the_model_of_one(train, on_codes):
    no_dropout = dict.fromkeys(("class_dropout", "token_dropout", "residual_dropout", "mlp_dropout"), 0.0)
    config = RUN | on_codes | {"model": RUN["model"] | no_dropout, "sampler": {"guidance_scale": 1.0}}
    run(train.words("split", config), environment=GATHERED)
    assert_equal_weights(train("whole", config), train.folder / "split", atol=2e-5)
    models = [ImagePipeline.from_pretrained(train.folder / name / "model").generator for name in ("whole", "split")]
    for name in LAYERS:
        one, other = (model.get_submodule(name).weight for model in models)
        assert one.sign().equal(other.sign()) and own_scale(other) is not None


def test_a_toy_learns_nearly_as_well_as_its_float_twin():
    """A fixed sequence for each of five classes, of which a fifth of the tokens is replaced: 1.0 nats a token are left to the best."""
    sequences = torch.randint(16, (5, 16))

    def batch(step, num=32):
        draw = torch.Generator().manual_seed(step)
        labels = torch.randint(5, (num,), generator=draw)
        replaced = torch.rand(num, 16, generator=draw) < 0.2
        return {"codes": sequences[labels].where(~replaced, torch.randint(16, (num, 16), generator=draw)), "labels": labels}

    def trained(ternary: TernaryConfig | None, steps=50) -> float:
        torch.manual_seed(1)
        options = dict(token_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, mlp_multiple_of=8)
        model = LlamaGen(codebook_size=16, grid_size=4, hidden_dim=32, depth=1, num_heads=2, num_classes=5, **options)
        if ternary is not None:
            make_ternary(model, ternary, {})
        optimizer, loss = torch.optim.AdamW(model.parameters()), NextToken(16)
        config = OptimConfig(lr=0.01, warmup_steps=5, schedule="cosine")
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, steps)
            if ternary is not None:
                set_strength(model, ternary.strength(step))
            loss(model, batch(step))["loss"].backward()
            optimizer.step(), optimizer.zero_grad()
        with torch.no_grad():
            return float(loss(model.eval(), batch(1000, 256))["loss"])

    plain = trained(None)
    ternary = trained(TernaryConfig(measure="mean", warmup_steps=10))
    print(f"float {plain:.3f}, ternary {ternary:.3f}")
    assert plain < 1.9  # guessing costs ln 16 = 2.77
    assert ternary < 1.1 * plain


def test_the_average_that_is_called_in_training_is_as_far_as_the_weights():
    model, average = tiny("dit"), tiny("dit")
    for network in (model, average):
        ternarize_linears(network, packed=False)
    averages = EMA(model, (0.9,), network=average)
    stage = TernaryStage(model, NextToken(16), nn.Identity(), ternary=TernaryConfig(measure="mean", warmup_steps=4))
    for step, wanted in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        stage.before_step(step, averages)
        assert {float(network.blocks[0].attn.qkv.strength) for network in (model, average)} == {wanted}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(per_row=True), r"ternary\.measure is none, so the other options"),
        (dict(measure="mean", warmup_steps=-1), r"ternary\.warmup_steps must be at least 0, got -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        TernaryConfig(**options)


def test_what_does_not_go_with_ternary_weights_is_refused(train, on_codes):
    assert "ternary.measure mean: trains weights whole, lora.rank 2 does not" in train.refused(RUN | on_codes, "--lora.rank", 2)
    vq = {"stage": "tokenizer", "model": {"name": "vq"}, "data": {"spec": "digits", "image_size": 8}, "ternary": {"measure": "mean"}}
    assert "ternary.measure mean: is for generators" in train.refused(vq | {"train": RUN["train"]})
    with pytest.raises(UserError, match=r"nested networks \(loss\.nested\) have no ternary weights"):
        make_ternary(tiny("maskgit"), TernaryConfig(measure="mean"), {"nested": (2,)})
    with pytest.raises(UserError, match="ternary: to_q is no linear layer of DiT"):
        make_ternary(tiny("dit"), TernaryConfig(measure="mean", exclude=("to_q",)), {})
