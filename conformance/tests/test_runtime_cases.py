"""Cases of programs, memory, contract, errors and determinism: quiet on the reference backend, and
sharp where something is planted.

Knows: the reference backend, a few faults. Does not know: the fault zoo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import DeviceStep, MemoryReport, OpenConfig, Runtime
from vllm_core.bindings import numpy as binding
from vllm_core_conformance.case import Case
from vllm_core_conformance.cases import (
    contract,
    deterministic,
    errors,
    memory,
    performance,
    programs,
)
from vllm_core_conformance.cases.contract import _admits
from vllm_core_conformance.cases.programs_echo import Weights, code_words, looked_up
from vllm_core_conformance.cases.programs_session import Session
from vllm_core_conformance.outcome import Result, execute
from vllm_core_conformance.target import Source, Target

SCORED = (*programs.CASES, *memory.CASES, *contract.CASES, *errors.CASES, *deterministic.CASES)
Break = Callable[[Any], None]


def opened(break_it: Break | None = None, dtype: str = "float32") -> Target:
    def open_runtime(config: OpenConfig) -> Runtime:
        runtime = binding.open_runtime(config)
        if break_it is not None:
            break_it(runtime)
        return runtime

    return Target(Source("broken" if break_it else "reference", open_runtime), dtype)


def verdict(case_id: str, break_it: Break, seed: int = 0) -> Result:
    (case,) = (case for case in SCORED if case.id == case_id)
    return execute(case, opened(break_it), seed)


@pytest.fixture(scope="module")
def reference() -> Target:
    return opened()


@pytest.mark.parametrize("case", SCORED, ids=lambda case: case.id)
def test_the_reference_backend_passes(case: Case, reference: Target) -> None:
    for seed in (0,) if case.area == "memory" else (0, 1):  # cycles take their time
        result = execute(case, reference, seed)
        if "batch_invariant" in case.needs:  # float32 does not promise it
            assert result.status == "not_supported", result.sentence
        else:
            assert result.status == "pass", f"{result.sentence}\n{result.traceback}"
            assert result.checks > 0


def test_speed_is_never_scored() -> None:
    assert performance.CASES
    assert not any(case.scored for case in performance.CASES)


def test_the_sharpest_program_cases_are_in_smoke() -> None:
    smoke = [case for case in programs.CASES if "smoke" in case.profiles]
    assert 6 <= len(smoke) <= 10


# ---- the exact model
def test_two_code_words_are_orthogonal_or_opposite() -> None:
    words = code_words()
    assert set(np.unique(words @ words.T)) == {-32.0, 0.0, 32.0}
    assert len({tuple(word) for word in words}) == len(words)


def test_a_token_looks_up_a_position_that_it_can_see() -> None:
    assert all(0 <= looked_up(t, i) <= i for t in range(64) for i in range(64))


def test_what_the_model_draws_is_worked_out_by_hand(reference: Target) -> None:
    weights = Weights.make(reference, np.random.default_rng(5))
    session = Session(reference, np.random.default_rng(6))
    prompt = session.admit(3, 4).tokens[:]
    pending = session.submit([(3, 4)], weights)
    found = prompt[(5 * prompt[3] + 3) % 4]
    drawn = np.asarray(reference.fetch(pending.result).tokens)
    assert drawn[:, 0].tolist() == [int(weights.successor[found]), -1, -1, -1]


# ---- planted faults
def _captures(place: int) -> Break:
    """Programs named step keep the first call's argument."""

    def break_it(runtime: Any) -> None:
        compile_ = runtime.compile

        def compile_and_capture(program: Any, key: Any) -> Any:
            run, kept = compile_(program, key), []

            def call(*args: Any) -> Any:
                if program.name != "step":
                    return run(*args)
                kept.append(args[place])
                return run(*args[:place], kept[0], *args[place + 1 :])

            return call

        runtime.compile = compile_and_capture

    return break_it


def _static_outputs(runtime: Any) -> None:
    """Results live in the buffers of the first call."""
    compile_ = runtime.compile

    def compile_with_buffers(program: Any, key: Any) -> Any:
        run, buffers = compile_(program, key), []
        first = len(program.consumes)

        def into(buffer: Any, value: Any) -> Any:
            if isinstance(value, np.ndarray) and value.shape == buffer.shape:
                buffer[...] = value
            elif isinstance(value, tuple):
                for pair in zip(buffer, value, strict=True):
                    into(*pair)
            return buffer

        def call(*args: Any) -> Any:
            found = run(*args)
            buffers.append(found[first:])
            return (*found[:first], *into(buffers[0], found[first:]))

        return call

    runtime.compile = compile_with_buffers


def _upload_aliases(runtime: Any) -> None:
    runtime.upload = lambda packed, host, key: DeviceStep(packed, {})


