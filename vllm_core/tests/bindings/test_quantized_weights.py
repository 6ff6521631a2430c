"""Every binding takes quantised weights, dequantised by the law."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vllm_core.backend import Runtime
from vllm_core.bindings.parts import SCHEMES, stored_parts
from vllm_core.errors import InvalidArgument, NotSupported, WeightError
from vllm_core.ops import HostArray, LazyArray, ParamSpec, Part, quantized
from vllm_core.tests.ops.frameworks import BINDINGS, open_binding

RNG = np.random.default_rng(8)
ROWS, SIZE = 6, 64


def dense(rows: int = ROWS) -> HostArray:
    return RNG.standard_normal((rows, SIZE), np.float32)


def unloaded(runtime: Runtime, spec: ParamSpec, parts: list[Part]) -> dict[str, HostArray]:
    found = runtime.unload(runtime.load(spec, parts))
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("scheme", quantized.BITS)
def test_dense_rows_become_what_their_codes_are_worth(binding: str, scheme: str) -> None:
    runtime = open_binding(binding)
    assert scheme in runtime.caps.schemes and not runtime.caps.native_schemes
    w, bits = dense(), quantized.BITS[scheme]
    bias = np.arange(ROWS, dtype=np.float32)
    spec = ParamSpec("w", (ROWS, SIZE), "linear", scheme=scheme)
    found = unloaded(runtime, spec, [Part("dense", {"weight": w, "bias": bias}, ROWS)])
    want = quantized.dequantize(quantized.quantize(w, bits, 64), bits)
    assert (found["weight"] == want).all() and (want != w).any()
    assert (found["bias"] == bias).all()


@pytest.mark.parametrize("binding", BINDINGS)
def test_dense_rows_are_quantised_in_the_group_that_is_asked_for(binding: str) -> None:
    w = dense()
    spec = ParamSpec("w", (ROWS, SIZE), "linear", scheme="int4", group=32)
    found = unloaded(open_binding(binding), spec, [Part("dense", {"weight": w}, ROWS)])["weight"]
    assert (found == quantized.dequantize(quantized.quantize(w, 4, 32), 4)).all()
    assert (found != quantized.dequantize(quantized.quantize(w, 4, 64), 4)).any()


@pytest.mark.parametrize("binding", BINDINGS)
def test_parts_of_several_schemes_join_in_their_order(binding: str) -> None:
    runtime = open_binding(binding, "float32")
    w = dense()
    four = quantized.quantize(dense(5), 4, 16)
    four["mins"] = RNG.standard_normal((5, SIZE // 16), np.float32)
    eight = quantized.quantize(dense(1), 8, SIZE)
    lazy = {n: LazyArray(x.shape, x.dtype.name, lambda x=x: x) for n, x in four.items()}  # type: ignore[misc]
    parts = [Part("int4", lazy, 5), Part("int8", eight, 1), Part("dense", {"weight": w}, ROWS)]
    found = unloaded(runtime, ParamSpec("w", (5 + 1 + ROWS, SIZE), "linear"), parts)["weight"]
    want = np.concatenate((quantized.dequantize(four, 4), quantized.dequantize(eight, 8), w))
    assert (found == want).all()


def test_values_are_rounded_once_to_a_model_of_16_bits() -> None:
    runtime = open_binding("torch", "bfloat16")
    tensors = quantized.quantize(dense(), 8, 32)
    found = unloaded(
        runtime, ParamSpec("w", (ROWS, SIZE), "embedding"), [Part("int8", tensors, ROWS)]
    )
    want = quantized.dequantize(tensors, 8).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (found["weight"] == want).all()


def load(spec: ParamSpec, *parts: Part) -> Any:
    return open_binding("numpy").load(spec, parts)


def test_what_cannot_be_stored_so_is_refused_by_name() -> None:
    with pytest.raises(NotSupported, match=r"blocks\.1\.up.*'fp8' is not supported here, only den"):
        load(ParamSpec("blocks.1.up", (2, 4), "linear"), Part("fp8", {}, 2))
    odd = Part("dense", {"weight": np.ones((2, 48), np.float32)}, 2)
    with pytest.raises(NotSupported, match=r"up \[2, 48\] cannot be stored as int4"):
        load(ParamSpec("up", (2, 48), "linear", scheme="int4"), odd)
    with pytest.raises(WeightError, match="up: the codes of scheme int8 must be uint8"):
        codes: Any = {"codes": np.ones((2, 32), np.int8), "scales": np.ones((2, 1), np.float32)}
        load(ParamSpec("up", (2, 32), "linear"), Part("int8", codes, 2))
    with pytest.raises(WeightError, match=r"up needs shape \[3, 32\]"):
        load(
            ParamSpec("up", (3, 32), "linear"),
            Part("int8", quantized.quantize(np.ones((2, 32)), 8, 32), 2),
        )
    nan = Part("dense", {"weight": np.full((2, 32), np.nan, np.float32)}, 2)
    with pytest.raises(WeightError, match=r"up: .* NaN"):
        load(ParamSpec("up", (2, 32), "linear", scheme="int8"), nan)


@pytest.mark.parametrize("group", [48, 64])
def test_a_group_that_the_law_does_not_know_reaches_no_quantiser(group: int) -> None:
    def unreached(weight: HostArray, bits: int, group: int) -> dict[str, HostArray]:
        raise AssertionError("was asked")

    spec = ParamSpec("up", (2, 96), "linear", scheme="int4", group=group)
    given = [Part("dense", {"weight": np.ones((2, 96), np.float32)}, 2)]
    with pytest.raises(InvalidArgument, match=f"up: 96 inputs .* groups of {group}; a group is"):
        list(stored_parts(spec, given, unreached))


def test_parts_to_be_stored_keep_their_codes_and_say_their_scheme() -> None:
    """What a backend that multiplies codes asks."""
    four = quantized.quantize(dense(2), 4, 32)
    spec = ParamSpec("w", (ROWS + 2, SIZE), "linear", scheme="int8-weight-only")
    given = [Part("int4", four, 2), Part("dense", {"weight": dense()}, ROWS)]
    first, second = stored_parts(spec, given)
    assert (first.scheme, first.rows, second.scheme) == ("int4", 2, "int8-weight-only")
    assert first.tensors["codes"] is four["codes"]
    assert second.tensors["codes"].shape == (ROWS, SIZE) and "weight" not in second.tensors
    assert {"dense", *quantized.BITS} == SCHEMES
