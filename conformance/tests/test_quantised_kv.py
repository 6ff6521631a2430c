"""Caches of 8 bits: honest ones pass, wrong ones are named, undeclared ones are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import INT8_KV
from vllm_core.ops.quantized_kv import quantize_kv
from vllm_core_conformance.cases import quantised, quantised_kv, serving_engine
from vllm_core_conformance.oracle import kv8
from vllm_core_conformance.oracle.model import Blueprint
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.target import Source, Target
from vllm_core_conformance.tiny import PLAIN, VOCAB, WINDOWS, spec_of
from vllm_core_conformance.zoo.fault import all_faults
from vllm_core_conformance.zoo.honest import HONEST
from vllm_core_conformance.zoo.kernel import Kernel
from vllm_core_conformance.zoo.kv8 import Int8Runtime
from vllm_core_conformance.zoo.runtime import ZooRuntime

CASES = {case.id.removeprefix("quantised.kv."): case for case in quantised_kv.CASES}
OTHERS = {case.id: case for case in quantised.CASES}
QUICK = [name for name in CASES if "decode" not in name]


def opened(kind: Any, dtype: str = "float32") -> Target:
    return Target(Source("planted", kind), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["honest_int8_cache", "honest_int8_inverse"])
def test_honest_caches_pass(name: str, dtype: str) -> None:
    target = opened(HONEST[name], dtype)
    for case in QUICK if dtype == "float32" else ("mixed", "uneven", "moved", "zeros"):
        result = execute(CASES[case], target, 5)
        assert (result.status, result.sentence) == ("pass", ""), case
        assert result.checks > 0


@pytest.mark.parametrize(
    ("fault", "case", "words"),
    [
        ("kv_scale_per_block", "prompts", "it fits one scale for all tokens of a block"),
        ("kv_scale_per_step", "mixed", "it fits one scale for all of the step"),
        ("kv_scale_over_heads", "uneven", "it fits one scale for all heads"),
        ("kv_scale_over_heads", "facts", "their codes and scales have"),
        ("kv_scale_in_half", "mixed", "it fits a scale rounded to float16"),
        ("kv_codes_cut_off", "mixed", "it fits codes that are cut off towards zero"),
        ("kv_codes_to126", "mixed", "it fits codes that are cut to -126..126"),
        ("kv_step_unquantised", "mixed", "elements are off"),
        ("kv_scales_of_values", "mixed", "elements are off"),
        ("kv_nan_passed_over", "not_numbers.mixed", "what reads it would be a number"),
        ("kv_unused_scales", "poison.mixed", "must not look at changed its output"),
        ("kv_copy_without_scales", "copy", "k_scale of group"),
        ("kv_copy_without_scales", "moved", "slots that the step does not own were changed"),
        ("kv_exports_values", "mixed", "export_blocks of a cache of 8 bits gave k, v, not"),
    ],
)
def test_a_wrong_cache_is_named(fault: str, case: str, words: str) -> None:
    result = execute(CASES[case], opened(all_faults()[fault].open), 2)
    assert result.status == "fail" and words in result.sentence, result.sentence


def test_an_undeclared_cache_is_refused_or_a_lie() -> None:
    class Plain(Kernel):
        """As older backends: blind for the format."""

        def alloc(self, groups: Any, num_blocks: Any) -> Any:
            kv = INT8_KV.__class__(self.dtype.name)
            blind = [replace(g, spec=replace(g.spec, kv=kv)) for g in groups]
            return super().alloc(blind, num_blocks)

    class Blind(ZooRuntime):
        ATTENTION = Plain

    for case in ("mixed", "copy", "facts", "poison.mixed"):
        assert execute(CASES[case], opened(ZooRuntime), 1).status == "not_supported"
    result = execute(CASES["mixed"], opened(Blind), 1)
    assert result.status in ("fail", "capability_lie") and result.sentence


def test_who_declares_int8_passes_the_other_cases_of_caches() -> None:
    target = opened(Int8Runtime)
    for name in ("quantised.declared", "quantised.caches"):
        assert execute(OTHERS[name], target, 1).status == "pass"

    class More(Int8Runtime):
        CAPS = replace(Int8Runtime.CAPS, kv_dtypes=frozenset({"int8", "float8_e4m3fn"}))

    result = execute(OTHERS["quantised.declared"], opened(More), 1)
    assert result.status == "fail" and "'float8_e4m3fn' is declared" in result.sentence


def test_the_oracles_codes_are_those_of_the_contract() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3000, 16)) * 10.0 ** rng.integers(-9, 9, (3000, 1))).astype(np.float32)
    x[::50] = 0
    codes, scales = quantize_kv(x)
    own, own_scales = kv8.quantise(x.astype(np.float64))
    assert (scales == own_scales).all()
    assert (codes == own).mean() > 0.9999  # others lie between two codes
    quotients = kv8.quotients(x.astype(np.float64), own_scales)
    assert (np.abs(codes - quotients) <= kv8.BETWEEN).all()


@pytest.mark.parametrize("blueprint", [PLAIN, WINDOWS], ids=lambda b: b.name)
def test_an_engine_gives_the_same_tokens_under_any_chunking_and_preemption(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_8_bits(blueprint: Blueprint, dtype: str) -> Any:
        return spec_of(blueprint, dtype).with_kv_format(INT8_KV)

    monkeypatch.setattr(serving_engine, "spec_of", in_8_bits)
    monkeypatch.setattr(serving_engine.Served, "_poison", lambda served: None)
    served = serving_engine.serve(opened(Int8Runtime), blueprint, 1)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, VOCAB, n).tolist() for n in (1, 3, 17, 26, 26)]
    prompts[4][:16] = prompts[3][:16]

    def tokens(setup: serving_engine.Setup, prompts: Any) -> tuple[Any, Any]:
        core = served.engine(setup)
        asked = [served.request(p, str(i), temperature=0.0) for i, p in prompts]
        streams = serving_engine.run(core, asked)
        return {name: stream.tokens for (name, _), stream in streams.items()}, core.stats()

    alone: dict[str, Any] = {}
    for item in enumerate(prompts):
        alone |= tokens(serving_engine.Setup(prefix_caching=False), [item])[0]
    tight = served.least_blocks(32) + 3
    setup = partial(serving_engine.Setup, num_blocks=tight)
    preempted = 0
    for budget in (16, 7, 5):
        together, stats = tokens(setup(token_budget=budget), list(enumerate(prompts)))
        assert together == alone
        preempted += stats["preemptions"]
    assert preempted > 0