def _padding_writes(runtime: Any) -> None:
    plan = runtime.attention.plan

    def plan_with_live_padding(*args: Any) -> Any:
        found = []
        for part in plan(*args):
            slots, *rest, valid = part.arrays
            size = part.group.block_tokens
            slots = np.where(valid, slots, size + np.arange(len(slots)) % size)
            found.append(replace(part, arrays=(slots, *rest, valid)))
        return tuple(found)

    runtime.attention.plan = plan_with_live_padding


def _half_block_bytes(runtime: Any) -> None:
    block_bytes = runtime.attention.block_bytes
    runtime.attention.block_bytes = lambda group: block_bytes(group) // 2


def _leaks_caches(runtime: Any) -> None:
    alloc, kept = runtime.attention.alloc, []

    def alloc_and_keep(*args: Any) -> Any:
        kept.append([x.copy() for x in alloc(*args)])
        return tuple(x.copy() for x in kept[-1])

    runtime.attention.alloc = alloc_and_keep


def _leaks_results(runtime: Any) -> None:
    fetch, kept = runtime.fetch, []

    def fetch_and_keep(value: Any) -> Any:
        kept.append([np.array(x) for x in value if isinstance(x, np.ndarray)])
        return fetch(value)

    runtime.fetch = fetch_and_keep


def _no_memory(runtime: Any) -> None:
    runtime.memory = lambda: MemoryReport(0, 0)


def _closes_once(runtime: Any) -> None:
    closed: list[bool] = []

    def close() -> None:
        if closed:
            raise RuntimeError("closed already")
        closed.append(True)

    runtime.close = close


def _swallows_errors(runtime: Any) -> None:
    compile_ = runtime.compile

    def compile_quietly(program: Any, key: Any) -> Any:
        run = compile_(program, key)

        def call(*args: Any) -> Any:
            try:
                return run(*args)
            except ValueError:
                return args

        return call

    runtime.compile = compile_quietly


def _any_scheme(runtime: Any) -> None:
    load = runtime.load
    runtime.load = lambda spec, parts: load(spec, [replace(p, scheme="dense") for p in parts])


def _gates_in_place(runtime: Any) -> None:
    silu_and_mul = runtime.ops.silu_and_mul

    def in_place(x: Any) -> Any:
        x[:, : x.shape[1] // 2] = silu_and_mul(x)
        return x[:, : x.shape[1] // 2].copy()

    runtime.ops.silu_and_mul = in_place


def _attend_without_lse(runtime: Any) -> None:
    attend = runtime.attention.attend

    def own(kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, *, sinks: Any = None) -> Any:
        return attend(kv, layer, q, k, v, plan, sinks=sinks)

    runtime.attention.attend = own


FAULTS: tuple[tuple[Break, str, str], ...] = (
    (_captures(0), "programs.replay.params", "parameters of another call"),
    (_captures(3), "programs.replay.data", "drew"),
    (_static_outputs, "programs.ahead.results", "later"),
    (_static_outputs, "programs.ahead.hidden", "later steps"),
    (_upload_aliases, "programs.upload.copies", "uploaded from one array"),
    (_padding_writes, "programs.padding.writes_nothing", ""),
    (_half_block_bytes, "memory.block_bytes", "do not fit"),
    (_leaks_caches, "memory.leak.alloc", "leaks"),
    (_leaks_results, "memory.leak.replay", "leaks"),
    (_no_memory, "memory.report", "0 < free <= total"),
    (_closes_once, "memory.close", "second close"),
    (_swallows_errors, "programs.failure.recovers", "seemed to work"),
    (_any_scheme, "errors.unknown_scheme", "seemed to work"),
    (_gates_in_place, "programs.inputs.of_ops", "argument 'x'"),
    (_attend_without_lse, "contract.signatures", "takes no 'return_lse'"),
)


@pytest.mark.parametrize(("break_it", "case_id", "words"), FAULTS, ids=[f[1] for f in FAULTS])
def test_a_planted_fault_is_named(break_it: Break, case_id: str, words: str) -> None:
    result = verdict(case_id, break_it)
    assert result.status == "fail", result.traceback
    assert words in result.sentence


def test_a_lie_about_batch_invariance_is_caught() -> None:
    def break_it(runtime: Any) -> None:
        runtime.caps = replace(runtime.caps, batch_invariant=True)

    assert verdict("deterministic.batch.rows", break_it).status == "fail"


@pytest.mark.parametrize(
    ("api", "fits"),
    [
        (">=0.1,<0.2", True),
        ("==0.1", True),
        (">=0.1", True),
        (">0.1", False),
        (">=0.2,<0.3", False),
        ("0.1", False),
        ("", False),
        (">=x", False),
    ],
)
def test_an_api_range_admits_the_seam(api: str, fits: bool) -> None:
    assert _admits(api, (0, 1)) is fits
