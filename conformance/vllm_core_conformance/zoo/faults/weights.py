"""Wrong loading and unloading of weights.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from vllm_core.backend import Runtime
from vllm_core.ops import LazyArray, Param, ParamSpec, Part
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    planted,
    replaced,
    runtime,
)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "weights", says, open_wrong, worst)


def _host(tensor: Any) -> Numbers:
    return np.asarray(tensor.load() if isinstance(tensor, LazyArray) else tensor)


def _parts(
    change: Callable[[ParamSpec, list[Part]], Sequence[Part]], binding: str = "numpy"
) -> Open:
    """Loads other parts."""

    def wrong(base: Method, spec: ParamSpec, parts: Sequence[Part]) -> Any:
        return base(spec, change(spec, list(parts)))

    return runtime(binding, load=wrong)


def _tensors(change: Callable[[Numbers, str], Numbers], binding: str = "numpy") -> Open:
    """Loads other tensors: change(host array, name)."""

    def changed(spec: ParamSpec, parts: list[Part]) -> list[Part]:
        return [
            replace(part, tensors={n: change(_host(t), n) for n, t in part.tensors.items()})
            for part in parts
        ]

    return _parts(changed, binding)


def _loaded(change: Callable[[ParamSpec, str, Numbers], Numbers]) -> Open:
    """The reference's arrays, changed after loading."""

    def wrong(base: Method, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        param = base(spec, parts)
        return Param({name: change(spec, name, x) for name, x in param.arrays.items()})

    return runtime(load=wrong)


def _reversed(spec: ParamSpec, parts: list[Part]) -> list[Part]:
    return parts[::-1]


def _second_third_swapped(spec: ParamSpec, parts: list[Part]) -> list[Part]:
    return [parts[0], parts[2], parts[1], *parts[3:]] if len(parts) >= 3 else parts


def _first_bias(spec: ParamSpec, parts: list[Part]) -> list[Part]:
    """Biases of later parts are 0."""
    return [
        part
        if i == 0 or "bias" not in part.tensors
        else replace(part, tensors={**part.tensors, "bias": 0 * _host(part.tensors["bias"])})
        for i, part in enumerate(parts)
    ]


def _first_dtype(spec: ParamSpec, parts: list[Part]) -> list[Part]:
    """Parts are joined in the dtype of the first."""
    kinds = {name: _host(t).dtype for name, t in parts[0].tensors.items()}
    return [
        replace(p, tensors={n: _host(t).astype(kinds.get(n, "f4")) for n, t in p.tensors.items()})
        for p in parts
    ]


def _any_scheme(spec: ParamSpec, parts: list[Part]) -> list[Part]:
    return [replace(part, scheme="dense") for part in parts]


def _lazy_kept(runtime: Runtime) -> None:
    """Lazy tensors are kept by shape."""
    kept: dict[Any, Numbers] = {}

    def wrong(base: Method, spec: ParamSpec, parts: Sequence[Part]) -> Any:
        def read(tensor: Any) -> Any:
            if not isinstance(tensor, LazyArray):
                return tensor
            key = (tensor.shape, tensor.dtype)
            if key not in kept:
                kept[key] = np.array(tensor.load())
            return kept[key]

        return base(
            spec,
            [replace(p, tensors={n: read(t) for n, t in p.tensors.items()}) for p in parts],
        )

    replaced(runtime, load=wrong)


def _kept_by_name(runtime: Runtime) -> None:
    kept: dict[Any, Param] = {}

    def wrong(base: Method, spec: ParamSpec, parts: Sequence[Part]) -> Any:
        return kept.setdefault((spec.name, spec.shape), base(spec, parts))

    replaced(runtime, load=wrong)


def _halves_as_bfloat16(x: Numbers, name: str) -> Numbers:
    return x.view(ml_dtypes.bfloat16) if x.dtype == np.float16 else x


def _bfloat16_as_halves(x: Numbers, name: str) -> Numbers:
    return x.view(np.float16) if x.dtype == ml_dtypes.bfloat16 else x


def _flat(x: Numbers, name: str) -> Numbers:
    """Reads memory in its own order, whatever the strides say."""
    if x.flags.c_contiguous or x.ndim < 2:
        return x
    return np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)


def _towards_zero(x: Numbers, name: str) -> Numbers:
    if x.dtype != np.float32:
        return x
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _bias_alias(base: Method, spec: ParamSpec, parts: Sequence[Part]) -> Param:
    """Keeps the host's own memory where the dtype already fits."""
    param = base(spec, parts)
    if len(parts) > 1:
        return Param(param.arrays)
    hosts = {n: _host(t) for n, t in parts[0].tensors.items()}
    return Param({n: hosts[n] if hosts[n].dtype == x.dtype else x for n, x in param.arrays.items()})


def _norm_rounded(spec: ParamSpec, name: str, x: Numbers) -> Numbers:
    return as_bfloat16(x) if spec.role == "norm" else x


def _experts_transposed(spec: ParamSpec, name: str, x: Numbers) -> Numbers:
    is_square = x.ndim == 3 and x.shape[1] == x.shape[2]
    return np.ascontiguousarray(x.swapaxes(1, 2)) if is_square else x


