import math

import pytest
import torch

from genvision.errors import UserError
from genvision.objectives.contrastive import info_nce


def test_equal_views_of_orthogonal_images_cost_what_the_formula_says():
    views = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    loss = info_nce(torch.cat([views, 2 * views]), temperature=0.2)  # lengths make no difference
    assert float(loss) == pytest.approx(math.log(1 + 2 * math.exp(-1 / 0.2)))


def test_features_that_tell_nothing_cost_a_guess_among_all_others():
    assert float(info_nce(torch.ones(8, 4), temperature=0.5)) == pytest.approx(math.log(7))


def test_each_feature_is_compared_with_all_but_itself():
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    wanted = 0.0
    for i in range(6):
        scores = {j: math.exp(float(unit[i] @ unit[j]) / 0.3) for j in range(6) if j != i}
        wanted -= math.log(scores[(i + 3) % 6] / sum(scores.values())) / 6
    assert float(info_nce(features, temperature=0.3)) == pytest.approx(wanted, rel=1e-5)


def test_a_single_image_has_nothing_to_be_told_from():
    with pytest.raises(UserError, match="at least 2 images"):
        info_nce(torch.randn(2, 4), temperature=0.2)
