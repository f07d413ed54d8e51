"""Quantisers with a table of codes: VQ, SimVQ and IBQ; and the registry of all.

VQ: van den Oord et al., arXiv:1711.00937; unit codes as in ViT-VQGAN (arXiv:2110.04627) and LlamaGen (arXiv:2406.06525 section 3.1);
moving averages arXiv:1711.00937 appendix A.1; rotation trick arXiv:2410.06424. SimVQ: arXiv:2411.02038. IBQ: arXiv:2412.02692.

Shapes: z [..., D] vectors, e the K codes' vectors, codes [...] int64.
"""

import inspect
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.lookup_free import BSQ, FSQ, LFQ
from genvision.tokenizers.quantized import Quantized, Quantizer, check_choice, in_chunks

SMOOTHING = 1e-5
"""Added to every code's count before the moving averages are divided by it."""


class VectorQuantizer(Quantizer):
    """The nearest code of a table, by Euclidean distance or between unit vectors.

    Args:
        codebook_size: K.
        codebook_dim: D.
        l2_norm: compare and return unit vectors; the stored table itself is not kept at unit length.
        commitment_beta: weight of the commitment term, which moves the encoder.
        codebook_weight: weight of the codebook term, which moves the codes.
        entropy_weight: weight of mean per-vector entropy minus entropy of the mean assignment (0 leaves it out).
        update: how the codes move: by the `gradient` of the codebook term, or as moving averages (`ema`) of the vectors that chose them,
            in every forward in training mode; there is no codebook term then. All processes must call forward together.
        ema_decay: of the moving averages.
        gradient: how the gradient reaches z: unchanged (`straight_through`), or turned and scaled as z was to become its code (`rotation`).
    """

    movable = True
    cluster_size: Tensor
    embed_sum: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        l2_norm: bool = True,
        commitment_beta: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        update: Literal["gradient", "ema"] = "gradient",
        ema_decay: float = 0.99,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        super().__init__()
        check_choice("update", update, ("gradient", "ema"))
        check_choice("gradient", gradient, ("straight_through", "rotation"))
        if not 0 <= ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, got {ema_decay}")
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.l2_norm, self.entropy_weight = l2_norm, entropy_weight
        self.commitment_beta, self.codebook_weight = commitment_beta, codebook_weight
        self.update, self.ema_decay, self.gradient = update, ema_decay, gradient
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        if l2_norm and not self.embedding.weight.is_meta:  # a norm without values would import torch's compiler
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        if update == "ema":
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("cluster_size", torch.ones(codebook_size))
            self.register_buffer("embed_sum", self.embedding.weight.detach().clone())

    def table(self) -> Tensor:
        """The codes as used, [K, D]."""
        return self.normalize(self.embedding.weight)

    def look_up(self, codes: Tensor) -> Tensor:
        return self.normalize(F.embedding(codes, self.embedding.weight))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code: [..., D] -> [...] int64; the first of equals."""
        with torch.autocast(z.device.type, enabled=False):
            return self._search(self.normalize(z.float()), self.table().float())

    def forward(self, z: Tensor) -> Quantized:
        """Quantise [..., D]; losses are means over all elements."""
        with torch.autocast(z.device.type, enabled=False):
            z, table = self.normalize(z.float()), self.table().float()
            if self.entropy_weight:
                # a moving average writes into the table, which the entropy's gradient still needs
                distances = self._distances(z.flatten(0, -2), table.clone() if self.update == "ema" else table)  # [BN, K]
                codes = distances.detach().argmin(1).view(z.shape[:-1])
            else:
                codes = self._search(z.detach(), table.detach())
            vectors = F.embedding(codes, table)
            losses = {}
            if self.update == "gradient":
                losses["codebook"] = self.codebook_weight * F.mse_loss(vectors, z.detach())
            elif self.training:
                self._move_averages(z.detach().flatten(0, -2), codes.flatten())
            losses["commitment"] = self.commitment_beta * F.mse_loss(z, vectors.detach())
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * assignment_entropy_gap(distances)
            passed = rotate_and_scale(z, vectors) if self.gradient == "rotation" else z + (vectors - z).detach()
        return Quantized(passed, codes, losses)

    @torch.no_grad()
    def move(self, codes: Tensor, vectors: Tensor) -> None:
        """Put single codes elsewhere; moving averages begin anew there, else the next of them would take the code back."""
        weight = self.embedding.weight
        codes, vectors = codes.to(weight.device), self.normalize(vectors.float()).to(weight)
        weight[codes] = vectors
        if self.update == "ema":
            self.cluster_size[codes] = 1.0
            self.embed_sum[codes] = vectors.to(self.embed_sum)

    def normalize(self, z: Tensor) -> Tensor:
        """Vectors [..., D] as they are compared: at unit length with `l2_norm`, else as they are."""
        return F.normalize(z, dim=-1) if self.l2_norm else z

    def _search(self, z: Tensor, table: Tensor) -> Tensor:
        return in_chunks(lambda rows: self._distances(rows, table).argmin(1), z, len(table))

    def _distances(self, z: Tensor, table: Tensor) -> Tensor:
        # written as |z|^2 + |e|^2 - 2 z.e, as the official code does, so that near ties fall the same way
        return z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.t()

    @torch.no_grad()
    def _move_averages(self, z: Tensor, codes: Tensor) -> None:
        # N <- d N + (1 - d) n and S <- d S + (1 - d) sum of z, codes S / N (arXiv:1711.00937, eqs. 6 to 8)
        new = z.new_zeros(self.codebook_size, self.codebook_dim + 1)
        new.index_add_(0, codes, F.pad(z, (0, 1), value=1.0))  # sums, and how many in the last column
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(new)
        self.embed_sum.lerp_(new[:, :-1].to(self.embed_sum), 1 - self.ema_decay)
        self.cluster_size.lerp_(new[:, -1].to(self.cluster_size), 1 - self.ema_decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + SMOOTHING) / (total + self.codebook_size * SMOOTHING) * total
        self.embedding.weight.copy_(self.normalize(self.embed_sum / smoothed[:, None]))


class SimVQ(VectorQuantizer):
    """VQ whose codes are one learned linear map of a frozen Gaussian table: every code moves when any is used (arXiv:2411.02038).

    Args:
        codebook_size: K.
        codebook_dim: D.
        commitment_beta: weight of the commitment term.
        codebook_weight: weight of the codebook term, which moves the map.
        entropy_weight: as for VQ.
        gradient: as for VQ.
    """

    movable = False

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        commitment_beta: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
    ) -> None:
        super().__init__(
            codebook_size,
            codebook_dim,
            l2_norm=False,
            commitment_beta=commitment_beta,
            codebook_weight=codebook_weight,
            entropy_weight=entropy_weight,
            gradient=gradient,
        )
        nn.init.normal_(self.embedding.weight, std=codebook_dim**-0.5)
        self.embedding.weight.requires_grad_(False)
        self.transform = nn.Linear(codebook_dim, codebook_dim, bias=False)

    def table(self) -> Tensor:
        return self.transform(self.embedding.weight)

    def look_up(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            return self.transform(F.embedding(codes, self.embedding.weight))

    def move(self, codes: Tensor, vectors: Tensor) -> None:
        Quantizer.move(self, codes, vectors)


class IBQ(VectorQuantizer):
    """The code of the greatest dot product; the softmax over all of them carries the gradient, so every code moves (arXiv:2412.02692).

    The chosen code need not be the nearest, and a code's own vector chooses it only if no longer one lies that way.
    Training holds [B*N, K] probabilities.

    Args:
        codebook_size: K.
        codebook_dim: D.
        commitment_beta: weight of the term that moves the codes. (The paper's beta; the encoder's term has weight 1.)
        entropy_weight: of the entropy term, at temperature 0.01.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, *, commitment_beta: float = 0.25, entropy_weight: float = 0.05) -> None:
        super().__init__(codebook_size, codebook_dim, l2_norm=False, codebook_weight=commitment_beta, entropy_weight=entropy_weight)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise [..., D]. Losses: `codebook`, `commitment`, `index` (both sides, through the softmax) and `entropy`."""
        with torch.autocast(z.device.type, enabled=False):
            z, table = z.float(), self.table().float()
            scores = self._distances(z.flatten(0, -2), table)  # [BN, K]
            p = F.softmax(-scores, dim=-1)
            codes = scores.detach().argmin(1).view(z.shape[:-1])
            vectors = F.embedding(codes, table)
            chosen = p + (F.one_hot(codes.flatten(), len(table)) - p).detach()  # [BN, K], one-hot
            through = (chosen @ table).view(z.shape)
            losses = {
                "codebook": self.codebook_weight * F.mse_loss(vectors, z.detach()),
                "commitment": F.mse_loss(z, vectors.detach()),
                "index": F.mse_loss(through, z),
            }
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * assignment_entropy_gap(scores)
        return Quantized(through, codes, losses)

    def _distances(self, z: Tensor, table: Tensor) -> Tensor:
        return -(z @ table.t())


def rotate_and_scale(z: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` as the rotation and scaling of z that makes them, both held fixed in the gradient (arXiv:2410.06424 section 4).

    Args:
        z: [..., D].
        vectors: [..., D], z's codes.

    Returns:
        [..., D], equal to `vectors` up to rounding.
    """
    unit_z, unit_e = F.normalize(z, dim=-1).detach(), F.normalize(vectors, dim=-1).detach()
    w = F.normalize(unit_z + unit_e, dim=-1)
    turned = z - 2 * w * (z * w).sum(-1, keepdim=True) + 2 * unit_e * (z * unit_z).sum(-1, keepdim=True)
    scale = vectors.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return turned * scale.detach()


