"""Wrong samplers and log-probabilities.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_core.backend import Runtime
from vllm_core.ops import Logprobs
from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.plain_sampler import SMALLEST, PlainSampler, philox
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    numpy_ops,
    ops,
    planted,
    replaced,
)


def _plain(**methods: Any) -> Open:
    """The plain sampler with other steps: each a function of (self, ...)."""
    return numpy_ops(type("WrongSampler", (PlainSampler,), methods))


def _columns(**changes: Callable[[Numbers], Numbers]) -> Open:
    """The reference's sampler with columns of the parameters changed on the way."""

    def wrong(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
        params = params.copy()
        for name, change in changes.items():
            params[:, int(Column[name])] = change(params[:, int(Column[name])])
        return base(logits, params, *rest)

    return ops(sample=wrong)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "sampling", says, open_wrong, worst)


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


# ---------------------------------------------------------------- the draw
def _float_inverse(self: Any, w: Numbers, u: Numbers) -> Numbers:
    cdf = np.cumsum((w / w.sum(-1, keepdims=True)).astype(np.float32), -1, dtype=np.float32)
    target = u.astype(np.float32) * np.float32(2.0**-32)
    return np.asarray((cdf > target[:, None]).argmax(-1))


def _half_cdf(self: Any, w: Numbers, u: Numbers) -> Numbers:
    cdf = np.cumsum(as_bfloat16((w / w.sum(-1, keepdims=True)).astype(np.float32)), -1)
    return np.asarray((cdf > (u * 2.0**-32)[:, None] * cdf[:, -1:]).argmax(-1))


def _by_rank(self: Any, w: Numbers, u: Numbers) -> Numbers:
    """The inverse CDF runs in order of probability."""
    order = np.argsort(-w, -1, kind="stable")
    place = PlainSampler.drawn(self, np.take_along_axis(w, order, -1), u)
    return np.take_along_axis(order, place[:, None], -1)[:, 0]


def _from_the_end(self: Any, w: Numbers, u: Numbers) -> Numbers:
    return np.asarray(w.shape[1] - 1 - PlainSampler.drawn(self, w[:, ::-1], u))


def _gumbel(self: Any, w: Numbers, u: Numbers) -> Numbers:
    rng = np.random.default_rng(u.tolist())
    with np.errstate(divide="ignore"):
        return np.asarray((np.log(w) + rng.gumbel(size=w.shape)).argmax(-1))


def _garbage(one_in: int) -> Method:
    def wrong(self: Any, w: Numbers, u: Numbers) -> Numbers:
        tokens = PlainSampler.drawn(self, w, u)
        return np.where((u >> 3) % one_in == 0, (u >> 8) % w.shape[1], tokens)

    return wrong


def _garbage_inside(self: Any, w: Numbers, u: Numbers) -> Numbers:
    """On one draw in fifty, any token that the filters left, all alike."""
    tokens = PlainSampler.drawn(self, w, u)
    flat = PlainSampler.drawn(self, (w > 0).astype(np.int64) << 20, (u * 2654435761) & 0xFFFFFFFF)
    return np.where((u >> 3) % 50 == 0, flat, tokens)


