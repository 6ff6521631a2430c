"""A runtime over numpy that keeps weights of few bits as codes and multiplies them.

Its methods are cut where kernels go wrong, for the faults; as it stands it is honest.

Knows: schemes, parts. Does not know: which mistakes there are, cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.bindings.numpy import NumpyOps
from vllm_core.bindings.parts import SCHEMES, stored_parts
from vllm_core.ops import Array, HostArray, Param, ParamSpec, Part
from vllm_core_conformance.zoo.kernel import wide
from vllm_core_conformance.zoo.runtime import ZooRuntime

single = np.float32
ARRAYS = ("codes", "scales", "mins", "weight")


class Coded:
    """One part: its scheme and arrays."""

    def __init__(self, scheme: str, arrays: dict[str, HostArray]) -> None:
        self.scheme, self.arrays = scheme, arrays
        self.bits = 8 if scheme.startswith("int8") else 4
        self.codes, self.scales = arrays.get("codes"), arrays.get("scales")
        self.mins = arrays.get("mins")

    def __getitem__(self, name: str) -> HostArray:
        return self.arrays[name]

    @property
    def num_groups(self) -> int:
        return int(self["scales"].shape[1])

    @property
    def group(self) -> int:
        return int(self["codes"].shape[1]) // self.num_groups


def schemes_of(param: Param) -> tuple[str, ...]:
    static: Any = param.static
    found: tuple[str, ...] = static[1]
    return found


def parts_of(param: Param) -> Iterator[Coded]:
    for place, scheme in enumerate(schemes_of(param)):
        found = {n: param[f"{place}.{n}"] for n in ARRAYS if f"{place}.{n}" in param.arrays}
        yield Coded(scheme, found)


def is_coded(param: Param) -> bool:
    return param.static != "dense"


class CodedOps(NumpyOps):
    """Products a part at a time, group by group."""

    def linear(self, x: Array, param: Param) -> Array:
        if not is_coded(param):
            return super().linear(x, param)
        return self.product(x, param).astype(x.dtype)

    def logits(self, x: Array, param: Param) -> Array:
        return self.product(x, param) if is_coded(param) else super().logits(x, param)

    def embed(self, ids: Array, param: Param) -> Array:
        if not is_coded(param):
            return super().embed(ids, param)
        (part,) = parts_of(param)
        rows = {name: array[ids] for name, array in part.arrays.items()}
        return self.values(Coded(part.scheme, rows)).astype(param["like"].dtype)

    def product(self, x: Array, param: Param) -> Array:
        out = np.concatenate([self.part(x, part) for part in parts_of(param)], -1)
        bias = param.get("bias")
        return out if bias is None else out + wide(bias)

    def part(self, x: Array, part: Coded) -> Array:
        if part.codes is None:
            return wide(x) @ wide(part["weight"]).T
        if part.scheme.endswith("-weight-only"):
            return self.summed(wide(x), np.ones((len(x), 1), single), part)
        return self.summed(*self.inputs(x, part), part)

    def inputs(self, x: Array, part: Coded) -> tuple[Array, Array]:
        """Codes [T, in] and scales [T, groups of inputs], as floats."""
        size = x.shape[1]
        return self.quantised(x, min(max(part.group, 32), size))

    def quantised(self, x: Array, group: int) -> tuple[Array, Array]:
        parts = x.astype(single).reshape(len(x), -1, group)
        amax = self.amax_of(parts)
        is_zero = amax < 2.0**-118
        factor = single(127) / np.where(is_zero, single(1), amax)
        codes = np.where(is_zero, single(0), self.rounded(parts * factor))
        return codes.reshape(x.shape), np.where(is_zero, single(0), amax / single(127))[..., 0]

    def amax_of(self, parts: Array) -> Array:
        return np.abs(parts).max(-1, keepdims=True)

    def rounded(self, x: Array) -> Array:
        return np.rint(x)

    def scale_of(self, part: Coded, at: int) -> Array:
        """[rows], of a group."""
        return part["scales"][:, at]

    def offset_of(self, part: Coded, at: int) -> Array:
        """What is added to scale * code, [rows]."""
        if part.mins is not None:
            return part.mins[:, at]
        return -self.scale_of(part, at) * single(self.zero_of(part))

    def zero_of(self, part: Coded) -> int:
        return int(2 ** (part.bits - 1))

    def codes_of(self, part: Coded) -> Array:
        return part["codes"].astype(single)

    def groups_of(self, part: Coded) -> Sequence[int]:
        return range(part.num_groups)

    def dot(self, x: Array, codes: Array) -> Array:
        return x @ codes.T

    def summed(self, x: Array, scales: Array, part: Coded) -> Array:
        codes, group = self.codes_of(part), part.group
        out = np.zeros((len(x), len(codes)), x.dtype)
        per = part.num_groups // scales.shape[1]
        for at in self.groups_of(part):
            some = slice(at * group, (at + 1) * group)
            own = scales[:, at // per, None]
            if part.mins is None:
                whole = self.dot(x[:, some], codes[:, some] - single(self.zero_of(part)))
                out += whole * own * self.scale_of(part, at)
                continue
            out += self.dot(x[:, some], codes[:, some]) * own * self.scale_of(part, at)
            out += x[:, some].sum(-1, keepdims=True) * own * self.offset_of(part, at)
        return out

    def values(self, part: Coded) -> Array:
        """float32 [rows, in]."""
        if part.codes is None:
            return wide(part["weight"])
        parts = self.codes_of(part).reshape(len(part.codes), part.num_groups, -1)
        scales = np.stack([self.scale_of(part, g) for g in range(part.num_groups)], 1)[..., None]
        if part.mins is None:
            found = (parts - single(self.zero_of(part))) * scales
        else:
            offsets = np.stack([self.offset_of(part, g) for g in range(part.num_groups)], 1)
            found = parts * scales + offsets[..., None]
        return np.asarray(found.reshape(part.codes.shape))


class CodedRuntime(ZooRuntime):
    """Keeps codes as they come, or as the contract's quantiser makes them."""

    OPS: type[CodedOps] = CodedOps
    CAPS = replace(ZooRuntime.CAPS, schemes=SCHEMES, native_schemes=SCHEMES - {"dense"})

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        if spec.scheme == "dense" and all(part.scheme == "dense" for part in parts):
            return super().load(spec, parts)
        arrays: dict[str, Any] = {"like": np.zeros(0, self.numpy_dtype)}
        biases, schemes = [], []
        for place, part in enumerate(stored_parts(spec, parts)):
            schemes.append(part.scheme)
            tensors = dict(part.tensors)
            if "bias" in tensors:
                biases.append(tensors.pop("bias").astype(self.numpy_dtype))
            if "weight" in tensors:
                tensors["weight"] = tensors["weight"].astype(self.numpy_dtype)
            arrays |= {f"{place}.{name}": np.array(x) for name, x in tensors.items()}
        spec.check((sum(part.rows for part in parts), spec.shape[-1]))
        if biases:
            arrays["bias"] = np.concatenate(biases)
        return Param(arrays, ("codes", tuple(schemes)))

    @property
    def numpy_dtype(self) -> Any:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def unload(self, param: Param) -> dict[str, HostArray]:
        if not is_coded(param):
            return super().unload(param)
        honest = CodedOps()
        found = {"weight": np.concatenate([honest.values(part) for part in parts_of(param)])}
        if "bias" in param.arrays:
            found["bias"] = np.array(param["bias"])
        return found


