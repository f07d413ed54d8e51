import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genvision.data.datasets import ordered_batches
from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.jobs.standardize import FACTS, measure_latents, standardize_tokenizer
from genvision.tokenizers.base import content_hash, load_tokenizer
from genvision.tokenizers.kl import KLTokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random KL tokenizer that has statistics already, wrong ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kl")
    options = dict(image_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3)
    KLTokenizer(**options, latent_mean=(5.0, 0.0, -3.0), latent_std=0.1).save_pretrained(path)
    return path


def latents_of(tokenizer, indices: np.ndarray | None = None) -> torch.Tensor:
    """All latents of the digits, float64 [N, c, h, w]."""
    batches = ordered_batches(open_source("digits"), 16, batch_size=256, indices=indices)
    with torch.no_grad():
        return torch.cat([tokenizer.encode(from_uint8(batch["images"])) for batch in batches]).double()


def test_latents_of_the_copy_have_mean_0_and_deviation_1_in_every_channel(folder, tmp_path):
    line = standardize_tokenizer(folder, "digits", tmp_path / "out", batch_size=256)
    assert "1,797 images of 16x16 pixels have 3 channels" in line
    old, new = load_tokenizer(folder), load_tokenizer(tmp_path / "out")
    latents = latents_of(new)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
    z = old.denormalize(latents_of(old))
    torch.testing.assert_close(torch.tensor(new.config.latent_mean), z.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(new.config.latent_std), z.std((0, 2, 3), correction=0).float())

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(new.decode(new.encode(images)), old.decode(old.encode(images)), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    changed = {key for key in old.config if old.config[key] != new.config[key] and not key.startswith("_")}
    assert changed == {"latent_mean", "latent_std"}
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert facts["latent_std"] == list(new.config.latent_std) and facts["tokenizer_hash"] == content_hash(old)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_part_of_the_set_is_spread_over_all_of_it(folder):
    tokenizer, source = load_tokenizer(folder), open_source("digits")
    found = measure_latents(tokenizer, source, num=10, batch_size=4)
    z = tokenizer.denormalize(latents_of(tokenizer, np.arange(10) * 1797 // 10))
    assert found.num_images == 10
    np.testing.assert_allclose(found.latent_mean, z.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.latent_std, z.std((0, 2, 3), correction=0), rtol=1e-5)
    assert found == measure_latents(tokenizer, source, num=10, batch_size=4, num_workers=1)
    assert measure_latents(tokenizer, source, num=2, image_size=8).image_size == 8


@pytest.mark.slow
@pytest.mark.parametrize("num", [100, 5])
def test_two_processes_find_what_one_finds_even_if_one_has_nothing_to_do(folder, tmp_path, num):
    script = f"""
import torch
from pathlib import Path
from genvision.jobs.standardize import standardize_tokenizer

torch.set_num_threads(1)
standardize_tokenizer(Path({str(folder)!r}), "digits", Path({str(tmp_path / "two")!r}), num={num}, batch_size=16, device="cpu")
"""
    (tmp_path / "job.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run([*launcher, str(tmp_path / "job.py")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    standardize_tokenizer(folder, "digits", tmp_path / "one", num=num, batch_size=16, device="cpu")
    one, two = (json.loads((tmp_path / name / FACTS).read_text()) for name in ("one", "two"))
    for name in ("latent_mean", "latent_std"):
        np.testing.assert_allclose(two.pop(name), one.pop(name), rtol=1e-12)
    assert one == two


def test_what_cannot_be_standardised_is_refused_and_leaves_nothing(folder, tiny_tokenizer, tmp_path):
    constant = load_tokenizer(folder)
    with torch.no_grad():
        constant.autoencoder.quant_conv.weight[1] = 0
    broken = load_tokenizer(folder)
    broken.autoencoder.quant_conv.weight.data[0, 0] = torch.nan
    digits = open_source("digits")
    with pytest.raises(UserError, match="1 of 3 latent channels are constant on digits, 1 first"):
        measure_latents(constant, digits, num=20)
    with pytest.raises(UserError, match="latents are not finite"):
        measure_latents(broken, digits, num=20)
    for tokenizer, options, message in (
        (tiny_tokenizer, {}, "its codes are discrete"),
        (folder, {"image_size": 15}, "multiple of 2"),
        (folder, {"num": 0}, "at least 1"),
        (folder, {"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ):
        with pytest.raises(UserError, match=message) as error:
            standardize_tokenizer(tokenizer, "digits", tmp_path / "out", **options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="already holds"):
        standardize_tokenizer(folder, "digits", tmp_path / "full")
