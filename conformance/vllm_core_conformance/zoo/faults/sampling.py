"""Wrong orders, filters and temperatures; with them the sampler's other faults.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults import draws, logprobs, penalties
from vllm_core_conformance.zoo.faults.plain_sampler import (
    SMALLEST,
    PlainSampler,
    columns,
    on_floats,
    plain,
)
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    ops,
)


# ---------------------------------------------------------------- the order of steps
def _penalties_first(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    if self.features.penalties:
        x = self.penalized(x, params, positions)
    if self.features.bias:
        x = self.held(self.biased(x, params), params, positions)
    return x


def _top_p_first(self: Any, x: Numbers, below: Numbers, w: Numbers, params: Numbers) -> Numbers:
    order = self.order(x)
    w = self.top_p(w, order, self.floats_of(params, Column.TOP_P))
    w = self.top_k(w, order, params[:, int(Column.TOP_K)])
    return np.asarray(self.min_p(w, below, self.floats_of(params, Column.MIN_P_GAP)))


def _min_p_first(self: Any, x: Numbers, below: Numbers, w: Numbers, params: Numbers) -> Numbers:
    order = self.order(x)
    w = self.min_p(w, below, self.floats_of(params, Column.MIN_P_GAP))
    w = self.top_k(w, order, params[:, int(Column.TOP_K)])
    return np.asarray(self.top_p(w, order, self.floats_of(params, Column.TOP_P)))


def _cold_gap(self: Any, x: Numbers, below: Numbers, w: Numbers, params: Numbers) -> Numbers:
    """min-p looks at logits before the temperature."""
    raw = (x.max(-1, keepdims=True) - x).astype(np.float32)
    return np.asarray(PlainSampler.filtered(self, x, raw, w, params))


def _filters_untempered(
    self: Any, x: Numbers, below: Numbers, w: Numbers, params: Numbers
) -> Numbers:
    """top-p sums probabilities at temperature 1."""
    raw = self.weights((x.max(-1, keepdims=True) - x).astype(np.float32))
    return np.where(PlainSampler.filtered(self, x, below, raw, params) > 0, w, 0)


# ---------------------------------------------------------------- filters
def _threshold_top_k(self: Any, w: Numbers, order: Numbers, k: Numbers) -> Numbers:
    """Keeps every tie with the k-th."""
    k = np.where((k > 0) & (k < w.shape[1]), k, w.shape[1])
    last = np.take_along_axis(np.take_along_axis(w, order, -1), k[:, None] - 1, -1)
    return np.where(w >= last, w, 0)


def _strict_top_p(self: Any, w: Numbers, order: Numbers, p: Numbers) -> Numbers:
    """Keeps while the mass up to and with the token stays within p: one token too few."""
    sorted_w = np.take_along_axis(w, order, -1)
    kept = np.cumsum(sorted_w, -1) <= self.need(p, w.sum(-1))[:, None]
    kept[:, 0] = True
    out = np.zeros_like(w)
    np.put_along_axis(out, order, np.where(kept, sorted_w, 0), -1)
    return out


def _one_more_top_p(self: Any, w: Numbers, order: Numbers, p: Numbers) -> Numbers:
    sorted_w = np.take_along_axis(w, order, -1)
    before = np.cumsum(sorted_w, -1) - sorted_w
    kept = before < self.need(p, w.sum(-1))[:, None]
    kept[:, 1:] |= kept[:, :-1].copy()
    out = np.zeros_like(w)
    np.put_along_axis(out, order, np.where(kept, sorted_w, 0), -1)
    return out


def _top_p_at_least(self: Any, w: Numbers, order: Numbers, p: Numbers) -> Numbers:
    """A token is in while the mass before it does not exceed p (<= where < belongs)."""
    sorted_w = np.take_along_axis(w, order, -1)
    kept = np.cumsum(sorted_w, -1) - sorted_w <= self.need(p, w.sum(-1))[:, None]
    out = np.zeros_like(w)
    np.put_along_axis(out, order, np.where(kept, sorted_w, 0), -1)
    return out


def _top_p_of_all(self: Any, x: Numbers, below: Numbers, w: Numbers, params: Numbers) -> Numbers:
    """top-p is a share of the whole vocabulary's mass, not of what top-k kept."""
    order = self.order(x)
    p = self.floats_of(params, Column.TOP_P)
    kept = self.top_p(w, order, p) > 0
    w = np.where(kept, self.top_k(w, order, params[:, int(Column.TOP_K)]), 0)
    return np.asarray(self.min_p(w, below, self.floats_of(params, Column.MIN_P_GAP)))


def _sixty_four_candidates(self: Any, w: Numbers, order: Numbers, p: Numbers) -> Numbers:
    """top-p looks at the 64 largest tokens only."""
    kept = PlainSampler.top_p(self, w, order, p)
    rank = np.argsort(order, -1)
    return np.where((rank < 64) | (p >= 1)[:, None], kept, 0)


