"""Classifiers on frozen features: k nearest neighbours, a linear layer, and attention with one learned query.

Shapes: N training rows, M test rows, D features, K classes, B rows of a batch, T tokens of C channels, H heads.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.data.order import sample_indices, sample_positions

TEST_ROWS = 512
"""Test rows that are compared with all training rows at once."""
LBFGS_STEPS = 200
ATTENTION_HEADS = 8
ATTENTIVE_LEARNING_RATE = 3e-3
ATTENTIVE_WEIGHT_DECAY = 0.05


def classify_by_neighbours(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The class of each test row by a weighted vote of its k nearest training rows (DINO, arXiv:2104.14294, appendix F.1).

    Nearness is the cosine s, the weight of a vote exp(s / temperature).

    Args:
        train: float [N, D], N at least k; labels int64 [N].
        test: float [M, D].

    Returns:
        int64 [M]; of classes with equal votes the lowest.
    """
    assert 1 <= k <= len(train), f"k {k} of {len(train)} rows"
    train = F.normalize(train, dim=1)
    found = []
    for rows in test.split(TEST_ROWS):
        near = (F.normalize(rows, dim=1) @ train.T).topk(k, dim=1)
        # minus 1 in the exponent scales all votes alike and keeps them finite
        votes = torch.zeros(len(rows), num_classes, device=rows.device)
        weights = ((near.values - 1) / temperature).exp()
        for neighbour in range(k):  # one at a time: sums of scatter have no fixed order on GPUs
            column = labels[near.indices[:, neighbour]].unsqueeze(1)
            votes.scatter_(1, column, votes.gather(1, column) + weights[:, neighbour].unsqueeze(1))
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to the optimum by L-BFGS from zero: no seed, no learning rate.

    Args:
        features: float [N, D] of the training rows; labels int64 [N].
        weight_decay: the loss is the mean cross-entropy + weight_decay / 2 times the squared weights (the bias is free).
        start: another probe of the same shape, to begin from its weights.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, *, weight_decay: float, start: "LinearProbe | None" = None
    ) -> None:
        self.mean = features.mean(dim=0)
        deviation = features.std(dim=0, correction=0)
        # what never changes tells nothing, and would blow up
        self.scale = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-12), 1 / deviation.clamp(min=1e-12), 0)
        standard = self._standard(features)
        self.weight = torch.zeros(features.shape[1], num_classes, device=features.device)
        self.bias = torch.zeros(num_classes, device=features.device)
        if start is not None:
            self.weight, self.bias = start.weight.clone(), start.bias.clone()
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(parameters, max_iter=LBFGS_STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(standard @ self.weight + self.bias, labels) + 0.5 * weight_decay * self.weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.weight, self.bias = self.weight.detach(), self.bias.detach()

    def __call__(self, features: Tensor) -> Tensor:
        """float [M, D] -> int64 [M]"""
        return (self._standard(features) @ self.weight + self.bias).argmax(dim=1)

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, held_out: Tensor, weight_decays: Sequence[float]
) -> tuple[LinearProbe, float, float]:
    """The probe of all training rows, with the weight decay that does best on those held out.

    Args:
        held_out: bool [N], true for rows that only choose.
        weight_decays: to try; of equally good ones the largest is taken.

    Returns:
        The probe, its weight decay, and the share of held-out rows that a probe of the others gets right.
    """
    best: tuple[float, float] = (-1.0, 0.0)
    probe = None
    for weight_decay in sorted(weight_decays, reverse=True):
        probe = LinearProbe(features[~held_out], labels[~held_out], num_classes, weight_decay=weight_decay, start=probe)
        share = int((probe(features[held_out]) == labels[held_out]).sum()) / int(held_out.sum())
        if share > best[0]:
            best = share, weight_decay
    return LinearProbe(features, labels, num_classes, weight_decay=best[1]), best[1], best[0]


class AttentiveHead(nn.Module):
    """One learned query gathers the tokens by multi-head attention, a linear layer names the class: [B, T, C] -> logits [B, K]."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = math.gcd(dim, ATTENTION_HEADS)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)  # tokens of deep layers can be a hundred times larger
        self.query = nn.Parameter(torch.randn(self.num_heads, dim // self.num_heads) * 0.02)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        keys, values = self.key_value(self.norm(tokens)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # each [B, T, H, C / H]
        weights = ((keys * self.query).sum(-1) / math.sqrt(self.query.shape[1])).softmax(dim=1)  # [B, T, H]
        pooled = (weights.unsqueeze(-1) * values).sum(dim=1).flatten(1)  # [B, C]
        logits: Tensor = self.head(pooled)
        return logits


def train_attentive_heads(
    tokens_of: Callable[[Tensor], Mapping[int, Tensor]],
    dims: Mapping[int, int],
    labels: Tensor,
    num_classes: int,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, AttentiveHead]:
    """Heads of several layers, trained side by side so that the frozen network reads each image once an epoch for all of them.

    Args:
        tokens_of: training rows int64 [B] -> layer to its tokens [B, T, C], without gradients.
        dims: layer to C.
        labels: int64 [N], on the device of the heads.
        advance: told how many rows have been seen.
    """
    with torch.random.fork_rng(devices=[]):  # layers fill themselves from the global state
        torch.random.default_generator.manual_seed(seed)
        heads = {layer: AttentiveHead(dim, num_classes) for layer, dim in dims.items()}
    for head in heads.values():
        head.train().to(labels.device)
    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=ATTENTIVE_LEARNING_RATE, weight_decay=ATTENTIVE_WEIGHT_DECAY)
    with torch.enable_grad():
        for step in range(num_steps):
            warmup = min(1.0, (step + 1) / max(1, num_steps // 20))
            for group in optimizer.param_groups:
                group["lr"] = ATTENTIVE_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            rows = torch.from_numpy(sample_indices(seed, sample_positions(step, batch_size), len(labels)))
            tokens = tokens_of(rows)
            wanted = labels[rows.to(labels.device)]
            # no parameter is shared, so each head sees its own loss alone
            loss = torch.stack([F.cross_entropy(head(tokens[layer]), wanted) for layer, head in heads.items()]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            advance(len(rows))
    return {layer: head.eval().requires_grad_(False) for layer, head in heads.items()}
