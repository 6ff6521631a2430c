"""Schemes and caches of few bits: judged, refused, or named as what nobody judges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import KVFormat, OpenConfig
from vllm_core.bindings.numpy import NumpyAttention, NumpyRuntime
from vllm_core.errors import NotSupported
from vllm_core.ops import ParamSpec, Part, quantized
from vllm_core_conformance.cases import quantised
from vllm_core_conformance.cases.quantised_products import make_codes
from vllm_core_conformance.oracle import quantised as law
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.target import Source, Target
from vllm_core_conformance.zoo.coded import ApartRuntime, CodedRuntime, TileRuntime
from vllm_core_conformance.zoo.fault import all_faults

CASES = {case.id: case for case in quantised.CASES}


class TakesCodes(NumpyRuntime):
    """Loads codes of schemes that it does not know as if they were values."""

    def load(self, spec: Any, parts: Any) -> Any:
        known = all(part.scheme in self.caps.schemes for part in parts)
        plain = [
            part if known else Part("dense", {"weight": part.tensors["weight"]}, part.rows)
            for part in parts
        ]
        return super().load(spec, plain)


class Guesses(NumpyRuntime):
    """Cuts scales and codes to the rows that both have."""

    def load(self, spec: Any, parts: Any) -> Any:
        cut = []
        for part in parts:
            rows = min(x.shape[0] for x in part.tensors.values())
            known = part.scheme in self.caps.schemes
            tensors = {name: x[:rows] if known else x for name, x in part.tensors.items()}
            cut.append(Part(part.scheme, tensors, rows))
        shape = (sum(part.rows for part in cut), spec.shape[1])
        return super().load(ParamSpec(spec.name, shape, spec.role, scheme=spec.scheme), cut)


class RaisesOther(NumpyRuntime):
    def load(self, spec: Any, parts: Any) -> Any:
        if any(part.scheme not in self.caps.schemes for part in parts):
            raise KeyError("scheme")
        return super().load(spec, parts)


class Declares(NumpyRuntime):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.caps = replace(self.caps, schemes=frozenset({"dense", "fp8"}))


class Rounds(NumpyRuntime):
    """Its cache keeps four bits, whatever is asked."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)

        class Attention(NumpyAttention):
            def import_blocks(self, kv: Any, group: Any, ids: Any, arrays: Any) -> Any:
                short = {name: np.round(x / 4) * 4 for name, x in arrays.items()}
                return super().import_blocks(kv, group, ids, short)

        self.attention = Attention(dtype)


