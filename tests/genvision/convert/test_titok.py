import math

import pytest
import torch

from genvision.convert.readers import fill
from genvision.convert.titok import titok
from genvision.errors import UserError
from parity_fixtures import Fixture, manifest

NAMES = ["l32", "b64", "s128", "bl128_vq8k", "bl128_vae_c16"]


def recorded(name: str) -> tuple[dict, dict]:
    """Manifest, and its tensors without memory."""
    content = manifest(f"titok_{name}")
    return content, {key: torch.empty(shape, device="meta") for key, shape in content["tensors"].items()}


@pytest.mark.parametrize("name", NAMES)
def test_our_module_has_exactly_the_recorded_tensors(name):
    content, state = recorded(name)
    with torch.device("meta"):
        module, renamed = titok(state, content["config"])
    fill(module, renamed, name)  # strict: refuses what is missing, left over or of another shape
    assert len(renamed) == len(state)
    assert sum(p.numel() for p in module.parameters()) == content["params"]
    assert sum(tensor.numel() for tensor in module.state_dict().values()) == sum(math.prod(shape) for shape in content["tensors"].values())
    tokens = int(name.split("_")[0].strip("lbs"))
    assert (module.spec.image_size, module.spec.downsample, module.spec.num_tokens) == (256, 16, tokens)
    assert module.spec.discrete == ("vae" not in name)


@pytest.mark.parametrize("name", ["s128", "bl128_vae_c16"])
def test_one_tensor_less_or_more_or_of_another_shape_is_noticed(name):
    content, state = recorded(name)
    changes = [({"surprise": torch.empty(2, 3)}, "unexpected surprise 2x3")]
    changes.append(({"encoder.conv_out.weight": torch.empty(7)}, "encoder.proj.weight is 7, expected"))
    with torch.device("meta"):
        for key in list(state)[::60]:
            module, renamed = titok({other: tensor for other, tensor in state.items() if other != key}, content["config"])
            with pytest.raises(UserError, match="1 tensors do not fit TiTok: missing"):
                fill(module, renamed, name)
        for change, message in changes:
            module, renamed = titok(state | change, content["config"])
            with pytest.raises(UserError, match=message):
                fill(module, renamed, name)


def test_every_value_of_a_small_checkpoint_arrives():
    fixture = Fixture("titok")
    module, renamed = titok(fixture.state, fixture.config)
    fill(module, renamed, "fixture")
    arrived = torch.cat([tensor.flatten() for tensor in module.state_dict().values()]).sort().values
    assert torch.equal(arrived, torch.cat([tensor.flatten() for tensor in fixture.state.values()]).sort().values)
    assert torch.equal(
        module.head.pixel_decoder.conv_blocks[0].res[0].conv1.weight, fixture.state["pixel_decoder.up.4.block.0.conv1.weight"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_decoder": False}, "checkpoints of the first release make pixels only after stage 2"),
        ({"is_legacy": False}, "finetune_decoder must be False where is_legacy is"),
        ({"vit_enc_model_size": "huge"}, "vit_enc_model_size 'huge' is unknown; known are small, base, large"),
        ({"vit_dec_patch_size": 8}, "vit_enc_patch_size 16 and vit_dec_patch_size 8 must be equal"),
    ],
)
def test_a_configuration_that_makes_no_tokenizer_is_one_line(options, message):
    content, state = recorded("s128")
    with pytest.raises(UserError, match=message) as error:
        titok(state, content["config"] | options)
    assert "\n" not in str(error.value)
