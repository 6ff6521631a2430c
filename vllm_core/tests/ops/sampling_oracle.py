"""What the sampler must draw, in Python integers: slow, obvious, and independent of the ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np

from vllm_core.backend.step import scrap_params
from vllm_core.ops import Column, HostArray

SMALLEST_NORMAL = 2.0**-126


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 as in the paper (Salmon et al., SC11, figure 2)."""
    x, k = list(counter), list(key)
    for _ in range(10):
        left, right = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [right >> 32 ^ x[1] ^ k[0], right % 2**32, left >> 32 ^ x[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(x)


@dataclass(frozen=True)
class Row:
    """What one row of a step asks for."""

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
    """Prompt and output so far; the draw is at position len(tokens) unless `position` says
    otherwise."""
    prompt_len: int = 0
    position: int | None = None
    bias: dict[int, float] = field(default_factory=dict)
    held_until: int = 0
    held: tuple[int, ...] = ()

    @property
    def place(self) -> int:
        return len(self.tokens) if self.position is None else self.position

    @property
    def gap(self) -> float:
        return float(np.float32(-math.log(self.min_p) if self.min_p else math.inf))


Packed: TypeAlias = tuple[HostArray, HostArray, HostArray, HostArray]


def pack(rows: Sequence[Row], vocab: int) -> Packed:
    """(params, positions, history, bias) as the device state holds them."""
    count = len(rows)
    params = np.tile(scrap_params(count, count), (count, 1))
    history = np.zeros((count + 1, max([1, *(len(r.tokens) for r in rows)])), np.int32)
    bias = np.zeros((count + 1, vocab), np.float32)
    floats = params.view(np.float32)
    for i, row in enumerate(rows):
        with np.errstate(over="ignore"):
            floats[i, Column.TEMPERATURE] = row.temperature
        params[i, Column.TOP_K] = row.top_k
        floats[i, Column.TOP_P] = row.top_p
        floats[i, Column.MIN_P_GAP] = row.gap
        floats[i, Column.PRESENCE] = row.presence
        floats[i, Column.FREQUENCY] = row.frequency
        floats[i, Column.REPETITION] = row.repetition
        params[i, Column.SEED_LOW : Column.SEED_HIGH + 1] = np.array(
            [row.seed & 0xFFFFFFFF, row.seed >> 32 & 0xFFFFFFFF], np.uint32
        ).view(np.int32)
        params[i, Column.SEQUENCE_INDEX] = row.sequence_index
        params[i, Column.PROMPT_LEN] = row.prompt_len
        params[i, Column.HELD_UNTIL] = row.held_until
        params[i, Column.HELD_IDS : Column.HELD_IDS + len(row.held)] = row.held
        if row.tokens:
            params[i, Column.HISTORY_SLOT] = i
            history[i, : len(row.tokens)] = row.tokens
        if row.bias:
            params[i, Column.BIAS_SLOT] = i
            for token, value in row.bias.items():
                bias[i, token] = value
    positions = np.array([row.place for row in rows], np.int32)
    return params, positions, history, bias


def adjusted(logits: HostArray, row: Row) -> HostArray:
    """[V] float32 after bias, held ids and penalties, operation by operation."""
    x = logits.astype(np.float32)
    for token, value in row.bias.items():
        x[token] += np.float32(value)
    if row.place < row.held_until:
        x[[token for token in row.held if token < len(x)]] = -np.inf
    repetition, frequency, presence = np.array(
        [row.repetition, row.frequency, row.presence], np.float32
    )
    for token in set(row.tokens[: row.place]):
        x[token] = x[token] * (1 / repetition) if x[token] > 0 else x[token] * repetition
    drawn = row.tokens[row.prompt_len : row.place]
    for token in set(drawn):
        x[token] = x[token] - np.float32(drawn.count(token)) * frequency - presence
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.float32(0), x)


def below(x: HostArray, row: Row) -> HostArray:
    """How far each logit lies under the best, in units of the temperature, float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        inverse_temperature = np.float32(1) / np.float32(row.temperature)
        if inverse_temperature < SMALLEST_NORMAL:
            inverse_temperature = np.float32(0)
        distance = (x.max() - x) * inverse_temperature
    return np.where(distance >= 0, distance, np.float32(np.inf))


def weights(distance: HostArray) -> list[int]:
    """By a float64 exp, correctly rounded for all that matters."""
    return [round(math.exp(-float(d)) * 2**27) for d in distance]


def draw(x: HostArray, row: Row, w: Sequence[Any] | None = None) -> int:
    """The token, by big integers, from adjusted logits [V] and (where given) weights of exp's own
    rounding."""
    if row.temperature < SMALLEST_NORMAL:
        return int(np.argmax(x))
    size = len(x)
    distance = below(x, row)
    w = weights(distance) if w is None else [int(v) for v in w]
    level = x.tolist()
    order = sorted(range(size), key=lambda i: (-level[i], i))
    if 0 < row.top_k < size:
        order = order[: row.top_k]
    total = sum(w[i] for i in order)
    share = Fraction(round(float(np.float32(row.top_p)) * 2**24), 2**24)
    masses = list(accumulate(w[i] for i in order))
    length = next(n for n, mass in enumerate(masses, 1) if mass >= share * total)
    kept = [i for i in order[:length] if distance[i] <= max(row.gap, SMALLEST_NORMAL)]
    uniform = philox(
        (row.place, row.sequence_index, 0, 0),
        (row.seed & 0xFFFFFFFF, row.seed >> 32 & 0xFFFFFFFF),
    )[0]
    target = uniform * sum(w[i] for i in kept) >> 32
    prefix = 0
    for i in sorted(kept):
        prefix += w[i]
        if prefix > target:
            return i
    raise AssertionError("the uniform lies past the mass")