def assignment_entropy_gap(distances: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of soft assignments minus entropy of their mean: low when each choice is sure and all codes are used.

    Args:
        distances: [N, K] squared distances, or whatever is least for the chosen code.
        temperature: of the softmax over minus distances.
    """
    log_p = F.log_softmax(-distances / temperature, dim=-1)
    p = log_p.exp()
    mean_p = p.mean(0)
    per_vector = -(p * log_p).sum(-1).mean()
    of_mean = -(mean_p * (mean_p + 1e-5).log()).sum()
    return per_vector - of_mean


QUANTIZERS: dict[str, type[Quantizer]] = {"vq": VectorQuantizer, "simvq": SimVQ, "ibq": IBQ, "fsq": FSQ, "lfq": LFQ, "bsq": BSQ}
"""Name to class. All are built from `codebook_size` and `codebook_dim` but FSQ, whose sizes follow from its `levels`."""


def make_quantizer(name: str, codebook_size: int, codebook_dim: int, options: dict[str, Any]) -> Quantizer:
    """A quantiser by its name in `QUANTIZERS`.

    Args:
        codebook_size, codebook_dim: K and D; where they follow from the options they must agree.
        options: its other arguments.

    Raises:
        UserError: the name or an option is unknown, or the sizes do not agree.
    """
    check_choice("quantizer", name, tuple(QUANTIZERS))
    known = list(inspect.signature(QUANTIZERS[name].__init__).parameters)[1:]
    for option in options:
        if option not in known:
            raise UserError(f"quantizer_options {option}: {name} has no such option; it has {', '.join(known)}")
    sizes = {"codebook_size": codebook_size, "codebook_dim": codebook_dim}
    quantizer = QUANTIZERS[name](**{size: value for size, value in sizes.items() if size in known}, **options)
    for size, value in sizes.items():
        if getattr(quantizer, size) != value:
            raise UserError(f"{size} {value}: {name} with these options has {getattr(quantizer, size)}; set {size} to that")
    return quantizer
