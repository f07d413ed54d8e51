import math

import pytest
import torch
import torch.nn.functional as F

from genvision.errors import UserError
from genvision.tokenizers.lookup_free import BSQ, FSQ, LFQ, sign_entropies
from genvision.tokenizers.quantized import in_chunks
from parity_fixtures import Fixture

SIGNS = {"lfq": LFQ, "bsq": BSQ}


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("quantizers")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def weighted(quantized, first):
    """The sum whose gradient the fixture holds: channels times whole numbers from `first` on."""
    return (quantized * torch.arange(first, first + quantized.shape[-1])).sum()


class TestFSQ:
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_codes_vectors_and_gradient_equal_the_official_ones(self, fixture, symmetric):
        name = "fsq_symmetric" if symmetric else "fsq"
        q, x = FSQ((8, 5, 5, 5), symmetric=symmetric), fixture.inputs["x4"].clone().requires_grad_()
        out = q(x)
        close(out.quantized, fixture.outputs[f"{name}.quantized"], fixture.atol)
        assert torch.equal(out.codes, fixture.outputs[f"{name}.indices"].long()) and out.losses == {}
        close(q.look_up(torch.arange(1000)), fixture.outputs[f"{name}.codes_0_999"], fixture.atol)
        weighted(out.quantized, 1).backward()
        close(x.grad, fixture.outputs[f"{name}.grad_x"], fixture.atol)

    def test_projected_equals_the_official_one(self, fixture):
        state, q = fixture.state, FSQ((8, 5, 5, 5))
        z = F.linear(fixture.inputs["x8"], state["fsq_proj.project_in.weight"], state["fsq_proj.project_in.bias"])
        assert torch.equal(q.nearest(z), fixture.outputs["fsq_proj.indices"].long())
        out = F.linear(q(z).quantized, state["fsq_proj.project_out.weight"], state["fsq_proj.project_out.bias"])
        close(out, fixture.outputs["fsq_proj.quantized"], fixture.atol)

    @pytest.mark.parametrize("levels", [(8, 6, 5), (3,), (8, 8, 8, 5, 5, 5)])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_every_code_comes_back_from_its_vector(self, levels, symmetric):
        q = FSQ(levels, symmetric=symmetric)
        codes = torch.arange(q.codebook_size)
        vectors = q.look_up(codes)
        assert (q.codebook_size, q.codebook_dim) == (math.prod(levels), len(levels)) and vectors.shape == (q.codebook_size, len(levels))
        assert vectors.min() == -1 and vectors.max() <= 1 and len(vectors.unique(dim=0)) == q.codebook_size
        assert torch.equal(q.codes_of(vectors), codes)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_every_code_is_reached_by_some_vector(self, symmetric):
        q = FSQ((8, 5, 3), symmetric=symmetric)
        line = torch.linspace(-4, 4, 81)
        codes = q.nearest(torch.cartesian_prod(line, line, line))
        assert torch.equal(codes.unique(), torch.arange(120))

    def test_two_levels_need_the_symmetric_form(self):
        with pytest.raises(UserError, match="set symmetric"):
            FSQ((8, 2))
        q = FSQ((2, 2), symmetric=True)
        assert q.nearest(torch.tensor([[-0.1, -0.1], [0.1, -0.1], [-0.1, 0.1], [0.1, 0.1]])).tolist() == [0, 1, 2, 3]
        with pytest.raises(UserError, match="two or more"):
            FSQ((8, 1))

    def test_large_codebooks_count_exactly(self):
        q = FSQ((9,) * 12)  # 2.8e11 codes: beyond what float32 and int32 can count
        far = torch.full((1, 12), 9.0)
        assert int(q.nearest(far)) == q.codebook_size - 1 and int(q.nearest(-far)) == 0
        codes = torch.randint(q.codebook_size, (100,), generator=torch.Generator().manual_seed(0))
        assert torch.equal(q.codes_of(q.look_up(codes)), codes)


