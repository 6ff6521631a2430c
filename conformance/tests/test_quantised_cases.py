"""Schemes and caches of few bits: refused, or named as what nobody judges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import OpenConfig
from vllm_core.bindings.numpy import NumpyAttention, NumpyRuntime
from vllm_core.ops import Part
from vllm_core_conformance.cases import quantised
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.target import Source, Target

CASES = {case.id: case for case in quantised.CASES}


class TakesCodes(NumpyRuntime):
    """Loads int8 codes as if they were values."""

    def load(self, spec: Any, parts: Any) -> Any:
        return super().load(
            spec, [Part("dense", {"weight": p.tensors["weight"]}, p.rows) for p in parts]
        )


class RaisesOther(NumpyRuntime):
    def load(self, spec: Any, parts: Any) -> Any:
        if any(part.scheme != "dense" for part in parts):
            raise KeyError("scheme")
        return super().load(spec, parts)


class Declares(NumpyRuntime):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.caps = replace(self.caps, schemes=frozenset({"dense", "int4"}))


class Rounds(NumpyRuntime):
    """Its cache keeps four bits, whatever is asked."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)

        class Attention(NumpyAttention):
            def import_blocks(self, kv: Any, group: Any, ids: Any, arrays: Any) -> Any:
                short = {name: np.round(x / 4) * 4 for name, x in arrays.items()}
                return super().import_blocks(kv, group, ids, short)

        self.attention = Attention(dtype)


def status(kind: type[NumpyRuntime], name: str) -> tuple[str, str]:
    def opened(config: OpenConfig) -> NumpyRuntime:
        return kind("float32")

    result = execute(CASES[name], Target(Source("planted", opened), "float32"), 2)
    return result.status, result.sentence


@pytest.mark.parametrize("name", CASES)
def test_the_reference_passes(name: str) -> None:
    assert status(NumpyRuntime, name) == ("pass", "")


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [
        (TakesCodes, "quantised.schemes", "codes as if they were values"),
        (RaisesOther, "quantised.schemes", "raised KeyError, expected NotSupported"),
        (Declares, "quantised.declared", "no case of this requirement set judges it"),
        (Rounds, "quantised.caches", "does not give back"),
    ],
)
def test_a_planted_fault_is_named(kind: Any, name: str, word: str) -> None:
    verdict, sentence = status(kind, name)
    assert verdict == "fail" and word in sentence
