"""Mixtures of data sets: what is seen how often, which classes there are, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from encoded_examples import write_codes
from PIL import Image

from genvision.data.datasets import ImageDataset, batches
from genvision.data.encoded import EncodedDataset
from genvision.data.mixture import is_encoded, open_encoded, parse_mixture
from genvision.data.order import TURNS, part_seed
from genvision.data.sources import open_source
from genvision.errors import UserError

DIGITS = "mix:0.7*digits:first; 0.3 * digits:second"
NUM_FIRST, NUM_SECOND = 898, 899


def write_folder(folder, classes):
    """A plain image a class, its grey value the first one's of the class."""
    for name, value in classes.items():
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(folder / name / "one.png")
    return f"folder:{folder}"


def parts_of(spec):
    return [tuple(part) for part in parse_mixture(spec, spec.removeprefix("mix:"))]


class TestSpecs:
    def test_stars_commas_and_braces_belong_to_the_parts(self):
        assert parts_of("mix:0.5*parquet:a/*-{0,1}.parquet;2*wds:b-{000..100}.tar ; 1e1 * digits") == [
            (0.5, "parquet:a/*-{0,1}.parquet"),
            (2.0, "wds:b-{000..100}.tar"),
            (10.0, "digits"),
        ]

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("mix:0*digits;1*digits", "'0' is no weight"),
            ("mix:-1*digits;1*digits", "'-1' is no weight"),
            ("mix:nan*digits;1*digits", "'nan' is no weight"),
            ("mix:inf*digits;1*digits", "'inf' is no weight"),
            ("mix:parquet:a*.parquet;1*digits", "'parquet:a' is no weight; expected a number above 0"),
            ("mix:digits;1*digits", "'digits' is no part of a mixture; give a weight and a data set each"),
            ("mix:1*digits;", "'' is no part of a mixture"),
            ("mix:1*digits", "is a mixture of one; give digits alone"),
            ("mix:1*mix:1*digits;2*digits", "a mixture in a mixture"),
            ("mix:1*digits:first;20000*digits:second", r"digits:first would be seen less than once in 10,000 samples; .* to 2\.0001 or"),
            ("mix:1*digits;1*encoded:a", "holds codes, not images"),
        ],
    )
    def test_what_is_no_mixture_is_refused_in_one_line(self, spec, message):
        with pytest.raises(UserError, match=message) as caught:
            open_source(spec)
        assert str(caught.value).startswith(f"{spec}: ") and "\n" not in str(caught.value)

    def test_which_specs_are_of_codes(self):
        assert [is_encoded(spec) for spec in ("encoded:a", "digits", "mix:1*encoded:a;1*digits", "mix:1*digits;1*npz:encoded:a")] == [
            True,
            False,
            True,
            False,
        ]


