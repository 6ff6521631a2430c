"""Wrong norms and array operations; with them the other ops' faults.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Param
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults import activations, matmuls, rope, sizes
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    flat_memory,
    ops,
    without,
)


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
        ops(rms_norm=flat_memory),
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
        ops(layer_norm=lambda base, x, p, eps: base(x, without(p, "bias"), eps)),
    ),
    _wrong(
        "layer_needs_bias",
        "layer_norm fails where there is no bias",
        ops(layer_norm=_layer_needs_bias),
    ),
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

FAULTS = (*NORMS, *rope.FAULTS, *activations.FAULTS, *matmuls.FAULTS, *sizes.FAULTS, *ARRAYS)
