"""The zoo itself: names, honest backends, faults that are wrong, what a matrix demands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_core.backend import OpenConfig
from vllm_core.backend.lies import missing_methods
from vllm_core.errors import InvalidArgument
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases import all_cases
from vllm_core_conformance.outcome import GOOD, execute
from vllm_core_conformance.score import judge
from vllm_core_conformance.sources import resolve
from vllm_core_conformance.steps import Scene, Seen, Shape, play
from vllm_core_conformance.target import Source, Target
from vllm_core_conformance.zoo.fault import MODULES, all_faults, select_faults
from vllm_core_conformance.zoo.honest import HONEST
from vllm_core_conformance.zoo.honest_limited import LIMITED, ApartRuntime
from vllm_core_conformance.zoo.matrix import Matrix
from vllm_core_conformance.zoo.trial import Trial, try_fault

OURS = ("honest_flash", "honest_split", "honest_whole_row", "honest_plain", "honest_coarse")


def scene(target: Target, seed: int = 0, **facts: object) -> Scene:
    """Three rows: one decodes, two have chunks behind a prefix."""
    rng = np.random.default_rng(seed)
    shape = Shape(6, 2, 32, 16, 40, 48, 4, 6, scale=0.2, decoy_group=True, **facts)  # type: ignore[arg-type]
    ids = rng.permutation(np.arange(1, 40))[:18].reshape(3, 6).astype(np.int32)
    keys, values = (target.round(rng.normal(size=(40, 3, 16, 2, 32))) for _ in "kv")
    query = np.array([1, 17, 3])
    q, k, v = (target.round(rng.normal(size=(21, heads, 32))) for heads in (6, 2, 2))
    sinks = target.round(rng.normal(size=6)) if shape.sinks else None
    rows, cached = np.array([4, 0, 2]), np.array([33, 5, 20])
    return Scene(shape, rows, cached, query, ids, keys, values, q, k, v, sinks, padding=np.nan)


def exact(scene: Scene) -> np.ndarray:
    """[t, Hq, D] by plain loops over rows, heads and queries."""
    shape, outs, at = scene.shape, [], 0
    for row, n in enumerate(scene.query):
        length = int(scene.seq_lens[row])
        j = np.arange(length)
        blocks = scene.tables[row][j // 16]
        keys, values = scene.keys[blocks, 1, j % 16], scene.values[blocks, 1, j % 16]
        keys[-n:], values[-n:] = scene.k[at : at + n], scene.v[at : at + n]
        for t in range(n):
            position = length - n + t
            seen = (j <= position) & (j > position - (shape.window or 1 << 30))
            head = np.repeat(np.arange(2), 3)
            score = np.einsum("hd,lhd->hl", scene.q[at + t], keys[:, head]) * shape.scale
            if shape.softcap:
                score = shape.softcap * np.tanh(score / shape.softcap)
            p = np.exp(score) * seen
            total = p.sum(-1) + (np.exp(scene.sinks) if scene.sinks is not None else 0)
            outs.append(np.einsum("hl,lhd->hd", p, values[:, head]) / total[:, None])
        at += n
    return np.array(outs)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("facts", [{"window": 21}, {"softcap": 3.0, "sinks": True}])
def test_honest_kernels_agree_with_plain_loops(
    name: str, dtype: str, facts: dict[str, Any]
) -> None:
    target = Target(Source(name, HONEST[name]), dtype)
    wanted = scene(target, **facts)
    seen: Seen = play(target, wanted)
    limit = {"float32": 4e-6, "bfloat16": 0.05, "float16": 5e-3}[dtype]
    assert np.abs(seen.out[:21] - exact(wanted)).max() < limit
    assert not seen.out[21:].any()


@pytest.mark.parametrize("name", [*OURS, "honest_modest", *LIMITED])
def test_honest_runtimes_declare_what_they_have(name: str) -> None:
    assert missing_methods(HONEST[name](OpenConfig(dtype="auto"))) == []


ASKS_FOR_STEPS = (
    "attention.coded.mixed",
    "kv.facts",
    "stepping.step.lives",
    "programs.replay.data",
    "programs.traffic",
    "programs.inputs.of_a_step",
    "memory.life",
    "errors.odd_heads",
    "errors.middle",
    "contract.two_runtimes",
    "deterministic.repeat.attention",
    "serving.oracle.plain",
)


class StrictlyApart(ApartRuntime):
    """Takes no row of one token beside longer ones, whatever it is."""

    def upload(self, packed: Any, host: Any, key: Any) -> Any:
        if len(np.unique(np.asarray(host.query_len) > 1)) > 1:
            raise InvalidArgument(f"rows of {host.query_len} tokens in one step")
        return super().upload(packed, host, key)


@pytest.mark.parametrize("name", [*LIMITED, "strictly_apart"])
def test_a_backend_is_asked_for_nothing_beyond_its_declared_limits(name: str) -> None:
    opening = LIMITED.get(name, StrictlyApart)
    target = Target(Source(name, opening))
    for case_id in ASKS_FOR_STEPS:
        if name == "strictly_apart" and case_id.startswith("serving"):
            continue  # the scheduler puts the last token of a prompt beside other prompts
        result = execute(all_cases()[case_id], target, seed=1)
        assert result.status in GOOD, f"{case_id}: {result.sentence}"


def test_every_fault_has_a_name_a_sentence_and_known_statuses() -> None:
    from vllm_core_conformance.outcome import GOOD, STATUSES

    faults = all_faults()
    assert len(faults) >= 60
    assert sum(fault.worst for fault in faults.values()) >= 30
    for name, fault in faults.items():
        assert name.isidentifier() and name == name.lower()
        assert len(fault.says) > 10, name
        assert fault.expected and fault.expected <= set(STATUSES) - GOOD, name


def test_the_zoo_is_found_by_name() -> None:
    opened = resolve("vllm_core_conformance.zoo.open:heads_interleaved").open(OpenConfig("float32"))
    assert opened.dtype == "float32"
    assert resolve("vllm_core_conformance.zoo.open:honest_flash").open is HONEST["honest_flash"]
    assert {fault.area for fault in select_faults(["kv"])} == {"kv"}
    assert MODULES[0] == "attention"


def test_every_attention_fault_differs_from_the_right_result_somewhere() -> None:
    """At least in what a coded scene of one kind shows; a fault that never differs is none."""
    kinds: tuple[dict[str, Any], ...] = ({"window": 21}, {"softcap": 3.0, "sinks": True}, {})
    for name in ("block_rounds_up", "causal_top_left", "window_plus_one", "softcap_after_mask"):
        fault = all_faults()[name]
        target = Target(Source(name, fault.open), "float32")
        worst = 0.0
        for facts in kinds:
            wanted = scene(target, **facts)
            out = play(target, wanted).out[:21]
            worst = max(worst, float(np.nan_to_num(np.abs(out - exact(wanted)), nan=9.0).max()))
        assert worst > 1e-3, name


def test_a_crash_in_a_dangerous_backend_is_seen_from_outside() -> None:
    trial = try_fault("ends_quietly", ["attention.coded.mixed"])
    assert trial.kills({"crash"}) == ["attention.coded.mixed"]


def _case(name: str, is_right: bool = True) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        require(is_right, "wrong")
        return Evidence(checks=1)

    return Case(name, "is right", run, frozenset({"core"}))


def test_a_matrix_demands_two_kills_of_a_fault_and_one_of_a_case() -> None:
    fault = all_faults()["zeros"]
    trial = Trial("zeros")
    trial.add("a.one", "float32", "fail", "wrong", 0.1)
    trial.add("a.two", "float32", "pass", "", 0.1)
    trial.add("a.three", "float32", "harness_error", "KeyError", 0.1)
    cases = [_case("a.one"), _case("a.two"), _case("a.three")]
    said = Matrix({"zeros": fault}, cases, {"zeros": trial}).problems(demand_of_cases=True)
    assert len(said) == 4
    assert "caught by 1 of 2 cases: a.one" in said[0]
    assert "a.three broke itself" in said[1]
    assert said[2:] == ["a.two catches no fault", "a.three catches no fault"]


def test_a_status_that_is_not_expected_is_no_kill() -> None:
    trial = Trial("aborts")
    trial.add("a.one", "float32", "fail", "wrong", 0.1)
    assert trial.kills(all_faults()["aborts"].expected) == []


@pytest.mark.parametrize("is_cut", [False, True])
def test_results_that_are_cut_off_are_told_from_rounded_ones(is_cut: bool) -> None:
    """Although every single error is within the noise of attention."""
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(80, 6, 64))
    bits: Any = wanted.astype(np.float32).view(np.uint32)
    bits = bits + (0 if is_cut else 0x8000) & 0xFFFF0000
    out = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    noise = np.abs(wanted) + 2 * np.abs(rng.normal(size=wanted.shape))
    if is_cut:
        with pytest.raises(Failed, match="cut off towards zero"):
            judge("attention", out, wanted, noise, dtype="bfloat16")
    else:
        assert judge("attention", out, wanted, noise, dtype="bfloat16").checks == wanted.size
