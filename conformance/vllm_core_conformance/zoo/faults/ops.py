"""Wrong norms, matmuls, embeddings and array operations: what an author of kernels gets wrong.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.backend import Runtime
from vllm_core.ops import Param, reference
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults import rope
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    ops,
    planted,
    replaced,
)


# ---------------------------------------------------------------- norms
def _rms(x: Numbers, weight: Numbers, eps: float, width: int | None = None) -> Any:
    mean = (x * x).sum(-1, keepdims=True) / (width or x.shape[-1])
    return (x / np.sqrt(mean + eps) * weight).astype(x.dtype)


def _rms_half(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    half = x.astype(np.float16)
    mean = np.mean(half * half, -1, keepdims=True, dtype=np.float16)
    return (x / np.sqrt(mean.astype(x.dtype) + eps) * param["weight"]).astype(x.dtype)


def _rms_eps_outside(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    root = np.sqrt(np.mean(x * x, -1, keepdims=True))
    return (x / (root + eps) * param["weight"]).astype(x.dtype)


def _rms_heads_together(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    mean = np.mean(x * x, tuple(range(1, x.ndim)), keepdims=True)
    return (x / np.sqrt(mean + eps) * param["weight"]).astype(x.dtype)


def _rms_weight_of_few_rows(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    out = base(x, param, eps)
    out[16:] = base(x[16:], Param({"weight": np.ones_like(param["weight"])}), eps)
    return out


def _rms_tail_unscaled(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    weight = param["weight"].copy()
    weight[len(weight) // 32 * 32 :] = 1
    return base(x, Param({"weight": weight}), eps)


def _rms_rounds_between(base: Method, x: Any, param: Param, eps: float) -> Any:
    import torch

    wide = x.to(param["weight"].dtype)
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * param["weight"]).to(x.dtype)


def _rms_in_model_dtype(base: Method, x: Any, param: Param, eps: float) -> Any:
    mean = (x * x).mean(-1, keepdim=True)
    return (x / (mean + eps).sqrt() * param["weight"].to(x.dtype)).to(x.dtype)


def _add_rms_in_place(base: Method, x: Numbers, residual: Numbers, param: Param, eps: float) -> Any:
    residual += x
    return _rms(residual, param["weight"], eps), residual


def _layer_one_pass(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    mean = x.mean(-1, keepdims=True)
    var = np.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0)
    bias = param.get("bias")
    out = (x - mean) / np.sqrt(var + eps) * param["weight"]
    return (out if bias is None else out + bias).astype(x.dtype)


def _layer_unbiased(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    out = centred / np.sqrt(x.var(-1, keepdims=True, ddof=1) + eps) * param["weight"]
    return (out if param.get("bias") is None else out + param["bias"]).astype(x.dtype)


def _layer_eps_outside(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    out = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + eps) * param["weight"]
    return (out if param.get("bias") is None else out + param["bias"]).astype(x.dtype)


def _layer_needs_bias(base: Method, x: Numbers, param: Param, eps: float) -> Any:
    return base(x, Param({"weight": param["weight"], "bias": param["bias"]}), eps)


# ---------------------------------------------------------------- activations
def _halves(x: Numbers) -> tuple[Numbers, Numbers]:
    half = x.shape[-1] // 2
    return x[:, :half], x[:, half:]


def _gated(act: Method) -> Method:
    def wrong(base: Method, x: Numbers) -> Numbers:
        gate, up = _halves(x)
        return np.asarray(act(gate) * up).astype(x.dtype)

    return wrong


def _silu(x: Numbers) -> Any:
    return x / (1 + np.exp(-x))


def _silu_rough(x: Numbers) -> Any:
    return x * (0.5 * np.tanh(np.clip(0.5 * x, -4.97, 4.97)) + 0.5) * (1 + 1e-3 * np.sin(x))


def _silu_in_place(base: Method, x: Numbers) -> Numbers:
    gate, up = _halves(x)
    gate[:] = _silu(gate) * up
    return gate.copy()


def _kind(kind: str, act: Method) -> Open:
    def wrong(base: Method, x: Numbers, asked: str) -> Numbers:
        return np.asarray(act(x)).astype(x.dtype) if asked == kind else np.asarray(base(x, asked))

    return ops(activation=wrong)


# ---------------------------------------------------------------- matmuls
def _without(param: Param, name: str) -> Param:
    return Param({key: x for key, x in param.arrays.items() if key != name})


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
    return base(x, param if x.shape[0] <= 1 else _without(param, "bias"))


def _bias_of_many_rows(base: Method, x: Numbers, param: Param) -> Any:
    return base(x, param if x.shape[0] > 4 else _without(param, "bias"))


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


def _flat_memory(base: Method, x: Numbers, *rest: Any) -> Any:
    """Reads size elements from where x begins, whatever its strides say."""
    if not x.flags.c_contiguous and x.ndim > 1 and x.base is not None:
        x = np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)
    return base(x.copy(), *rest)


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


# ---------------------------------------------------------------- array vocabulary
def _cast_cuts(base: Method, x: Any, dtype: str) -> Any:
    import torch

    if dtype == "bfloat16" and x.dtype == torch.float32:
        return (x.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return base(x, dtype)


def _cast_saturates(base: Method, x: Any, dtype: str) -> Any:
    import torch

    if dtype in ("bfloat16", "float16") and x.is_floating_point():
        top = torch.finfo(getattr(torch, dtype)).max
        return base(torch.where(x.isnan(), x, x.clamp(-top, top)), dtype)
    return base(x, dtype)


def _accumulate_once(base: Method, x: Numbers, index: Any, value: Any) -> Numbers:
    x[index] += value
    return x


def _put_adds(base: Method, x: Numbers, index: Any, value: Any) -> Numbers:
    x[index] = 0
    np.add.at(x, index, value)
    return x


def _top_ties(base: Method, x: Numbers, count: int) -> Any:
    ids = (x.shape[-1] - 1 - np.argsort(-x[..., ::-1], -1, kind="stable"))[..., :count]
    return np.take_along_axis(x, ids, -1), ids.astype(np.int32)


def _top_ascending(base: Method, x: Numbers, count: int) -> Any:
    values, ids = base(x, count)
    return values[..., ::-1], ids[..., ::-1]


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "ops", says, open_wrong, worst)


NORMS = (
    _wrong("rms_half", "rms_norm takes its mean in 16 bits", ops(rms_norm=_rms_half)),
    _wrong(
        "rms_eps_outside",
        "rms_norm adds eps to the root, not under it",
        ops(rms_norm=_rms_eps_outside),
    ),
    _wrong(
        "rms_eps_ignored",
        "rms_norm ignores eps",
        ops(rms_norm=lambda base, x, param, eps: base(x, param, 1e-30)),
    ),
    _wrong(
        "rms_eps_fixed",
        "rms_norm has 1e-6 compiled in, whatever eps is asked for",
        ops(rms_norm=lambda base, x, param, eps: base(x, param, 1e-6)),
    ),
    _wrong(
        "rms_padded_width",
        "rms_norm divides by the width padded to a multiple of 64",
        ops(rms_norm=lambda base, x, p, eps: _rms(x, p["weight"], eps, -(-x.shape[-1] // 64) * 64)),
        worst=True,
    ),
    _wrong(
        "rms_weight_plus_one",
        "rms_norm multiplies with 1 + weight",
        ops(rms_norm=lambda base, x, p, eps: base(x, Param({"weight": 1 + p["weight"]}), eps)),
    ),
    _wrong(
        "rms_weight_of_few_rows",
        "rms_norm applies its weight to the first 16 rows only",
        ops(rms_norm=_rms_weight_of_few_rows),
    ),
    _wrong(
        "rms_tail_unscaled",
        "rms_norm applies its weight to whole vectors of 32 columns only",
        ops(rms_norm=_rms_tail_unscaled),
    ),
    _wrong(
        "rms_heads_together",
        "rms_norm of [T, heads, D] normalises all heads of a token together",
        ops(rms_norm=_rms_heads_together),
    ),
    _wrong(
        "rms_rounds_between",
        "rms_norm rounds x / rms to the model's 16 bits before it multiplies with the weight",
        ops("torch", rms_norm=_rms_rounds_between),
    ),
    _wrong(
        "rms_in_model_dtype",
        "rms_norm computes in the model's 16 bits",
        ops("torch", rms_norm=_rms_in_model_dtype),
    ),
    _wrong(
        "rms_flat_memory",
        "rms_norm reads a strided input as if it were contiguous",
        ops(rms_norm=_flat_memory),
        worst=True,
    ),
    _wrong(
        "add_rms_keeps_residual",
        "add_rms_norm returns the residual that it was given",
        ops(add_rms_norm=lambda base, x, r, p, eps: (base(x, r, p, eps)[0], r)),
        worst=True,
    ),
    _wrong(
        "add_rms_norms_x_only",
        "add_rms_norm normalises x without the residual",
        ops(add_rms_norm=lambda base, x, r, p, eps: (_rms(x, p["weight"], eps), x + r)),
    ),
    _wrong(
        "add_rms_residual_half",
        "add_rms_norm returns the sum in 16 bits",
        ops(
            add_rms_norm=lambda base, x, r, p, eps: (
                base(x, r, p, eps)[0],
                (x + r).astype(np.float16).astype(x.dtype),
            )
        ),
    ),
    _wrong(
        "add_rms_in_place",
        "add_rms_norm adds into the residual that the caller still owns",
        ops(add_rms_norm=_add_rms_in_place),
    ),
    _wrong(
        "layer_one_pass",
        "layer_norm takes the variance as E[x^2] - E[x]^2 in float32",
        ops(layer_norm=_layer_one_pass),
    ),
    _wrong("layer_unbiased", "layer_norm divides by n - 1", ops(layer_norm=_layer_unbiased)),
    _wrong(
        "layer_eps_outside",
        "layer_norm adds eps to the standard deviation",
        ops(layer_norm=_layer_eps_outside),
    ),
    _wrong(
        "layer_bias_lost",
        "layer_norm drops its bias",
        ops(layer_norm=lambda base, x, p, eps: base(x, _without(p, "bias"), eps)),
    ),
    _wrong(
        "layer_needs_bias",
        "layer_norm fails where there is no bias",
        ops(layer_norm=_layer_needs_bias),
    ),
    _wrong(
        "layer_jax_rounds_mean",
        "layer_norm subtracts a mean that was rounded to bfloat16",
        ops(
            "jax",
            layer_norm=lambda base, x, p, eps: base(
                x - x.mean(-1, keepdims=True).astype("bfloat16").astype(x.dtype), p, eps
            ),
        ),
    ),
)


def _gelu_erf(x: Numbers) -> Any:
    return reference.activation(x, "gelu")


def _gelu_tanh(x: Numbers) -> Any:
    return reference.activation(x, "gelu_tanh")


def _quick_gelu(x: Numbers) -> Any:
    return x / (1 + np.exp(-1.702 * x))


ACTIVATIONS = (
    _wrong("silu_rough", "silu is good to 1e-3 only", ops(silu_and_mul=_gated(_silu_rough))),
    _wrong(
        "silu_hard",
        "silu is the piecewise linear hard swish",
        ops(silu_and_mul=_gated(lambda x: x * np.clip(x / 6 + 0.5, 0, 1))),
    ),
    _wrong(
        "silu_overflow",
        "silu is x e^x / (1 + e^x), NaN for large x",
        ops(silu_and_mul=_gated(lambda x: x * np.exp(x) / (1 + np.exp(x)))),
        worst=True,
    ),
    _wrong(
        "silu_clamped",
        "silu_and_mul clamps its inputs at 7, as one family of models wants",
        ops(silu_and_mul=lambda base, x: base(np.clip(x, -np.inf, 7).astype(x.dtype))),
    ),
    _wrong(
        "silu_flat_tail",
        "silu is 0 below -16",
        ops(silu_and_mul=_gated(lambda x: np.where(x < -16, 0, _silu(x)))),
    ),
    _wrong(
        "silu_halves_swapped",
        "silu_and_mul gates with the second half",
        ops(silu_and_mul=lambda base, x: base(np.concatenate(_halves(x)[::-1], -1))),
    ),
    _wrong(
        "silu_interleaved",
        "silu_and_mul takes even columns as gate and odd ones as up",
        ops(silu_and_mul=lambda base, x: base(np.concatenate((x[:, ::2], x[:, 1::2]), -1))),
    ),
    _wrong("silu_in_place", "silu_and_mul overwrites its input", ops(silu_and_mul=_silu_in_place)),
    _wrong("silu_flat_memory", "silu_and_mul ignores strides", ops(silu_and_mul=_flat_memory)),
    _wrong("gelu_gate_erf", "gelu_and_mul uses erf", ops(gelu_and_mul=_gated(_gelu_erf))),
    _wrong("gelu_is_tanh", 'activation "gelu" uses tanh', _kind("gelu", _gelu_tanh)),
    _wrong("gelu_tanh_is_erf", 'activation "gelu_tanh" uses erf', _kind("gelu_tanh", _gelu_erf)),
    _wrong("gelu_quick", 'activation "gelu" is x sigmoid(1.702 x)', _kind("gelu", _quick_gelu)),
    _wrong(
        "gelu_flat_tail",
        "gelu_tanh is 0 below -3.5",
        _kind("gelu_tanh", lambda x: np.where(x < -3.5, 0, _gelu_tanh(x))),
    ),
    _wrong("relu_six", "relu stops at 6", _kind("relu", lambda x: np.clip(x, 0, 6))),
    _wrong(
        "relu_swallows_nan",
        "relu makes 0 of NaN",
        _kind("relu", lambda x: np.where(x > 0, x, 0)),
    ),
    _wrong(
        "activation_overflow",
        'activation "silu" overflows',
        _kind("silu", lambda x: x * np.exp(x) / (1 + np.exp(x))),
    ),
    _wrong(
        "activation_wide",
        "activation returns float32 in a model of 16 bits",
        ops("torch", activation=lambda base, x, kind: base(x.float(), kind)),
    ),
)

MATMULS = (
    _wrong(
        "linear_bias_lost",
        "linear drops its bias",
        ops(linear=lambda base, x, param: base(x, _without(param, "bias"))),
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
        worst=True,
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
    _wrong("linear_flat_memory", "linear ignores strides", ops(linear=_flat_memory)),
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
        ops(logits=lambda base, x, param: base(x, _without(param, "bias"))),
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

ARRAYS = (
    _wrong("cast_cuts", "cast to bfloat16 cuts instead of rounding", ops("torch", cast=_cast_cuts)),
    _wrong("cast_saturates", "cast to 16 bits saturates", ops("torch", cast=_cast_saturates)),
    _wrong(
        "accumulate_once",
        "accumulate adds once where an index repeats",
        ops(accumulate=_accumulate_once),
    ),
    _wrong("put_adds", "put adds the values of a repeated index", ops(put=_put_adds)),
    _wrong("top_ties", "top orders ties from the highest id", ops(top=_top_ties)),
    _wrong(
        "top_ascending", "top returns the smallest of the largest first", ops(top=_top_ascending)
    ),
    _wrong(
        "asarray_alias",
        "asarray returns the host's own memory",
        ops(asarray=lambda base, host: np.asarray(host)),
    ),
    _wrong(
        "words_signed",
        "words keep the sign of 32-bit integers",
        ops(words=lambda base, x: x.astype(np.int64)),
        worst=True,
    ),
    _wrong(
        "amax_skips_nan",
        "amax skips NaN",
        ops(amax=lambda base, x: np.fmax.reduce(x, -1)),
    ),
    _wrong(
        "full_of_floats",
        "full ignores a float dtype of 64 bits and gives integers in 64",
        ops(full=lambda base, shape, value, dtype: np.full(shape, value)),
    ),
    _wrong(
        "repeat_once_less",
        "repeat runs its body once less",
        ops(repeat=lambda base, count, body, carry: base(count - 1, body, carry)),
    ),
)

FAULTS = (*NORMS, *rope.FAULTS, *ACTIVATIONS, *MATMULS, *ARRAYS)
