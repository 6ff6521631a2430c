"""What the sampler must draw, in big integers, and which other tokens an honest exp may lead to.

Written from the page of the seam (section 8). Weights w = round(exp(-d) 2^27) follow from a float64
exp; a device's float32 exp may round some of them otherwise, so a draw within EDGE of a boundary
may fall on the other side. Where every kept logit equals the best, exp(0) = 1 leaves no choice.

Knows: bias, penalties, filters, the draw. Does not know: steps, devices, the core's own text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend.step import scrap_params
from vllm_core.ops import Column

Numbers = NDArray[Any]

UNIT = 27
EDGE = 1e-6
"""Share of the mass by which exp may move a boundary."""
ZERO_BELOW = np.float32(2.0**-126)


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 (Salmon et al., SC11): ten rounds of two 32 x 32 products."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Request:
    """What one row asks for."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    sequence_index: int = 0
    tokens: tuple[int, ...] = ()
    """Prompt and output so far, where the row has a history slot."""
    later: tuple[int, ...] = ()
    """What an earlier owner of the history slot left behind the position."""
    prompt_len: int = 0
    position: int | None = None
    """Of the token being drawn; None: behind `tokens`."""
    bias: Mapping[int, float] = field(default_factory=dict)
    held: tuple[int, ...] = ()
    held_until: int = 0

    @property
    def place(self) -> int:
        return len(self.tokens) if self.position is None else self.position

    @property
    def gap(self) -> np.float32:
        return np.float32(-math.log(self.min_p) if self.min_p else math.inf)

    @property
    def is_greedy(self) -> bool:
        return bool(np.float32(self.temperature) < ZERO_BELOW)


def pack(requests: Sequence[Request], vocab: int, length: int) -> tuple[Numbers, ...]:
    """(params, positions, history [P+1, length], bias [P+1, vocab]): slots in reverse order."""
    count = len(requests)
    params = np.tile(scrap_params(count, count), (count, 1))
    floats = params.view(np.float32)
    history = np.full((count + 1, length), vocab - 1, np.int32)
    bias = np.zeros((count + 1, vocab), np.float32)
    for i, r in enumerate(requests):
        slot = count - 1 - i
        floats[i, Column.TEMPERATURE] = r.temperature
        params[i, Column.TOP_K] = r.top_k
        floats[i, Column.TOP_P] = r.top_p
        floats[i, Column.MIN_P_GAP] = r.gap
        floats[i, Column.PRESENCE] = r.presence
        floats[i, Column.FREQUENCY] = r.frequency
        floats[i, Column.REPETITION] = r.repetition
        seed = np.array([r.seed & 0xFFFFFFFF, (r.seed >> 32) & 0xFFFFFFFF], np.uint32)
        params[i, [Column.SEED_LOW, Column.SEED_HIGH]] = seed.view(np.int32)
        params[i, Column.SEQUENCE_INDEX] = r.sequence_index
        params[i, Column.PROMPT_LEN] = r.prompt_len
        params[i, Column.HELD_UNTIL] = r.held_until
        params[i, Column.HELD_IDS : Column.HELD_IDS + len(r.held)] = r.held
        written = (*r.tokens, *r.later)[:length]
        if written:
            params[i, Column.HISTORY_SLOT] = slot
            history[slot, : len(written)] = written
        if r.bias:
            params[i, Column.BIAS_SLOT] = slot
            for token, value in r.bias.items():
                bias[slot, token] = value
    return params, np.array([r.place for r in requests], np.int32), history, bias


def adjusted(logits: Numbers, r: Request) -> Numbers:
    """[V] float32 after bias, held ids and penalties, rounded after each operation."""
    x = logits.astype(np.float32)
    for token, value in r.bias.items():
        x[token] += np.float32(value)
    if r.place < r.held_until:
        x[[token for token in r.held if 0 <= token < len(x)]] = -np.inf
    seen = r.tokens[: r.place]
    repetition = np.float32(r.repetition)
    for token in set(seen):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    drawn = list(seen[r.prompt_len :])
    for token in set(drawn):
        taken = np.float32(drawn.count(token)) * np.float32(r.frequency)
        x[token] = x[token] - taken - np.float32(r.presence)
    x[np.abs(x) < ZERO_BELOW] = 0
    return x


def distances(x: Numbers, r: Request) -> Numbers:
    """[V] float32: how far below the best, in units of the temperature; inf where banned."""
    coldness = np.float32(1) / np.float32(r.temperature)
    if coldness < ZERO_BELOW:
        coldness = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        d = (x.max() - x) * coldness
    return np.where(np.isneginf(x), np.float32(np.inf), d)


