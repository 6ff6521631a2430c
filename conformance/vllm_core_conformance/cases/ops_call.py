"""Calls one op of a backend on inputs that hurt, and judges what comes back.

Every call checks that the inputs keep their bits and that results have the promised dtype. Results
too small for a root mean square of their own are judged together at the end.

Knows: how an op is called and judged. Does not know: what any op computes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Ops, Param
from vllm_core_conformance.case import Evidence, require
from vllm_core_conformance.score import (
    CLASSES,
    judge,
    limits_of,
    require_equal,
    u32_over_u,
    z_of,
)
from vllm_core_conformance.target import Target, calling, wide

Numbers = NDArray[Any]
Tensors: TypeAlias = Mapping[str, Numbers]

SMALL = 1_000
"""Results of fewer elements share one root mean square."""
FEW = 300


def rng_of(case_id: str, seed: int) -> np.random.Generator:
    """The case's own stream for a seed."""
    return np.random.default_rng([seed, zlib.crc32(case_id.encode())])


@dataclass(frozen=True)
class Activation:
    """Numbers in the model dtype, exact in it."""

    value: Numbers


@dataclass(frozen=True)
class Fixed:
    """An array in its own dtype: ids, angles, shares."""

    value: Numbers


@dataclass(frozen=True)
class Weights:
    """Dense tensors, exact in the model dtype."""

    role: str
    tensors: Tensors


@dataclass(frozen=True)
class Loaded:
    """A Param that is on the device already."""

    param: Param


Arg: TypeAlias = Activation | Fixed | Weights | Loaded


