"""The serving cases: their oracle, their draws, and what they make of right and wrong backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import BucketPolicy, OpenConfig, RectangleTables, Runtime, StepConstraints
from vllm_core.bindings.numpy import NumpyOps, NumpyRuntime
from vllm_core_conformance import tiny
from vllm_core_conformance.cases import serving
from vllm_core_conformance.cases.serving_draws import choices, philox_word
from vllm_core_conformance.cases.serving_engine import serve
from vllm_core_conformance.oracle import model as oracle
from vllm_core_conformance.outcome import Result, execute
from vllm_core_conformance.target import Source, Target

CASES = {case.id.removeprefix("serving."): case for case in serving.CASES}
MODELS = (tiny.PLAIN, tiny.WINDOWS, tiny.POOLS, tiny.EXPERTS, tiny.LEARNED)


def open_with(make: Callable[[str], Runtime]) -> Target:
    def opened(config: OpenConfig) -> Runtime:
        return make("float32" if config.dtype == "auto" else config.dtype)

    return Target(Source("planted", opened), "float32")


def verdict(target: Target, name: str, seed: int = 1) -> Result:
    return execute(CASES[name], target, seed)


# ---------------------------------------------------------------- the oracle, twice
def by_loops(blueprint: oracle.Blueprint, weights: Any, tokens: list[int]) -> list[list[float]]:
    """Logits once more, a number at a time: nothing shared with the oracle."""

    def dot(a: Any, b: Any) -> float:
        return math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True))

    def linear(x: list[float], own: Any) -> list[float]:
        bias = own.get("bias", np.zeros(len(own["weight"])))
        return [dot(row, x) + float(b) for row, b in zip(own["weight"], bias, strict=True)]

    def norm(x: list[float], own: Any, kind: str) -> list[float]:
        mean = math.fsum(x) / len(x) if kind == "layer" else 0.0
        centred = [value - mean for value in x]
        size = math.sqrt(dot(centred, centred) / len(x) + blueprint.eps)
        bias = own.get("bias", np.zeros(len(x)))
        return [v / size * w + b for v, w, b in zip(centred, own["weight"], bias, strict=True)]

    def turned(x: list[float], place: int, facts: Any) -> list[float]:
        half, out = len(x) // 2, list(x)
        for i, frequency in enumerate(blueprint.frequency_of(facts)):
            angle = float(np.float32(place) * np.float32(frequency))
            c, s = math.cos(angle), math.sin(angle)
            out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
        return out

    def act(x: float, kind: str) -> float:
        if kind == "relu":
            return max(x, 0.0)
        if kind == "silu":
            return x / (1 + math.exp(-x))
        if kind == "gelu":
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def gated(facts: oracle.Layer, h: list[float]) -> list[float]:
        size = len(h) // 2
        return [act(g, facts.activation) * u for g, u in zip(h[:size], h[size:], strict=True)]

    def ffn(facts: oracle.Layer, own: Any, x: list[float]) -> list[float]:
        if not facts.experts:
            if facts.gated:
                return linear(gated(facts, linear(x, own["gate_up"])), own["down"])
            return linear([act(v, facts.activation) for v in linear(x, own["up"])], own["down"])
        router = linear(x, own["router"])
        share = [math.exp(v - max(router)) for v in router]
        best = sorted(range(len(share)), key=lambda e: (-share[e], e))[: facts.top_k]
        out = [0.0] * len(x)
        for e in best:
            h = gated(facts, linear(x, {"weight": own["gate_up"]["weight"][e]}))
            y = linear(h, {"weight": own["down"]["weight"][e]})
            weight = share[e] / math.fsum(share[b] for b in best)
            out = [a + weight * b for a, b in zip(out, y, strict=True)]
        return out

    def attend(facts: oracle.Layer, qkvs: list[list[list[list[float]]]], t: int) -> list[float]:
        out: list[float] = []
        for head in range(facts.q_heads):
            group = head // (facts.q_heads // facts.kv_heads)
            first = 0 if facts.window is None else max(0, t - facts.window + 1)
            scores = []
            for j in range(first, t + 1):
                score = facts.scale * dot(qkvs[t][0][head], qkvs[j][1][group])
                if facts.softcap is not None:
                    score = facts.softcap * math.tanh(score / facts.softcap)
                scores.append(score)
            p = [math.exp(score - max(scores)) for score in scores]
            for d in range(facts.dim):
                values = [qkvs[j][2][group][d] for j in range(first, t + 1)]
                out.append(dot(p, values) / math.fsum(p))
        return out

    xs = [
        [float(v) * blueprint.embedding_scale for v in weights["embed"]["weight"][t]]
        for t in tokens
    ]
    if blueprint.position_offset is not None:
        table = weights["positions"]["weight"]
        xs = [
            [a + float(b) for a, b in zip(x, table[t + blueprint.position_offset])]
            for t, x in enumerate(xs)
        ]
    for facts, own in zip(blueprint.layers, weights["layers"], strict=True):
        qkvs = []
        for t, x in enumerate(xs):
            flat = linear(norm(x, own["input_norm"], facts.norm), own["qkv"])
            heads = [flat[i : i + facts.dim] for i in range(0, len(flat), facts.dim)]
            q, rest = heads[: facts.q_heads], heads[facts.q_heads :]
            k, v = rest[: facts.kv_heads], rest[facts.kv_heads :]
            if facts.qk_norm:
                q = [norm(h, own["q_norm"], facts.norm) for h in q]
                k = [norm(h, own["k_norm"], facts.norm) for h in k]
            if facts.rotates:
                q, k = [turned(h, t, facts) for h in q], [turned(h, t, facts) for h in k]
            qkvs.append([q, k, v])
        for t, x in enumerate(xs):
            h = linear(attend(facts, qkvs, t), own["output"])
            if facts.sandwich:
                h = norm(h, own["post_attention_norm"], facts.norm)
            x = [a + b for a, b in zip(x, h, strict=True)]
            h = ffn(facts, own, norm(x, own["ffn_norm"], facts.norm))
            if facts.sandwich:
                h = norm(h, own["post_ffn_norm"], facts.norm)
            xs[t] = [a + b for a, b in zip(x, h, strict=True)]
    head = {"weight": weights["embed" if blueprint.tied else "head"]["weight"]}
    cap, out = blueprint.logit_softcap, []
    for x in xs:
        row = linear(norm(x, weights["norm"], blueprint.layers[0].norm), head)
        row = [v * blueprint.logit_scale for v in row]
        out.append(row if cap is None else [cap * math.tanh(v / cap) for v in row])
    return out


@pytest.mark.parametrize("blueprint", MODELS, ids=lambda b: b.name)
def test_the_oracle_agrees_with_loops_over_single_numbers(blueprint: oracle.Blueprint) -> None:
    weights = tiny.make_weights(blueprint, 3, lambda x: np.asarray(x, np.float32).astype(float))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 9).tolist()
    found = oracle.logits_of(blueprint, weights, oracle.hidden(blueprint, weights, tokens))
    exact = np.array(by_loops(blueprint, weights, tokens))
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-11)


def test_rounding_errors_of_the_oracle_grow_with_the_roundoff() -> None:
    weights = tiny.make_weights(tiny.PLAIN, 0, lambda x: x)
    tokens = list(range(20))
    exact = oracle.hidden(tiny.PLAIN, weights, tokens)
    errors = [
        np.abs(oracle.hidden(tiny.PLAIN, weights, tokens, oracle.Rounding(u, 1)) - exact).mean()
        for u in (2.0**-24, 2.0**-11)
    ]
    assert 2.0**11 < errors[1] / errors[0] < 2.0**15


# ---------------------------------------------------------------- draws
def test_philox_gives_the_published_words() -> None:
    """Known answers of the Random123 distribution (philox4x32, 10 rounds)."""
    assert philox_word((0, 0, 0, 0), (0, 0)) == 0x6627E8D5
    ones = 0xFFFFFFFF
    assert philox_word((ones,) * 4, (ones,) * 2) == 0x408F276D


def request(**params: Any) -> Any:
    served = serve(open_with(NumpyRuntime), tiny.PLAIN, 0)
    return served.request([1, 2], "r", **params)


def test_a_draw_is_strict_only_where_no_error_changes_it() -> None:
    x = np.linspace(0.0, 3.0, tiny.VOCAB)
    asked = request(temperature=1.0, seed=5)
    sharp = choices(x, np.full(tiny.VOCAB, 1e-9), asked, 0, 2)
    blunt = choices(x, np.full(tiny.VOCAB, 0.02), asked, 0, 2)
    assert sharp.is_strict and sharp.tokens == {sharp.expected}
    assert not blunt.is_strict and sharp.expected in blunt.tokens and len(blunt.tokens) > 1


def test_filters_within_the_error_of_their_cut_are_not_strict() -> None:
    x = np.zeros(tiny.VOCAB)
    x[:4] = (5.0, 4.0, 4.0 - 1e-7, 1.0)
    tiny_error = np.full(tiny.VOCAB, 1e-9)
    for wish in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": math.exp(-1.0)}):
        asked = request(temperature=1.0, seed=1, **wish)
        assert choices(x, tiny_error, asked, 0, 2).tokens <= {0, 1, 2}
        assert not choices(x, np.full(tiny.VOCAB, 1e-3), asked, 0, 2).is_strict
    assert choices(x, tiny_error, request(temperature=1.0, seed=1, top_k=2), 0, 2).is_strict


# ---------------------------------------------------------------- right backends
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_reference_passes_every_case_and_decides_every_greedy_token(dtype: str) -> None:
    target = Target(Source("reference", lambda config: NumpyRuntime(config.dtype)), dtype)
    for name in CASES:
        result = verdict(target, name)
        assert result.status == "pass", (name, result.sentence, result.traceback)
        assert result.checks > 100 and result.figures["greedy tokens within the noise"] == 0
        if "preemption" in name or "traffic" in name:
            assert result.figures["preemptions"] > 0
        if "prefix" in name or "traffic" in name:
            assert result.figures["tokens from the prefix cache"] > 0


class Bounded(NumpyRuntime):
    """Right, with static-like buckets and awkward constraints."""

    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        return BucketPolicy(tokens=(max_tokens,), rows=(max_rows,), widths=(max_width,))

    def constraints(self) -> StepConstraints:
        return StepConstraints(mixed_ok=False, max_prefills=2, chunk_multiple=4, max_tokens=12)


@pytest.mark.parametrize("name", ["chunks.plain", "together", "sampling.plain", "traffic.pools"])
def test_a_padding_backend_with_constraints_passes(name: str) -> None:
    assert verdict(open_with(Bounded), name).sentence == ""


def test_a_backend_without_windows_may_refuse_what_needs_them() -> None:
    class Without(NumpyRuntime):
        def __init__(self, dtype: str) -> None:
            super().__init__(dtype)
            from dataclasses import replace

            self.caps = replace(self.caps, windows=False, softcap=False)

    assert verdict(open_with(Without), "oracle.windows").status == "not_supported"


# ---------------------------------------------------------------- wrong backends
def with_ops(kind: type[NumpyOps]) -> Target:
    def make(dtype: str) -> Runtime:
        runtime = NumpyRuntime(dtype)
        runtime.ops = kind()
        runtime.block_tables = RectangleTables(runtime.ops)
        return runtime

    return open_with(make)


class LosesLastToken(NumpyOps):
    """What a row drew behind a prompt of several tokens is forgotten."""

    def advance(self, state: Any, step: Any, view: Any, tokens: Any) -> Any:
        old, lengths = state.last_token.copy(), np.diff(step.query_start)
        accepted, state = super().advance(state, step, view, tokens)
        state.last_token[step.row[lengths > 3]] = old[step.row[lengths > 3]]
        return accepted, state


class IgnoresSequences(NumpyOps):
    """All sequences of a request draw with one stream."""

    def sample(self, logits: Any, params: Any, *more: Any) -> Any:
        params = params.copy()
        params[:, 9] = 0
        return super().sample(logits, params, *more)


class ForgetsOverflow(NumpyOps):
    """The program `apply` does nothing."""

    def apply(self, block_tables: Any, state: Any, changes: Any) -> Any:
        return state


class HidesFaults(NumpyOps):
    def sample(self, *args: Any) -> Any:
        tokens, fault = super().sample(*args)
        return tokens, 0 * fault


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [
        (LosesLastToken, "chunks.plain", "expected"),
        (LosesLastToken, "oracle.experts", "expected"),
        (IgnoresSequences, "sampling.plain", "sequence"),
        (ForgetsOverflow, "prefix.plain", "KV slot"),
        (ForgetsOverflow, "traffic.plain", "model 'plain'"),
        (HidesFaults, "nan", "fault of its row"),
    ],
)
def test_a_planted_fault_is_caught_in_words(kind: Any, name: str, word: str) -> None:
    result = verdict(with_ops(kind), name)
    assert result.status == "fail" and word in result.sentence


def test_an_error_that_the_engine_survives_is_still_a_failure() -> None:
    class Stumbles(NumpyRuntime):
        calls = 0

        def compile(self, program: Any, key: Any) -> Any:
            run = super().compile(program, key)

            def stumble(*args: Any) -> Any:
                self.calls += 1
                if self.calls == 9:
                    raise RuntimeError("out of luck")
                return run(*args)

            return stumble

    result = verdict(open_with(Stumbles), "compilations")
    assert result.status == "fail" and "out of luck" in result.sentence


def test_compiling_every_step_anew_is_a_failure() -> None:
    class Recompiles(NumpyRuntime):
        count = 0

        def num_compilations(self) -> int:
            return self.count

        def compile(self, program: Any, key: Any) -> Any:
            run = super().compile(program, key)

            def counted(*args: Any) -> Any:
                self.count += 1
                return run(*args)

            return counted

    result = verdict(open_with(Recompiles), "compilations")
    assert result.status == "fail" and "anew" in result.sentence