@dataclass
class Draw:
    """One row: the token that follows from exact weights, and what else an honest exp allows."""

    x: Numbers
    r: Request
    extra: float = 0.0
    """Share of the mass by which roundings before exp may move a boundary."""
    size: int = 0
    """Tokens that pass the filters."""

    def token(self) -> int:
        """The token; -1 for a row without a finite best logit."""
        if not np.isfinite(self.x.max()):
            return -1
        if self.r.is_greedy:
            return int(np.argmax(self.x))
        self._prepare()
        kept = self._kept(self._length(self._need()), 0.0)
        self.size = len(kept)
        prefix = np.cumsum(self.w[kept])
        target = self.uniform * int(prefix[-1]) >> 32
        return int(kept[np.searchsorted(prefix, target, side="right")])

    def allows(self, token: int) -> bool:
        """Whether an honest exp could have led to the token."""
        if self.r.is_greedy or not 0 <= token < len(self.x):
            return False
        slack = EDGE + self.extra
        total = int(self.masses[-1])
        wide = slack * total if self._is_rounded(self.order) else 0.0
        lowest, highest = (self._length(self._need() + sign * wide) for sign in (-1, 1))
        for length in range(lowest, min(highest, lowest + 64) + 1):
            for edge in (0.0, slack, -slack):
                kept = self._kept(length, edge)
                if self._holds(kept, token, slack):
                    return True
        return False

    # ---- pieces
    def _prepare(self) -> None:
        x, r = self.x, self.r
        self.d = distances(x, r)
        self.w = np.rint(np.exp(-self.d.astype(np.float64)) * 2.0**UNIT).astype(np.int64)
        order = np.argsort(-x, kind="stable")  # by (logit descending, id ascending)
        self.order = order[: r.top_k] if 0 < r.top_k < len(x) else order
        self.masses = np.cumsum(self.w[self.order])
        words = r.seed & 0xFFFFFFFF, (r.seed >> 32) & 0xFFFFFFFF
        self.uniform = philox((r.place, r.sequence_index, 0, 0), words)[0]

    def _is_rounded(self, ids: Numbers) -> bool:
        """Whether exp leaves a choice: not where every weight is that of the best."""
        return bool(self.extra) or bool(((self.d[ids] > 0) & (self.w[ids] > 0)).any())

    def _need(self) -> int:
        """The mass that top-p asks for, rounded up to a whole one."""
        share = max(round(float(np.float32(self.r.top_p)) * 2**24), 1)
        return -(-share * int(self.masses[-1]) >> 24)

    def _length(self, need: float) -> int:
        """Tokens of the shortest prefix with at least this mass."""
        need = max(min(math.ceil(need), int(self.masses[-1])), 1)
        return int(np.searchsorted(self.masses, need, side="left")) + 1

    def _kept(self, length: int, edge: float) -> Numbers:
        """Ids in order that pass the filters; edge moves min-p's cut."""
        gap = max(float(self.r.gap), float(ZERO_BELOW))
        coldness = math.frexp(float(np.float32(self.r.temperature)))[0]
        if coldness == 0.5 and not self.extra:
            edge = 0.0  # a power of two: distances are exact
        prefix = self.order[:length]
        return np.sort(prefix[self.d[prefix] <= gap * (1 + edge)])

    def _holds(self, kept: Numbers, token: int, slack: float) -> bool:
        """Whether the token's share of the kept mass, widened, holds the uniform."""
        place = int(np.searchsorted(kept, token))
        if place == len(kept) or kept[place] != token:
            return False
        prefix = np.cumsum(self.w[kept])
        total, u = float(prefix[-1]), self.uniform / 2**32
        if not self._is_rounded(kept):
            slack = 0.0
        low = float(prefix[place] - self.w[token]) / total
        high = float(prefix[place]) / total
        return low - slack <= u < high + slack


def roughness(x: Numbers, r: Request) -> float:
    """`extra` of a row whose penalties may round in more than one honest way: by u32 of each logit,
    twice over."""
    scale = np.abs(x[np.isfinite(x)]).max(initial=0.0)
    return float(min(4 * 2.0**-24 * scale / max(r.temperature, 1e-3), 1e-3))


def survival(statistic: float, freedom: int) -> float:
    """P(chi-square > statistic), by the cube root of Wilson and Hilferty."""
    share = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - share)) / math.sqrt(share)
    return math.erfc(z / math.sqrt(2)) / 2


def chi_square(counts: Numbers, probability: Numbers) -> tuple[float, int]:
    """(statistic, degrees of freedom); cells under 5 expected are pooled."""
    expected = probability * counts.sum()
    rare = expected < 5
    groups: Iterator[tuple[float, float]] = zip(counts[~rare].tolist(), expected[~rare].tolist())
    cells = list(groups)
    if expected[rare].sum() > 0:
        cells.append((float(counts[rare].sum()), float(expected[rare].sum())))
    if counts[rare & (expected == 0)].any():
        return math.inf, max(len(cells) - 1, 1)
    return sum((o - e) ** 2 / e for o, e in cells), max(len(cells) - 1, 1)