class TestSigns:
    @pytest.mark.parametrize("name", SIGNS)
    @pytest.mark.parametrize("inv_temperature", [1, 100])
    def test_codes_and_losses_equal_the_official_ones(self, fixture, name, inv_temperature):
        q, out = SIGNS[name](64, inv_temperature=inv_temperature), fixture.outputs
        train = f"{name}.train_invtemp{inv_temperature}"
        result = q(fixture.inputs["x6"])
        close(result.quantized, out[f"{name}.eval_quantized"], fixture.atol)
        assert torch.equal(result.codes, out[f"{name}.eval_indices"])
        close(q.look_up(torch.arange(64)), out[f"{name}.codes_0_63"], fixture.atol)
        close(result.losses["commitment"] / 0.25, out[f"{train}_commitment"], fixture.atol)
        close(sum(result.losses.values()), out[f"{train}_aux_loss"], fixture.atol)

    @pytest.mark.parametrize("name", SIGNS)
    @pytest.mark.parametrize("inv_temperature", [1, 100])
    def test_entropies_and_gradient_equal_the_official_ones_without_their_floor(self, fixture, name, inv_temperature):
        """The official code takes the logarithm of a probability below 1e-5 as that of 1e-5; at 2^18 codes this is every one of them."""
        q, out = SIGNS[name](64, inv_temperature=inv_temperature), fixture.outputs
        train = f"{name}.train_invtemp{inv_temperature}"

        def over_all_codes(floor):
            x = fixture.inputs["x6"].double().requires_grad_()
            z, table = q.normalize(x), q.look_up(torch.arange(64)).double()
            p = torch.softmax(2 * inv_temperature * z.flatten(0, 1) @ table.t(), dim=-1)
            per_vector, of_mean = (-(a * a.clamp(min=floor).log()).sum(-1).mean() for a in (p, p.mean(0)))
            vectors = table[q.nearest(x)]
            loss = 0.25 * F.mse_loss(z, vectors) + 0.1 * (per_vector - of_mean)
            (weighted(z + (vectors - z).detach(), 0) + loss).backward()
            return per_vector.float(), of_mean.float(), x.grad.float()

        for actual, what in zip(over_all_codes(1e-5), ("per_sample_entropy", "batch_entropy", "grad_x"), strict=True):
            close(actual, out[f"{train}_{what}"], fixture.atol)
        x = fixture.inputs["x6"].clone().requires_grad_()
        result = q(x)
        (weighted(result.quantized, 0) + sum(result.losses.values())).backward()
        ours = (*sign_entropies(q.normalize(x).flatten(0, 1), q.scale, inv_temperature), x.grad)
        for actual, exact in zip(ours, over_all_codes(1e-300), strict=True):
            close(actual, exact, 2e-6)

    @pytest.mark.parametrize("name", SIGNS)
    @pytest.mark.parametrize("bit_order", ["msb", "lsb"])
    @pytest.mark.parametrize("bits", [1, 5, 18])
    def test_every_code_comes_back_from_its_vector(self, name, bit_order, bits):
        q = SIGNS[name](2**bits, bit_order=bit_order)
        codes = torch.arange(2**bits)[:: max(1, 2**bits // 4096)]
        assert q.codebook_dim == bits and torch.equal(q.nearest(q.look_up(codes)), codes)
        torch.testing.assert_close(q.look_up(codes).abs(), torch.full((len(codes), bits), q.scale))

    def test_first_channel_is_the_greatest_or_the_least_bit(self):
        z = torch.tensor([1.0, -1.0, 0.0, 1.0])  # zero is negative
        assert int(LFQ(16).nearest(z[None])) == 0b1001
        assert int(LFQ(16).nearest(torch.tensor([[1.0, -1.0, -1.0, -1.0]]))) == 8
        assert int(LFQ(16, bit_order="lsb").nearest(torch.tensor([[1.0, -1.0, -1.0, -1.0]]))) == 1

    def test_entropy_of_a_quarter_million_codes_trains_in_little_memory(self):
        q = LFQ(2**18)
        z = (0.01 * torch.randn(256, 18, generator=torch.Generator().manual_seed(0))).requires_grad_()
        q(z).losses["entropy"].backward()  # [N, K] would be 268 MB, and as much again for each of its gradients
        assert z.grad.isfinite().all() and (z.grad != 0).all()

    def test_entropy_term_spreads_the_codes(self):
        q, z = LFQ(16, inv_temperature=1.0, diversity_gamma=2.0), torch.nn.Parameter(1.0 + 0.1 * torch.randn(64, 4))
        optimizer = torch.optim.Adam([z], lr=0.05)
        before = len(q.nearest(z).unique())
        for _ in range(100):
            optimizer.zero_grad()
            q(z).losses["entropy"].backward()
            optimizer.step()
        assert before == 1 and len(q.nearest(z).unique()) >= 12

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(codebook_size=100), "power of two"),
            (dict(codebook_size=1), "power of two"),
            (dict(codebook_size=64, codebook_dim=8), "codebook_dim must be 6"),
            (dict(codebook_size=2**36), "set entropy_weight to 0"),
            (dict(codebook_size=64, bit_order="big"), "choose one of msb, lsb"),
        ],
    )
    def test_wrong_options_are_one_line(self, options, message):
        with pytest.raises(UserError, match=message) as error:
            BSQ(**options)
        assert "\n" not in str(error.value)

    def test_bits_beyond_the_entropy_still_make_codes(self):
        q = BSQ(2**36, 36, entropy_weight=0.0)
        codes = torch.randint(2**36, (50,))
        out = q(q.look_up(codes))
        assert torch.equal(out.codes, codes) and set(out.losses) == {"commitment"}


@pytest.mark.parametrize(
    "q", [FSQ((8, 8, 8, 6, 5)), FSQ((5, 5, 5, 4, 4), symmetric=True), LFQ(2**16), BSQ(2**16)], ids=["fsq", "sym", "lfq", "bsq"]
)
def test_codes_are_the_same_under_autocast(q):
    z = torch.randn(2, 50, q.codebook_dim)
    plain = q(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = q(z)
        assert torch.equal(q.nearest(z), plain.codes) and torch.equal(half.codes, plain.codes)
        assert torch.equal(q.look_up(plain.codes), q.look_up(half.codes))
    assert torch.equal(half.quantized, plain.quantized)
    assert q.nearest(z[0, 0]).shape == () and q.nearest(z).dtype == torch.int64


def test_search_in_chunks_bounds_the_rows_and_keeps_the_order():
    seen = []

    def search(rows):
        seen.append(len(rows))
        return rows[:, 0].long()

    z = torch.arange(300.0).view(3, 100, 1)
    assert torch.equal(in_chunks(search, z, codebook_size=2**14), z[..., 0].long())
    assert seen == [64] * 4 + [44]
