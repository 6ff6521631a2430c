"""Wrong matmuls: linear, logits, embed.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.backend import Runtime
from vllm_core.ops import Param
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    flat_memory,
    ops,
    planted,
    replaced,
    without,
)


def _columns_only(multiple: int) -> Method:
    """Of the inner dimension, what lies past the last whole tile is not summed."""

    def wrong(base: Method, x: Numbers, param: Param) -> Any:
        k = x.shape[-1] // multiple * multiple
        arrays = dict(param.arrays) | {"weight": param["weight"][:, :k]}
        return base(x[:, :k], Param(arrays))

    return wrong


def _inputs(change: Method) -> Method:
    """The product of changed operands."""

    def wrong(base: Method, x: Numbers, param: Param) -> Any:
        return base(change(x), Param(dict(param.arrays) | {"weight": change(param["weight"])}))

    return wrong


def _ten_bits(x: Numbers) -> Numbers:
    single = np.ascontiguousarray(x, np.float32)
    cut = (single.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return cut.astype(x.dtype)


def _half_sums(base: Method, x: Numbers, param: Param) -> Any:
    out = np.zeros((x.shape[0], param["weight"].shape[0]), np.float16)
    for at in range(0, x.shape[1], 32):
        out += (x[:, at : at + 32] @ param["weight"][:, at : at + 32].T).astype(np.float16)
    bias = param.get("bias")
    return (out if bias is None else out + bias).astype(x.dtype)


def _last_split_lost(base: Method, x: Numbers, param: Param) -> Any:
    k = x.shape[-1]
    if k < 256:
        return base(x, param)
    k -= k // 4
    return base(x[:, :k], Param(dict(param.arrays) | {"weight": param["weight"][:, :k]}))


def _bias_of_one_row(base: Method, x: Numbers, param: Param) -> Any:
    return base(x, param if x.shape[0] <= 1 else without(param, "bias"))


def _bias_of_many_rows(base: Method, x: Numbers, param: Param) -> Any:
    return base(x, param if x.shape[0] > 4 else without(param, "bias"))


def _bias_twice(base: Method, x: Numbers, param: Param) -> Any:
    out = base(x, param)
    return out if param.get("bias") is None else out + param["bias"]


def _square_transposed(base: Method, x: Numbers, param: Param) -> Any:
    weight = param["weight"]
    if weight.shape[0] != weight.shape[1]:
        return base(x, param)
    return base(x, Param(dict(param.arrays) | {"weight": weight.T}))


def _last_columns_stale(base: Method, x: Numbers, param: Param) -> Any:
    out = base(x, param)
    out[:, out.shape[1] // 16 * 16 :] = 0
    return out


def _row_of_big_tile(base: Method, x: Numbers, param: Param) -> Any:
    out = base(x, param)
    if len(out) >= 32:
        out[31] = out[30]
    return out


def _rows_past_tile(base: Method, x: Numbers, param: Param) -> Any:
    out = base(x, param)
    if len(out) > 8:
        out[len(out) // 8 * 8 :] = 0
    return out


def _nan_spreads(base: Method, x: Numbers, param: Param) -> Any:
    return base(x, param) + 0 * x.sum(-1).reshape(-1).sum()


def _linear_bfloat16_partials(base: Method, x: Any, param: Param) -> Any:
    import torch

    weight = param["packed"].to_dense() if "packed" in param.arrays else param["weight"]
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)
    for at in range(0, x.shape[1], 32):
        out += x[:, at : at + 32] @ weight[:, at : at + 32].T
    bias = param.get("bias")
    return out if bias is None else out + bias


def _shared_workspace(*names: str) -> Open:
    """Results of one shape share their memory: the second call overwrites the first result."""

    def plant(runtime: Runtime) -> None:
        kept: dict[Any, Numbers] = {}

        def wrong(base: Method, *args: Any) -> Any:
            out = base(*args)
            place = kept.setdefault((out.shape, out.dtype), out)
            place[:] = out
            return place

        replaced(runtime.ops, **dict.fromkeys(names, wrong))

    return planted(plant)


def _weights_by_shape(runtime: Runtime) -> None:
    """Repacked weights are kept by shape."""
    kept: dict[tuple[int, ...], Numbers] = {}

    def wrong(base: Method, x: Numbers, param: Param) -> Any:
        weight = kept.setdefault(param["weight"].shape, param["weight"])
        return base(x, Param(dict(param.arrays) | {"weight": weight}))

    replaced(runtime.ops, linear=wrong)


def _result_not_written(runtime: Runtime) -> None:
    """The kernel writes whole tiles of 4 rows; the rest keeps what the buffer held before."""
    kept: dict[Any, Numbers] = {}

    def wrong(base: Method, x: Numbers, param: Param) -> Any:
        out = base(x, param)
        old = kept.get(out.shape)
        kept[out.shape] = out.copy()
        if old is not None and len(out) % 4:
            out[len(out) // 4 * 4 :] = old[len(out) // 4 * 4 :]
        return out

    replaced(runtime.ops, linear=wrong)


# ---------------------------------------------------------------- logits, embeddings
def _last_logit_garbage(base: Method, x: Numbers, param: Param) -> Any:
    out = base(x, param)
    if out.shape[1] % 64:
        out[:, -1] = out[:, -2]
    return out


def _logits_tail_chunk(base: Method, x: Numbers, param: Param) -> Any:
    """A second chunk of the vocabulary begins one column early."""
    out = base(x, param)
    out[:, 128:] = out[:, 127:-1].copy()[:, : out.shape[1] - 128]
    return out


def _embed_bound(base: Method, ids: Numbers, param: Param) -> Any:
    return base(np.minimum(ids, param["weight"].shape[0] - 2), param)


def _embed_padding_id(base: Method, ids: Numbers, param: Param) -> Any:
    return np.where((ids == 0)[:, None], 0, base(ids, param)).astype(param["weight"].dtype)


def _embed_short_ids(base: Method, ids: Numbers, param: Param) -> Any:
    return base(ids.astype(np.int16), param)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "ops", says, open_wrong, worst)


FAULTS = (
    _wrong(
        "linear_bias_lost",
        "linear drops its bias",
        ops(linear=lambda base, x, param: base(x, without(param, "bias"))),
    ),
    _wrong("linear_bias_twice", "linear adds its bias twice", ops(linear=_bias_twice)),
    _wrong(
        "linear_bias_of_one_row",
        "linear adds its bias in the kernel for one row only",
        ops(linear=_bias_of_one_row),
    ),
    _wrong(
        "linear_bias_of_many_rows",
        "linear forgets its bias in the kernel for up to four rows",
        ops(linear=_bias_of_many_rows),
    ),
    _wrong(
        "linear_k_tail_8", "linear drops inputs past a multiple of 8", ops(linear=_columns_only(8))
    ),
    _wrong(
        "linear_k_tail_32",
        "linear drops inputs past a multiple of 32",
        ops(linear=_columns_only(32)),
        worst=True,
    ),
    _wrong(
        "linear_last_split_lost",
        "linear drops the last of four splits of at least 256 inputs",
        ops(linear=_last_split_lost),
    ),
    _wrong(
        "linear_n_tail",
        "linear leaves outputs past a multiple of 16 at 0",
        ops(linear=_last_columns_stale),
    ),
    _wrong(
        "linear_m_tail",
        "linear leaves rows past a multiple of 8 at 0 when there are more than 8",
        ops(linear=_rows_past_tile),
    ),
    _wrong(
        "linear_row_of_big_tile",
        "linear gives row 31 the result of row 30 from 32 rows on",
        ops(linear=_row_of_big_tile),
    ),
    _wrong("linear_half_sums", "linear keeps partial sums in 16 bits", ops(linear=_half_sums)),
    _wrong(
        "linear_ten_bits",
        "linear cuts float32 operands to 10 bits, as TF32 units do",
        ops(linear=_inputs(_ten_bits)),
    ),
    _wrong(
        "linear_bfloat16_operands",
        "linear rounds float32 operands to bfloat16",
        ops(linear=_inputs(as_bfloat16)),
    ),
    _wrong(
        "linear_half_range",
        "linear runs in float16: operands above 65504 become infinite",
        ops(linear=_inputs(lambda x: np.where(np.abs(x) > 65504, np.inf * np.sign(x), x))),
    ),
    _wrong(
        "linear_bfloat16_partials",
        "linear adds partial sums over 32 inputs in the model's 16 bits",
        ops("torch", linear=_linear_bfloat16_partials),
    ),
    _wrong(
        "linear_square_transposed",
        "linear takes a square weight as [in, out]",
        ops(linear=_square_transposed),
    ),
    _wrong("linear_nan_spreads", "one row with NaN makes all rows NaN", ops(linear=_nan_spreads)),
    _wrong("linear_flat_memory", "linear ignores strides", ops(linear=flat_memory)),
    _wrong(
        "linear_weights_by_shape",
        "linear keeps repacked weights by shape",
        planted(_weights_by_shape),
    ),
    _wrong(
        "linear_rows_not_written",
        "linear leaves what the buffer held in rows past a multiple of 4",
        planted(_result_not_written),
    ),
    _wrong(
        "linear_shared_workspace",
        "results of linear of one shape share their memory",
        _shared_workspace("linear"),
    ),
    _wrong(
        "linear_wide",
        "linear returns float32 in a model of 16 bits",
        ops("torch", linear=lambda base, x, param: base(x, param).float()),
    ),
    _wrong(
        "linear_jax_sums_rounded",
        "linear in jax accumulates two halves apart and rounds each to bfloat16",
        ops(
            "jax",
            linear=lambda base, x, param: base(x, param).astype("bfloat16").astype(x.dtype),
        ),
    ),
    _wrong(
        "logits_bfloat16",
        "logits are rounded to bfloat16",
        ops(logits=lambda base, x, param: as_bfloat16(base(x, param))),
        worst=True,
    ),
    _wrong(
        "logits_model_dtype",
        "logits come through the model's 16 bits",
        ops("torch", logits=lambda base, x, param: base(x, param).to(x.dtype).float()),
    ),
    _wrong(
        "logits_last_column",
        "the last logit repeats its neighbour where V is no multiple of 64",
        ops(logits=_last_logit_garbage),
    ),
    _wrong(
        "logits_second_chunk",
        "logits from id 128 on stand one column late",
        ops(logits=_logits_tail_chunk),
    ),
    _wrong(
        "logits_bias_lost",
        "logits drop the head's bias",
        ops(logits=lambda base, x, param: base(x, without(param, "bias"))),
    ),
    _wrong(
        "logits_half_range",
        "logits saturate at 30",
        ops(logits=lambda base, x, param: np.clip(base(x, param), -30, 30)),
    ),
    _wrong("embed_bound", "embed clips ids to V - 2", ops(embed=_embed_bound)),
    _wrong("embed_padding_id", "embed takes id 0 for padding", ops(embed=_embed_padding_id)),
    _wrong("embed_short_ids", "embed takes ids as 16-bit integers", ops(embed=_embed_short_ids)),
)
