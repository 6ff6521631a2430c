"""The sampler of the seam in numpy with 64-bit integers and a sort, in steps that a fault replaces.

Equal to the reference bit for bit as it stands: a second text, so that a fault is one method.

Knows: the order and the integers of a draw. Does not know: what faults there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_core.bindings.numpy import NumpyOps
from vllm_core.errors import NotSupported
from vllm_core.ops import Features
from vllm_core.ops.sampling import MAX_VOCAB
from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.faults.planted import Method, Numbers, Open, numpy_ops, ops

SMALLEST = np.float32(2.0**-126)
_WORD = np.uint64(0xFFFFFFFF)


class PlainSampler(NumpyOps):
    """One method per step; arrays are [R, V], columns [R]."""

    unit = 27

    def sample(
        self,
        logits: Any,
        params: Any,
        positions: Any,
        history: Any,
        bias: Any,
        features: Features,
    ) -> tuple[Any, Any]:
        if logits.shape[-1] > MAX_VOCAB:
            raise NotSupported(f"the sampler holds {MAX_VOCAB} tokens, not {logits.shape[-1]}")
        self.bias_at, self.history_at, self.features = bias, history, features
        x = np.asarray(logits).astype(np.float32)
        x = self.adjusted(x, params, positions)
        fault = self.fault(x)
        greedy = self.greedy(x).astype(np.int32)
        if not features.draw:
            return greedy, fault
        x = np.where(np.abs(x) < SMALLEST, np.float32(0), x)
        temperature = self.floats_of(params, Column.TEMPERATURE)
        below = self.below(x, temperature)
        w = self.weights(below)
        if features.filters:
            w = self.filtered(x, below, w, params)
        drawn = self.drawn(w, self.uniform(positions, params))
        return np.where(self.is_drawn(temperature), drawn, greedy).astype(np.int32), fault

    def floats_of(self, params: Any, column: Column) -> Numbers:
        return np.ascontiguousarray(params[:, int(column)]).view(np.float32)

    # ---- what is done to the logits
    def adjusted(self, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
        if self.features.bias:
            x = self.biased(x, params)
            x = self.held(x, params, positions)
        return self.penalized(x, params, positions) if self.features.penalties else x

    def biased(self, x: Numbers, params: Numbers) -> Numbers:
        return np.asarray(x + self.bias_at[params[:, int(Column.BIAS_SLOT)]])

    def held(self, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
        x = np.array(x)
        for row in np.nonzero(self.holds(positions, params[:, int(Column.HELD_UNTIL)]))[0]:
            ids = params[row, int(Column.HELD_IDS) :]
            x[row, ids[(ids >= 0) & (ids < x.shape[1])]] += np.float32(-np.inf)
        return x

    def holds(self, positions: Numbers, until: Numbers) -> Numbers:
        return np.asarray(positions < until)

    def counted(self, params: Numbers, row: int, position: int) -> tuple[Numbers, Numbers]:
        """Ids of the history that count as seen, and as drawn."""
        tokens = self.history_at[params[row, int(Column.HISTORY_SLOT)]]
        start = max(int(params[row, int(Column.PROMPT_LEN)]), 0)
        return tokens[: max(position, 0)], tokens[start : max(position, start)]

    def penalized(self, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
        x = np.array(x)
        repetition, frequency, presence = (
            self.floats_of(params, column)
            for column in (Column.REPETITION, Column.FREQUENCY, Column.PRESENCE)
        )
        for row in range(len(x)):
            seen, drawn = self.counted(params, row, int(positions[row]))
            ids = np.unique(seen)
            x[row, ids] = self.repeated(x[row, ids], repetition[row])
            ids, counts = np.unique(drawn, return_counts=True)
            x[row, ids] = self.subtracted(
                x[row, ids], counts.astype(np.float32), frequency[row], presence[row]
            )
        return x

    def repeated(self, x: Numbers, penalty: Any) -> Numbers:
        return np.asarray(x * np.where(x > 0, np.float32(1) / penalty, penalty))

    def subtracted(self, x: Numbers, counts: Numbers, frequency: Any, presence: Any) -> Numbers:
        return np.asarray(x - counts * frequency - presence)

    def fault(self, x: Numbers) -> Numbers:
        return np.asarray(~np.isfinite(x.max(-1))).astype(np.int32)

    def greedy(self, x: Numbers) -> Numbers:
        return np.asarray(x.argmax(-1))

    # ---- weights
    def is_drawn(self, temperature: Numbers) -> Numbers:
        return np.asarray(temperature >= SMALLEST)

    def below(self, x: Numbers, temperature: Numbers) -> Numbers:
        """Distance from the best, over the temperature."""
        is_drawn = self.is_drawn(temperature)
        coldness = np.float32(1) / np.where(is_drawn, temperature, np.float32(1))
        coldness = np.where(coldness >= SMALLEST, coldness, np.float32(0))
        below = (x.max(-1, keepdims=True) - x) * coldness[:, None]
        return np.where(below >= 0, below, np.float32(np.inf))

    def weights(self, below: Numbers) -> Numbers:
        return np.round(np.exp(-below) * np.float32(2.0**self.unit)).astype(np.int64)

    # ---- filters
    def order(self, x: Numbers) -> Numbers:
        return np.argsort(-x, -1, kind="stable")

    def filtered(self, x: Numbers, below: Numbers, w: Numbers, params: Numbers) -> Numbers:
        order = self.order(x)
        w = self.top_k(w, order, params[:, int(Column.TOP_K)])
        w = self.top_p(w, order, self.floats_of(params, Column.TOP_P))
        return self.min_p(w, below, self.floats_of(params, Column.MIN_P_GAP))

    def top_k(self, w: Numbers, order: Numbers, k: Numbers) -> Numbers:
        rank = np.argsort(order, -1)
        k = np.where((k > 0) & (k < w.shape[1]), k, w.shape[1])
        return np.where(rank < k[:, None], w, 0)

    def top_p(self, w: Numbers, order: Numbers, p: Numbers) -> Numbers:
        need = self.need(p, w.sum(-1))
        sorted_w = np.take_along_axis(w, order, -1)
        before = np.cumsum(sorted_w, -1) - sorted_w
        kept = np.zeros_like(w)
        np.put_along_axis(kept, order, np.where(before < need[:, None], sorted_w, 0), -1)
        return kept

    def need(self, p: Numbers, total: Numbers) -> Numbers:
        """The least integer at or above p * total, p in 24 bits."""
        share = np.clip(np.round(p * np.float32(2.0**24)), 1, 2**24).astype(np.int64)
        low = share * (total & 0xFFFFFF)
        return np.asarray(share * (total >> 24) + ((low + 0xFFFFFF) >> 24))

    def min_p(self, w: Numbers, below: Numbers, gap: Numbers) -> Numbers:
        return np.where(below <= np.maximum(gap, SMALLEST)[:, None], w, 0)

    # ---- the draw
    def counter(self, positions: Numbers, params: Numbers) -> tuple[Numbers, Numbers]:
        return positions, params[:, int(Column.SEQUENCE_INDEX)]

    def seed(self, params: Numbers) -> tuple[Numbers, Numbers]:
        return params[:, int(Column.SEED_LOW)], params[:, int(Column.SEED_HIGH)]

    def uniform(self, positions: Numbers, params: Numbers) -> Numbers:
        zero = np.zeros(len(params), np.int64)
        counter = (*self.counter(positions, params), zero, zero)
        return philox(counter, self.seed(params))

    def drawn(self, w: Numbers, u: Numbers) -> Numbers:
        total = w.sum(-1)
        low = (u * (total & 0xFFFF)) >> 16
        target = (u * (total >> 16) + low) >> 16
        return np.asarray((np.cumsum(w, -1) > target[:, None]).argmax(-1))


def philox(counter: tuple[Numbers, ...], key: tuple[Numbers, Numbers]) -> Numbers:
    """Word 0 of Philox4x32-10, int64."""
    a, b, c, d = (np.asarray(x).astype(np.int64).astype(np.uint64) & _WORD for x in counter)
    k0, k1 = (np.asarray(x).astype(np.int64).astype(np.uint64) & _WORD for x in key)
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (q >> np.uint64(32)) ^ b ^ k0,
            q & _WORD,
            (p >> np.uint64(32)) ^ d ^ k1,
            p & _WORD,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _WORD, (k1 + np.uint64(0xBB67AE85)) & _WORD
    return a.astype(np.int64)


def plain(**methods: Any) -> Open:
    """The plain sampler with other steps: each a function of (self, ...)."""
    return numpy_ops(type("WrongSampler", (PlainSampler,), methods))


def columns(**changes: Callable[[Numbers], Numbers]) -> Open:
    """The reference's sampler with columns of the parameters changed on the way."""

    def wrong(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
        params = params.copy()
        for name, change in changes.items():
            params[:, int(Column[name])] = change(params[:, int(Column[name])])
        return base(logits, params, *rest)

    return ops(sample=wrong)


def on_floats(change: Callable[[Numbers], Numbers]) -> Callable[[Numbers], Numbers]:
    def wrong(column: Numbers) -> Numbers:
        values = np.ascontiguousarray(column).view(np.float32)
        return change(values).astype(np.float32).view(np.int32)

    return wrong
