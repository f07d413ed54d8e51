"""docs/data.md: its commands run on tiny real data at the places they name, every SPEC opens, and its numbers are those of the code."""

import gzip
import io
import json
import pickle
import re
import shlex
from dataclasses import fields
from inspect import signature
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_examples import png, write_shards

from genvision.cli import main
from genvision.data import hub, order, parquet_index, shard_files, tar_index, tar_shards
from genvision.data.datasets import MAX_RESTARTS
from genvision.data.encoded import EncodedDataset
from genvision.data.encoding import encode_dataset
from genvision.data.image_files import IMAGE_SUFFIXES
from genvision.data.sources import SCHEMES, open_source
from genvision.training.config import DataConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "data.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE.replace("\\\n", ""), re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for block in BLOCKS for line in block.splitlines()]
TABLE = PAGE.partition("| SPEC, for example |")[2].partition("\n\n")[0]
SPECS = [spec for row in TABLE.splitlines()[2:] for spec in re.findall(r"`([^`]+)`", row.split("|")[1])]
TINY = {
    "vq/vq_folder64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.base_channels 8 --data.num_workers 0",
    "dit/flow_cifar10_pixels.yaml": "--train.num_steps 2 --train.batch_size 4 --model.hidden_dim 24 --model.depth 1 --model.num_heads 2 "
    "--sampler.num_steps 2 --data.num_workers 0",
    "llamagen/llamagen_cifar10.yaml": "--train.num_steps 2 --train.batch_size 4 --model.hidden_dim 40 --model.depth 1 --model.num_heads 1",
    "--data.validation": "--train.validate_every 1",
    "encode": "--workers 0",
}
"""What makes commands small enough for a test."""
WNIDS = ("n01440764", "n01443537")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    yield
    if (far := fsspec.filesystem("memory")).exists("/bucket"):
        far.rm("/bucket", recursive=True)


def write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def jpeg(seed: int, size: int = 70) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(seed, size))).save(file, "JPEG")
    return file.getvalue()


def write_folder() -> None:
    for i in range(8):
        write(f"photos/{'cat' if i < 4 else 'dog'}/{i}.jpg", jpeg(i))


