"""Every op of the catalogue on every binding, in units of its own noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import Runtime
from vllm_core.ops import HostArray, Ops, ParamSpec, Part
from vllm_core.ops.cases import Activation, Case, Fixed, Weights
from vllm_core.ops.catalogue import OPS, Op, page, z_of
from vllm_core.tests.ops.frameworks import compiled, open_binding

BINDINGS = [
    ("numpy", "float32"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("jax", "float32"),
    ("jax", "bfloat16"),
]
CHECKED_HERE = [op for op in OPS.values() if op.inputs is not None]


def on_device(runtime: Runtime, arg: Any) -> Any:
    """The array or Param that a binding is given; None for what is passed as it is."""
    ops = runtime.ops
    if isinstance(arg, Activation):
        return ops.cast(ops.asarray(arg.value.astype(np.float32)), runtime.dtype)
    if isinstance(arg, Fixed):
        return ops.asarray(arg.value)
    if isinstance(arg, Weights):
        weight = arg.tensors["weight"]
        part = Part("dense", {k: v.astype(np.float32) for k, v in arg.tensors.items()}, len(weight))
        return runtime.load(ParamSpec("weight", weight.shape, arg.role), [part])
    return None


def results(runtime: Runtime, op: Op, case: Case) -> list[HostArray]:
    """What the binding computes: integers, or float32 copies of results in the dtype that the op
    promises."""
    promised = "float32" if op.float32_out else runtime.dtype
    given = [on_device(runtime, arg) for arg in case.args]

    def run(*arrays: Any) -> tuple[Any, ...]:
        rest = iter(arrays)
        args = [arg if value is None else next(rest) for arg, value in zip(case.args, given)]
        found = getattr(runtime.ops, op.name)(*args)
        found = found if isinstance(found, tuple) else (found,)
        names = [str(x.dtype).removeprefix("torch.") for x in found]
        assert all(name in ("int32", promised) for name in names), names
        wide = (
            x if name == "int32" else runtime.ops.cast(x, "float32")
            for x, name in zip(found, names)
        )
        return tuple(wide)

    found = compiled(runtime, run)(*(value for value in given if value is not None))
    return [np.asarray(x) for x in found]


def judged(runtime: Runtime, op: Op) -> Iterator[tuple[Case, HostArray, HostArray]]:
    """(case, result, z) of each float result; integers are held to equality at once."""
    dtype = "float32" if op.float32_out else runtime.dtype
    ratio = 2.0**-24 / {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    assert op.inputs is not None and op.reference is not None
    for case in (case.rounded(runtime.dtype) for case in op.inputs(np.random.default_rng(1))):
        with np.errstate(under="ignore"):
            exact = op.reference(*case.host())
            noise = op.noise(ratio, *case.host()) if op.noise else exact
        for found, law, n in zip(results(runtime, op, case), exact, noise, strict=True):
            assert found.shape == law.shape, case.name
            if found.dtype.kind == "i" or op.limits is None:
                assert (found == law).all(), case.name
            else:
                yield case, found, z_of(found, law, n, dtype)


@pytest.mark.parametrize(
    ("op", "binding", "dtype"),
    [
        pytest.param(op, binding, dtype, id=f"{op.name}-{binding}-{dtype}")
        for op in CHECKED_HERE
        for binding, dtype in BINDINGS
    ],
)
def test_an_op_stays_within_its_own_noise(op: Op, binding: str, dtype: str) -> None:
    runtime = open_binding(binding, dtype)
    checked, total, worst = 0, 0.0, (0.0, "")
    for case, _, z in judged(runtime, op):
        checked, total = checked + z.size, total + float((z**2).sum())
        if z.size and z.max() > worst[0]:
            place = tuple(int(i) for i in np.unravel_index(z.argmax(), z.shape))
            worst = (float(z.max()), f"case {case.name!r}, element {place}")
    limits = op.limits_for(dtype)
    if limits is not None:
        assert checked > 50
        assert worst[0] <= limits.max, worst[1]
        assert (total / checked) ** 0.5 <= limits.rms


def test_a_wrong_result_is_caught_by_its_z() -> None:
    exact = np.array([1.0, 2.0, 0.0])
    out = np.array([1.0, 2.0 + 2**-20, 0.0])
    assert z_of(out, exact, np.abs(exact), "float32").tolist() == pytest.approx([0, 8, 0])
    assert z_of(np.array([np.nan]), np.ones(1), np.ones(1), "float32")[0] == np.inf


def test_every_method_of_the_op_table_is_declared_or_plain_vocabulary() -> None:
    vocabulary = set(
        "asarray host cast arange full put accumulate amax top bits floats words word stack_layers "
        "layers repeat provider".split()
    )
    methods = {name for name in vars(Ops) if not name.startswith("_") and callable(vars(Ops)[name])}
    declared = {op.name for op in OPS.values() if op.owner == "Ops"}
    assert methods - vocabulary == declared


def test_the_page_of_the_ops_is_up_to_date() -> None:
    path = Path(__file__).parents[3] / "docs" / "ops.md"
    if not path.parent.exists():
        pytest.skip("there is no docs folder beside the package: docs/ops.md was not compared")
    assert path.read_text() == page(), "run: python -m vllm_core.ops.catalogue > docs/ops.md"
