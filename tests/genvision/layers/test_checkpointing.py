import pytest
import torch
from torch import nn

from genvision.errors import UserError
from genvision.layers.checkpointing import POLICIES, Trunk, segment_length, set_checkpointing
from genvision.layers.nested import TokenCache
from genvision.layers.transformer import Transformer
from genvision.models.dit import DiT
from genvision.models.llamagen import LlamaGen
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.titok import TiTok
from genvision.tokenizers.vit import ViTok
from genvision.tokenizers.vq import VQTokenizer

PLACES = {"codebook_size": 12, "grid_size": 3, "hidden_dim": 16, "depth": 5, "num_heads": 4, "num_classes": 3}
CODES, LABELS = torch.arange(18).view(2, 9) % 12, torch.tensor([0, 2])
LATENTS, TIMES = torch.linspace(-1, 1, 128).view(2, 4, 4, 4), torch.tensor([0.2, 0.7])
IMAGES = torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)
VIT = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {"depth": 4, "heads": 2}.items()}


def dit(model):
    output, features = model(LATENTS, TIMES, LABELS, with_features=True)
    return output.square().mean() + features[0].square().mean()


def reconstruction(model):
    output = model(IMAGES)
    return output.reconstruction.square().mean() + sum(output.losses.values())


FAMILIES = {
    "llamagen": (lambda: LlamaGen(**PLACES, mlp_multiple_of=8, drop_path=0.3), lambda model: model(CODES[:, :-1], LABELS).square().mean()),
    "rar": (lambda: RAR(**PLACES), lambda model: model(CODES, LABELS).square().mean()),
    "maskgit": (lambda: MaskGIT(**PLACES, mlp_multiple_of=8), lambda model: model(CODES, LABELS).square().mean()),
    "maskgit, skips": (
        lambda: MaskGIT(**PLACES, block="pre_norm", mlp="gelu", use_skips=True),
        lambda model: model(CODES, LABELS, nesting=2).square().mean(),
    ),
    "mage": (
        lambda: MAGE(**PLACES, decoder_dim=8, decoder_depth=3, decoder_num_heads=2),
        lambda model: model(CODES, LABELS, kept=torch.arange(0, 9, 2).expand(2, -1)).square().mean(),
    ),
    "dit": (
        lambda: DiT(input_size=4, hidden_dim=16, depth=5, num_heads=2, num_classes=3, align_depth=3, align_dims=(6,), align_hidden=8),
        dit,
    ),
    "vq": (
        lambda: VQTokenizer(
            image_size=16,
            codebook_size=8,
            codebook_dim=4,
            base_channels=8,
            encoder_multipliers=(1, 1, 2),
            num_res_blocks=1,
            z_channels=8,
            norm_groups=4,
            dropout=0.2,
            quantizer_options={"update": "ema"},
        ),
        reconstruction,
    ),
    "vitok": (lambda: ViTok(image_size=16, patch_size=4, encoder_width=16, decoder_width=16, rope_style="2d_mixed", **VIT), reconstruction),
    "titok": (
        lambda: TiTok(
            image_size=16, patch_size=4, num_latent_tokens=3, token_dim=4, codebook_size=8, encoder_dim=16, decoder_dim=16, **VIT
        ),
        reconstruction,
    ),
    "kl": (lambda: KLTokenizer(image_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4), reconstruction),
}
"""A model with random parts in training, and a loss."""


def awake(name):
    torch.manual_seed(0)
    model = FAMILIES[name][0]().train()
    for parameter in model.parameters():  # heads and modulations start at zero
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def trained(name, policy, autocast=False):
    """Gradients and buffers after one step with the same random numbers."""
    model = awake(name)
    set_checkpointing(model, policy)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = FAMILIES[name][1](model)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients | dict(model.named_buffers())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_policy_changes_a_bit_of_gradients_or_codebook_counters_while_dropout_is_on(name):
    expected = trained(name, "none")
    if name not in ("dit", "titok"):  # whose blocks have no dropout
        model = awake(name)
        assert not torch.equal(FAMILIES[name][1](model), FAMILIES[name][1](model))
    for policy in ("block", "sqrt") if name != "kl" else ("block",):
        found = trained(name, policy)
        assert found.keys() == expected.keys()
        assert not [key for key in expected if not torch.equal(found[key], expected[key])]
    if name == "vq":
        assert not torch.equal(expected["quantize.cluster_size"], awake(name).quantize.cluster_size)


