"""Embeddings of conditions. Dropping a condition is what makes classifier-free guidance possible (arXiv:2207.12598)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelEmbedding(nn.Module):
    """Class labels [B] -> [B, 1, C]; one more row for the null class where labels are dropped in training."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.table = nn.Embedding(num_classes + int(dropout > 0), dim)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop` [B] boolean says whose label is dropped; None draws it in training and drops none in eval."""
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.table(labels).unsqueeze(1)


class TextEmbedding(nn.Module):
    """Text features [B, T, F] -> [B, T, C] by a two-layer perceptron; a fixed random table stands for "no text".

    The null features are a buffer: the official training saves but never changes them.
    """

    def __init__(self, length: int, feature_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(feature_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.null_features: Tensor
        self.register_buffer("null_features", torch.randn(length, feature_dim) / feature_dim**0.5)

    def forward(self, features: Tensor, drop: Tensor | None = None) -> Tensor:
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(features.shape[0], device=features.device) < self.dropout
        if drop is not None:
            features = torch.where(drop[:, None, None], self.null_features, features)
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))
