"""Rows A1 to A5: tokens of LlamaGen-B drawn one by one, beside transformers' Llama of the same shape with the very same weights.

LlamaGen on a sequence that is no grid is Llama but for the order of a head's channels (pairs that turn together are neighbours here, and
half a head apart there), and for the prefix, a class instead of a word. So classes become further words of the peer, and greedy tokens
must be equal. On a grid positions have other angles and the work is the same. Weights are random, the head too.

Before anything is timed, the greedy tokens of the path that is timed are compared with those of whole passes without a cache and with
F.linear, and with the peer's. With int8 weights the distributions of next tokens are compared instead, as Kullback-Leibler divergences.

Shapes: B images, N tokens, R rows (two an image under guidance), V codebook entries.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.bench.checks import WrongAnswer, check_tokens
from genvision.bench.floors import Floors, Work
from genvision.bench.peer_llama import generate, merged_rows, peer_llama
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import by_turns
from genvision.kernels.linear import Weights
from genvision.layers.packed import prepare_linears
from genvision.models.llamagen import LlamaGen
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.guidance import combine
from genvision.samplers.randomness import ImageStreams

NUM_CLASSES = 1000
GUIDANCE = 4.0
MAX_KL = 0.05
"""Mean divergence in nats from which on int8 weights count as wrong; random weights of this size give a hundredth of that."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the network, the job and the rounds."""

    rounds: int = 9
    num_tokens: int = 256
    images: int = 4
    """Of the rows with several."""
    hidden_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    codebook_size: int = 16384
    top_k: int = 2000


LONG = Sizes()
QUICK = Sizes(rounds=3, num_tokens=8)


class Setting(NamedTuple):
    """Rows that share their peers."""

    rows: tuple[str, ...]
    several: bool
    """Several images, or one."""
    scale: float


SETTINGS = (Setting(("A1",), False, 1.0), Setting(("A2", "A2m", "A4"), False, GUIDANCE), Setting(("A3", "A3m", "A5"), True, GUIDANCE))
INT8, MERGED = ("A4", "A5"), ("A2m", "A3m")


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    """Network and peer are built once for all rows."""
    model = random_llamagen(sizes)
    peer = peer_llama(model)
    for setting in SETTINGS:
        chosen = [row for row in rows if row.name in setting.rows]
        if chosen:
            yield from Decoding(model, peer, sizes, setting).results(chosen)


def random_llamagen(sizes: Sizes) -> LlamaGen:
    torch.manual_seed(0)
    model = LlamaGen(
        codebook_size=sizes.codebook_size,
        sequence_length=sizes.num_tokens,
        hidden_dim=sizes.hidden_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        num_classes=NUM_CLASSES,
    )
    nn.init.normal_(model.head.weight, std=0.02)
    return model.eval()


def prepared(model: LlamaGen, weights: Weights, rows: int) -> LlamaGen:
    """A copy of the model as sampling jobs use it on a CPU."""
    return prepare_linears(deepcopy(model), weights, rows=rows)


