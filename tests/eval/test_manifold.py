import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from genvision.errors import UserError
from genvision.eval import manifold
from genvision.eval.manifold import manifold_radii, precision_recall, squared_distances
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def activations() -> Fixture:
    return Fixture("eval_activations")


@pytest.mark.parametrize(("name", "scale"), [("pr_k3", 1), ("pr_k3_x64", 64)])
def test_adms_arithmetic_equals_the_tensorflow_evaluator(activations, name, scale):
    """x64 makes float16 overflow, so that the float32 branch runs; the other stays in float16."""
    gen, ref = (scale * activations.inputs[side].numpy() for side in ("gen", "ref"))
    expected = {key: activations.outputs[f"adm/{name}/{key}"] for key in ("precision", "recall", "radii_ref", "radii_gen")}
    found = precision_recall(gen, ref, mode="adm")
    assert found.precision == pytest.approx(expected["precision"].item(), abs=1.01 / 300)
    assert found.recall == pytest.approx(expected["recall"].item(), abs=1.01 / 400)
    for side, features in (("ref", ref), ("gen", gen)):
        radii = expected[f"radii_{side}"].numpy()
        np.testing.assert_allclose(manifold_radii(features, mode="adm"), radii, atol=5e-3 * radii.mean())
    distances = activations.outputs[f"adm/{name}/dist2_ref8_gen8"].numpy()
    np.testing.assert_allclose(squared_distances(ref[:8], gen[:8], "adm"), distances, rtol=5e-3)


@pytest.mark.parametrize(("k", "name"), [(3, "full"), (5, "k5")])
def test_float32_equals_torch_fidelity(activations, k, name):
    found = precision_recall(activations.inputs["gen"].numpy(), activations.inputs["ref"].numpy(), k=k)
    assert found.precision == pytest.approx(activations.outputs[f"fidelity/prc_{name}_precision"].item(), abs=1e-6)
    assert found.recall == pytest.approx(activations.outputs[f"fidelity/prc_{name}_recall"].item(), abs=1e-6)


def test_float32_equals_torch_fidelity_on_other_data_too():
    a, b = torch.randn(70, 12), torch.randn(90, 12) * 1.2 + 0.1
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    ours = precision_recall(a.numpy(), b.numpy())
    assert (ours.precision, ours.recall) == (pytest.approx(theirs["precision"]), pytest.approx(theirs["recall"]))


@pytest.mark.parametrize("mode", ["adm", "float32"])
def test_tiles_and_blocks_do_not_matter(monkeypatch, activations, mode):
    gen, ref = activations.inputs["gen"].numpy(), activations.inputs["ref"].numpy()
    whole = precision_recall(gen, ref, mode=mode)
    monkeypatch.setattr(manifold, "TILE", 50)
    monkeypatch.setattr(manifold, "ADM_BLOCK", 100)
    tiled = precision_recall(gen, ref, mode=mode)
    np.testing.assert_array_equal(tiled.generated_inside, whole.generated_inside)
    np.testing.assert_array_equal(tiled.reference_inside, whole.reference_inside)


def test_one_overflow_sends_its_whole_block_to_float32_and_no_other(monkeypatch):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 16)).astype(np.float32)
    features[150] *= 1000  # |x|^2 is far above 65,504
    monkeypatch.setattr(manifold, "ADM_BLOCK", 100)
    monkeypatch.setattr(manifold, "TILE", 100)
    tiles = squared_distances(features[:100], features, "adm")
    exact = squared_distances(features[:100], features, "float32")
    np.testing.assert_array_equal(tiles[:, 100:], exact[:, 100:])
    assert not np.array_equal(tiles[:, :100], exact[:, :100])
    assert np.isfinite(tiles).all()


@pytest.mark.parametrize("mode", ["adm", "float32"])
def test_roles_a_collapsed_set_is_precise_and_recalls_nothing(mode):
    real = torch.randn(300, 8).numpy()
    collapsed = precision_recall(real[:1].repeat(100, axis=0), real, mode=mode)
    assert collapsed.precision == 1 and collapsed.recall <= 0.02
    memorised = precision_recall(real, real, mode=mode)
    assert memorised.precision == memorised.recall == 1
    elsewhere = precision_recall(real + 100, real, mode=mode)
    assert elsewhere.precision == elsewhere.recall == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["adm", "float32"])
def test_the_gpu_gives_the_distances_of_the_cpu_though_tf32_is_allowed(activations, mode):
    sets = [activations.inputs[side].numpy() for side in ("gen", "ref")]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        on_gpu = squared_distances(*sets, mode, "cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    # float16 rounds sums of products that differ in their last bit to neighbouring numbers
    tolerance = 1e-5 if mode == "float32" else 2e-3
    wanted = squared_distances(*sets, mode)
    np.testing.assert_allclose(on_gpu, wanted, atol=tolerance * wanted.mean())


def test_membership_is_told_for_every_image():
    real = torch.randn(300, 4).numpy()
    generated = np.concatenate([real[:30], real[:20] + 50])
    found = precision_recall(generated, real)
    np.testing.assert_array_equal(found.generated_inside, np.arange(50) < 30)
    assert found.precision == pytest.approx(0.6)


def test_memory_maps_are_read_in_parts(tmp_path):
    features = torch.randn(120, 6).numpy()
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert precision_recall(mapped, features[:90] * 1.1).recall == precision_recall(features, features[:90] * 1.1).recall


def test_too_few_images_and_other_features_are_refused():
    with pytest.raises(UserError, match="at least 4 generated images, got 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="features of 2 and 3 numbers"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
