"""Data sets of the Hub, by local folders in the layout of a repository: what is read, in which order, and what is refused."""

import errno
import io
import multiprocessing
import os
import pickle
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from refused_sources import refused

from genvision.data import hub, parquet, parquet_index
from genvision.data.datasets import ImageDataset, batches, ordered_batches
from genvision.data.sources import BadImageError, open_source
from genvision.errors import UserError

NAMES = ["ant", "bee", "cat"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def _small_and_private(tmp_path, monkeypatch):
    """Caches of this test, and a piece for every row group."""
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(parquet_index, "PIECE_BYTES", 1)


def png(number):
    """A picture whose pixels are all `number`."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, number, number)).save(file, "PNG")
    return file.getvalue()


def rows(numbers, label=lambda number: number % 3):
    return {"image": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers], "label": [label(n) for n in numbers]}


@pytest.fixture
def write(tmp_path):
    def write(columns, name="data/train-00000-of-00001.parquet", schema=FEATURES.arrow_schema, group=3):
        path = tmp_path / "repo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, schema=schema), path, row_group_size=group)
        return path

    return write


@pytest.fixture
def repo(write, tmp_path):
    """20 training images in row groups of 3 (the last of each file is shorter), 4 for testing; image i has the pixels i."""
    write(rows(range(10)), "data/train-00000-of-00002.parquet")
    write(rows(range(10, 20)), "data/train-00001-of-00002.parquet")
    write(rows(range(40, 44)), "data/test-00000-of-00001.parquet")
    return tmp_path / "repo"


def pixel(source, index):
    return source.load(index).getpixel((0, 0))[0]


class TestReading:
    def test_rows_of_a_split_come_in_the_order_of_the_files(self, repo, monkeypatch):
        source = open_source(f"hub:{repo}")
        assert source.label_names == NAMES
        assert source.labels.tolist() == [n % 3 for n in range(20)]
        assert [pixel(source, index) for index in range(20)] == list(range(20))
        assert source.name(12) == f"{repo}/data/train-00001-of-00002.parquet: row 2"
        assert source.stored_formats() == {"PNG": 20}
        monkeypatch.chdir(repo.parent)
        test = open_source("hub:repo:test")
        assert [pixel(test, index) for index in range(4)] == [40, 41, 42, 43]
        assert len(open_source(f"hub:{repo}:default:test")) == 4

    def test_hashes_are_those_of_the_rows(self, repo, write):
        source = open_source(f"hub:{repo}")
        assert source.content_hash() == open_source(f"parquet:{repo}/data/train-*.parquet").content_hash()
        before = source.fingerprint()
        assert open_source(f"hub:{repo}").fingerprint() == before
        write(rows(range(10, 20), label=lambda n: 0), "data/train-00001-of-00002.parquet")
        assert open_source(f"hub:{repo}").fingerprint() != before

    def test_workers_and_copies_read_the_same(self, repo):
        source = open_source(f"hub:{repo}")
        source.load(0)
        copy = pickle.loads(pickle.dumps(source))
        assert [pixel(copy, index) for index in (19, 0)] == [19, 0]
        found = [batch["images"][:, 0, 0, 0].tolist() for batch in ordered_batches(source, 4, batch_size=8, num_workers=2)]
        assert found == [list(range(8)), list(range(8, 16)), list(range(16, 20))]

    def test_labels_are_read_once_and_again_after_a_change(self, repo, monkeypatch):
        open_source(f"hub:{repo}")
        with monkeypatch.context() as patch:
            patch.setattr(parquet_index, "_read_rows", lambda *_: pytest.fail("labels are read again"))
            assert open_source(f"hub:{repo}").labels.tolist() == [n % 3 for n in range(20)]
        for file in (repo / "data").glob("train-*"):  # the same size and time, but no parquet any more
            stat = file.stat()
            file.write_bytes(bytes(stat.st_size))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        refused(f"hub:{repo}", "train-0000", "damaged")

    def test_a_damaged_index_is_made_again(self, repo, tmp_path, capsys):
        open_source(f"hub:{repo}")
        next((tmp_path / "cache" / "shard_indexes").glob("*.npz")).write_bytes(b"PK cut off")
        assert len(open_source(f"hub:{repo}")) == 20
        assert capsys.readouterr().err.count("is damaged") == 1

    def test_files_are_listed_by_one_of_several_processes(self, repo, tmp_path, monkeypatch):
        read_rows, log = parquet_index._read_rows, tmp_path / "log"

        def slowly(file, *columns):
            with log.open("a") as lines:
                lines.write(f"{file}\n")
            time.sleep(0.1)
            return read_rows(file, *columns)

        monkeypatch.setattr(parquet_index, "_read_rows", slowly)
        context = multiprocessing.get_context("fork")
        others = [context.Process(target=lambda: len(open_source(f"hub:{repo}"))) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join()
            assert other.exitcode == 0
        assert len(log.read_text().splitlines()) == 2  # one line a file

    def test_a_damaged_table_of_the_cache_is_fetched_again(self, repo, tmp_path):
        assert pixel(open_source(f"hub:{repo}"), 4) == 4
        (table,) = (tmp_path / "cache" / "row_groups").glob("*/*.arrow")
        content = bytearray(table.read_bytes())
        place = content.index(png(4))
        content[place : place + len(png(4))] = bytes(len(png(4)))  # as a disk that lost power leaves it
        table.write_bytes(content)
        assert pixel(open_source(f"hub:{repo}"), 4) == 4

    def test_tables_are_used_from_a_cache_that_may_only_be_read(self, repo, monkeypatch):
        assert pixel(open_source(f"hub:{repo}"), 4) == 4

        def read_only(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "utime", read_only)
        monkeypatch.setattr(hub, "read_images", lambda *_: pytest.fail("is fetched again"))
        assert pixel(open_source(f"hub:{repo}"), 4) == 4

    def test_a_cache_folder_that_is_a_file_is_told_in_one_line(self, repo, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").touch()
        monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "file"))
        source = open_source(f"hub:{repo}")
        assert "cannot be written (Not a directory)" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"row_groups/\w+: cannot be written \(Not a directory\).*GENVISION_CACHE"):
            source.load(0)

    def test_class_names_come_from_the_card_where_the_files_have_none(self, write, tmp_path):
        write(rows(range(3)), schema=pa.schema([pa.field(field.name, field.type) for field in FEATURES.arrow_schema]))
        card = {"dataset_info": {"features": FEATURES._to_yaml_list()}}
        datasets_yaml = datasets.utils.metadata.yaml.safe_dump(card)
        (tmp_path / "repo" / "README.md").write_text(f"---\n{datasets_yaml}---\n")
        assert open_source(f"hub:{tmp_path}/repo").label_names == NAMES

    def test_a_set_without_labels_has_one_class(self, write, tmp_path):
        write({"image": [png(1), png(2)]}, schema=pa.schema([("image", pa.binary())]))
        source = open_source(f"hub:{tmp_path}/repo")
        assert (source.labels.tolist(), source.label_names, pixel(source, 1)) == ([0, 0], ["all"], 2)

    def test_small_row_groups_are_read_together(self, repo, tmp_path, monkeypatch):
        monkeypatch.setattr(parquet_index, "PIECE_BYTES", 1 << 20)
        source = open_source(f"hub:{repo}")
        assert [pixel(source, index) for index in range(20)] == list(range(20))
        assert len(list((tmp_path / "cache" / "row_groups").glob("*/*.arrow"))) == 2  # one of each file

    def test_files_behind_an_address_are_read_in_ranges(self, write):
        import fsspec

        address = "memory://genvision-test-hub/train.parquet"
        with fsspec.open(address, "wb") as file:
            file.write(write(rows(range(8))).read_bytes())
        index, _ = parquet_index.open_index([address], None)
        assert (index.labels.tolist(), index.num_rows.tolist()) == ([0, 1, 2, 0, 1, 2, 0, 1], [3, 3, 2])
        images = parquet_index.read_images(address, index.image_column, [1]).column(0)
        assert [image["bytes"].as_py() for image in images] == [png(3), png(4), png(5)]
        fsspec.filesystem("memory").rm("/genvision-test-hub", recursive=True)
        with pytest.raises(UserError, match="the file is gone"):
            parquet_index.read_images(address, index.image_column, [1])


class TestOrder:
    @pytest.fixture
    def large(self, write, tmp_path, monkeypatch):
        """100 images in row groups of 5, where the cache holds the images of a window of 20 twice."""
        write(rows(range(60)), "data/train-00000-of-00002.parquet", group=5)
        write(rows(range(60, 100)), "data/train-00001-of-00002.parquet", group=5)
        source = open_source(f"hub:{tmp_path}/repo")
        monkeypatch.setattr(hub, "CACHE_BYTES", int(source._index.num_bytes.sum()) * 2 * 20 // 100)
        return open_source(f"hub:{tmp_path}/repo")

    def read(self, source, steps, world_size=1, start=0):
        """Pixel of each image in the order of the global batch."""
        data = ImageDataset(source, 4, flip=False)
        streams = [
            batches(data, seed=3, batch_size=20, start_step=start, end_step=steps, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        values = [value for parts in zip(*streams, strict=True) for part in parts for value in part["images"][:, 0, 0, 0].tolist()]
        return np.round((np.array(values) + 1) * 127.5).astype(int).tolist()

    def test_the_order_is_that_of_one_process_whatever_their_number_and_resumes_exactly(self, large):
        order = large.order()
        whole = self.read(large, 5)
        assert whole == order.indices(3, np.arange(100)).tolist()
        assert sorted(whole) == list(range(100))  # each image once an epoch
        assert self.read(large, 5, world_size=2) == whole
        assert self.read(pickle.loads(pickle.dumps(large)), 5, start=3) == whole[60:]

    def test_each_row_group_is_read_about_once_an_epoch_in_a_bounded_cache(self, large, tmp_path, monkeypatch):
        order = large.order()
        assert (order.window, order.block) == (16, 5)
        reads = []
        read = hub.read_images
        monkeypatch.setattr(hub, "read_images", lambda file, column, groups: reads.append((file, *groups)) or read(file, column, groups))
        for index in order.indices(0, np.arange(100)):
            large.load(index)
            held = sum(path.stat().st_size for path in (tmp_path / "cache" / "row_groups").glob("*/*.arrow"))
            assert held <= hub.CACHE_BYTES + 8 * 1000  # Arrow's frames around the images
            assert large._tables.mapped_bytes <= hub.CACHE_BYTES
        assert len(set(reads)) == 20
        assert len(reads) <= 22

    def test_a_set_that_fits_is_shuffled_whole_and_a_wide_window_widens_the_cache(self, repo, large):
        assert large.order(50).window == 50
        widened = large._tables.max_bytes
        large.order()  # a mixture asks again for its fingerprint
        assert large._tables.max_bytes == widened > hub.CACHE_BYTES
        small = open_source(f"hub:{repo}:test")
        assert sorted(small.order().indices(0, np.arange(4))) == [0, 1, 2, 3]
        assert small.order().window is None


class TestFaults:
    def test_damaged_rows_fail_by_file_and_row(self, write, tmp_path):
        kept = tmp_path / "kept.png"
        kept.write_bytes(png(9))
        write({"image": [str(kept)], "label": [0]}, "data/test.parquet", schema=None)
        assert pixel(open_source(f"hub:{tmp_path}/repo:test"), 0) == 9
        images = [
            {"bytes": None, "path": str(kept)},
            {"bytes": png(1)[:50], "path": None},
            {"bytes": None, "path": None},
            {"bytes": None, "path": "gone.png"},
        ]
        write({"image": images, "label": [0, 1, 2, 0]})
        source = open_source(f"hub:{tmp_path}/repo")
        assert pixel(source, 0) == 9
        for index, reason in ((1, ""), (2, "no image"), (3, "No such file")):
            with pytest.raises(BadImageError, match=rf"00000-of-00001\.parquet: row {index}: .*{reason}"):
                source.load(index)

    def test_a_damaged_row_group_costs_its_rows_alone(self, write, tmp_path):
        file = write(rows(range(9)))
        pages = pq.ParquetFile(file).metadata.row_group(1).column(0)
        content = bytearray(file.read_bytes())
        content[pages.data_page_offset : pages.data_page_offset + 40] = b"\xff" * 40
        file.write_bytes(content)
        source = open_source(f"hub:{tmp_path}/repo")
        with pytest.raises(BadImageError, match=r"row 4: cannot be read as an image .*damaged"):
            source.load(4)
        skipping = ordered_batches(source, 4, batch_size=9, on_bad_image="skip")
        assert [batch["indices"].tolist() for batch in skipping] == [[0, 1, 2, 6, 7, 8]]
        assert sorted(skipping.bad_images) == [3, 4, 5]

    def test_a_file_that_goes_away_stops_the_run_and_is_no_bad_image(self, write, tmp_path):
        file = write(rows(range(3)))
        source = open_source(f"hub:{tmp_path}/repo")
        file.unlink()
        with pytest.raises(UserError, match="the file is gone") as caught:
            source.load(0)
        assert not isinstance(caught.value, BadImageError)

    def test_wrong_names_are_refused(self, repo):
        refused(f"hub:{repo}:val", "no split val", "train or test")
        refused(f"hub:{repo}:large:train", "large", "Available")
        refused(f"hub:{repo}:a:b:train", "expected hub:OWNER/NAME")
        refused(f"hub:{repo}:", "expected hub:OWNER/NAME")
        refused(f"hub:{repo}-none", "no folder here")
        refused("hub:cifar10", "no name on the Hub")
        refused("hub:owner/name@", "no folder here")
        refused(f"hub:{repo.parent}/r*po", "holds * in the name of a repository")

    def test_no_network_is_told(self):
        refused("hub:nobody/nothing@v1:test", "the Hub cannot be reached", "HF_HUB_OFFLINE")

    def test_other_formats_are_refused_with_a_way_out(self, tmp_path):
        (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
        refused(f"hub:{tmp_path}", "no parquet files", "wds:")
        assert "hub:owner/name@refs/convert/parquet" in hub._no_parquet("hub:owner/name", hub.HubName.parse("", "owner/name"))
        of_branch = "hub:owner/name@refs/convert/parquet"
        assert "@refs" not in hub._no_parquet("hub:owner/name", hub.HubName.parse("", of_branch.removeprefix("hub:")))
        (tmp_path / "empty").mkdir()
        refused(f"hub:{tmp_path}/empty", "no data files found")

    def test_files_that_cannot_be_used_are_refused(self, write, tmp_path):
        spec = f"hub:{tmp_path}/repo"
        write(rows(range(2), label=lambda n: None if n else 0))
        refused(spec, "1 rows without a label")
        write(rows(range(2), label=lambda n: -1))
        refused(spec, "label -1", "unlabelled split")
        write({"text": ["x"]}, schema=None)
        refused(spec, "image or img")
        write({"image": [png(0)], "label": ["ant"]}, schema=None)
        refused(spec, "label is string", "whole numbers")
        write(rows([]))
        refused(spec, "no rows")
        file = write(rows(range(2)))
        file.write_bytes(file.read_bytes()[:-9])
        refused(spec, "train-00000", "damaged")

    def test_who_does_not_own_the_data_is_not_told_to_change_them(self):
        features = datasets.Features({"text": datasets.Value("string")})
        for file, mend in (("hf://datasets/a/b/x.parquet", "choose another split or data set"), ("x.parquet", "rename the column")):
            with pytest.raises(UserError, match=mend):
                parquet.find_image_column(file, features)

    def test_files_of_unlike_columns_are_refused(self, write, tmp_path):
        write(rows(range(2)), "data/train-00000-of-00002.parquet")
        write({"image": [png(0)]}, "data/train-00001-of-00002.parquet", schema=None)
        refused(f"hub:{tmp_path}/repo", "train-00001", "no column label")
