"""What an address stands for."""

import pytest
from fsspec.implementations.local import LocalFileSystem

from genvision.data.shard_addresses import expand_braces, list_shards
from genvision.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x.tar", ["x.tar"]),
        ("x-{8..11}.tar", ["x-8.tar", "x-9.tar", "x-10.tar", "x-11.tar"]),
        ("x-{008..010}.tar", ["x-008.tar", "x-009.tar", "x-010.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
    ],
)
def test_braces_stand_for_numbers_and_words(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("x-{0-3}.tar", "expected numbers {000..146}"), ("x-{3..0}.tar", "the smaller one first"), ("{0..9999}-{0..9999}", "more than")],
)
def test_wrong_braces_are_refused(pattern, words):
    with pytest.raises(UserError, match=words.replace("{", r"\{")):
        expand_braces(pattern)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder, pattern=""):
    path = f"{folder}/{pattern}" if pattern else str(folder)
    return [name.removeprefix(f"{folder}/") for name in list_shards(LocalFileSystem(), path, path)]


def test_a_folder_and_wildcards_stand_for_sorted_files(tmp_path):
    touch(tmp_path, "b.tar", "a.tar", "._a.tar", "a.tar.idx", "deep/c.tar", "a[1].tar")
    assert listed(tmp_path) == ["a.tar", "a[1].tar", "b.tar"]
    assert listed(tmp_path, "?.tar") == ["a.tar", "b.tar"]
    assert listed(tmp_path, "**/*.tar") == ["a.tar", "a[1].tar", "b.tar", "deep/c.tar"]
    assert listed(tmp_path, "a[1].tar") == ["a[1].tar"]  # a file of this very name comes before the pattern
    assert listed(tmp_path, "{b,a}.tar") == ["b.tar", "a.tar"]


def test_what_names_no_set_of_shards_is_refused(tmp_path):
    touch(tmp_path, "one/x-train-00.tar", "one/x-validation-00.tar", "packed/x.tar.gz", "none/x.txt")
    for pattern, words in {
        "one": "several splits",
        "packed": "gunzip",
        "none": "no tar file in this folder",
        "one/y*.tar": "no file matches",
        "one/{x,x}.tar": "twice",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            listed(tmp_path, pattern)
        assert "\n" not in str(caught.value)