def write_parquet(name: str, image_column: str) -> None:
    features = datasets.Features({image_column: datasets.Image(), "label": datasets.ClassLabel(names=["airplane", "bird"])})
    rows = {image_column: [{"bytes": png(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=features.arrow_schema), name)


def write_hub() -> None:
    for part in ("train", "test"):
        write_parquet(f"uoft-cs/cifar10/plain_text/{part}-00000-of-00001.parquet", "img")


def write_wds() -> None:
    """Shards here, and two in a bucket."""
    for shard, path in enumerate(sorted(write_shards(Path("shards"), 8, 2).iterdir())):
        fsspec.filesystem("memory").pipe(f"/bucket/train-{shard:03d}.tar", path.read_bytes())


def write_imagenet() -> None:
    for number, wnid in enumerate(WNIDS):
        write(f"data/imagenet/train/{wnid}/{wnid}_1.JPEG", jpeg(number))
        write(f"data/imagenet/val/ILSVRC2012_val_0000000{number}.JPEG", jpeg(number))
    write("data/imagenet/val_labels.txt", "".join(f"ILSVRC2012_val_0000000{i}.JPEG {wnid}\n" for i, wnid in enumerate(WNIDS)).encode())


def write_imagenet32() -> None:
    write("data/imagenet32/train_data_batch_1", pickle.dumps({"data": pixels(2, 3 * 32 * 32), "labels": [1, 1000]}))


def write_imagenet64() -> None:
    Path("data/imagenet64").mkdir(parents=True)
    np.save("data/imagenet64/imagenet64-valid.npy", pixels(2, 64, 64, 3))


def write_lsun() -> None:
    lmdb = pytest.importorskip("lmdb")
    for category in ("bedroom", "tower"):
        Path(f"data/lsun/{category}_train_lmdb").mkdir(parents=True)
        with lmdb.open(f"data/lsun/{category}_train_lmdb") as environment, environment.begin(write=True) as transaction:
            transaction.put(b"%040x" % 1, jpeg(0))


def write_idx() -> None:
    for images in ("mnist/train-images-idx3-ubyte", "mnist/t10k-images-idx3-ubyte", "emnist/emnist-letters-train-images-idx3-ubyte.gz"):
        packed = gzip.compress if images.endswith(".gz") else bytes
        write(f"data/{images}", packed(np.array([0x803, 2, 28, 28], ">u4").tobytes() + pixels(2, 28, 28).tobytes()))
        labels = images.replace("images", "labels").replace("idx3", "idx1")
        write(f"data/{labels}", packed(np.array([0x801, 2], ">u4").tobytes() + bytes([1, 2])))


def write_cifar() -> None:
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        write(f"data/cifar-10-batches-py/{name}", pickle.dumps({"data": pixels(2, 3072), "labels": [0, 1]}))
    write("data/cifar-10-batches-py/batches.meta", pickle.dumps({"label_names": ["airplane", "bird"]}))
    write("data/cifar-100-python/test", pickle.dumps({"data": pixels(2, 3072), "fine_labels": [0, 1]}))
    write("data/cifar-100-python/meta", pickle.dumps({"fine_label_names": ["apple", "bear"]}))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


WRITERS = {
    "digits": (),
    "folder": (write_folder,),
    "parquet": (lambda: write_parquet("data/cifar10/train-00000-of-00001.parquet", "img"),),
    "npz": (lambda: np.savez("samples.npz", pixels(2, 8, 8, 3)),),
    "wds": (write_wds,),
    "hub": (write_hub,),
    "mix": (write_folder, write_wds),
    "imagenet": (write_imagenet,),
    "imagenet32": (write_imagenet32,),
    "imagenet64": (write_imagenet64,),
    "lsun": (write_lsun,),
    "idx": (write_idx,),
    "cifar": (write_cifar,),
}


def near(word: str) -> str:
    """Two shards in this process's memory stand for the 147 of a bucket."""
    return word.replace("s3://", "memory://").replace("{000..146}", "{000..001}")


def test_every_kind_of_data_is_in_the_table():
    assert {spec.partition(":")[0] for spec in SPECS} == set(SCHEMES) == set(WRITERS)


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_of_the_table_opens(spec):
    for write_data in WRITERS[spec.partition(":")[0]]:
        write_data()
    source = open_source(near(spec))
    assert len(source) >= 2 and source.num_classes >= 1
    assert source.load(len(source) - 1).mode == "RGB"


def test_the_commands_and_the_code_run(capsys):
    for write_data in (write_folder, write_wds, write_hub, write_cifar, write_imagenet):
        write_data()
    for words in COMMANDS:
        small = [word for key, changes in TINY.items() if key in words for word in shlex.split(changes)]
        main([*map(near, words), *small])
    assert [words[0] for words in COMMANDS] == ["train", "encode", "encode", "train", "train", "train", "encode", "encode", "train"]
    views = {"codes": 2, "codes_shards": 2, "codes_imagenet": 10, "codes_imagenet_val": 1}
    assert {name: EncodedDataset(f"runs/{name}").num_views for name in views} == views
    assert EncodedDataset("runs/codes_imagenet").label_names == list(WNIDS)
    named = json.loads(Path("runs/gen/model/model_index.json").read_text())["id2label"]
    assert [*named.values()] == ["cat", "dog", "0", "1", "2"]
    assert len([*Path("cache/shards").glob("*.tar")]) == 2
    assert {entry.name for entry in Path("cache").iterdir()} == {"shard_indexes", "shards", "row_groups"}
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {})
    assert capsys.readouterr().out == "8 ['cat', 'dog'] [0 0 0] {'JPEG': 8}\n"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("up to {:,} images", [order.WINDOW]),
        (
            "windows of {:,}, each made of {:,} stretches of {:,} ",
            [order.LARGE_SET_WINDOW, order.LARGE_SET_WINDOW // order.BLOCK, order.BLOCK],
        ),
        ("windows of {:,}, of stretches of {:,} ", [tar_shards.REMOTE_WINDOW, tar_shards.REMOTE_BLOCK]),
        ("that {} GiB hold, at most {:,},", [hub.CACHE_BYTES >> 31, hub.MAX_WINDOW]),
        ("the last {} GiB of a data set", [hub.CACHE_BYTES >> 30]),
        ("pieces of about {} MiB", [parquet_index.PIECE_BYTES >> 20]),
        ("after {:.0f}, {:.0f} and {:.0f} seconds", shard_files.WAITS),
        ("After {} times without a batch", [{3: "three"}[MAX_RESTARTS]]),
        ("A shard has {:,} images", [signature(encode_dataset).parameters["shard_size"].default]),
        ("Of samples 0 to {:,}, of the next {:,} ", [order.TURNS - 1, order.TURNS]),
        ("{:.0f} MB and {:.0f} MB for ImageNet", [2 * 4 * 1.281167, 24 * 1.281167]),
        ("`{}`, `{}`, `{}`, `{}`, `{}` or `{}`; all samples", tar_index.JSON_LABELS),
        ("`{}` (one a line), `{}` or `{}` beside", tar_shards.NAME_FILES),
        ("`{}`, `{}`, `{}`, `{}` and `{}` count", IMAGE_SUFFIXES),
    ],
)
def test_numbers_and_names_are_those_of_the_code(text, numbers):
    assert text.format(*numbers) in " ".join(PAGE.split())


def test_what_the_page_names_exists():
    assert set(re.findall(r"`data\.(\w+)", PAGE)) <= {field.name for field in fields(DataConfig)}
    for page, anchor in re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", PAGE):
        headings = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}
