"""Wrong log-probabilities.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Logprobs
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    ops,
)


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


def _rounded(told: Logprobs) -> Logprobs:
    return told._replace(values=told.values.bfloat16().float())


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "sampling", says, open_wrong, worst)


FAULTS = (
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