class TestImages:
    def test_every_part_has_its_share_and_its_own_epochs(self):
        data = ImageDataset(open_source(DIGITS), 8, flip=False)
        first, second = open_source("digits:first"), open_source("digits:second")
        stream = batches(data, seed=4, batch_size=500, end_step=TURNS // 500)
        batch = {key: torch.cat(values) for key, *values in ((k, *(b[k] for b in stream)) for k in ("images", "labels", "positions"))}
        indices = data.order.indices(4, batch["positions"].numpy())
        for start, num, share, number, source in ((0, NUM_FIRST, 7000, 0, first), (NUM_FIRST, NUM_SECOND, 3000, 1, second)):
            is_mine = (indices >= start) & (indices < start + num)
            own = indices[is_mine] - start
            assert is_mine.sum() == share
            for epoch in own[: share // num * num].reshape(-1, num):
                assert sorted(epoch.tolist()) == list(range(num))
            np.testing.assert_array_equal(own[:50], source.order().indices(part_seed(4, number), np.arange(50)))
            assert batch["labels"].numpy()[is_mine].tolist() == source.labels[own].tolist()
            alone = ImageDataset(source, 8, flip=False)
            assert torch.equal(batch["images"][is_mine][:50], alone.get_batch(np.arange(50), own[:50])["images"])

    def test_the_source_is_its_parts_behind_each_other(self):
        source, parts = open_source(DIGITS), [open_source(f"digits:{part}") for part in ("first", "second")]
        assert (len(source), source.label_names) == (NUM_FIRST + NUM_SECOND, parts[0].label_names)
        np.testing.assert_array_equal(source.labels, np.concatenate([part.labels for part in parts]))
        for index, (part, own) in {0: (0, 0), 897: (0, 897), 898: (1, 0), 1796: (1, 898)}.items():
            assert source.load(index).tobytes() == parts[part].load(own).tobytes()
            assert source.name(index) == parts[part].name(own)
        assert pickle.loads(pickle.dumps(source)).load(900).tobytes() == source.load(900).tobytes()
        assert source.stored_formats() == {"array": 1797} and source.encoded_bytes() is None

    def test_the_fingerprint_tells_parts_and_shares(self):
        specs = (DIGITS, "mix:7*digits:first;3*digits:second", "mix:6*digits:first;4*digits:second", "mix:7*digits:first;3*digits:first")
        prints = [open_source(spec).fingerprint() for spec in specs]
        assert prints[0] == prints[1] and len(set(prints)) == 3
        hashes = [open_source(spec).content_hash() for spec in specs]
        assert hashes[0] == hashes[1] == hashes[2] != hashes[3]

    def test_classes_of_one_name_are_one_class(self, tmp_path):
        one = write_folder(tmp_path / "one", {"cat": 10, "dog": 20})
        two = write_folder(tmp_path / "two", {"ant": 30, "cat": 40, "elk": 50})
        source = open_source(f"mix:1*{one};1*{two}")
        assert source.label_names == ["cat", "dog", "ant", "elk"]
        assert source.labels.tolist() == [0, 1, 2, 0, 3]
        assert [source.load(index).getpixel((0, 0))[0] for index in range(5)] == [10, 20, 30, 40, 50]
        assert source.encoded_bytes() == sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
        assert source.stored_formats() == {"PNG": 5}
        assert open_source(f"mix:1*{one};1*{one}").labels.tolist() == [0, 1, 0, 1]

    def test_a_window_is_one_of_each_part(self):
        order = open_source(DIGITS).order(100)
        assert [part.window for part in order.orders] == [100, 100]


class TestCodes:
    @pytest.fixture
    def folders(self, tmp_path):
        write_codes(tmp_path / "a", 40, shard_rows=16, label_names=["cat", "dog"])
        write_codes(tmp_path / "b", 100, shard_rows=30, label_names=["dog", "elk", "ant"], first_code=1000)
        return tmp_path

    def open(self, folders, **options):
        return open_encoded(f"mix:1*encoded:{folders / 'a'};3*encoded:{folders / 'b'}", **options)

    def test_batches_are_those_of_the_parts_with_labels_of_the_mixture(self, folders):
        data = self.open(folders, seed=3, shuffle_window=64)
        a, b = (EncodedDataset(folders / name, seed=3) for name in "ab")
        assert (len(data), data.label_names, data.highest_label) == (140, ["cat", "dog", "elk", "ant"], 3)
        positions, indices = np.arange(50, 56), np.array([139, 0, 40, 39, 1, 77])
        batch = data.get_batch(positions, indices)
        assert batch["codes"][:, 0, 0].tolist() == [1099, 0, 1000, 39, 1, 1037]
        assert batch["labels"].tolist() == [1, 0, 1, 1, 1, 2]  # of b 0, 0, 1: dog, dog, elk
        assert batch["positions"].tolist() == positions.tolist()
        for row, (part, own) in enumerate([(b, 99), (a, 0), (b, 0), (a, 39), (a, 1), (b, 37)]):
            assert torch.equal(batch["codes"][row], part.get(int(positions[row]), own)["codes"])
        np.testing.assert_array_equal(data.class_counts, [20, 20 + 34, 33, 33])
        copy = pickle.loads(pickle.dumps(data))
        assert torch.equal(copy.get_batch(positions, indices)["codes"], batch["codes"])
        assert torch.equal(data.get_batch(np.array([50]), np.array([139]))["codes"][0], batch["codes"][0])

    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    def test_all_processes_together_see_every_part_in_its_share_and_epochs(self, folders, world_size):
        data = self.open(folders)
        steps = TURNS // 600
        seen = np.zeros((steps, world_size, 600 // world_size), dtype=np.int64)
        for rank in range(world_size):
            for step, batch in enumerate(batches(data, seed=1, batch_size=600, rank=rank, world_size=world_size, end_step=steps)):
                seen[step, rank] = batch["codes"][:, 0, 0]
        seen = seen.ravel()
        for own in (seen[seen < 1000], seen[seen >= 1000] - 1000):
            num = int(own.max()) + 1
            assert num in (40, 100)
            for epoch in own[: len(own) // num * num].reshape(-1, num):
                assert sorted(epoch.tolist()) == list(range(num))
        assert abs((seen < 1000).mean() - 0.25) < 0.01

    def test_one_set_is_opened_as_itself(self, folders):
        data = open_encoded(f"encoded:{folders / 'a'}", seed=5, shuffle_window=16)
        assert isinstance(data, EncodedDataset) and (data.seed, data.order.window) == (5, 16)

    def test_another_tokenizer_is_refused(self, folders):
        data = self.open(folders)
        data.check_tokenizer("a" * 64)
        with pytest.raises(UserError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb"):
            data.check_tokenizer("b" * 64)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokenizer_hash": "b" * 64}, "has tokenizer aaaaaaaaaaaa, .*/c has bbbbbbbbbbbb; encode one of them again"),
            ({"side": 4}, r"has code shape \[2, 2\], .*/c has \[4, 4\]"),
            ({"kind": "latents", "dtype": "uint16"}, "has kind codes, .*/c has latents"),
            ({"image_size": 16}, "has image size 64, .*/c has 16"),
        ],
    )
    def test_sets_that_do_not_go_together_are_refused_by_name(self, folders, change, message):
        write_codes(folders / "c", 4, **change)
        with pytest.raises(UserError, match=message) as caught:
            open_encoded(f"mix:1*encoded:{folders / 'a'};1*encoded:{folders / 'c'}")
        assert "\n" not in str(caught.value)

    def test_a_path_that_the_system_refuses_costs_a_line(self, folders):
        for spec in ("encoded:~no_such_user/a", f"mix:1*encoded:{folders / 'a'};1*encoded:~no_such_user/a"):
            with pytest.raises(UserError, match=r"home directory.*; check the path") as caught:
                open_encoded(spec)
            assert "\n" not in str(caught.value)

    def test_codes_and_images_do_not_mix(self, folders):
        with pytest.raises(UserError, match="digits holds images, other parts hold codes"):
            open_encoded(f"mix:1*encoded:{folders / 'a'};1*digits")

    def test_names_that_stand_twice_can_be_shared_but_not_merged(self, folders):
        for name, classes in (("c", ["crane", "crane"]), ("d", ["crane", "crane"]), ("e", ["crane", "elk"])):
            write_codes(folders / name, 4, label_names=classes)
        same = open_encoded(f"mix:1*encoded:{folders / 'c'};1*encoded:{folders / 'd'}")
        assert (same.label_names, same.class_counts.tolist()) == (["crane", "crane"], [4, 4])
        with pytest.raises(UserError, match=r"'crane' names two classes of encoded:.*/c; rename one"):
            open_encoded(f"mix:1*encoded:{folders / 'e'};1*encoded:{folders / 'c'}")