@dataclass
class Bench:
    """Calls of one case."""

    target: Target
    evidence: Evidence = field(default_factory=Evidence)
    small: dict[tuple[str, str], list[tuple[Numbers, Numbers, Numbers]]] = field(
        default_factory=dict
    )

    @property
    def ratio(self) -> float:
        """u32 / u of the model dtype."""
        return u32_over_u(self.target.dtype)

    @property
    def is_16_bit(self) -> bool:
        return self.target.dtype in ("bfloat16", "float16")

    def round(self, x: Numbers) -> Numbers:
        return self.target.round(x)

    # ---- calls
    def call(
        self, tag: Hashable, fn: Callable[..., tuple[Any, ...]], args: Iterable[Any]
    ) -> tuple[Any, ...]:
        """fn(ops, *values) as a program -> its results on the host, in the device's own dtypes.

        args: Activation, Fixed, Weights or Loaded. fn must close over nothing that a seed decides.
        """
        args = list(args)
        target, ops = self.target, self.target.ops

        def program(*values: Any) -> tuple[Any, ...]:
            return fn(ops, *values)

        values = [self._on_device(arg) for arg in args]
        found = target.call(("ops", tag), program, *values)
        for place, (arg, value) in enumerate(zip(args, values)):
            if isinstance(arg, (Activation, Fixed)):
                what = f"{tag}: the op changed its input {place}"
                self.evidence += require_equal(
                    wide(target.fetch(value)), wide(arg.value), what, nan_equal=True
                )
        return found

    def op(self, name: str, args: Iterable[Any], *static: Hashable) -> tuple[Any, ...]:
        """One method of the op table; `static` follows its array arguments."""

        def fn(ops: Ops, *values: Any) -> tuple[Any, ...]:
            found = getattr(ops, name)(*values, *static)
            return found if isinstance(found, tuple) else (found,)

        return self.call((name, static), fn, args)

    def _on_device(self, arg: Arg) -> Any:
        target = self.target
        if isinstance(arg, Weights):
            return target.param(arg.role, arg.tensors)
        if isinstance(arg, Loaded):
            return arg.param
        if isinstance(arg, Activation):
            return target.array(arg.value)
        with calling("asarray"):
            return target.ops.asarray(arg.value)

    # ---- verdicts
    def judge(
        self,
        op: str,
        out: Any,
        exact: Numbers,
        noise: Numbers,
        *,
        where: str = "",
        axes: Sequence[str] = (),
        single: bool = False,
        by_class: bool = False,
    ) -> None:
        """single: the result is promised in float32 whatever the model's dtype. by_class: the
        backend's declared accumulation widens the noise."""
        where = f"{op} {where}".strip()
        dtype = self._check_dtype(op, out, where, single)
        out = wide(out)
        require(
            out.shape == exact.shape,
            f"{where}: shape {list(out.shape)}, expected {list(exact.shape)}",
        )
        numeric_class = self.target.caps.numeric_class if by_class else "A"
        limits = limits_of(op, dtype)
        worst = z_of(out, exact, noise, dtype, CLASSES[numeric_class]).max(initial=0.0)
        if out.size < SMALL and worst <= limits.max:
            parts = self.small.setdefault((op, dtype), [])
            parts.append((out.ravel(), exact.ravel(), noise.ravel()))
            return
        self.evidence += judge(
            op, out, exact, noise, dtype=dtype, numeric_class=numeric_class, axes=axes, where=where
        )

    def _check_dtype(self, op: str, out: Any, where: str, single: bool) -> str:
        """The dtype whose roundoff counts; Failed unless the result has the promised one."""
        found, model = np.asarray(out).dtype.name, self.target.dtype
        allowed = {model}
        if single:
            allowed = {"float32"}
            if model == "float64" or op.startswith("logits"):
                allowed.add("float64")  # float32 or better
        require(
            found in allowed,
            f"{where}: the result is {found}, promised is {' or '.join(sorted(allowed))}",
            found=found,
        )
        return "float32" if single else model

    def equal(self, out: Any, exact: Numbers, what: str, *, axes: Sequence[str] = ()) -> None:
        """The same values (0.0 and -0.0 are one)."""
        out, exact = wide(out), wide(np.asarray(exact))
        if out.dtype.kind == "f":
            out, exact = out + 0.0, exact + 0.0
        self.evidence += require_equal(out, exact, what, axes=axes)

    def done(self) -> Evidence:
        """All evidence, small results included; under FEW elements have no root mean square."""
        for (op, dtype), parts in self.small.items():
            out, exact, noise = (np.concatenate(column) for column in zip(*parts))
            if out.size < FEW:
                self.evidence.checks += out.size
                continue
            self.evidence += judge(
                op,
                out,
                exact,
                noise,
                dtype=dtype,
                numeric_class=self.target.caps.numeric_class,
                axes=("element",),
                where=f"{op} (small shapes together)",
            )
        self.small.clear()
        return self.evidence


# ---------------------------------------------------------------- inputs
def regimes(
    rng: np.random.Generator, rows: int, width: int, dtype: str, outlier: float = 1000.0
) -> Numbers:
    """[rows, width]: each row in one of eight regimes, in an order of the seed's choice: normal,
    an outlier channel, denormal, zero, large, an offset that dwarfs the spread, one value alone,
    and small beside the eps of norms."""
    x = rng.normal(size=(rows, width))
    is_16_bit = dtype in ("bfloat16", "float16")
    # beside a bare 3 a running float32 sum honestly loses the squares of what is far smaller
    alone = np.zeros(width) if is_16_bit else rng.normal(size=width) * 0.3
    alone[rng.integers(width)] = 3.0
    offset = 30.0 if is_16_bit else 1000.0
    start = int(rng.integers(8))
    for row in range(rows):
        kind = (row + start) % 8
        if kind == 1:
            x[row, rng.integers(width)] *= outlier
        elif kind == 2:
            x[row] *= 1e-40
        elif kind == 3:
            x[row] = 0
        elif kind == 4:
            x[row] *= 100 if dtype == "float16" else 3e5  # float16 ends at 65504
        elif kind == 5:
            x[row] += offset
        elif kind == 6:
            x[row] = alone
        elif kind == 7:
            x[row] *= 2e-3
    order = rng.permutation(rows)
    return np.asarray(x[order])


def weight(rng: np.random.Generator, *shape: int) -> Numbers:
    """Normal, of a size that keeps the size of what it multiplies."""
    return np.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]))
