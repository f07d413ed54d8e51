"""Tables that processes share: made once, bounded, and told in a line when there is no room."""

import multiprocessing
import os
import pickle

import pyarrow as pa
import pytest
from small_disk import small_disk

from genvision.data.shared_tables import SharedTables
from genvision.errors import UserError


def table(value, num_bytes=1000):
    return pa.table({"image": [bytes([value]) * num_bytes]})


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.arrow"))


def test_a_table_is_made_once_and_comes_back_from_another_process_too(tmp_path):
    log = tmp_path / "reads"

    def read():
        with log.open("a") as file:
            file.write("read\n")
        return table(7)

    tables = SharedTables(tmp_path / "tables", 10_000)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=lambda: os._exit(tables.get("a", read).column(0)[0].as_py() != bytes([7]) * 1000)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    for same in (tables, tables, pickle.loads(pickle.dumps(tables))):
        assert same.get("a", read).equals(table(7))
    assert log.read_text() == "read\n"


def test_disk_and_maps_stay_within_the_bound_and_the_oldest_go_first(tmp_path):
    tables = SharedTables(tmp_path, 5000)
    made = []

    def get(number):
        assert tables.get(str(number), lambda: made.append(number) or table(number)).equals(table(number))
        assert folder_bytes(tmp_path) <= 5000
        assert tables.mapped_bytes <= 5000

    (tmp_path / ".9.arrow.1.part").write_bytes(bytes(900))  # a write that was interrupted
    os.utime(tmp_path / ".9.arrow.1.part", (0, 0))
    (tmp_path / ".8.arrow.2.part").write_bytes(bytes(9000))  # one that goes on
    for number in (0, 1, 2, 1, 3, 4, 0, 4):
        get(number)
    assert made == [0, 1, 2, 3, 4, 0]
    assert [path.name for path in tmp_path.glob("*.part")] == [".8.arrow.2.part"]
    assert SharedTables(tmp_path, 100).get("large", lambda: table(5, 2000)).num_rows == 1  # one table always has room


def test_a_damaged_file_is_made_again(tmp_path):
    SharedTables(tmp_path, 5000).get("a", lambda: table(1))
    (tmp_path / "a.arrow").write_bytes(bytes(100))
    assert SharedTables(tmp_path, 5000).get("a", lambda: table(1)).equals(table(1))


def test_a_full_disk_is_told_in_one_line(tmp_path):
    with small_disk(1 << 16, tmp_path / "disk") as disk:
        tables = SharedTables(disk / "tables", 1 << 30)
        tables.get("small", lambda: table(1))
        with pytest.raises(UserError, match=r"tables: cannot be written \(No space left on device\); free up to 1\.1 GB.*GENVISION_CACHE"):
            tables.get("large", lambda: table(2, 1 << 17))
