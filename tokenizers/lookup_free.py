"""Quantisers without a table: FSQ rounds every channel, LFQ and BSQ take its sign.

FSQ: Mentzer et al., arXiv:2309.15505. LFQ: MAGVIT-v2, arXiv:2310.05737 section 3.1. BSQ: Zhao et al., arXiv:2406.07548 section 4.

Shapes: z [..., D] vectors, K codes, L levels of a channel, codes [...] int64.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError
from genvision.tokenizers.quantized import Quantized, Quantizer, check_choice, in_chunks

MOST_ENTROPY_BITS = 26
"""Bits up to which the entropy over all 2^D codes is held: 2^26 probabilities are 256 MB."""


class FSQ(Quantizer):
    """Every channel is squashed and rounded to one of a few levels; no codebook to learn and no loss (arXiv:2309.15505 section 3.1).

    K is the product of the levels, D their number; the first channel counts least. Usual levels: 8 6 5 (240), 8 5 5 5 (1000),
    7 5 5 5 5 (4375), 8 8 8 6 5 (15360), 8 8 8 5 5 5 (64000).
    A code's vector lies in [-1, 1]; it is no encoder output, so its code is `codes_of(vectors)`, not `nearest(vectors)`.

    Args:
        levels: of each channel.
        symmetric: levels equally spaced from -1 to 1, also where their number is even; needed for two levels.
    """

    def __init__(self, levels: tuple[int, ...] = (8, 5, 5, 5), *, symmetric: bool = False) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise UserError(f"levels must be two or more for each channel, got {list(levels)}")
        if not symmetric and 2 in levels:
            raise UserError(f"levels {list(levels)}: two levels lie far off the centre unless they are symmetric; set symmetric, or take 3")
        self.levels, self.symmetric = tuple(levels), symmetric
        self.codebook_size, self.codebook_dim = math.prod(levels), len(levels)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise [..., D]; the gradient passes the rounding unchanged and the squashing as it is."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bounded(z.float())
            steps = bounded + (self._rounded(bounded) - bounded).detach()
            vectors = self._vectors(steps)
        return Quantized(vectors, self.codes_of(vectors.detach()), {})

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.codes_of(self._vectors(self._rounded(self._bounded(z.float()))))

    def look_up(self, codes: Tensor) -> Tensor:
        levels = self._row(self.levels, codes.device).long()
        steps = codes[..., None] // self._basis(codes.device) % levels  # 0 .. L - 1
        return self._vectors(steps if self.symmetric else steps - levels // 2)

    def codes_of(self, vectors: Tensor) -> Tensor:
        """Codes of codes' own vectors: [..., D] in [-1, 1] -> [...] int64, the inverse of `look_up`."""
        levels = self._row(self.levels, vectors.device)
        steps = (vectors.float() + 1) * (levels - 1) / 2 if self.symmetric else (vectors.float() + 1) * (levels // 2)
        return (steps.round().long() * self._basis(vectors.device)).sum(-1)  # whole numbers: exact whatever K

    def _bounded(self, z: Tensor) -> Tensor:
        """What is rounded: steps from 0 where symmetric, else from the middle level."""
        levels = self._row(self.levels, z.device)
        if self.symmetric:
            return (levels - 1) * (z.tanh() + 1) / 2
        half = (levels - 1) * (1 + 1e-3) / 2  # a little wider, so that the outer levels can be reached
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return (z + (offset / half).atanh()).tanh() * half - offset

    def _rounded(self, bounded: Tensor) -> Tensor:
        # halves go up where symmetric and to the even number else, as in the published code
        return (bounded + 0.5).floor() if self.symmetric else bounded.round()

    def _vectors(self, steps: Tensor) -> Tensor:
        levels = self._row(self.levels, steps.device)
        return steps * (2 / (levels - 1)) - 1 if self.symmetric else steps / (levels // 2)

    def _basis(self, device: torch.device) -> Tensor:
        return torch.tensor([math.prod(self.levels[:i]) for i in range(self.codebook_dim)], device=device)

    @staticmethod
    def _row(values: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)


class LFQ(Quantizer):
    """The signs of D channels are the bits of a code: K = 2^D, vectors of +1 and -1 (arXiv:2310.05737 section 3.1).

    Zero counts as negative. The entropy term is exact over all K codes without ever holding [N, K]: bits are independent, so the entropy
    of a vector is the sum of its bits', and the mean distribution is a product of two matrices of half the bits each.

    Args:
        codebook_size: K, a power of two.
        codebook_dim: D, the logarithm of K; follows from it unless told.
        commitment_weight: of the squared distance between z and its code.
        entropy_weight: of mean per-vector entropy minus `diversity_gamma` times entropy of the mean distribution (0 leaves it out).
        diversity_gamma: see entropy_weight; more of it spreads the codes.
        inv_temperature: of the distances in the entropy term.
        bit_order: which bit of the code the first channel is: `msb`, the greatest, or `lsb`, the least as in Open-MAGVIT2.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        inv_temperature: float = 100.0,
        bit_order: Literal["msb", "lsb"] = "msb",
    ) -> None:
        super().__init__()
        bits = codebook_size.bit_length() - 1
        if bits < 1 or codebook_size != 2**bits:
            raise UserError(f"codebook_size must be a power of two from 2 on where codes are signs, got {codebook_size}")
        if codebook_dim not in (None, bits):
            raise UserError(f"codebook_dim must be {bits}, one channel for each bit of codebook_size {codebook_size}, got {codebook_dim}")
        if entropy_weight and bits > MOST_ENTROPY_BITS:
            raise UserError(f"the entropy of 2^{bits} codes does not fit into memory, 2^{MOST_ENTROPY_BITS} do; set entropy_weight to 0")
        check_choice("bit_order", bit_order, ("msb", "lsb"))
        self.codebook_size, self.codebook_dim = codebook_size, bits
        self.commitment_weight, self.entropy_weight, self.diversity_gamma = commitment_weight, entropy_weight, diversity_gamma
        self.inv_temperature, self.bit_order = inv_temperature, bit_order

    @property
    def scale(self) -> float:
        """Distance of a code's every channel from 0."""
        return 1.0

    def normalize(self, z: Tensor) -> Tensor:
        """Vectors [..., D] as they are compared."""
        return z

    def forward(self, z: Tensor) -> Quantized:
        """Quantise [..., D], straight-through; losses `commitment` (mean over all elements) and `entropy` (may be negative)."""
        with torch.autocast(z.device.type, enabled=False):
            z = self.normalize(z.float())
            codes = self._codes(z.detach())
            vectors = self.look_up(codes)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z, vectors)}
            if self.entropy_weight:
                per_vector, of_mean = sign_entropies(z.flatten(0, -2), self.scale, self.inv_temperature)
                losses["entropy"] = self.entropy_weight * (per_vector - self.diversity_gamma * of_mean)
        return Quantized(z + (vectors - z).detach(), codes, losses)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        return self._codes(z)  # no scaling of a vector changes its signs

    def look_up(self, codes: Tensor) -> Tensor:
        bits = codes[..., None] >> self._shifts(codes.device) & 1
        return (2.0 * bits - 1.0) * self.scale

    def _codes(self, z: Tensor) -> Tensor:
        shifts = self._shifts(z.device)
        return in_chunks(lambda rows: ((rows > 0).long() << shifts).sum(-1), z, self.codebook_dim)

    def _shifts(self, device: torch.device) -> Tensor:
        shifts = torch.arange(self.codebook_dim, device=device)
        return shifts.flip(0) if self.bit_order == "msb" else shifts


