import pytest
import torch
import torch.nn.functional as F

from genvision.errors import UserError
from genvision.tokenizers.quantizers import IBQ, QUANTIZERS, SimVQ, VectorQuantizer, assignment_entropy_gap, rotate_and_scale
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("quantizers")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def quantizer(**changes):
    return VectorQuantizer(8, 3, **(dict(l2_norm=True, commitment_beta=0.25, entropy_weight=0.0) | changes))


def official(fixture, name, **options):
    q = VectorQuantizer(24, 8, l2_norm=name == "vq_cosine", commitment_beta=1.0, update="ema", ema_decay=0.8, **options)
    q.move(torch.arange(24), fixture.state[f"{name}.codebook"])
    return q


def any_quantizer(name):
    return QUANTIZERS[name](levels=(8, 5, 5)) if name == "fsq" else QUANTIZERS[name](64, 6)


class TestVQ:
    def test_nearest_code_is_the_nearest(self):
        q = quantizer(l2_norm=False)
        z = torch.randn(2, 3, 3, 3)
        expected = torch.cdist(z.flatten(0, 2), q.embedding.weight).argmin(1).view(2, 3, 3)
        assert torch.equal(q.nearest(z), expected)
        assert torch.equal(q(z).codes, expected)
        q.entropy_weight = 0.1  # which compares in one piece
        assert torch.equal(q(z).codes, expected)

    def test_a_vector_of_the_table_maps_to_itself_whatever_its_length(self):
        q = quantizer()
        codes = torch.arange(8)
        assert torch.equal(q.nearest(5.0 * q.embedding.weight[codes][None, None])[0, 0], codes)
        torch.testing.assert_close(q.look_up(codes).norm(dim=-1), torch.ones(8))

    def test_gradient_passes_straight_through(self):
        q = quantizer(l2_norm=False)
        z = torch.randn(1, 2, 2, 3, requires_grad=True)
        q(z).quantized.sum().backward()
        assert torch.equal(z.grad, torch.ones_like(z))

    @pytest.mark.parametrize("name", ["vq_euclid", "vq_cosine"])
    def test_codes_losses_and_gradients_equal_the_official_ones(self, fixture, name):
        out, factors = fixture.outputs, torch.arange(8.0)
        q, x = official(fixture, name).eval(), fixture.inputs["x8"].clone().requires_grad_()
        assert torch.equal(q.nearest(x), out[f"{name}.eval_indices"])
        close(q.look_up(q.nearest(x)), out[f"{name}.eval_quantized"], fixture.atol)
        result = q(x)
        close(result.quantized, out[f"{name}.train_quantized"], fixture.atol)
        loss = sum(result.losses.values())
        close(loss, out[f"{name}.train_loss"], fixture.atol)
        ((result.quantized * factors).sum() + loss).backward()
        close(x.grad, out[f"{name}.train_grad_x"], fixture.atol)

        q, x = official(fixture, name, gradient="rotation").eval(), fixture.inputs["x8"].clone().requires_grad_()
        turned = q(x).quantized
        close(turned, out[f"{name}.rotation_quantized"], fixture.atol)
        (turned * factors).sum().backward()
        close(x.grad, out[f"{name}.rotation_grad_x"], fixture.atol)

    @pytest.mark.parametrize("name", ["vq_euclid", "vq_cosine"])
    def test_moving_averages_equal_the_official_ones(self, fixture, name):
        q, out = official(fixture, name).train(), fixture.outputs
        before = q.look_up(torch.arange(24)).clone()
        result = q(fixture.inputs["x8"])
        close(result.quantized, before[result.codes], 1e-6)  # the codes as they were
        close(q.cluster_size, out[f"{name}.ema_cluster_size"], fixture.atol)
        close(q.embed_sum, out[f"{name}.ema_embed_avg"], fixture.atol)
        close(q.look_up(torch.arange(24)), out[f"{name}.ema_codebook"], fixture.atol)

    def test_moving_averages_equal_those_of_taming(self):
        fixture = Fixture("taming_vqgan")
        q = VectorQuantizer(32, 12, l2_norm=False, update="ema", ema_decay=fixture.config["ema"]["decay"])
        q.move(torch.arange(32), fixture.state["quantize.embedding.weight"])
        codes = q.train()(fixture.outputs["prequant"].permute(0, 2, 3, 1)).codes
        assert torch.equal(codes.flatten(), fixture.outputs["indices"])
        close(q.cluster_size, fixture.outputs["ema_cluster_size"], 1e-6)
        close(q.embed_sum, fixture.outputs["ema_embed_avg"], 1e-6)
        close(q.embedding.weight, fixture.outputs["ema_weight"], 1e-6)

    def test_gradient_of_the_codes_squares_equals_that_of_taming(self):
        fixture = Fixture("taming_vqgan")
        q = VectorQuantizer(32, 12, l2_norm=False)
        q.load_state_dict({"embedding.weight": fixture.state["quantize.embedding.weight"]})
        z = fixture.outputs["prequant"].permute(0, 2, 3, 1).clone().requires_grad_()
        out = q(z)
        close(out.quantized.permute(0, 3, 1, 2), fixture.outputs["quant"], fixture.atol)
        out.quantized.square().sum().backward()
        close(z.grad.permute(0, 3, 1, 2), fixture.outputs["dsum_dz_straight_through"], fixture.atol)

    def test_projected_to_few_channels_equals_the_official_one(self, fixture):
        state, q = fixture.state, VectorQuantizer(24, 4, l2_norm=True)
        q.load_state_dict({"embedding.weight": state["vq_factor.codebook"]})
        z = F.linear(fixture.inputs["x8"], state["vq_factor.project_in.weight"], state["vq_factor.project_in.bias"])
        codes = q.nearest(z)
        assert torch.equal(codes, fixture.outputs["vq_factor.eval_indices"])
        out = F.linear(q.look_up(codes), state["vq_factor.project_out.weight"], state["vq_factor.project_out.bias"])
        close(out, fixture.outputs["vq_factor.eval_quantized"], fixture.atol)

    def test_moving_averages_find_the_centres_of_clusters_without_an_optimizer(self):
        centres = torch.eye(3) * 4
        q = VectorQuantizer(3, 3, l2_norm=False, update="ema", ema_decay=0.9, entropy_weight=0.1).train()
        q.move(torch.arange(3), torch.eye(3) * 0.5)
        for _ in range(200):
            z = (centres.repeat(20, 1) + 0.1 * torch.randn(60, 3)).requires_grad_()
            sum(q(z).losses.values()).backward()
        assert "codebook" not in q(z).losses and z.grad.abs().sum() > 0
        close(q.embedding.weight, centres, 0.1)
        assert q.embedding.weight.grad is None

    def test_moving_averages_rest_in_evaluation_and_live_in_the_checkpoint(self):
        q = quantizer(update="ema")
        q.train()(torch.randn(50, 3))
        state = {name: tensor.clone() for name, tensor in q.state_dict().items()}
        assert set(state) == {"embedding.weight", "cluster_size", "embed_sum"}
        q.eval()(torch.randn(50, 3))
        assert all(torch.equal(tensor, state[name]) for name, tensor in q.state_dict().items())
        again = quantizer(update="ema")
        again.load_state_dict(state)
        z = torch.randn(50, 3)
        for model in (q, again):
            model.train()(z)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in q.state_dict().items())
        assert set(quantizer().state_dict()) == {"embedding.weight"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [(dict(update="mean"), "gradient, ema"), (dict(gradient="none"), "rotation"), (dict(ema_decay=1.0), "below 1")],
    )
    def test_wrong_options_are_one_line(self, options, message):
        with pytest.raises(UserError, match=message) as error:
            quantizer(**options)
        assert "\n" not in str(error.value)


