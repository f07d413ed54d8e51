"""Official ViTok checkpoints: every recorded size has exactly our tensors."""

import pytest
import torch

from genvision.convert.readers import fill
from genvision.convert.vitok import vitok
from genvision.errors import UserError
from parity_fixtures import FOLDER, Fixture, manifest

MANIFESTS = sorted(path.stem.removeprefix("manifest_") for path in FOLDER.glob("manifest_vitok_*.json"))


def meta_state(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in manifest(name)["tensors"].items()}


@pytest.mark.parametrize("name", MANIFESTS)
def test_our_module_has_exactly_the_recorded_tensors(name):
    recorded = manifest(name)
    with torch.device("meta"):
        module, state = vitok(meta_state(name), recorded["config"])
        fill(module, state, name)  # strict: refuses what is missing, left over or of another shape
    assert sum(p.numel() for p in module.parameters()) == recorded["params"]
    assert all(p.is_meta for p in module.parameters())


def test_there_are_four_recorded_sizes():
    assert len(MANIFESTS) == 4


def test_one_tensor_less_or_more_is_noticed():
    name = "vitok_sb_4x8"
    with torch.device("meta"):
        module, state = vitok(meta_state(name), manifest(name)["config"])
        for key in list(state)[::50]:
            with pytest.raises(UserError, match="1 tensors do not fit ViTok: missing"):
                fill(module, {other: tensor for other, tensor in state.items() if other != key}, name)
        with pytest.raises(UserError, match="unexpected surprise 2x3"):
            fill(module, state | {"surprise": torch.empty(2, 3)}, name)


def test_every_option_of_the_original_arrives():
    config = Fixture("vitok_ae_code").config
    changes = dict(lengths=[1, 2, 6], num_heads=2, rope_theta=100.0, code_width=3, variational=True, posemb="sincos2d", tubelet_size=1)
    module, _ = vitok({}, config | changes)
    made = module.config
    assert (made.encoder_heads, made.decoder_heads, made.rope_theta, made.code_width) == (2, 2, 100.0, 3)
    assert tuple(made.code_lengths) == (1, 2, 6) and made.code_length == 6 and made.variational
    assert module.mask_token.shape == (1, 1, 3) and not module.posemb.requires_grad
    assert vitok({}, config | {"rope_theta": None})[0].config.rope_style == "none"
    mixed, _ = vitok({}, Fixture("vitok_ae").config | {"rope_style": "2d_mixed"})
    assert mixed.enc_freqs.shape == (2, 2, 4 * 6)


@pytest.mark.parametrize(
    ("changes", "message"), [({"channels": 4}, "channels 4"), ({"norm_layer": "rms"}, "'rms'"), ({"rope_style": "3d"}, "rope_style '3d'")]
)
def test_what_is_not_supported_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        vitok({}, Fixture("vitok_ae").config | changes)
    assert "\n" not in str(caught.value)