def _whole_segments(self: Any, w: Numbers, u: Numbers) -> Numbers:
    """What stands past a multiple of 64 has no mass."""
    if w.shape[1] > 64:
        w = w.copy()
        w[:, w.shape[1] // 64 * 64 :] = 0
    return np.asarray(PlainSampler.drawn(self, w, u))


def _last_never(self: Any, w: Numbers, u: Numbers) -> Numbers:
    w = w.copy()
    w[:, -1] = 0
    return np.asarray(PlainSampler.drawn(self, w, u))


def _short_sums(self: Any, w: Numbers, u: Numbers) -> Numbers:
    """The mass is summed in 32 bits: it wraps for flat rows."""
    total = w.sum(-1) & 0xFFFFFFFF
    target = (u * (total >> 16) + ((u * (total & 0xFFFF)) >> 16)) >> 16
    return np.asarray((np.cumsum(w, -1) > target[:, None]).argmax(-1))


def _short_ids(base: Method, *args: Any) -> Any:
    tokens, fault = base(*args)
    return (tokens & 0xFFFF).astype(np.int32), fault


def _one_stream(self: Any, positions: Numbers, params: Numbers) -> Numbers:
    zero = np.zeros(1, np.int64)
    first = philox((positions[:1], zero, zero, zero), tuple(s[:1] for s in self.seed(params)))
    return np.broadcast_to(first, (len(params),))


def _row_in_counter(self: Any, positions: Numbers, params: Numbers) -> Numbers:
    """The stream word holds the row of the batch."""
    rows, zero = np.arange(len(params)), np.zeros(len(params), np.int64)
    return philox((*self.counter(positions, params), rows, zero), self.seed(params))


def _draft_stream(self: Any, positions: Numbers, params: Numbers) -> Numbers:
    one = np.ones(len(params), np.int64)
    return philox((*self.counter(positions, params), one, one - 1), self.seed(params))


def _stale_draw(runtime: Runtime) -> None:
    """Every thirteenth call, row 0 gets the token of the call before."""
    seen: list[int] = []

    def wrong(base: Method, *args: Any) -> Any:
        tokens, fault = base(*args)
        if len(seen) % 13 == 12:
            tokens = tokens.copy()
            tokens[0] = seen[-1]
        seen.append(int(tokens[0]))
        return tokens, fault

    replaced(runtime.ops, sample=wrong)


# ---------------------------------------------------------------- bias, penalties, flags
def _next_slot(self: Any, x: Numbers, params: Numbers) -> Numbers:
    """The bias slot is taken from the parameters of row 0."""
    return np.asarray(x + self.bias_at[params[0, int(Column.BIAS_SLOT)]])


def _first_held(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    params = params.copy()
    params[:, int(Column.HELD_IDS) + 4 :] = -1
    return np.asarray(PlainSampler.held(self, x, params, positions))


def _whole_history(self: Any, params: Numbers, row: int, position: int) -> Any:
    seen, drawn = PlainSampler.counted(self, params, row, self.history_at.shape[1])
    return seen, drawn


def _without_last(self: Any, params: Numbers, row: int, position: int) -> Any:
    return PlainSampler.counted(self, params, row, position - 1)


def _flag_spills(self: Any, x: Numbers) -> Numbers:
    fault = PlainSampler.fault(self, x)
    return np.maximum(fault, np.roll(fault, 1)).astype(np.int32)


def _clean(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
    return base(np.where(np.isnan(logits), -np.inf, logits), params, *rest)


def _greedy_if_any(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
    """One greedy row makes the batch greedy."""
    params = params.copy()
    column = int(Column.TEMPERATURE)
    if (params[:, column] == 0).any():
        params[:, column] = 0
    return base(logits, params, *rest)


def _mutates(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
    """Tempers the logits in place, so that the log-probabilities that follow are of those."""
    temperature = np.ascontiguousarray(params[:, int(Column.TEMPERATURE)]).view(np.float32)
    out = base(logits, params, *rest)
    logits /= np.where(temperature > 0, temperature, 1)[:, None].astype(logits.dtype)
    return out


def _on_floats(change: Callable[[Numbers], Numbers]) -> Callable[[Numbers], Numbers]:
    def wrong(column: Numbers) -> Numbers:
        values = np.ascontiguousarray(column).view(np.float32)
        return change(values).astype(np.float32).view(np.int32)

    return wrong


ORDER = (
    _wrong(
        "penalties_before_bias", "penalties come before the bias", _plain(adjusted=_penalties_first)
    ),
    _wrong(
        "top_p_before_top_k", "top-p comes before top-k", _plain(filtered=_top_p_first), worst=True
    ),
    _wrong(
        "min_p_before_others", "min-p comes before top-k and top-p", _plain(filtered=_min_p_first)
    ),
    _wrong("min_p_before_temperature", "min-p looks at raw logits", _plain(filtered=_cold_gap)),
    _wrong("top_p_untempered", "top-p sums at temperature 1", _plain(filtered=_filters_untempered)),
    _wrong("top_p_of_all", "top-p is a share of all mass", _plain(filtered=_top_p_of_all)),
)

FILTERS = (
    _wrong(
        "top_k_plus_one",
        "top-k keeps k + 1",
        _columns(TOP_K=lambda k: np.where(k > 0, k + 1, 0)),
        worst=True,
    ),
    _wrong(
        "top_k_minus_one",
        "top-k keeps k - 1",
        _columns(TOP_K=lambda k: np.maximum(k - 1, np.minimum(k, 1))),
    ),
    _wrong("top_k_ties", "top-k keeps every tie with the k-th", _plain(top_k=_threshold_top_k)),
    _wrong(
        "top_k_at_most_64", "top-k above 64 keeps 64", _columns(TOP_K=lambda k: np.minimum(k, 64))
    ),
    _wrong(
        "top_k_of_first_row",
        "every row has the top-k of row 0",
        _columns(TOP_K=lambda k: np.broadcast_to(k[:1], k.shape)),
    ),
    _wrong("top_p_strict", "top-p drops the token that crosses p", _plain(top_p=_strict_top_p)),
    _wrong("top_p_one_more", "top-p keeps one token more", _plain(top_p=_one_more_top_p)),
    _wrong(
        "top_p_at_least",
        "top-p keeps one more where the mass is exactly p",
        _plain(top_p=_top_p_at_least),
    ),
    _wrong(
        "top_p_sixty_four", "top-p looks at 64 candidates", _plain(top_p=_sixty_four_candidates)
    ),
    _wrong("top_p_bfloat16", "top-p is read in bfloat16", _columns(TOP_P=_on_floats(as_bfloat16))),
    _wrong(
        "filter_ties_high",
        "filters order ties from the highest id",
        _plain(order=lambda self, x: x.shape[1] - 1 - np.argsort(-x[:, ::-1], -1, kind="stable")),
    ),
    _wrong(
        "min_p_of_total",
        "min-p is a share of the total mass",
        _plain(
            min_p=lambda self, w, below, gap: np.where(
                w >= np.exp(-gap)[:, None] * w.sum(-1, keepdims=True), w, np.where(below == 0, w, 0)
            )
        ),
    ),
    _wrong(
        "min_p_strict",
        "min-p drops a token exactly at its limit",
        _plain(
            min_p=lambda self, w, below, gap: np.where(
                (below < np.maximum(gap, SMALLEST)[:, None]) | (below == 0), w, 0
            )
        ),
    ),
    _wrong(
        "min_p_base_two",
        "min-p takes its logarithm to base 2",
        _columns(MIN_P_GAP=_on_floats(lambda gap: gap * np.float32(0.6931472))),
    ),
    _wrong(
        "filters_ignored",
        "filters are ignored",
        _plain(filtered=lambda self, x, below, w, params: w),
    ),
)

TEMPERATURE = (
    _wrong(
        "temperature_twice",
        "the temperature is applied twice",
        _columns(TEMPERATURE=_on_floats(np.square)),
    ),
    _wrong(
        "temperature_inverse",
        "logits are multiplied with the temperature",
        _columns(TEMPERATURE=_on_floats(lambda t: np.where(t > 0, 1 / np.where(t > 0, t, 1), 0))),
    ),
    _wrong(
        "temperature_zero_draws",
        "temperature 0 draws in a batch that draws",
        _columns(TEMPERATURE=_on_floats(lambda t: np.where(t == 0, 1, t))),
    ),
    _wrong(
        "temperature_floor",
        "temperatures below 0.1 are greedy",
        _columns(TEMPERATURE=_on_floats(lambda t: np.where(t < 0.1, 0, t))),
    ),
    _wrong(
        "temperature_at_most_one",
        "temperatures above 1 are 1",
        _columns(TEMPERATURE=_on_floats(lambda t: np.minimum(t, 1))),
    ),
    _wrong(
        "temperature_of_first_row",
        "every row has the temperature of row 0",
        _columns(TEMPERATURE=lambda t: np.broadcast_to(t[:1], t.shape)),
    ),
    _wrong(
        "temperature_first",
        "the temperature comes before bias and penalties",
        _plain(
            adjusted=lambda self, x, params, positions: _tempered_first(self, x, params, positions)
        ),
    ),
    _wrong("greedy_if_any", "one greedy row makes the batch greedy", ops(sample=_greedy_if_any)),
    _wrong(
        "greedy_ties_high",
        "argmax takes the highest of equal logits",
        _plain(greedy=lambda self, x: x.shape[1] - 1 - x[:, ::-1].argmax(-1)),
        worst=True,
    ),
    _wrong(
        "greedy_bfloat16",
        "argmax looks at bfloat16",
        _plain(greedy=lambda self, x: as_bfloat16(x).argmax(-1)),
    ),
    _wrong(
        "greedy_raw",
        "greedy rows ignore bias and penalties where others draw",
        _plain(
            greedy=lambda self, x: (self.raw if self.features.draw else x).argmax(-1),
            adjusted=lambda self, x, params, positions: _keeps_raw(self, x, params, positions),
        ),
    ),
)


def _keeps_raw(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    self.raw = x
    return np.asarray(PlainSampler.adjusted(self, x, params, positions))


def _tempered_first(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    t = self.floats_of(params, Column.TEMPERATURE)
    t = np.where(t >= SMALLEST, t, np.float32(1))[:, None]
    return np.asarray(PlainSampler.adjusted(self, x / t, params, positions) * t)


PENALTIES = (
    _wrong(
        "repetition_of_prompt",
        "repetition looks at the prompt only",
        _plain(
            counted=lambda self, params, row, position: (
                PlainSampler.counted(
                    self, params, row, min(position, params[row, int(Column.PROMPT_LEN)])
                )[0],
                PlainSampler.counted(self, params, row, position)[1],
            )
        ),
    ),
    _wrong(
        "repetition_of_output",
        "repetition looks at the output only",
        _plain(
            counted=lambda self, params, row, position: (
                (PlainSampler.counted(self, params, row, position)[1],) * 2
            )
        ),
    ),
    _wrong(
        "frequency_of_prompt",
        "frequency and presence count the prompt too",
        _plain(
            counted=lambda self, params, row, position: (
                (PlainSampler.counted(self, params, row, position)[0],) * 2
            )
        ),
    ),
    _wrong(
        "repetition_divides",
        "repetition divides negative logits too",
        _plain(repeated=lambda self, x, penalty: x / penalty),
        worst=True,
    ),
    _wrong(
        "repetition_subtracts",
        "repetition multiplies positive logits and divides negative ones",
        _plain(repeated=lambda self, x, penalty: np.where(x > 0, x * penalty, x / penalty)),
    ),
    _wrong(
        "frequency_once",
        "frequency counts a token once",
        _plain(subtracted=lambda self, x, counts, frequency, presence: x - frequency - presence),
    ),
    _wrong(
        "presence_counts",
        "presence is counted like frequency",
        _plain(
            subtracted=lambda self, x, counts, frequency, presence: (
                x - counts * (frequency + presence)
            )
        ),
    ),
    _wrong("penalties_miss_last", "penalties miss the last token", _plain(counted=_without_last)),
    _wrong(
        "penalties_of_old_owner",
        "penalties count what stands behind the row's position",
        _plain(counted=_whole_history),
    ),
    _wrong(
        "penalties_negative_ignored",
        "negative penalties are taken for 0",
        _columns(
            FREQUENCY=_on_floats(lambda f: np.maximum(f, 0)),
            PRESENCE=_on_floats(lambda f: np.maximum(f, 0)),
        ),
    ),
    _wrong(
        "repetition_below_one",
        "repetition below 1 is taken for 1",
        _columns(REPETITION=_on_floats(lambda r: np.maximum(r, 1))),
    ),
    _wrong(
        "frequency_four_bits",
        "counts end at 15",
        _plain(subtracted=lambda self, x, counts, f, p: x - np.minimum(counts, 15) * f - p),
    ),
    _wrong(
        "bias_of_first_row", "the bias slot of row 0 serves every row", _plain(biased=_next_slot)
    ),
    _wrong(
        "bias_scaled",
        "the bias is added after a division by the temperature",
        _plain(
            biased=lambda self, x, params: (
                x
                + self.bias_at[params[:, int(Column.BIAS_SLOT)]]
                * np.maximum(self.floats_of(params, Column.TEMPERATURE), np.float32(1e-3))[:, None]
            )
        ),
    ),
    _wrong(
        "bias_finite_bans",
        "banned tokens get -10 instead of -inf",
        _plain(
            biased=lambda self, x, params: (
                x + np.maximum(self.bias_at[params[:, int(Column.BIAS_SLOT)]], -10)
            )
        ),
    ),
    _wrong(
        "held_one_short",
        "held ids are free one position early",
        _plain(holds=lambda self, positions, until: positions + 1 < until),
    ),
    _wrong(
        "held_one_long",
        "held ids stay held at the position",
        _plain(holds=lambda self, positions, until: positions <= until),
    ),
    _wrong("held_first_four", "only four ids are held", _plain(held=_first_held)),
)

DRAWS = (
    _wrong("seed_high_ignored", "the seed has 32 bits", _columns(SEED_HIGH=np.zeros_like)),
    _wrong(
        "seed_words_swapped",
        "the words of the seed are swapped",
        _plain(
            seed=lambda self, params: (
                params[:, int(Column.SEED_HIGH)],
                params[:, int(Column.SEED_LOW)],
            )
        ),
    ),
    _wrong(
        "sequence_index_ignored",
        "sequences of a request draw alike",
        _columns(SEQUENCE_INDEX=np.zeros_like),
        worst=True,
    ),
    _wrong(
        "draw_position_early",
        "the draw's position is that of the last token",
        _plain(
            counter=lambda self, positions, params: (
                positions - 1,
                params[:, int(Column.SEQUENCE_INDEX)],
            )
        ),
    ),
    _wrong(
        "draw_counter_swapped",
        "position and sequence index are swapped",
        _plain(
            counter=lambda self, positions, params: (
                params[:, int(Column.SEQUENCE_INDEX)],
                positions,
            )
        ),
    ),
    _wrong(
        "draw_position_short",
        "the position has 8 bits",
        _plain(
            counter=lambda self, positions, params: (
                positions & 0xFF,
                params[:, int(Column.SEQUENCE_INDEX)],
            )
        ),
    ),
    _wrong(
        "draw_one_stream", "all rows share row 0's uniform", _plain(uniform=_one_stream), worst=True
    ),
    _wrong(
        "draw_by_row",
        "the uniform depends on the row of the batch",
        _plain(uniform=_row_in_counter),
    ),
    _wrong(
        "draw_other_stream", "the uniform is of the stream of drafts", _plain(uniform=_draft_stream)
    ),
    _wrong(
        "draw_low_bits",
        "the uniform has its low 24 bits only",
        _plain(
            uniform=lambda self, positions, params: (
                (PlainSampler.uniform(self, positions, params) & 0xFFFFFF) << 8
            )
        ),
    ),
    _wrong(
        "draw_high_bits",
        "the uniform keeps 12 bits",
        _plain(
            uniform=lambda self, positions, params: (
                PlainSampler.uniform(self, positions, params) & ~0xFFFFF
            )
        ),
    ),
    _wrong("draw_float_cdf", "the CDF is summed in float32", _plain(drawn=_float_inverse)),
    _wrong("draw_bfloat16_cdf", "probabilities are bfloat16", _plain(drawn=_half_cdf)),
    _wrong("draw_by_rank", "the CDF runs by probability", _plain(drawn=_by_rank)),
    _wrong("draw_from_the_end", "the CDF runs from the last id", _plain(drawn=_from_the_end)),
    _wrong("draw_gumbel", "draws come from another generator", _plain(drawn=_gumbel)),
    _wrong(
        "draw_garbage_fifth", "one draw in five is garbage", _plain(drawn=_garbage(5)), worst=True
    ),
    _wrong(
        "draw_garbage_hundredth", "one draw in a hundred is garbage", _plain(drawn=_garbage(100))
    ),
    _wrong(
        "draw_garbage_inside",
        "one draw in fifty ignores the probabilities",
        _plain(drawn=_garbage_inside),
    ),
    _wrong(
        "draw_whole_segments",
        "ids past a multiple of 64 are never drawn",
        _plain(drawn=_whole_segments),
    ),
    _wrong("draw_last_never", "the last id is never drawn", _plain(drawn=_last_never)),
    _wrong("draw_short_sums", "the mass is summed in 32 bits", _plain(drawn=_short_sums)),
    _wrong("draw_short_ids", "ids have 16 bits", ops(sample=_short_ids)),
    _wrong("draw_coarse_weights", "weights have 14 bits: rare tokens are lost", _plain(unit=14)),
    _wrong(
        "draw_bfloat16_logits",
        "draws see logits in bfloat16",
        _plain(below=lambda self, x, t: PlainSampler.below(self, as_bfloat16(x), t)),
    ),
    _wrong("draw_stale", "every thirteenth call gives row 0 an old token", planted(_stale_draw)),
    _wrong(
        "draw_jax_seed_low",
        "the low word of the seed is ignored (jax)",
        ops(
            "jax",
            sample=lambda base, logits, params, *rest: base(
                logits, params.at[:, int(Column.SEED_LOW)].set(0), *rest
            ),
        ),
    ),
    _wrong(
        "draw_torch_position",
        "the position counts from 0 in torch",
        ops(
            "torch",
            sample=lambda base, logits, params, positions, *rest: base(
                logits, params, positions - 1, *rest
            ),
        ),
    ),
    _wrong("nan_not_flagged", "NaN is taken for -inf and not flagged", ops(sample=_clean)),
    _wrong(
        "infinity_not_flagged",
        "only NaN is flagged, not a row of infinities",
        _plain(fault=lambda self, x: np.isnan(x).any(-1).astype(np.int32)),
    ),
    _wrong("flag_spills", "the flag of a row spills to its neighbour", _plain(fault=_flag_spills)),
    _wrong(
        "flag_of_any_infinity",
        "a banned token raises the flag",
        _plain(fault=lambda self, x: (~np.isfinite(x).all(-1)).astype(np.int32)),
    ),
    _wrong("logits_tempered_in_place", "sample tempers the logits in place", ops(sample=_mutates)),
)


# ---------------------------------------------------------------- log-probabilities
def _logprobs(**wrong: Any) -> Open:
    return ops(logprobs=lambda base, logits, targets, count: _told(logits, targets, count, **wrong))


def _told(logits: Numbers, targets: Numbers, count: int, **wrong: Any) -> Logprobs:
    x = np.asarray(wrong.get("prepare", lambda x: x)(logits.astype(np.float32)))
    best = x.max(-1, keepdims=True) * wrong.get("shift", 1)
    lse = np.log(np.exp(x - best).sum(-1, keepdims=True)) + best
    lse = wrong.get("round", lambda lse: lse)(lse)
    rows = np.arange(len(x))
    targets = np.clip(targets, 0, x.shape[1] - 1)
    own = x[rows, targets][:, None]
    rank = (wrong.get("beats", np.greater)(x, own)).sum(-1) + wrong.get("first", 1)
    ids = np.argsort(-x, -1, kind="stable")[:, :count]
    ids = wrong.get("order", lambda ids: ids)(ids)
    values = np.concatenate((own, np.take_along_axis(x, ids, -1)), 1) - lse
    ids = np.concatenate((targets[:, None], ids), 1).astype(np.int32)
    values = wrong.get("values", lambda v: v)(values).astype(np.float32)
    return Logprobs(ids, values, rank.astype(np.int32))


def _target_before(base: Method, logits: Any, targets: Any, count: int) -> Any:
    return base(logits, np.roll(targets, 1), count)


def _alternatives_without_target(base: Method, logits: Any, targets: Any, count: int) -> Any:
    """The target is left out of the alternatives."""
    hidden = logits.copy()
    hidden[np.arange(len(hidden)), targets] = -np.inf
    told = base(logits, targets, count)
    other = base(hidden, hidden.argmax(-1), count)
    values = told.values.copy()
    values[:, 1:] = (
        np.take_along_axis(logits, other.ids[:, 1:], -1)
        - (logits[np.arange(len(logits)), targets] - told.values[:, 0])[:, None]
    )
    return Logprobs(np.concatenate((told.ids[:, :1], other.ids[:, 1:]), 1), values, told.rank)


LOGPROBS = (
    _wrong(
        "logprobs_shifted",
        "log-probabilities are of the row before's token",
        ops(logprobs=_target_before),
    ),
    _wrong(
        "logprobs_base_two",
        "log-probabilities are in bits",
        _logprobs(values=lambda v: v / np.float32(np.log(2))),
    ),
    _wrong(
        "logprobs_half_lse",
        "the normaliser is float16",
        _logprobs(round=lambda lse: lse.astype(np.float16).astype(np.float32)),
    ),
    _wrong(
        "logprobs_bfloat16",
        "log-probabilities read logits as bfloat16",
        _logprobs(prepare=as_bfloat16),
    ),
    _wrong("logprobs_no_maximum", "the normaliser overflows", _logprobs(shift=0)),
    _wrong("logprobs_rank_from_zero", "ranks count from 0", _logprobs(first=0)),
    _wrong(
        "logprobs_rank_ties",
        "a rank counts the ties and the token itself",
        _logprobs(beats=np.greater_equal, first=0),
    ),
    _wrong(
        "logprobs_unsorted",
        "alternatives are ordered by id",
        _logprobs(order=lambda ids: np.sort(ids, -1)),
    ),
    _wrong(
        "logprobs_second_first",
        "alternatives begin with the second best",
        _logprobs(order=lambda ids: np.roll(ids, -1, -1)),
    ),
    _wrong(
        "logprobs_unnormalised",
        "values are logits less the largest",
        _logprobs(values=lambda v: v - v[:, 1:2] if v.shape[1] > 1 else v),
    ),
    _wrong(
        "logprobs_without_target",
        "alternatives leave out the target",
        ops(logprobs=_alternatives_without_target),
    ),
    _wrong(
        "logprobs_clamped",
        "log-probabilities end at -20",
        _logprobs(values=lambda v: np.maximum(v, -20)),
    ),
    _wrong(
        "logprobs_model_dtype",
        "log-probabilities are bfloat16 numbers",
        ops("torch", logprobs=lambda base, *args: _rounded(base(*args))),
    ),
)


def _rounded(told: Logprobs) -> Logprobs:
    return told._replace(values=told.values.bfloat16().float())


FAULTS = (*ORDER, *FILTERS, *TEMPERATURE, *PENALTIES, *DRAWS, *LOGPROBS)