class BSQ(LFQ):
    """LFQ on the unit sphere: vectors are brought to length 1, codes are +-1 / sqrt(D) (arXiv:2406.07548 section 4)."""

    @property
    def scale(self) -> float:
        return self.codebook_dim**-0.5

    def normalize(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


def sign_entropies(z: Tensor, scale: float, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of softmax(2 * inv_temperature * z.c) over the 2^D sign codes c, and entropy of the mean distribution, in nats.

    Args:
        z: [N, D].
        scale: the codes' channels are +-scale.
        inv_temperature: sharpness of the softmax.
    """
    logits = 4 * inv_temperature * scale * z  # of each bit, [N, D]: the bits are independent
    log_on, log_off = F.logsigmoid(logits), F.logsigmoid(-logits)
    on, off = log_on.exp(), log_off.exp()
    per_vector = -(on * log_on + off * log_off).sum(-1).mean()
    half = z.shape[1] // 2
    mean_p = _joint(on[:, :half], off[:, :half]).t() @ _joint(on[:, half:], off[:, half:]) / len(z)  # [2^half, 2^(D - half)]
    return per_vector, -(mean_p * mean_p.clamp(min=1e-30).log()).sum()


def _joint(on: Tensor, off: Tensor) -> Tensor:
    """Probabilities of all words of independent bits: [N, d] twice -> [N, 2^d]."""
    p = on.new_ones(len(on), 1)
    for i in range(on.shape[1]):
        p = torch.stack([p * off[:, i : i + 1], p * on[:, i : i + 1]], dim=-1).flatten(1)
    return p
