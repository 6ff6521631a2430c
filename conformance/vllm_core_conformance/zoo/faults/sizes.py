"""Ops that are right until a step is as small or as large as steps really are.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Param
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import Method, Numbers, Open, ops

GROUP = 1024
"""Threads of a group: what one pass of a row holds."""
ROWS = 256


def _gate_of_one_token(base: Method, x: Numbers) -> Any:
    return base(np.roll(x, x.shape[-1] // 2, -1) if len(x) == 1 else x)


def _mean_of_first_pass(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    first = x[..., :GROUP]
    mean = (first * first).mean(-1, keepdims=True)
    return (x / np.sqrt(mean + eps) * param["weight"]).astype(x.dtype)


def _residual_of_first_pass(
    base: Method, x: Numbers, residual: Numbers, param: Param, eps: float
) -> Any:
    residual = np.where(np.arange(x.shape[-1]) < GROUP, residual, 0).astype(x.dtype)
    return base(x, residual, param, eps)


def _first_rows(base: Method, x: Numbers) -> Any:
    out = np.array(base(x))
    out[ROWS:] = 0
    return out


def _first_pass_of_embed(base: Method, ids: Numbers, param: Param) -> Any:
    out = np.array(base(ids, param))
    out[:, GROUP:] = 0
    return out


def _last_expert_of_one_token(
    base: Method, x: Numbers, ids: Numbers, shares: Numbers, *params: Param
) -> Any:
    if len(x) == 1 and ids.shape[1] > 1:
        ids, shares = ids[:, :-1], shares[:, :-1]
    return base(x, ids, shares, *params)


def _wrong(name: str, says: str, open_wrong: Open) -> Fault:
    return Fault(name, "ops", says, open_wrong)


FAULTS = (
    _wrong(
        "silu_of_one_token",
        "a step of one token gates the wrong half",
        ops(silu_and_mul=_gate_of_one_token),
    ),
    _wrong(
        "rms_norm_of_first_pass",
        "the mean square of a row is that of its first 1,024 channels",
        ops(rms_norm=_mean_of_first_pass),
    ),
    _wrong(
        "residual_of_first_pass",
        "a residual is added to the first 1,024 channels",
        ops(add_rms_norm=_residual_of_first_pass),
    ),
    _wrong(
        "gelu_of_first_rows",
        "a gate computes 256 tokens and leaves the others 0",
        ops(gelu_and_mul=_first_rows),
    ),
    _wrong(
        "embed_first_pass",
        "rows of an embedding are copied as far as 1,024 channels",
        ops(embed=_first_pass_of_embed),
    ),
    _wrong(
        "experts_of_one_token",
        "a step of one token goes without its last expert",
        ops(moe_experts=_last_expert_of_one_token),
    ),
)
