"""Random traffic: requests of all kinds come, go, share and are preempted on a small cache, step by
step, and every token of each is judged.

Knows: random requests, what always holds of a cache. Does not know: what is right (judge).
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from vllm_core.engine.core import EngineCore
from vllm_core.engine.request import Request
from vllm_core_conformance.case import Evidence
from vllm_core_conformance.cases.serving_engine import Served, Setup, Streams, one_step, serve, take
from vllm_core_conformance.cases.serving_judge import Judge
from vllm_core_conformance.oracle.model import Blueprint
from vllm_core_conformance.target import Target
from vllm_core_conformance.tiny import VOCAB

NUM_ACTIONS = 70
MAX_TAIL, MAX_ANSWER = 8, 11
"""Tokens of a prompt behind its shared prefix, and of an answer."""


def traffic(blueprint: Blueprint, target: Target, seed: int) -> Evidence:
    """Adds, aborts and steps at random; then everything runs to its end."""
    rng = np.random.default_rng([seed, zlib.crc32(f"traffic {blueprint.name}".encode())])
    served = serve(target, blueprint, seed)
    longest = served.max_len // 4 + MAX_TAIL + MAX_ANSWER
    blocks = served.least_blocks(longest) + int(rng.integers(0, 4))
    core = served.engine(
        Setup(
            token_budget=int(rng.choice((5, 9, 16))),
            num_blocks=blocks,
            policy=str(rng.choice(("fcfs", "priority"))),
        )
    )
    driver = Driver(served, core, rng)
    for _ in range(NUM_ACTIONS):
        driver.act()
    driver.finish()
    judge = Judge(served, "random traffic")
    for request in driver.requests:
        is_whole = request.request_id not in driver.aborted
        for sequence in request.sequences:
            stream = driver.streams.get((request.request_id, sequence.index))
            if stream is not None:
                judge.sequence(request, sequence.index, stream, is_whole=is_whole)
    found = judge.evidence()
    stats = core.stats()
    found.figures["preemptions"] = float(stats["preemptions"])
    found.figures["tokens from the prefix cache"] = float(stats["prefix_hit_tokens"])
    found.figures["requests"] = float(len(driver.requests))
    return found


class Driver:
    """Does one random thing after the other to an engine."""

    def __init__(self, served: Served, core: EngineCore, rng: np.random.Generator) -> None:
        self.served, self.core, self.rng = served, core, rng
        self.requests: list[Request] = []
        self.aborted: set[str] = set()
        self.streams: Streams = {}
        self.prefixes = [rng.integers(0, VOCAB, n).tolist() for n in (0, 5, served.max_len // 4)]

    def act(self) -> None:
        what = self.rng.random()
        running = list(self.core.scheduler.requests)
        if what < 0.3 and len(running) < 12:
            self.add()
        elif what < 0.34 and running:
            name = str(self.rng.choice(running))
            self.core.abort(name)
            self.aborted.add(name)
        elif self.core.has_work:
            take(self.streams, one_step(self.core))
            self.check()

    def add(self) -> None:
        rng = self.rng
        tokens = [
            *self.prefixes[int(rng.integers(len(self.prefixes)))],
            *rng.integers(0, VOCAB, int(rng.integers(1, MAX_TAIL + 1))).tolist(),
        ]
        params: dict[str, Any] = {
            "max_tokens": int(rng.integers(1, MAX_ANSWER + 1)),
            "temperature": 0.0,
            "ignore_eos": bool(rng.random() < 0.7),
            "logprobs": 3,
            "seed": int(rng.integers(2**62)),
        }
        kind = rng.random()
        if kind < 0.2:
            params |= {"temperature": 8.0, "n": int(rng.integers(1, 4))}
        elif kind < 0.3:
            params |= {"repetition_penalty": 1.3, "presence_penalty": 0.5}
        elif kind < 0.4:
            params |= {"logit_bias": {int(rng.integers(VOCAB)): 5.0}, "temperature": 5.0}
        elif kind < 0.5:
            params |= {"prompt_logprobs": 1}
        request = self.served.request(tokens, f"r{len(self.requests)}", **params)
        request.priority = int(rng.integers(0, 3))
        self.requests.append(request)
        self.core.add(request)

    def finish(self) -> None:
        for _ in range(3000):
            if not self.core.has_work:
                break
            take(self.streams, one_step(self.core))
        self.check()
        pools = self.core.scheduler.kv.pools
        if self.core.has_work or any(pool.num_used for pool in pools):
            raise AssertionError("the scheduler did not finish, or kept blocks")

    def check(self) -> None:
        """Every block is free or referenced, once."""
        for pool in self.core.scheduler.kv.pools:
            held = sum(1 for count in pool.references[1:] if count)
            if held + pool.num_free != pool.num_usable:
                raise AssertionError(f"{held} held + {pool.num_free} free of {pool.num_usable}")
