"""Cases: whole engines. The core's own scheduler and runner serve tiny models on the backend, and
every token is judged by the float64 decoder, however it was batched, chunked, shared, interrupted.

Knows: what an engine may do to a request. Does not know: what is right (oracle, judge).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vllm_core.engine.core import EngineCore
from vllm_core.engine.request import Request
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases import serving_checkpoint, serving_traffic
from vllm_core_conformance.cases.serving_engine import Served, Setup, Streams, run, serve
from vllm_core_conformance.cases.serving_judge import Judge
from vllm_core_conformance.oracle.model import Blueprint
from vllm_core_conformance.target import Target
from vllm_core_conformance.tiny import EXPERTS, LEARNED, PLAIN, POOLS, VOCAB, WINDOWS

SICK = 70
"""The token whose embedding is NaN."""


def seeded(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def prompt(rng: np.random.Generator, length: int) -> list[int]:
    found: list[int] = rng.integers(0, VOCAB, length).tolist()
    return found


def greedy(served: Served, tokens: Sequence[int], name: str, **more: Any) -> Request:
    """The most likely tokens, with log-probabilities: what is judged most sharply."""
    own = {"temperature": 0.0, "ignore_eos": True, "logprobs": 3, "max_tokens": 6}
    return served.request(tokens, name, **(own | more))


# ---------------------------------------------------------------- against the oracle
def _oracle(blueprint: Blueprint, target: Target, seed: int) -> Evidence:
    """Prompts around the edges of blocks and windows, more of them than rows."""
    rng = seeded(f"oracle {blueprint.name}", seed)
    served = serve(target, blueprint, seed)
    b, longest = served.block_tokens, served.max_len - 8
    lengths = rng.permutation([1, b - 1 or 1, b, b + 1, 3 * b + 2, 6, longest])
    requests = [
        greedy(
            served,
            prompt(rng, int(length)),
            f"r{i}",
            max_tokens=8,
            prompt_logprobs=2 if i % 2 else None,
        )
        for i, length in enumerate(lengths)
    ]
    judge = Judge(served)
    judge.all(requests, run(served.engine(Setup()), requests))
    return judge.evidence()


# ---------------------------------------------------------------- how prompts are cut
def _chunks(blueprint: Blueprint, budgets: Sequence[int], target: Target, seed: int) -> Evidence:
    """The same prompts under ever other token budgets."""
    rng = seeded(f"chunks {blueprint.name}", seed)
    served = serve(target, blueprint, seed)
    b = served.block_tokens
    long = [prompt(rng, n) for n in (3 * b, 3 * b + 1, 2 * b + 3, 5)]
    judge = Judge(served)
    for budget in budgets:
        some = long if budget > 1 else [long[3], long[2]]
        requests = [
            greedy(served, p, f"r{i}", max_tokens=4, prompt_logprobs=1 if i == 1 else None)
            for i, p in enumerate(some)
        ]
        judge.told = f"chunks of at most {budget} tokens"
        setup = Setup(token_budget=budget, is_async=bool(budget % 2))
        judge.all(requests, run(served.engine(setup), requests))
    return judge.evidence()


# ---------------------------------------------------------------- who is in a step
def _together(target: Target, seed: int) -> Evidence:
    """Each request alone, one after the other; then all at once in another order, with late
    arrivals that take over rows, tables and slots of others."""
    rng = seeded("together", seed)
    served = _many(target, seed)
    lengths = rng.permutation([2, 3, 5, 7, 9, 11, 14, 17, 20, 23])
    prompts = [prompt(rng, int(length)) for length in lengths]

    def requests() -> list[Request]:
        return [
            greedy(served, p, f"r{i}", max_tokens=3 + i % 5, repetition_penalty=1.2)
            if i % 3 == 2
            else greedy(served, p, f"r{i}", max_tokens=3 + i % 5)
            for i, p in enumerate(prompts)
        ]

    alone: Streams = {}
    judge = Judge(served, "alone")
    core = served.engine(Setup(is_async=False, prefix_caching=False))
    for request in requests():
        own = run(core, [request])
        judge.all([request], own)
        alone |= own
    mixed = requests()
    order = [mixed[i] for i in rng.permutation(len(mixed))]
    late = {2: order[4:6], 5: order[6:8], 9: order[8:]}
    judge.told = "together with others"
    streams = run(served.engine(Setup(num_rows=5)), order[:4], late=late)
    judge.all(mixed, streams)
    wide = [greedy(served, p, f"r{i}", max_tokens=9) for i, p in enumerate([*prompts, [7], [9]])]
    judge.told = "twelve rows in one step"
    judge.all(wide, run(served.engine(Setup()), wide))
    found = judge.evidence()
    if target.caps.batch_invariant:
        found += _equal(alone, streams)
    return found


def _equal(alone: Streams, together: Streams) -> Evidence:
    for key, own in alone.items():
        got = together[key].tokens
        first = next((i for i, pair in enumerate(zip(got, own.tokens)) if pair[0] != pair[1]), -1)
        require(
            got == own.tokens,
            f"request {key[0]!r} gets other tokens together with others than alone (first at "
            f"output {first}), although batch_invariant is declared",
        )
    return Evidence(checks=sum(len(own.tokens) for own in alone.values()))


def _many(target: Target, seed: int) -> Served:
    return serve(target, replace(PLAIN, max_len=280), seed, rows=37, budget=40, sequences=6)


def _many_rows(target: Target, seed: int) -> Evidence:
    """More rows than one tile holds, beside contexts of hundreds of tokens."""
    rng = seeded("many rows", seed)
    served = _many(target, seed)
    requests = [
        greedy(served, prompt(rng, int(length)), f"r{i}", max_tokens=5)
        for i, length in enumerate(rng.integers(1, 9, 36))
    ]
    requests.insert(7, greedy(served, prompt(rng, 263), "long", max_tokens=5))
    judge = Judge(served, "37 rows")
    judge.all(requests, run(served.engine(Setup()), requests))
    return judge.evidence()


def _block_sizes(wanted: int, target: Target, seed: int) -> Evidence:
    """Blocks of another size, chunks that end within them."""
    rng = seeded(f"blocks {wanted}", seed)
    served = serve(target, POOLS, seed, block=wanted)
    requests = [
        greedy(served, prompt(rng, int(n)), f"r{i}") for i, n in enumerate(rng.integers(9, 40, 6))
    ]
    judge = Judge(served, f"blocks of {served.block_tokens}")
    judge.all(requests, run(served.engine(Setup(token_budget=11)), requests))
    return judge.evidence()


# ---------------------------------------------------------------- a cache too small, a cache shared
def _preemption(blueprint: Blueprint, target: Target, seed: int) -> Evidence:
    """A cache of little more than one longest sequence: rows lose their blocks and resume."""
    rng = seeded(f"preemption {blueprint.name}", seed)
    served = serve(target, blueprint, seed)
    b = served.block_tokens
    length = -(-3 * served.max_len // (10 * b)) * b - 2
    counted = {"presence_penalty": 1.5, "frequency_penalty": 1.5}  # of the output, lost or not
    requests = [
        greedy(
            served,
            prompt(rng, max(1, length - i % 3)),
            f"r{i}",
            max_tokens=14,
            **(counted if i % 2 else {}),
        )
        for i in range(5)
    ]
    # two fit while they start, and not once they have grown
    blocks = 2 * served.least_blocks(length + 1) - len(served.runner.groups) + 1
    blocks = max(served.least_blocks(length + 14), blocks)
    core = served.engine(Setup(num_blocks=blocks, prefix_caching=False))
    judge = Judge(served, f"a cache of {blocks - 1} blocks")
    judge.all(requests, run(core, requests))
    found = judge.evidence()
    found.figures["preemptions"] = float(core.stats()["preemptions"])
    return found


def _prefix(blueprint: Blueprint, target: Target, seed: int) -> Evidence:
    """A prefix computed once and read by others, over and over; nobody may write into it. With
    penalties the skipped tokens reach the history ahead of the step."""
    rng = seeded(f"prefix {blueprint.name}", seed)
    served = serve(target, blueprint, seed)
    b = served.block_tokens
    shared = prompt(rng, max(served.max_len // 2, 2 * b) + 1)
    core = served.engine(Setup())
    judge = Judge(served, "a shared prefix")

    def wave(name: str, tails: Sequence[int]) -> None:
        requests = [
            greedy(
                served,
                shared[: len(shared) if i else 2 * b + 1] + prompt(rng, tail),
                f"{name}{i}",
                repetition_penalty=1.15 if i == 2 else 1.0,
                frequency_penalty=0.4 if i == 2 else 0.0,
            )
            for i, tail in enumerate(tails)
        ]
        judge.all(requests, run(core, requests))

    wave("cold", (b, 0))
    wave("warm", (1, 0, 2, b))
    wave("again", (3, 1, 0, 2))
    found = judge.evidence()
    found.figures["tokens from the prefix cache"] = float(core.stats()["prefix_hit_tokens"])
    return found


# ---------------------------------------------------------------- what is drawn
def _sampling(blueprint: Blueprint, target: Target, seed: int) -> Evidence:
    """Every sampling parameter, mixed in steps whose rows come and go: the draw depends on seed,
    position and sequence, and on no neighbour. Temperatures are high, since the logits are."""
    rng = seeded(f"sampling {blueprint.name}", seed)
    served = serve(target, blueprint, seed)
    ids = rng.permutation(VOCAB)[:12].tolist()
    # an end is drawn as soon as it is allowed
    ends: dict[str, Any] = {"stop_token_ids": ids, "logit_bias": dict.fromkeys(ids, 90.0)}
    wishes: list[dict[str, Any]] = [
        {"temperature": 9.0, "n": 3},
        {"temperature": 5.0, "top_k": 5, "logprobs": 2},
        {"temperature": 8.0, "top_p": 0.8},
        {"temperature": 7.0, "min_p": 0.05, "presence_penalty": 0.8},
        {"temperature": 12.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.6},
        {"temperature": 15.0, "repetition_penalty": 0.8, "seed": -3},
        {"temperature": 4.0, "logit_bias": {ids[0]: 9.0, ids[1]: -9.0, ids[2]: 8.5}},
        {"temperature": 9.0, "allowed_token_ids": ids[3:9]},
        {"temperature": 0.0, "banned_token_ids": ids[2:10], "logprobs": 4},
        {"temperature": 6.0, "min_tokens": 5, **ends},
        {"temperature": 0.0, "min_tokens": 3, **ends, "ignore_eos": False},
        {"temperature": 6.0, "seed": 2**63 + 11, "frequency_penalty": 1.5, "top_k": 30},
    ]
    requests = [
        served.request(
            prompt(rng, int(rng.integers(1, 14))),
            f"r{i}",
            **({"seed": int(rng.integers(2**62)), "max_tokens": 9, "ignore_eos": True} | wish),
        )
        for i, wish in enumerate(wishes)
    ]
    order = [requests[i] for i in rng.permutation(len(requests))]
    judge = Judge(served, "sampling")
    streams = run(served.engine(Setup()), order[:7], late={4: order[7:10], 8: order[10:]})
    judge.all(requests, streams)
    return judge.evidence()


# ---------------------------------------------------------------- what goes wrong
def _nan(target: Target, seed: int) -> Evidence:
    """One request computes NaN: it gets its fault, its neighbours their tokens, and whoever takes
    over its row and blocks is clean."""
    rng = seeded("nan", seed)
    served = serve(target, PLAIN, seed)
    served.use(seed)
    weights = {**served.weights}
    embed, head = weights["embed"]["weight"].copy(), weights["head"]["weight"].copy()
    embed[SICK], head[SICK] = np.nan, 0.0
    served.use(seed, {**weights, "embed": {"weight": embed}, "head": {"weight": head}})

    def healthy(length: int) -> list[int]:
        found: list[int] = rng.integers(0, SICK, length).tolist()
        return found

    b = served.block_tokens
    sick = [
        greedy(served, [*healthy(b + 1), SICK, *healthy(n)], f"sick{n}", max_tokens=6)
        for n in (0, b + 2)
    ]
    well = [greedy(served, healthy(n), f"well{i}") for i, n in enumerate((3, 2 * b, 9))]
    late = [greedy(served, healthy(n), f"late{i}") for i, n in enumerate((2, b + 1, 3 * b, 5))]
    core = served.engine(Setup(num_blocks=1 + 2 * served.least_blocks(3 * b + 6)))
    streams = run(core, [well[0], sick[0], well[1], sick[1], well[2]], late={6: late})
    for request in sick:
        require(
            request.sequences[0].finish_reason == "error",
            f"the logits of request {request.request_id!r} are NaN, but it ended as "
            f"{request.sequences[0].finish_reason!r}: the fault of its row was not reported",
        )
    judge = Judge(served, "beside a request whose logits are NaN")
    judge.all([*well, *late], streams)
    found = judge.evidence()
    found.checks += len(sick)
    return found


def _abort(target: Target, seed: int) -> Evidence:
    """Requests end from outside while their step is in flight; others take row and blocks at
    once."""
    rng = seeded("abort", seed)
    served = serve(target, PLAIN, seed)
    b = served.block_tokens
    doomed = [
        greedy(served, prompt(rng, n), f"gone{i}", max_tokens=20) for i, n in enumerate((3, 3 * b))
    ]
    kept = [
        greedy(served, prompt(rng, n), f"kept{i}", max_tokens=12)
        for i, n in enumerate((5, b, 2 * b + 1))
    ]
    late = [greedy(served, prompt(rng, n), f"late{i}") for i, n in enumerate((2, 2 * b, 4, b + 1))]
    core = served.engine(Setup(num_blocks=2 * served.least_blocks(3 * b + 20)))

    def each_step(step: int, streams: Streams) -> None:
        if step in (3, 5):
            core.abort(doomed[step == 5].request_id)

    streams = run(
        core,
        [kept[0], doomed[0], kept[1], doomed[1], kept[2]],
        late={3: late[:2], 5: late[2:]},
        each_step=each_step,
    )
    judge = Judge(served, "while others are aborted")
    judge.all([*kept, *late], streams)
    for request in doomed:
        own = streams.get((request.request_id, 0))
        if own is not None:
            judge.sequence(request, 0, own, is_whole=False)
    return judge.evidence()


def _compilations(target: Target, seed: int) -> Evidence:
    """The same traffic again meets no new shape: nothing is compiled, and the tokens are the
    same."""
    rng = seeded("compilations", seed)
    served = serve(target, PLAIN, seed)
    prompts = [prompt(rng, n) for n in (1, 4, 18, 9, 2, 27)]
    judge, counts = Judge(served), []
    for number in range(2):
        requests = [greedy(served, p, f"r{i}") for i, p in enumerate(prompts)]
        core: EngineCore = served.engine(Setup(prefix_caching=False, is_async=False))
        judge.told = "the same traffic again" if number else "first traffic"
        judge.all(requests, run(core, requests))
        counts.append(target.runtime.num_compilations())
    require(
        counts[0] == counts[1],
        f"the same steps again were compiled {counts[1] - counts[0]} times anew: a program does "
        "not keep what it compiled for its shapes",
    )
    judge.checks += 1
    return judge.evidence()


def _case(
    name: str,
    says: str,
    body: Callable[[Target, int], Evidence],
    *more: str,
    needs: tuple[str, ...] = (),
    every_dtype: bool = False,
) -> Case:
    return Case(f"serving.{name}", says, body, frozenset(("serving", *more)), needs, every_dtype)


_WINDOWS = ("windows", "softcap")

CASES: tuple[Case, ...] = (
    _case(
        "oracle.plain",
        "serves a grouped-query decoder within the noise of its dtype",
        partial(_oracle, PLAIN),
        "smoke",
        every_dtype=True,
    ),
    _case(
        "oracle.windows",
        "serves full and window layers in one pool, softcaps, tied embeddings",
        partial(_oracle, WINDOWS),
        needs=_WINDOWS,
        every_dtype=True,
    ),
    _case(
        "oracle.pools",
        "serves KV groups of unequal size, multi-query heads, biases",
        partial(_oracle, POOLS),
        needs=("windows",),
        every_dtype=True,
    ),
    _case(
        "oracle.experts",
        "serves a mixture of experts in padded steps",
        partial(_oracle, EXPERTS),
        every_dtype=True,
    ),
    _case(
        "oracle.learned",
        "serves learned positions, layer norms and biases",
        partial(_oracle, LEARNED),
        every_dtype=True,
    ),
    _case(
        "chunks.plain",
        "gives the same tokens however a prompt is cut",
        partial(_chunks, PLAIN, (1, 3, 7, 16)),
    ),
    _case(
        "chunks.windows",
        "gives the same tokens however a prompt is cut, with windows",
        partial(_chunks, WINDOWS, (5, 16)),
        needs=_WINDOWS,
    ),
    _case("together", "gives each request the tokens it gets alone", _together),
    _case("many_rows", "serves 37 rows and a context of 260 tokens in one step", _many_rows),
    _case(
        "blocks.small",
        "serves with its smallest blocks",
        partial(_block_sizes, 1),
        needs=("windows",),
    ),
    _case(
        "blocks.large", "serves with larger blocks", partial(_block_sizes, 16), needs=("windows",)
    ),
    _case("preemption.plain", "resumes preempted requests", partial(_preemption, PLAIN)),
    _case(
        "preemption.windows",
        "resumes preempted requests, with windows",
        partial(_preemption, WINDOWS),
        needs=_WINDOWS,
    ),
    _case(
        "prefix.plain", "reads shared prefixes, and keeps them", partial(_prefix, PLAIN), "smoke"
    ),
    _case(
        "prefix.windows",
        "reads shared prefixes, with windows",
        partial(_prefix, WINDOWS),
        needs=_WINDOWS,
    ),
    _case(
        "sampling.plain",
        "draws what each request asked for",
        partial(_sampling, PLAIN),
        "smoke",
        every_dtype=True,  # in 16 bits few draws are decided strictly
    ),
    _case("nan", "keeps one request's NaN from all others", _nan),
    _case("abort", "serves on while requests are aborted", _abort),
    _case("compilations", "compiles nothing twice", _compilations),
    _case(
        "traffic.plain",
        "serves random traffic on a small cache",
        partial(serving_traffic.traffic, PLAIN),
    ),
    _case(
        "traffic.pools",
        "serves random traffic on two small pools",
        partial(serving_traffic.traffic, POOLS),
        needs=("windows",),
    ),
    _case(
        "checkpoint",
        "serves weights that the core's loader reads from files",
        serving_checkpoint.checkpoint,
    ),
)