def test_autocast_is_the_same_in_the_second_pass():
    expected, found = trained("llamagen", "none", autocast=True), trained("llamagen", "sqrt", autocast=True)
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not torch.equal(trained("llamagen", "none")["blocks.0.mlp.up.weight"], expected["blocks.0.mlp.up.weight"])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_blocks_are_read_only_while_these_are_called(name):
    """Sharded weights (FSDP) are gathered when a block is called and let go behind it."""
    model = awake(name)
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(units) > 3
    whole = awake(name)
    torch.manual_seed(1)
    expected = FAMILIES[name][1](whole)
    real = {parameter: parameter.data for unit in units for parameter in unit.parameters()}

    def gather(unit, *_):
        for parameter in unit.parameters():
            parameter.data = real[parameter]

    def let_go(unit, *_):
        for parameter in unit.parameters():
            parameter.data = torch.full_like(real[parameter], torch.nan)

    for unit in units:
        let_go(unit)
        unit.register_forward_pre_hook(gather)
        unit.register_forward_hook(let_go)
    torch.manual_seed(1)
    torch.testing.assert_close(FAMILIES[name][1](model), expected)


def kept_bytes(policy, depth):
    """What is kept for the backward pass of a chain of blocks, besides weights and what the last norm keeps."""
    model = Transformer(8, depth, 2, 16)
    model.norm = nn.Identity()
    set_checkpointing(model, policy)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(2, 5, 8, requires_grad=True))
    return sum(kept.values())


def test_what_is_kept_grows_with_the_square_root_of_the_number_of_blocks():
    one = 2 * 5 * 8 * 4
    assert [kept_bytes("sqrt", depth) for depth in (16, 64)] == [4 * one, 8 * one]
    assert [kept_bytes("block", depth) for depth in (16, 64)] == [16 * one, 64 * one]
    assert kept_bytes("none", 64) > 10 * 64 * one


@pytest.mark.parametrize("policy, runs", [("none", [1, 1, 1, 1]), ("block", [2, 2, 2, 2]), ("sqrt", [3, 2, 3, 2])])
def test_blocks_run_once_more_or_twice_but_for_the_last_of_a_segment(policy, runs):
    model, seen = Transformer(8, 4, 2, 16), [0, 0, 0, 0]

    def count(i):
        seen[i] += 1

    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: count(i))
    set_checkpointing(model, policy)
    model(torch.randn(2, 5, 8, requires_grad=True)).sum().backward()
    assert seen == runs


def test_segments_are_as_many_as_the_square_root_rounded_up():
    assert [segment_length(depth) for depth in (1, 2, 3, 12, 24, 40, 64)] == [1, 1, 2, 3, 5, 6, 8]


def test_keys_and_values_are_stored_once():
    model, writes = awake("maskgit"), []

    class Counting(TokenCache):
        def update(self, layer, *args):
            writes.append(layer)
            return super().update(layer, *args)

    for policy in POLICIES:
        set_checkpointing(model, policy)
        model(CODES, LABELS, cache=Counting()).sum().backward()
        assert writes == [0, 1, 2, 3, 4]
        writes.clear()


def test_the_switch_of_diffusers_is_the_policy_block():
    model = awake("vitok")
    model.enable_gradient_checkpointing()
    by_switch = [trunk._gradient_checkpointing_func for trunk in model.modules() if isinstance(trunk, Trunk)]
    assert len(by_switch) == 2
    torch.manual_seed(1)
    FAMILIES["vitok"][1](model).backward()
    for name, gradient in trained("vitok", "none").items():
        assert torch.equal(dict(model.named_parameters())[name].grad, gradient)
    set_checkpointing(model, "none")
    assert not any(trunk.gradient_checkpointing for trunk in model.modules() if isinstance(trunk, Trunk))


@pytest.mark.parametrize(
    "build, policy, message",
    [
        (lambda: nn.Linear(2, 2), "some", "'some' is unknown; choose one of none, block, sqrt"),
        (lambda: nn.Linear(2, 2), "block", "Linear has no blocks"),
        (lambda: awake("kl"), "sqrt", "KLTokenizer runs its blocks one by one; choose block"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(build, policy, message):
    with pytest.raises(UserError, match=f"train.gradient_checkpointing.*{message}") as error:
        set_checkpointing(build(), policy)
    assert "\n" not in str(error.value)
