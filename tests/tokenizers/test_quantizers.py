import torch

from genvision.tokenizers.quantizers import CodebookUsage, VectorQuantizer, assignment_entropy_gap, revive_dead_codes


def quantizer(**changes):
    return VectorQuantizer(8, 3, **(dict(l2_norm=True, commitment_beta=0.25, entropy_weight=0.0) | changes))


def test_nearest_code_is_the_nearest():
    q = quantizer(l2_norm=False)
    z = torch.randn(2, 3, 3, 3)
    expected = torch.cdist(z.flatten(0, 2), q.embedding.weight).argmin(1).view(2, 3, 3)
    assert torch.equal(q.nearest(z), expected)
    assert torch.equal(q(z).codes, expected)


def test_a_vector_of_the_table_maps_to_itself_whatever_its_length():
    q = quantizer()
    codes = torch.arange(8)
    assert torch.equal(q.nearest(5.0 * q.embedding.weight[codes][None, None])[0, 0], codes)
    torch.testing.assert_close(q.look_up(codes).norm(dim=-1), torch.ones(8))


def test_gradient_passes_straight_through():
    q = quantizer(l2_norm=False)
    z = torch.randn(1, 2, 2, 3, requires_grad=True)
    q(z).quantized.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_usage_counts_a_whole_pass():
    usage = CodebookUsage(4)
    usage.update(torch.tensor([[0, 0], [1, 1]]))
    usage.update(torch.tensor([[0, 1], [0, 1]]))
    summary = usage.summary()
    assert summary["usage"] == 0.5
    assert abs(summary["perplexity"] - 2) < 1e-12 and abs(summary["entropy_bits"] - 1) < 1e-12
    assert usage.num_dead == 2


def test_top_share_is_what_the_most_frequent_codes_make_up():
    usage = CodebookUsage(200)
    usage.update(torch.arange(200).repeat(3))
    assert usage.top_share() == usage.top_share(0.0101) == 0.01 and usage.top_share(1.0) == 1.0
    usage.update(torch.full((600,), 7))
    assert usage.top_share() == (603 + 3) / 1200 and usage.top_share(0.0) == 603 / 1200
    assert CodebookUsage(4).top_share() == 0.0


def test_entropy_gap_prefers_sure_and_varied_choices():
    sure_and_varied = 1 - torch.eye(4)
    sure_and_equal = (1 - torch.eye(4))[:1].expand(4, -1)
    unsure = torch.zeros(4, 4)
    gaps = [float(assignment_entropy_gap(d)) for d in (sure_and_varied, sure_and_equal, unsure)]
    assert gaps[0] < gaps[1] and gaps[0] < gaps[2]


def test_dead_codes_move_onto_the_batch_and_living_ones_stay():
    q = quantizer(l2_norm=False)
    before = q.embedding.weight.detach().clone()
    z = torch.randn(1, 5, 1, 3)
    counts = torch.tensor([3, 0, 1, 0, 2, 2, 2, 2])
    moved = revive_dead_codes(q, counts, z, torch.Generator().manual_seed(1))
    assert moved == 2
    after = q.embedding.weight.detach()
    living = counts > 0
    assert torch.equal(after[living], before[living])
    for row in after[~living]:
        assert (z.flatten(0, 2) == row).all(-1).any()
    assert revive_dead_codes(q, torch.ones(8), z, torch.Generator()) == 0
