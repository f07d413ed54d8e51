import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genvision.errors import UserError
from genvision.tokenizers.codebook import CodebookUsage, Remap, revive_dead_codes
from genvision.tokenizers.quantizers import FSQ, IBQ, SimVQ, VectorQuantizer
from parity_fixtures import Fixture

ROOT = Path(__file__).parents[2]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestUsage:
    def test_counts_a_whole_pass(self):
        usage = CodebookUsage(4)
        usage.update(torch.tensor([[0, 0], [1, 1]]))
        usage.update(torch.tensor([[0, 1], [0, 1]]))
        summary = usage.summary()
        assert summary["usage"] == 0.5
        assert abs(summary["perplexity"] - 2) < 1e-12 and abs(summary["entropy_bits"] - 1) < 1e-12
        assert usage.num_dead == 2

    def test_equals_the_official_measures(self):
        fixture = Fixture("quantizers")
        usage = CodebookUsage(24)
        for row in fixture.outputs["vq_euclid.eval_indices"]:
            usage.update(row)
        expected = {"usage": "usage.fraction", "perplexity": "usage.perplexity", "entropy_bits": "usage.entropy_bits"}
        assert usage.summary() == pytest.approx({ours: float(fixture.outputs[name]) for ours, name in expected.items()}, abs=fixture.atol)
        fixture = Fixture("taming_vqgan")
        usage = CodebookUsage(32)
        usage.update(fixture.outputs["indices"])
        assert usage.summary()["perplexity"] == pytest.approx(float(fixture.outputs["perplexity"]), abs=fixture.atol)

    def test_top_share_is_what_the_most_frequent_codes_make_up(self):
        usage = CodebookUsage(200)
        usage.update(torch.arange(200).repeat(3))
        assert usage.top_share() == usage.top_share(0.0101) == 0.01 and usage.top_share(1.0) == 1.0
        usage.update(torch.full((600,), 7))
        assert usage.top_share() == (603 + 3) / 1200 and usage.top_share(0.0) == 603 / 1200
        assert CodebookUsage(4).top_share() == 0.0


class TestRevival:
    @pytest.mark.parametrize("options", [dict(l2_norm=False), dict(l2_norm=False, update="ema"), None], ids=["gradient", "ema", "ibq"])
    def test_dead_codes_move_onto_the_batch_and_living_ones_stay(self, options):
        q = IBQ(8, 3) if options is None else VectorQuantizer(8, 3, **options)
        before = q.embedding.weight.detach().clone()
        z = torch.randn(1, 5, 1, 3)
        counts = torch.tensor([3, 0, 1, 0, 2, 2, 2, 2])
        assert revive_dead_codes(q, counts, z, seeded(1)) == 2
        after = q.embedding.weight.detach()
        living = counts > 0
        assert torch.equal(after[living], before[living])
        for row in after[~living]:
            assert (z.flatten(0, 2) == row).all(-1).any()
        assert revive_dead_codes(q, torch.ones(8), z, torch.Generator()) == 0

    def test_threshold_says_below_which_count_a_code_is_dead(self):
        counts = torch.tensor([3, 0, 1, 2, 2, 2, 2, 2])
        moved = [revive_dead_codes(VectorQuantizer(8, 3), counts, torch.randn(9, 3), seeded(), threshold=t) for t in (1, 2, 3, 4)]
        assert moved == [1, 2, 7, 8]

    @pytest.mark.parametrize("l2_norm", [False, True])
    def test_the_next_moving_average_leaves_a_revived_code_where_it_is(self, l2_norm):
        q = VectorQuantizer(4, 3, l2_norm=l2_norm, update="ema", ema_decay=0.5).train()
        q.move(torch.arange(4), torch.eye(4)[:, :3] - 0.1)
        for _ in range(10):  # nothing but code 0 is chosen: the sums of the others shrink towards nothing
            q(torch.tensor([[1.0, 0.0, 0.0]]))
        z = torch.tensor([[-3.0, 4.0, 1.0]])
        revive_dead_codes(q, torch.tensor([1, 1, 1, 0]), z, seeded())
        revived = q.look_up(torch.tensor([3])).clone()
        torch.testing.assert_close(revived, torch.nn.functional.normalize(z, dim=-1) if l2_norm else z)
        q(torch.tensor([[1.0, 0.0, 0.0]]))  # does not choose it
        torch.testing.assert_close(q.look_up(torch.tensor([3])), revived, atol=1e-3, rtol=0)
        assert int(q.nearest(z)) == 3

    @pytest.mark.parametrize("q", [SimVQ(8, 3), FSQ((4, 2, 1 + 1), symmetric=True)], ids=["simvq", "fsq"])
    def test_codes_that_cannot_move_one_by_one_are_refused_in_one_line(self, q):
        assert not q.movable
        with pytest.raises(UserError, match="cannot be moved one by one") as error:
            revive_dead_codes(q, torch.zeros(8), torch.randn(5, 3), seeded())
        assert "\n" not in str(error.value)


