"""Every op that carries numbers: its law, inputs that hurt, and how much noise is honest.

Tests, the conformance suite and docs/ops.md derive from `OPS`. An error is judged in units of the op's own first-order
noise: z = |o - o64| / (u * n), with o64 the law in float64 on exactly the bits that the binding consumed, u the unit
roundoff of the output's dtype and n the op's noise at that element. Results below the smallest normal number may be
flushed to 0, so that much is added to u * n.

Knows: ops, inputs, noise, limits. Does not know: bindings, test frameworks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from vllm_core.ops import reference
from vllm_core.ops.arrays import HostArray
from vllm_core.ops.interface import Ops

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
}


# ---------------------------------------------------------------- arguments of a case
@dataclass(frozen=True)
class Activation:
    """An array in the model's dtype."""

    value: HostArray


@dataclass(frozen=True)
class Fixed:
    """An array on the device in its own dtype: ids, angles, routing weights."""

    value: HostArray


@dataclass(frozen=True)
class Weights:
    """Dense tensors that `Runtime.load` makes a Param of."""

    role: str
    tensors: Mapping[str, HostArray]


@dataclass(frozen=True)
class Case:
    """One call. Arguments of other types than the three above are passed as they are."""

    name: str
    args: tuple[Any, ...]

    def rounded(self, dtype: str) -> Case:
        """The same case on numbers that `dtype` holds exactly."""

        def nearest(x: HostArray) -> HostArray:
            return x.astype(DTYPES[dtype]).astype(np.float64)

        def one(arg: Any) -> Any:
            if isinstance(arg, Activation):
                return Activation(nearest(arg.value))
            if isinstance(arg, Weights):
                return replace(arg, tensors={k: nearest(v) for k, v in arg.tensors.items()})
            return arg

        return replace(self, args=tuple(one(arg) for arg in self.args))

    def host(self) -> tuple[Any, ...]:
        """Arguments of the law: float64 arrays, integers as they are, weights as {name: array}."""

        def one(arg: Any) -> Any:
            if isinstance(arg, Weights):
                return dict(arg.tensors)
            if isinstance(arg, (Activation, Fixed)):
                x = arg.value
                return x.astype(np.float64) if x.dtype.kind == "f" else x
            return arg

        return tuple(one(arg) for arg in self.args)


@dataclass(frozen=True)
class Limits:
    """Largest z, and root of the mean square of z over all cases of an op."""

    rms: float
    max: float


Law = Callable[..., tuple[HostArray, ...]]
"""reference(*host arguments) -> results; noise(ratio, *host arguments) -> n of each result, ratio = u32 / u."""


@dataclass(frozen=True)
class Op:
    """One op of the contract. Integer results are compared exactly; so are ops without limits."""

    name: str
    owner: str = "Ops"
    """Which interface it is a method of."""
    reference: Law | None = None
    inputs: Callable[[np.random.Generator], Iterator[Case]] | None = None
    noise: Law | None = None
    noise_text: str = "exact"
    limits: Limits | None = None
    float32_out: bool = False
    """Its results are float32 whatever the model's dtype."""
    tested_in: str = "bindings/test_catalogue.py"
    """Below vllm_core/tests."""

    @property
    def doc(self) -> str:
        """Of the method; a reference to another function is followed."""
        if self.owner != "Ops":
            from vllm_core.ops import sampling, stepping  # noqa: F401
        return inspect.getdoc(getattr(Ops, self.name, None)) or ""


def z_of(out: HostArray, exact: HostArray, noise: HostArray, dtype: str) -> HostArray:
    """Errors in units of the noise; NaN equals nothing and is infinitely wrong."""
    error = np.abs(out.astype(np.float64) - exact)
    z = error / (ROUNDOFF[dtype] * noise + SMALLEST_NORMAL[dtype])
    same = (out == exact) | (np.isnan(out) & np.isnan(exact))
    return np.where(same, 0.0, np.where(np.isnan(z), np.inf, z))