class TakesFormats(NumpyRuntime):
    """Its cache is of its own dtype, whatever is asked: small integers come back right."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)

        class Attention(NumpyAttention):
            def alloc(self, groups: Any, num_blocks: Any) -> Any:
                own = KVFormat(dtype)
                blind = [replace(g, spec=replace(g.spec, kv=own)) for g in groups]
                return super().alloc(blind, num_blocks)

        self.attention = Attention(dtype)


def status(kind: type[NumpyRuntime], name: str) -> tuple[str, str]:
    def opened(config: OpenConfig) -> NumpyRuntime:
        return kind("float32")

    result = execute(CASES[name], Target(Source("planted", opened), "float32"), 2)
    return result.status, result.sentence


@pytest.mark.parametrize("name", [name for name in CASES if ".kv." not in name])
def test_the_reference_passes(name: str) -> None:
    assert status(NumpyRuntime, name) == ("pass", "")


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [
        (TakesCodes, "quantised.schemes", "codes as if they were values"),
        (Guesses, "quantised.schemes", "load took int4 codes of one row less"),
        (RaisesOther, "quantised.schemes", "raised KeyError, expected NotSupported"),
        (Declares, "quantised.declared", "no case of this requirement set judges it"),
        (Rounds, "quantised.caches", "does not give back"),
        (TakesFormats, "quantised.caches", "format int8 is accepted, which is not declared"),
    ],
)
def test_a_planted_fault_is_named(kind: Any, name: str, word: str) -> None:
    verdict, sentence = status(kind, name)
    assert verdict == "fail" and word in sentence


def test_undeclared_schemes_may_be_refused_but_not_be_wrong() -> None:
    def opened(kind: Any) -> Target:
        class Few(kind):  # type: ignore[misc]
            CAPS = replace(kind.CAPS, schemes=frozenset({"dense"}), native_schemes=frozenset())

        return Target(Source("few", Few), "float32")

    case = CASES["quantised.linear.int4"]
    right = execute(case, opened(CodedRuntime), 1)
    assert right.status == "not_supported" and "declare scheme:int4" in right.sentence
    assert execute(case, opened(Refuses), 1).status == "not_supported"
    wrong = execute(case, opened(fault_runtime("mins_ignored")), 1)
    assert wrong.status == "capability_lie" and "it fits when mins are ignored" in wrong.sentence


class Refuses(CodedRuntime):
    def load(self, spec: Any, parts: Any) -> Any:
        if any(part.scheme != "dense" for part in parts):
            raise NotSupported("dense weights only")
        return super().load(spec, parts)


def fault_runtime(name: str) -> Any:
    return all_faults()[name].open


@pytest.mark.parametrize("runtime", [TileRuntime, ApartRuntime, CodedRuntime])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_honest_kernels_that_differ_pass(runtime: Any, dtype: str) -> None:
    target = Target(Source("honest", runtime), dtype)
    for name in ("linear.int8", "linear.int4-weight-only", "gated.int4", "parts.mixed"):
        result = execute(CASES[f"quantised.{name}"], target, 3)
        assert (result.status, result.sentence) == ("pass", "")


@pytest.mark.parametrize(
    ("fault", "case", "word"),
    [
        ("nibbles_swapped", "linear.int4", "it fits when the two codes of a pair are swapped"),
        ("mins_ignored", "linear.int8", "it fits when mins are ignored"),
        ("scale_of_neighbour_row", "head.int4", "it fits when scales are those of the row before"),
        ("last_group_dropped", "linear.int8", "it fits when the last group of inputs is left out"),
        ("one_scale_per_token", "linear.int4", "it fits when inputs are quantised with one scale"),
        ("embed_last_row", "embed.int8", "that is row 513"),
        ("nan_passed_over", "head.int8", "NaN in token 0 must give NaN"),
        ("one_scale_per_row", "dense.int8", "steps of its group of"),
        ("group_passed_over", "dense.int4", "in groups of 32: row"),
        ("first_scheme_for_all", "parts.mixed", "elements are off"),
    ],
)
def test_a_planted_kernel_is_caught_and_its_mistake_named(fault: str, case: str, word: str) -> None:
    target = Target(Source(fault, fault_runtime(fault)), "float32")
    result = execute(CASES[f"quantised.{case}"], target, 2)
    assert result.status == "fail" and word in result.sentence


# ---------------------------------------------------------------- the oracle, in loops
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("has_mins", [False, True])
def test_values_of_codes_are_those_of_scalar_arithmetic(bits: int, has_mins: bool) -> None:
    rng = np.random.default_rng(5)
    found = make_codes(rng, f"int{bits}", 5, 64, 16, has_mins=has_mins)
    tensors, values = found.tensors, law.values(found.tensors, bits)
    first, second = law.terms(tensors, bits)
    for row in range(5):
        for at in range(64):
            code, scale = int(tensors["codes"][row, at]), float(tensors["scales"][row, at // 16])
            zero = 128 if bits == 8 else 8
            exact = scale * (code - zero)
            if has_mins:
                exact = scale * code + float(tensors["mins"][row, at // 16])
            assert values[row, at] == pytest.approx(exact, rel=1e-6, abs=1e-6 * abs(scale * code))
            assert first[row, at] + second[row, at] == pytest.approx(exact, abs=1e-15)


def test_inputs_are_rounded_to_127_steps_of_each_group() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, 96)).astype(np.float32).astype(np.float64)
    x[1, :32] = 0
    found = law.coded_inputs(x, 32)
    for token in range(3):
        for at in range(0, 96, 32):
            amax = float(np.abs(x[token, at : at + 32]).max())
            for i in range(at, at + 32):
                code = round(float(x[token, i]) * 127 / amax) if amax else 0
                assert found[token, i] == pytest.approx(code * amax / 127, rel=1e-6)
    quiet = law.without_ties(np.full((1, 32), 0.5) + np.eye(1, 32) * 0.5, 32)
    assert quiet[0, 0] == 1 and not quiet[0, 1:].any()  # 63.5 is between two codes


@pytest.mark.parametrize("bits", [8, 4])
def test_the_oracles_quantiser_is_that_of_the_contract(bits: int) -> None:
    """Written twice from one text: here without a helper of the core, there for all to use."""
    weight = np.random.default_rng(7).normal(size=(9, 128)).astype(np.float32)
    weight[0, :64] = 0
    tensors = quantized.quantize(weight, bits, 64)
    assert (law.quantised(weight, bits, 64) == quantized.dequantize(tensors, bits)).all()