class TileOps(CodedOps):
    """Few tokens meet codes; more meet values that were rounded to the model's dtype first, from
    the last group to the first."""

    def part(self, x: Array, part: Coded) -> Array:
        if len(x) <= 8 or part.codes is None:
            return super().part(x, part)
        return wide(x) @ wide(self.values(part).astype(x.dtype)).T

    def groups_of(self, part: Coded) -> Sequence[int]:
        return range(part.num_groups)[::-1]


class ApartOps(CodedOps):
    """What is added to codes is summed up apart, also where it is only the zero point; inputs are
    divided by their scale instead of multiplied with its inverse."""

    def summed(self, x: Array, scales: Array, part: Coded) -> Array:
        codes, group = self.codes_of(part), part.group
        out, more = np.zeros((2, len(x), len(codes)), x.dtype)
        per = part.num_groups // scales.shape[1]
        for at in self.groups_of(part):
            some = slice(at * group, (at + 1) * group)
            own = scales[:, at // per, None]
            out += (x[:, some] @ codes[:, some].T) * own * self.scale_of(part, at)
            more += x[:, some].sum(-1, keepdims=True) * own * self.offset_of(part, at)
        return np.asarray(out + more)

    def quantised(self, x: Array, group: int) -> tuple[Array, Array]:
        parts = x.astype(single).reshape(len(x), -1, group)
        scale = np.abs(parts).max(-1, keepdims=True) / single(127)
        scale = np.where(scale < 2.0**-125, single(0), scale)
        codes = np.rint(parts / np.where(scale == 0, single(1), scale))
        codes = np.where(scale == 0, single(0), codes)
        return codes.reshape(x.shape), scale[..., 0]


class TileRuntime(CodedRuntime):
    OPS = TileOps


class ApartRuntime(CodedRuntime):
    OPS = ApartOps
