import pickle

import numpy as np
import pytest

from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.moments import Gaussian
from genvision.eval.reference_files import ReferenceFile, open_reference, write_statistics


def statistics(dim: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(seed).standard_normal((50, dim))
    return rows.mean(0), np.cov(rows, rowvar=False)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adms_layout_is_read_as_it_is(tmp_path, dtype, save):
    (mu, sigma), (mu_s, sigma_s) = statistics(6), statistics(4, seed=1)
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    save(tmp_path / "VIRTUAL.npz", arr_0=IMAGES, **{name: array.astype(dtype) for name, array in arrays.items()}, extra=np.arange(3))
    found = open_reference(str(tmp_path / "VIRTUAL.npz"))
    assert isinstance(found, ReferenceFile)
    assert found.statistics.keys() == {"pool", "spatial"}
    assert found.statistics["pool"].sigma.dtype == np.float64
    np.testing.assert_allclose(found.statistics["spatial"].sigma, sigma_s, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.images.load(3)), IMAGES[3])


def test_statistics_alone_are_enough(tmp_path):
    mu, sigma = statistics()
    np.savez(tmp_path / "stats.npz", mu=mu.astype(np.float32), sigma=sigma)
    found = open_reference(f"npz:{tmp_path / 'stats.npz'}")
    assert found.images is None and found.statistics.keys() == {"pool"}


def test_images_alone_are_an_ordinary_set(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    assert isinstance(open_reference(str(tmp_path / "images.npz")), ImageSource)
    assert isinstance(open_reference("digits"), ImageSource)


def test_our_own_file_holds_everything(tmp_path):
    written = {"pool": Gaussian(*statistics(), 50), "dinov2": Gaussian(*statistics(3), 50)}
    write_statistics(tmp_path / "s.safetensors", written, {"protocol": "edm2", "image_size": 8})
    found = open_reference(str(tmp_path / "s.safetensors"))
    assert found.facts == {"protocol": "edm2", "image_size": 8}
    for name, gaussian in written.items():
        np.testing.assert_array_equal(found.statistics[name].sigma, gaussian.sigma)
        assert found.statistics[name].count == 50
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edm2s_pickles_are_read(tmp_path, protocol):
    mu, sigma = statistics()
    content = {
        "fid": {"mu": mu, "sigma": np.asfortranarray(sigma)},
        "fd_dinov2": {"mu": mu[:3], "sigma": sigma[:3, :3].copy()},
        "num_images": 50,
    }
    (tmp_path / "img512.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = open_reference(str(tmp_path / "img512.pkl"))
    np.testing.assert_array_equal(found.statistics["pool"].sigma, sigma)
    np.testing.assert_array_equal(found.statistics["dinov2"].mu, mu[:3])
    assert found.statistics["pool"].count == 50


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Evil(), {"fid": {"mu": Evil()}}, {"fid": np.array([Evil()], dtype=object)}):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"evil\.pkl: not EDM2's statistics"):
            open_reference(str(tmp_path / "evil.pkl"))
    assert not (tmp_path / "owned").exists()


MU, SIGMA = statistics()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": MU}, "has mean; expected statistics mu and sigma, or images under arr_0"),
        ({"mu": MU}, "has mu but no sigma"),
        ({"sigma": SIGMA}, "has sigma but no mu"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "has mu_s but no sigma_s"),
        ({"mu": MU, "sigma": SIGMA[:5]}, r"mu \[D\] and sigma \[D, D\]"),
        ({"mu": MU, "sigma": SIGMA * np.nan}, "not finite"),
        ({"mu": MU, "sigma": np.triu(SIGMA)}, "not symmetric"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "mu is int64, expected float32 or float64"),
        ({"mu": MU, "sigma": SIGMA.astype(np.float16)}, "is float16, expected float32 or float64"),
        ({"mu": np.array([{}]), "sigma": SIGMA}, "not an npz file, or damaged"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": IMAGES / 255}, r"arr_0 is float64 \[5, 8, 8, 3\], expected uint8 \[N, H, W, 3\]"),
        ({"arr_0": np.full((2, 8, 8, 3), np.nan)}, "arr_0 is float64"),
        ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \[8, 8, 3\]"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"expected uint8 \[N, H, W, 3\]"),
        ({"arr_0": IMAGES.astype(np.int64)}, "arr_0 is int64"),
    ],
)
def test_wrong_arrays_are_named_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        open_reference(str(tmp_path / "wrong.npz"))
    assert "wrong.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 300, -30])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "pkl"])
def test_cut_files_are_named_in_one_line(tmp_path, kind, keep):
    path = tmp_path / f"cut.{kind}"
    if kind == "npz":
        np.savez(path, mu=MU, sigma=SIGMA)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}))
    else:
        write_statistics(path, {"pool": Gaussian(MU, SIGMA, 50)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"cut\.{kind}") as caught:
        open_reference(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    for name in ("a.pkl", "a.safetensors", "a.npz"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            open_reference(str(tmp_path / name))