class TestRemap:
    @pytest.mark.parametrize(("kind", "unknown"), [("extra", "extra"), ("int", 3)])
    def test_equals_the_official_one(self, kind, unknown):
        fixture = Fixture("taming_vqgan")
        used, codes = fixture.inputs["used"], fixture.outputs["indices"].view(2, 16)
        remap = Remap(used, 32, unknown=unknown)
        indices = remap.to_used(codes)
        assert torch.equal(indices.flatten(), fixture.outputs[f"remap_{kind}_indices"].flatten())
        assert torch.equal(remap.to_all(indices), fixture.outputs[f"remap_{kind}_unmapped"])
        assert remap.num_indices == len(used) + (unknown == "extra")
        vectors = fixture.state["quantize.embedding.weight"][remap.to_all(indices)]
        entry = fixture.outputs[f"remap_{kind}_codebook_entry"]
        torch.testing.assert_close(vectors, entry.permute(0, 2, 3, 1).flatten(1, 2), atol=fixture.atol, rtol=0)

    def test_used_codes_come_back_and_unknown_ones_become_any(self):
        used = torch.tensor([7, 2, 5])
        remap = Remap(used, 9)
        assert torch.equal(remap.to_all(remap.to_used(used, seeded())), used)
        strange = torch.full((4000,), 3)
        drawn = remap.to_used(strange, seeded())
        assert (torch.bincount(drawn, minlength=3) > 1200).all() and remap.num_indices == 3
        assert torch.equal(drawn, remap.to_used(strange, seeded()))
        with pytest.raises(ValueError, match="give a generator"):
            remap.to_used(strange)

    @pytest.mark.parametrize(
        ("used", "unknown"), [([1, 1], "extra"), ([9], "extra"), ([-1], "extra"), ([], "extra"), ([1], 1), ([1], "nearest")]
    )
    def test_wrong_lists_are_refused_in_one_line(self, used, unknown):
        with pytest.raises(UserError, match="remap") as error:
            Remap(torch.tensor(used, dtype=torch.int64), 9, unknown=unknown)
        assert "\n" not in str(error.value)


TRAINING = """
import sys
import torch
from genvision.processes import process_state
from genvision.tokenizers.codebook import CodebookUsage, revive_dead_codes
from genvision.tokenizers.quantizers import VectorQuantizer

state = process_state("cpu")
torch.manual_seed(0)
q = VectorQuantizer(16, 3, l2_norm=False, update="ema", ema_decay=0.8).train()
z = torch.randn(2, 40, 3)
for step in z:
    q(step.chunk(state.num_processes)[state.process_index])
averages = {name: tensor.clone() for name, tensor in q.state_dict().items()}
share = z[1].chunk(state.num_processes)[state.process_index]
usage = CodebookUsage(16)
usage.update(q.nearest(share))
revive_dead_codes(q, torch.arange(16) % 2, share, torch.Generator().manual_seed(state.process_index))
found = {"averages": averages, "revived": q.state_dict(), "counts": usage.sum_over_processes().counts, "z": z[1]}
torch.save(found, f"{sys.argv[1]}/{state.num_processes}-{state.process_index}.pt")
"""


@pytest.mark.slow
def test_processes_move_their_codes_alike_and_as_one_process_would(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launcher, str(tmp_path / "train.py"), str(tmp_path)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, tensor in alone["averages"].items():
        torch.testing.assert_close(first["averages"][name], tensor)
        assert all(torch.equal(first[when][name], second[when][name]) for when in ("averages", "revived"))
    places = [int((first["z"] == row).all(-1).nonzero()) for row in first["revived"]["embedding.weight"][::2]]
    assert all(place < 20 for place in places[::2]) and all(place >= 20 for place in places[1::2])  # each process gave every other code
    assert torch.equal(first["counts"], alone["counts"]) and torch.equal(second["counts"], alone["counts"])