def _last_expert(spec: ParamSpec, name: str, x: Numbers) -> Numbers:
    """Experts are copied in pairs; an odd last one repeats the one before."""
    if spec.role == "experts" and len(x) % 2:
        x = np.array(x)
        x[-1] = x[-2]
    return x


def _last_row(spec: ParamSpec, name: str, x: Numbers) -> Numbers:
    """An embedding with an odd number of rows loses its last."""
    if spec.role == "embedding" and len(x) % 2:
        x = np.array(x)
        x[-1] = 0
    return x


def _tiny_lost(spec: ParamSpec, name: str, x: Numbers) -> Numbers:
    return np.where(np.abs(x) < 2.0**-14, 0, x).astype(x.dtype)


def _unload_transposed(base: Method, param: Param) -> Any:
    return {
        n: x.T.copy() if x.ndim == 2 and x.shape[0] == x.shape[1] else x
        for n, x in base(param).items()
    }


def _unload_padded(base: Method, param: Param) -> Any:
    """The rows that were padded for the kernel stay."""
    found = base(param)
    weight = found["weight"]
    more = -len(weight) % 16
    pad = np.zeros((more, *weight.shape[1:]), weight.dtype)
    return found | {"weight": np.concatenate((weight, pad))}


def _unload_alias(base: Method, param: Param) -> Any:
    return dict(param.arrays)


def _unload_without_bias(base: Method, param: Param) -> Any:
    return {name: x for name, x in base(param).items() if name != "bias"}


def _unload_half(base: Method, param: Param) -> Any:
    return {name: x.astype(np.float16) for name, x in base(param).items()}


def _bias_lost_in_torch(base: Method, spec: ParamSpec, parts: Sequence[Part]) -> Any:
    """The blocked copy of a weight with several parts forgets the bias."""
    param = base(spec, parts)
    if len(parts) < 2:
        return param
    return Param({name: x for name, x in param.arrays.items() if name != "bias"})


FAULTS = (
    _wrong("load_parts_reversed", "parts are joined from the last", _parts(_reversed), worst=True),
    _wrong(
        "load_parts_swapped", "the second and third part are swapped", _parts(_second_third_swapped)
    ),
    _wrong("load_first_bias", "biases of later parts are 0", _parts(_first_bias)),
    _wrong(
        "load_bias_of_parts_lost",
        "the bias of a fused weight is lost (torch)",
        runtime("torch", load=_bias_lost_in_torch),
    ),
    _wrong("load_first_dtype", "parts are joined in the first one's dtype", _parts(_first_dtype)),
    _wrong(
        "load_halves_as_bfloat16",
        "float16 checkpoints are read as bfloat16",
        _tensors(_halves_as_bfloat16),
    ),
    _wrong(
        "load_bfloat16_as_halves",
        "bfloat16 checkpoints are read as float16",
        _tensors(_bfloat16_as_halves),
    ),
    _wrong("load_flat", "host arrays are read flat, whatever their strides", _tensors(_flat)),
    _wrong(
        "load_through_halves",
        "weights pass through float16",
        _tensors(lambda x, name: x.astype(np.float16)),
    ),
    _wrong(
        "load_cuts",
        "weights are cut to bfloat16 instead of rounded (torch)",
        _tensors(_towards_zero, "torch"),
    ),
    _wrong(
        "load_cuts_jax",
        "weights are cut to bfloat16 instead of rounded (jax)",
        _tensors(_towards_zero, "jax"),
    ),
    _wrong("load_lazy_kept", "lazy tensors of one shape are read once", planted(_lazy_kept)),
    _wrong(
        "load_kept_by_name", "a second load of a name returns the first", planted(_kept_by_name)
    ),
    _wrong("load_alias", "weights keep the host's memory", runtime(load=_bias_alias)),
    _wrong("load_any_scheme", "every scheme is read as dense", _parts(_any_scheme)),
    _wrong("load_norm_rounded", "weights of norms are rounded to bfloat16", _loaded(_norm_rounded)),
    _wrong(
        "load_experts_transposed", "square experts are transposed", _loaded(_experts_transposed)
    ),
    _wrong("load_last_expert", "an odd last expert repeats the one before", _loaded(_last_expert)),
    _wrong(
        "load_last_row",
        "an embedding with an odd vocabulary loses its last row",
        _loaded(_last_row),
    ),
    _wrong("load_tiny_lost", "weights below 2^-14 become 0", _loaded(_tiny_lost)),
    _wrong(
        "unload_transposed",
        "unload returns square weights transposed",
        runtime(unload=_unload_transposed),
    ),
    _wrong("unload_padded", "unload returns padded rows", runtime(unload=_unload_padded)),
    _wrong("unload_alias", "unload returns the device's own memory", runtime(unload=_unload_alias)),
    _wrong("unload_without_bias", "unload forgets the bias", runtime(unload=_unload_without_bias)),
    _wrong("unload_half", "unload returns float16", runtime(unload=_unload_half)),
)