class TestRotation:
    def test_turns_and_scales_what_flows_back_as_it_did_what_flowed_forward(self):
        z, e = torch.randn(5, 4).requires_grad_(), torch.randn(5, 4)
        out = rotate_and_scale(z, e)
        torch.testing.assert_close(out, e)
        upstream = torch.randn(5, 4)
        (gradient,) = torch.autograd.grad(out, z, upstream)
        ratio = e.norm(dim=-1) / z.norm(dim=-1)
        torch.testing.assert_close(gradient.norm(dim=-1), ratio * upstream.norm(dim=-1))
        # the angle to the code before is the angle to z after
        torch.testing.assert_close(F.cosine_similarity(gradient, z, dim=-1), F.cosine_similarity(upstream, e, dim=-1))

    def test_opposite_and_vanishing_vectors_give_finite_gradients(self):
        z = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
        out = rotate_and_scale(z, torch.tensor([[-1.0, -2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        out.sum().backward()
        close(out[0], torch.tensor([-1.0, -2.0, 0.0]), 1e-6)
        assert z.grad.isfinite().all()


class TestSimVQ:
    def test_codes_losses_and_gradients_equal_the_official_ones(self, fixture):
        q, x, out = SimVQ(24, 8), fixture.inputs["x8"].clone().requires_grad_(), fixture.outputs
        q.load_state_dict(
            {"embedding.weight": fixture.state["simvq.frozen_codebook"], "transform.weight": fixture.state["simvq.code_transform.weight"]}
        )
        close(q.look_up(torch.arange(24)), out["simvq.codebook"], fixture.atol)
        result = q(x)
        assert torch.equal(result.codes, out["simvq.indices"])
        close(result.quantized, out["simvq.quantized"], fixture.atol)
        loss = sum(result.losses.values())
        close(loss, out["simvq.loss"], fixture.atol)
        loss.backward()
        close(x.grad, out["simvq.dloss_dx"], fixture.atol)
        close(q.transform.weight.grad, out["simvq.dloss_dweight"], fixture.atol)

    def test_every_code_moves_when_one_is_used(self):
        q = SimVQ(16, 4)
        before = q.look_up(torch.arange(16)).detach().clone()
        optimizer = torch.optim.SGD(q.parameters(), lr=0.5)
        q(torch.randn(1, 4)).losses["codebook"].backward()
        optimizer.step()
        assert ((q.look_up(torch.arange(16)) - before).norm(dim=-1) > 0).all()


class TestIBQ:
    def test_codes_losses_and_gradients_equal_the_official_ones(self):
        fixture = Fixture("ibq_quantizer")
        out, q = fixture.outputs, IBQ(24, 8)
        q.load_state_dict(fixture.state)
        z = fixture.inputs["z"].permute(0, 2, 3, 1).clone().requires_grad_()
        result = q(z)
        assert torch.equal(result.codes.flatten(), out["indices"]) and torch.equal(q.nearest(z).flatten(), out["indices"])
        close(result.quantized.permute(0, 3, 1, 2), out["quant"], fixture.atol)
        close(result.losses["entropy"] / 0.05, out["entropy_loss"], fixture.atol)
        loss = sum(result.losses.values())
        close(loss - result.losses["entropy"], out["quant_loss"], fixture.atol)
        ((result.quantized * fixture.inputs["coef"].permute(0, 2, 3, 1)).mean() + loss).backward()
        close(q.embedding.weight.grad, out["grad_embedding"], fixture.atol)
        close(z.grad.permute(0, 3, 1, 2), out["grad_z"], fixture.atol)

    def test_gradient_reaches_codes_that_were_not_chosen(self):
        q = IBQ(16, 4, entropy_weight=0.0)
        q(torch.randn(1, 4)).quantized.square().sum().backward()
        assert (q.embedding.weight.grad.abs().sum(-1) > 0).all()


def test_entropy_gap_prefers_sure_and_varied_choices():
    sure_and_varied = 1 - torch.eye(4)
    sure_and_equal = (1 - torch.eye(4))[:1].expand(4, -1)
    unsure = torch.zeros(4, 4)
    gaps = [float(assignment_entropy_gap(d)) for d in (sure_and_varied, sure_and_equal, unsure)]
    assert gaps[0] < gaps[1] and gaps[0] < gaps[2]


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
class TestEveryQuantizer:
    def test_gives_what_the_contract_says(self, name):
        q = any_quantizer(name)
        z = torch.randn(2, 4, 5, q.codebook_dim, requires_grad=True)
        out = q(z)
        assert out.quantized.shape == z.shape and out.quantized.dtype == torch.float32
        assert out.codes.shape == z.shape[:-1] and out.codes.dtype == torch.int64
        assert out.codes.min() >= 0 and out.codes.max() < q.codebook_size
        assert torch.equal(q.nearest(z), out.codes) and not q.nearest(z).requires_grad
        close(q.look_up(out.codes), out.quantized, 1e-5)
        assert q.nearest(z[:0]).shape == (0, 4, 5)
        (out.quantized.square().sum() + sum(out.losses.values())).backward()
        assert z.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in q.parameters() if p.requires_grad)

    def test_every_code_comes_back_from_its_vector(self, name):
        q = any_quantizer(name)
        if name == "fsq":
            pytest.skip("its vectors are no encoder outputs; see codes_of")
        if name == "ibq":  # a longer code may win by the dot product, so make them equally long
            q.embedding.weight.data = F.normalize(torch.randn(64, 6), dim=-1)
        codes = torch.arange(q.codebook_size)
        assert torch.equal(q.nearest(q.look_up(codes)), codes)

    def test_one_row_or_many_at_a_time_give_the_same_codes(self, name, monkeypatch):
        q = any_quantizer(name)
        z = torch.randn(50, q.codebook_dim)
        together = q.nearest(z)
        monkeypatch.setattr("genvision.tokenizers.quantized._CHUNK_FLOATS_CPU", 1)
        assert torch.equal(q.nearest(z), together)

    def test_codes_are_the_same_under_autocast(self, name):
        q = any_quantizer(name)
        z = torch.randn(2, 50, q.codebook_dim)
        plain = q(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = q(z)
            assert torch.equal(half.codes, plain.codes) and torch.equal(q.nearest(z), plain.codes)
            assert torch.equal(q.look_up(plain.codes), q.look_up(half.codes)) and q.look_up(plain.codes).dtype == torch.float32
        assert torch.equal(half.quantized, plain.quantized) and all(torch.equal(half.losses[k], v) for k, v in plain.losses.items())

    def test_compiles_without_a_graph_break(self, name):
        q = any_quantizer(name)
        explained = torch._dynamo.explain(q)(torch.randn(2, 7, q.codebook_dim))
        assert explained.graph_break_count == 0, explained.break_reasons

    def test_saved_state_gives_equal_codes(self, name):
        q, again = any_quantizer(name), any_quantizer(name)
        again.load_state_dict(q.state_dict())
        z = torch.randn(2, 50, q.codebook_dim)
        assert torch.equal(again.nearest(z), q.nearest(z)) and torch.equal(again(z).quantized, q(z).quantized)