def _greedy_if_any(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
    """One greedy row makes the batch greedy."""
    params = params.copy()
    column = int(Column.TEMPERATURE)
    if (params[:, column] == 0).any():
        params[:, column] = 0
    return base(logits, params, *rest)


def _keeps_raw(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    self.raw = x
    return np.asarray(PlainSampler.adjusted(self, x, params, positions))


def _tempered_first(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    t = self.floats_of(params, Column.TEMPERATURE)
    t = np.where(t >= SMALLEST, t, np.float32(1))[:, None]
    return np.asarray(PlainSampler.adjusted(self, x / t, params, positions) * t)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "sampling", says, open_wrong, worst)


ORDER = (
    _wrong(
        "penalties_before_bias", "penalties come before the bias", plain(adjusted=_penalties_first)
    ),
    _wrong("top_p_before_top_k", "top-p comes before top-k", plain(filtered=_top_p_first)),
    _wrong(
        "min_p_before_others", "min-p comes before top-k and top-p", plain(filtered=_min_p_first)
    ),
    _wrong("min_p_before_temperature", "min-p looks at raw logits", plain(filtered=_cold_gap)),
    _wrong("top_p_untempered", "top-p sums at temperature 1", plain(filtered=_filters_untempered)),
    _wrong("top_p_of_all", "top-p is a share of all mass", plain(filtered=_top_p_of_all)),
)

FILTERS = (
    _wrong(
        "top_k_plus_one",
        "top-k keeps k + 1",
        columns(TOP_K=lambda k: np.where(k > 0, k + 1, 0)),
        worst=True,
    ),
    _wrong(
        "top_k_minus_one",
        "top-k keeps k - 1",
        columns(TOP_K=lambda k: np.maximum(k - 1, np.minimum(k, 1))),
    ),
    _wrong("top_k_ties", "top-k keeps every tie with the k-th", plain(top_k=_threshold_top_k)),
    _wrong(
        "top_k_at_most_64", "top-k above 64 keeps 64", columns(TOP_K=lambda k: np.minimum(k, 64))
    ),
    _wrong(
        "top_k_of_first_row",
        "every row has the top-k of row 0",
        columns(TOP_K=lambda k: np.broadcast_to(k[:1], k.shape)),
    ),
    _wrong("top_p_strict", "top-p drops the token that crosses p", plain(top_p=_strict_top_p)),
    _wrong("top_p_one_more", "top-p keeps one token more", plain(top_p=_one_more_top_p)),
    _wrong(
        "top_p_at_least",
        "top-p keeps one more where the mass is exactly p",
        plain(top_p=_top_p_at_least),
    ),
    _wrong("top_p_sixty_four", "top-p looks at 64 candidates", plain(top_p=_sixty_four_candidates)),
    _wrong("top_p_bfloat16", "top-p is read in bfloat16", columns(TOP_P=on_floats(as_bfloat16))),
    _wrong(
        "filter_ties_high",
        "filters order ties from the highest id",
        plain(order=lambda self, x: x.shape[1] - 1 - np.argsort(-x[:, ::-1], -1, kind="stable")),
    ),
    _wrong(
        "min_p_of_total",
        "min-p is a share of the total mass",
        plain(
            min_p=lambda self, w, below, gap: np.where(
                w >= np.exp(-gap)[:, None] * w.sum(-1, keepdims=True), w, np.where(below == 0, w, 0)
            )
        ),
    ),
    _wrong(
        "min_p_strict",
        "min-p drops a token exactly at its limit",
        plain(
            min_p=lambda self, w, below, gap: np.where(
                (below < np.maximum(gap, SMALLEST)[:, None]) | (below == 0), w, 0
            )
        ),
    ),
    _wrong(
        "min_p_base_two",
        "min-p takes its logarithm to base 2",
        columns(MIN_P_GAP=on_floats(lambda gap: gap * np.float32(0.6931472))),
    ),
    _wrong(
        "filters_ignored",
        "filters are ignored",
        plain(filtered=lambda self, x, below, w, params: w),
    ),
)

TEMPERATURE = (
    _wrong(
        "temperature_twice",
        "the temperature is applied twice",
        columns(TEMPERATURE=on_floats(np.square)),
    ),
    _wrong(
        "temperature_inverse",
        "logits are multiplied with the temperature",
        columns(TEMPERATURE=on_floats(lambda t: np.where(t > 0, 1 / np.where(t > 0, t, 1), 0))),
    ),
    _wrong(
        "temperature_zero_draws",
        "temperature 0 draws in a batch that draws",
        columns(TEMPERATURE=on_floats(lambda t: np.where(t == 0, 1, t))),
    ),
    _wrong(
        "temperature_floor",
        "temperatures below 0.1 are greedy",
        columns(TEMPERATURE=on_floats(lambda t: np.where(t < 0.1, 0, t))),
    ),
    _wrong(
        "temperature_at_most_one",
        "temperatures above 1 are 1",
        columns(TEMPERATURE=on_floats(lambda t: np.minimum(t, 1))),
    ),
    _wrong(
        "temperature_of_first_row",
        "every row has the temperature of row 0",
        columns(TEMPERATURE=lambda t: np.broadcast_to(t[:1], t.shape)),
    ),
    _wrong(
        "temperature_first",
        "the temperature comes before bias and penalties",
        plain(
            adjusted=lambda self, x, params, positions: _tempered_first(self, x, params, positions)
        ),
    ),
    _wrong("greedy_if_any", "one greedy row makes the batch greedy", ops(sample=_greedy_if_any)),
    _wrong(
        "greedy_ties_high",
        "argmax takes the highest of equal logits",
        plain(greedy=lambda self, x: x.shape[1] - 1 - x[:, ::-1].argmax(-1)),
        worst=True,
    ),
    _wrong(
        "greedy_bfloat16",
        "argmax looks at bfloat16",
        plain(greedy=lambda self, x: as_bfloat16(x).argmax(-1)),
    ),
    _wrong(
        "greedy_raw",
        "greedy rows ignore bias and penalties where others draw",
        plain(
            greedy=lambda self, x: (self.raw if self.features.draw else x).argmax(-1),
            adjusted=lambda self, x, params, positions: _keeps_raw(self, x, params, positions),
        ),
    ),
)


FAULTS = (*ORDER, *FILTERS, *TEMPERATURE, *penalties.FAULTS, *draws.FAULTS, *logprobs.FAULTS)
