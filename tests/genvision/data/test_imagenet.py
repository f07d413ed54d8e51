"""ImageNet as the archives, the development kit and Kaggle hold it, at five images of three classes."""

import numpy as np
import pytest
from PIL import Image
from refused_sources import refused
from scipy.io import savemat

from genvision.data.sources import open_source

WNIDS = ["n01440764", "n01443537", "n02119789"]
TRAIN = [
    f"{WNIDS[2]}/{WNIDS[2]}_7.JPEG",
    f"{WNIDS[0]}/{WNIDS[0]}_1.JPEG",
    f"{WNIDS[0]}/{WNIDS[0]}_10.JPEG",
    f"{WNIDS[1]}/{WNIDS[1]}_2.JPEG",
]
VAL = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)]


def save(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name, "JPEG")


@pytest.fixture
def root(tmp_path):
    """Train folders, and flat validation images without ground truth."""
    save(tmp_path / "train", TRAIN)
    save(tmp_path / "val", VAL)
    return tmp_path


def write_kit(folder, ground_truth=(1, 3, 2)):
    """The kit numbers the classes in an order of its own, and has entries that are no classes."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [(1, WNIDS[2], "kit fox", 0), (2, WNIDS[1], "goldfish", 0), (3, WNIDS[0], "tench", 0), (1001, "n00001740", "entity", 2)]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=fields)[:, None]}, do_compression=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in ground_truth))


def test_training_classes_are_the_sorted_wnids(root):
    source = open_source(f"imagenet:{root}")
    assert (source.label_names, source.labels.tolist()) == (WNIDS, [0, 0, 1, 2])
    assert source.name(0) == f"{root}/train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG"
    assert source.load(3).size == (4, 4)
    assert source.fingerprint() == open_source(f"folder:{root}/train").fingerprint()
    assert open_source(f"imagenet:{root}:train").labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("place", [".", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12"])
def test_flat_validation_images_have_the_kits_ground_truth(root, place):
    write_kit(root / place)
    source = open_source(f"imagenet:{root}:val")
    assert (source.label_names, source.labels.tolist()) == (WNIDS, [2, 0, 1])
    assert source.name(2) == f"{root}/val/{VAL[2]}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n{2},n02119789 1 2 3 4 n02119789 5 6 \n{0},n01443537 0 0\n{1},n01440764 1\n",
        ),
        ("val_labels.txt", "{0}.JPEG n01443537\n{1}.JPEG n01440764\n{2}.JPEG n02119789\n"),
        ("val_labels.csv", "val/{0}.JPEG,n01443537\nval/{1}.JPEG,n01440764\n\nval/{2}.JPEG,n02119789\n"),
    ],
)
def test_a_list_of_wnids_serves_as_ground_truth(root, name, content):
    (root / name).write_text(content.format(*(name.removesuffix(".JPEG") for name in VAL)))
    assert open_source(f"imagenet:{root}:val").labels.tolist() == [1, 0, 2]


def test_kaggles_folders_are_found(root):
    place = root / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    place.mkdir(parents=True)
    for part in ("train", "val"):
        (root / part).rename(place / part)
    (root / "kaggle" / "LOC_val_solution.csv").write_text("".join(f"{name[:-5]},{WNIDS[2]} 1 2 3 4\n" for name in VAL))
    assert open_source(f"imagenet:{root}/kaggle").labels.tolist() == [0, 0, 1, 2]
    assert open_source(f"imagenet:{root}/kaggle:val").labels.tolist() == [2, 2, 2]


def test_validation_folders_have_the_classes_of_training(root, capsys):
    for number, name in enumerate(VAL):
        (root / "val" / WNIDS[2 - number]).mkdir()
        (root / "val" / name).rename(root / "val" / WNIDS[2 - number] / name)
    (root / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG").unlink()
    (root / "train" / WNIDS[1]).rmdir()
    source = open_source(f"imagenet:{root}:val")
    assert (source.label_names, source.labels.tolist()) == ([WNIDS[0], WNIDS[2]], [0, 1])
    assert "1 of 3 images are of classes that" in capsys.readouterr().err
    (root / "train").rename(root / "elsewhere")
    assert open_source(f"imagenet:{root}:val").label_names == WNIDS
    assert capsys.readouterr().err == ""


def test_folders_of_other_forms_are_refused_with_the_mend(root):
    refused(f"imagenet:{root}/none", "no such file or folder")
    refused(f"imagenet:{root}:test", "no part 'test'", "train or val")
    refused(f"imagenet:{root}/train", "is the folder of the classes itself", f"give imagenet:{root}")
    refused(f"imagenet:{root}:val", "no ground truth", "ILSVRC2012_devkit_t12")
    (root / "train" / "tench").mkdir()
    refused(f"imagenet:{root}", "tench", "no WNID", f"folder:{root}/train")
    (root / "train" / "tench").rename(root / "train" / "n00000001")
    refused(f"imagenet:{root}", "n00000001", "holds no images")
    (root / "train" / "n00000001.tar").touch()
    refused(f"imagenet:{root}", "n00000001.tar is to be extracted")
    save(root / "train", ["stray.JPEG"])
    refused(f"imagenet:{root}", "stray.JPEG", "sub-folders")
    tars = root / "other" / "train"
    tars.mkdir(parents=True)
    refused(f"imagenet:{root}/other", "no images in it")
    (tars / "n01440764.tar").touch()
    refused(f"imagenet:{root}/other", "extract n01440764.tar")
    save(tars, ["a.JPEG"])
    refused(f"imagenet:{root}/other", "a.JPEG", "one folder of images for each WNID")
    refused(f"imagenet:{root}/other:val", "no folder val")


def test_ground_truth_that_does_not_fit_is_refused(root):
    write_kit(root, ground_truth=(1, 3))
    refused(f"imagenet:{root}:val", "ground_truth.txt", "nothing of ILSVRC2012_val_00000003.JPEG", "2 entries")
    write_kit(root, ground_truth=(1, 3, 9))
    refused(f"imagenet:{root}:val", "meta.mat", "nothing of class 9")
    write_kit(root, ground_truth=("1", "x", "2"))
    refused(f"imagenet:{root}:val", "ground_truth.txt", "one number of a class")
    write_kit(root)
    content = (root / "meta.mat").read_bytes()
    for damaged in (content[:-30], content[:100], b"", b"x" * 300):
        (root / "meta.mat").write_bytes(damaged)
        refused(f"imagenet:{root}:val", "meta.mat", "cannot be read")
    savemat(root / "meta.mat", {"other": 1})
    refused(f"imagenet:{root}:val", "meta.mat", "cannot be read")
    (root / "meta.mat").unlink()
    refused(f"imagenet:{root}:val", "meta.mat: is missing")
    file = root / "val_labels.txt"
    file.write_text(f"{VAL[0]} n01440764\n{VAL[1]} tench\n")
    refused(f"imagenet:{root}:val", "line 2", "tench")
    file.write_text("".join(f"{name} n09999999\n" for name in VAL))
    refused(f"imagenet:{root}:val", "do not belong together")
