"""Wrong uniforms, draws and flags.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.backend import Runtime
from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.plain_sampler import (
    PlainSampler,
    columns,
    philox,
    plain,
)
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    ops,
    planted,
    replaced,
)


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


def _flag_spills(self: Any, x: Numbers) -> Numbers:
    fault = PlainSampler.fault(self, x)
    return np.maximum(fault, np.roll(fault, 1)).astype(np.int32)


def _clean(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
    return base(np.where(np.isnan(logits), -np.inf, logits), params, *rest)


def _mutates(base: Method, logits: Any, params: Any, *rest: Any) -> Any:
    """Tempers the logits in place, so that the log-probabilities that follow are of those."""
    temperature = np.ascontiguousarray(params[:, int(Column.TEMPERATURE)]).view(np.float32)
    out = base(logits, params, *rest)
    logits /= np.where(temperature > 0, temperature, 1)[:, None].astype(logits.dtype)
    return out


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "sampling", says, open_wrong, worst)


FAULTS = (
    _wrong("seed_high_ignored", "the seed has 32 bits", columns(SEED_HIGH=np.zeros_like)),
    _wrong(
        "seed_words_swapped",
        "the words of the seed are swapped",
        plain(
            seed=lambda self, params: (
                params[:, int(Column.SEED_HIGH)],
                params[:, int(Column.SEED_LOW)],
            )
        ),
    ),
    _wrong(
        "sequence_index_ignored",
        "sequences of a request draw alike",
        columns(SEQUENCE_INDEX=np.zeros_like),
    ),
    _wrong(
        "draw_position_early",
        "the draw's position is that of the last token",
        plain(
            counter=lambda self, positions, params: (
                positions - 1,
                params[:, int(Column.SEQUENCE_INDEX)],
            )
        ),
    ),
    _wrong(
        "draw_counter_swapped",
        "position and sequence index are swapped",
        plain(
            counter=lambda self, positions, params: (
                params[:, int(Column.SEQUENCE_INDEX)],
                positions,
            )
        ),
    ),
    _wrong(
        "draw_position_short",
        "the position has 8 bits",
        plain(
            counter=lambda self, positions, params: (
                positions & 0xFF,
                params[:, int(Column.SEQUENCE_INDEX)],
            )
        ),
    ),
    _wrong(
        "draw_one_stream", "all rows share row 0's uniform", plain(uniform=_one_stream), worst=True
    ),
    _wrong(
        "draw_by_row",
        "the uniform depends on the row of the batch",
        plain(uniform=_row_in_counter),
    ),
    _wrong(
        "draw_other_stream", "the uniform is of the stream of drafts", plain(uniform=_draft_stream)
    ),
    _wrong(
        "draw_low_bits",
        "the uniform has its low 24 bits only",
        plain(
            uniform=lambda self, positions, params: (
                (PlainSampler.uniform(self, positions, params) & 0xFFFFFF) << 8
            )
        ),
    ),
    _wrong(
        "draw_high_bits",
        "the uniform keeps 12 bits",
        plain(
            uniform=lambda self, positions, params: (
                PlainSampler.uniform(self, positions, params) & ~0xFFFFF
            )
        ),
    ),
    _wrong("draw_float_cdf", "the CDF is summed in float32", plain(drawn=_float_inverse)),
    _wrong("draw_bfloat16_cdf", "probabilities are bfloat16", plain(drawn=_half_cdf)),
    _wrong("draw_by_rank", "the CDF runs by probability", plain(drawn=_by_rank)),
    _wrong("draw_from_the_end", "the CDF runs from the last id", plain(drawn=_from_the_end)),
    _wrong("draw_gumbel", "draws come from another generator", plain(drawn=_gumbel)),
    _wrong(
        "draw_garbage_fifth", "one draw in five is garbage", plain(drawn=_garbage(5)), worst=True
    ),
    _wrong(
        "draw_garbage_hundredth", "one draw in a hundred is garbage", plain(drawn=_garbage(100))
    ),
    _wrong(
        "draw_garbage_inside",
        "one draw in fifty ignores the probabilities",
        plain(drawn=_garbage_inside),
    ),
    _wrong(
        "draw_whole_segments",
        "ids past a multiple of 64 are never drawn",
        plain(drawn=_whole_segments),
    ),
    _wrong("draw_last_never", "the last id is never drawn", plain(drawn=_last_never)),
    _wrong("draw_short_sums", "the mass is summed in 32 bits", plain(drawn=_short_sums)),
    _wrong("draw_short_ids", "ids have 16 bits", ops(sample=_short_ids)),
    _wrong("draw_coarse_weights", "weights have 14 bits: rare tokens are lost", plain(unit=14)),
    _wrong(
        "draw_bfloat16_logits",
        "draws see logits in bfloat16",
        plain(below=lambda self, x, t: PlainSampler.below(self, as_bfloat16(x), t)),
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
        plain(fault=lambda self, x: np.isnan(x).any(-1).astype(np.int32)),
    ),
    _wrong("flag_spills", "the flag of a row spills to its neighbour", plain(fault=_flag_spills)),
    _wrong(
        "flag_of_any_infinity",
        "a banned token raises the flag",
        plain(fault=lambda self, x: (~np.isfinite(x).all(-1)).astype(np.int32)),
    ),
    _wrong("logits_tempered_in_place", "sample tempers the logits in place", ops(sample=_mutates)),
)