class Decoding:
    """One setting: what is compared, checked and timed.

    Args:
        peer: from `peer_llama`, with the weights of the model.
    """

    def __init__(self, model: LlamaGen, peer: Any, sizes: Sizes, setting: Setting) -> None:
        self.model, self.peer, self.sizes, self.scale = model, peer, sizes, setting.scale
        self.images = sizes.images if setting.several else 1
        self.num_rows = self.images * (1 + (self.scale != 1))
        self.labels = torch.arange(self.images) * 97 % NUM_CLASSES
        self.noise = ImageStreams(0, range(self.images))
        self.fast: dict[Weights, LlamaGen] = {}

    @torch.inference_mode()
    def results(self, rows: Sequence[Row]) -> list[Result]:
        results: list[Result] = []
        checks: dict[str, str] = {}
        for row in rows:
            weights = self.weights(row)
            if weights not in self.fast:
                self.fast[weights] = prepared(self.model, weights, self.num_rows)
            try:
                checks[row.name] = self.check(row)
            except WrongAnswer as error:
                results.append(wrong(row, self.what(row), str(error)))
        sound = [row for row in rows if row.name in checks]
        if not sound:
            return results
        calls: dict[str, Callable[[], Any]] = {}
        for row in sound:
            calls[self.weights(row)] = partial(self.draw, self.fast[self.weights(row)])
            calls[row.peer] = partial(self.peer_draws, row)
        floors = Floors(self.work("float32"))
        seconds = by_turns(calls | floors.calls, self.sizes.rounds, floors=list(floors.calls))
        for row in sound:
            weights = self.weights(row)
            result = measured(
                row,
                self.what(row),
                seconds,
                own=weights,
                peer=row.peer,
                floor=floors.floor(seconds, self.work(weights)),
                check=checks[row.name],
                unit="token",
                num_units=self.sizes.num_tokens,
                notes=(self.first_token(row),),
            )
            results.append(result)
        return results

    def weights(self, row: Row) -> Weights:
        return "int8" if row.name in INT8 else "float32"

    def what(self, row: Row) -> str:
        guided = f", guidance {self.scale:g}" if self.scale != 1 else ""
        shape = f"{self.sizes.hidden_dim} x {self.sizes.depth}"
        weights = "int8 weights, the peer float32" if row.name in INT8 else "float32"
        images = f"{self.images} image{'s' if self.images > 1 else ''}"
        return f"LlamaGen {shape}, {images}{guided}, {weights}, {self.sizes.num_tokens} tokens"

    def draw(self, model: LlamaGen, **options: Any) -> Tensor:
        """Tokens int64 [B, N] as our users draw them."""
        sampler = AutoregressiveSampler(**({"guidance_scale": self.scale, "top_k": self.sizes.top_k} | options))
        return sampler.sample(model, self.labels, self.noise)

    def peer_draws(self, row: Row, num_tokens: int | None = None, *, greedy: bool = False) -> Tensor:
        function = merged_rows if row.name in MERGED else generate
        top_k = 0 if greedy else self.sizes.top_k
        return function(self.peer, self.labels, num_tokens or self.sizes.num_tokens, scale=self.scale, top_k=top_k)

    def check(self, row: Row) -> str:
        """See the head of this file.

        Raises:
            WrongAnswer: tokens differ, or distributions too much.
        """
        greedy = self.peer_draws(row, greedy=True)
        fast = self.fast[self.weights(row)]
        if row.name in INT8:
            return check_divergence(self.model, fast, greedy, self.labels)
        tokens = self.draw(fast, temperature=0.0)
        plain = plain_logits(self.model, tokens, self.labels, self.scale).argmax(-1)
        check_tokens("greedy tokens beside those of whole passes", tokens, plain)
        return check_tokens("greedy, beside whole passes and the peer", tokens, greedy)

    def work(self, weights: Weights) -> Work:
        """What all tokens need at least: every weight and the cache once a token; products of int8 may be faster than float32's."""
        linear = sum(module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Linear))
        config, tokens = self.model.config, self.sizes.num_tokens
        cache = 4 * self.num_rows * 2 * config.depth * config.hidden_dim * tokens / 2  # half full on average
        if weights == "int8":
            return Work(flops=0, bytes=tokens * (linear + cache))
        return Work(flops=tokens * 2 * self.num_rows * linear, bytes=tokens * (4 * linear + cache))

    def first_token(self, row: Row) -> str:
        """How long the first token takes, which the rest waits for."""
        short = only_first(self.fast[self.weights(row)])
        calls = {"own": lambda: self.draw(short), "peer": lambda: self.peer_draws(row, 1)}
        seconds = by_turns(calls, self.sizes.rounds).cpu
        own, peer = (1e3 * sorted(seconds[name])[len(seconds[name]) // 2] for name in ("own", "peer"))
        return f"first token after {own:.0f} ms, the peer's after {peer:.0f} ms"


def only_first(model: LlamaGen) -> LlamaGen:
    """The same network with the same weights, which ends after one token."""
    short = copy(model)
    short.num_tokens, short.code_shape = 1, (1,)
    return short


def plain_logits(model: LlamaGen, codes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """float32 [B, N, V]: what every token was chosen from, all in one pass over the conditional and one over the null rows."""
    conditional: Tensor = model(codes[:, :-1], labels)
    if scale == 1:
        return conditional
    return combine(conditional, model(codes[:, :-1], labels, drop=torch.ones_like(labels, dtype=torch.bool)), scale)


def check_divergence(model: LlamaGen, fast: LlamaGen, codes: Tensor, labels: Tensor) -> str:
    """Kullback-Leibler divergence of the distributions of next tokens, before guidance, of two networks that read the same tokens.

    Raises:
        WrongAnswer: the mean is above `MAX_KL`.
    """
    expected = plain_logits(model, codes, labels, 1.0).log_softmax(-1)
    logits, cache = fast.start(labels)
    steps = [logits]
    for tokens in codes[:, :-1].unbind(1):
        steps.append(fast.extend(tokens, cache))
    found = torch.stack(steps, dim=1).log_softmax(-1)  # [B, N, V]
    divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)  # [B, N]
    mean, most = divergence.mean().item(), divergence.max().item()
    if not mean <= MAX_KL:
        raise WrongAnswer(f"KL of next tokens from float32's: {mean:.3g} nats on average, {MAX_KL:g} is allowed")
    return f"KL of next tokens from float32's: mean {mean:.1e}, at most {most:.1e} nats"
