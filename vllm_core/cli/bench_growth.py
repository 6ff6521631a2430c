"""Thousands of requests of every kind through one engine, and the process's memory as they go.

Lengths, sampling, penalties, log-probabilities, stop ids and shared prefixes vary, and some
requests are aborted. The first quarter warms up (caches of programs and prefixes fill); what counts
is how much more memory stays behind all that follow.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_core.cli.engine_options import add_engine_options, engine_config
from vllm_core.errors import InvalidArgument
from vllm_core.params import SamplingParams

if TYPE_CHECKING:
    from vllm_core.engine.engine import LLMEngine

SUMMARY = "memory of the process over thousands of varied requests"

POINTS = 20
"""Readings in all."""
ABORTED = 0.05
SHARED = 0.3
LONGEST_PROMPT, LONGEST_ANSWER = 96, 48
PREFIX_LEN = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=int, default=10_000, metavar="N")
    parser.add_argument(
        "--at-once", type=int, default=32, metavar="N", help="requests in flight (default: 32)"
    )
    add_engine_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.num_requests < POINTS or args.at_once < 1:
        raise InvalidArgument(f"--num-requests must be at least {POINTS}, and --at-once 1")
    config = engine_config(args)
    from vllm_core.engine.engine import LLMEngine

    engine = LLMEngine(config)
    try:
        _check_lengths(engine.opened.plan.max_model_len)
        draw = random.Random(config.seed or 0)
        vocab = engine.opened.spec.vocab_size
        prefixes = [[draw.randrange(vocab) for _ in range(PREFIX_LEN)] for _ in range(4)]
        start, readings, counts = time.perf_counter(), [], {"finished": 0, "aborted": 0}
        done = 0
        print(f"{'requests':>10} {'MiB':>10} {'objects':>10}", file=sys.stderr)
        for point in range(POINTS):
            goal = args.num_requests * (point + 1) // POINTS
            _serve(engine, goal - done, args.at_once, draw, prefixes, counts)
            done = goal
            gc.collect()
            reading = {"requests": done, "bytes": _resident(), "objects": len(gc.get_objects())}
            readings.append(reading)
            line = f"{done:>10} {reading['bytes'] / 2**20:>10.1f} {reading['objects']:>10}"
            print(line, file=sys.stderr, flush=True)
        elapsed, description = time.perf_counter() - start, engine.describe()
    finally:
        engine.close()
    warm, last = readings[POINTS // 4 - 1], readings[-1]
    return {
        "engine": description,
        "config": asdict(config),
        **counts,
        "elapsed_s": elapsed,
        "growth_bytes": last["bytes"] - warm["bytes"],
        "growth_objects": last["objects"] - warm["objects"],
        "readings": readings,
    }


def _check_lengths(max_model_len: int) -> None:
    """InvalidArgument where the longest prompt leaves no room for an answer."""
    least = PREFIX_LEN + LONGEST_PROMPT + 1
    if max_model_len < least:
        raise InvalidArgument(
            f"max_model_len is {max_model_len}, and the longest prompts need at least {least}; "
            "raise --max-model-len, or take a model with a longer context"
        )


def _serve(
    engine: LLMEngine,
    count: int,
    at_once: int,
    draw: random.Random,
    prefixes: list[list[int]],
    counts: dict[str, int],
) -> None:
    """`count` requests, at most `at_once` in flight, to the end of all."""
    vocab = engine.opened.spec.vocab_size
    running: set[str] = set()
    left = count
    while left or running:
        while left and len(running) < at_once:
            left -= 1
            prompt = [draw.randrange(vocab) for _ in range(draw.randint(1, LONGEST_PROMPT))]
            if draw.random() < SHARED:
                prompt = draw.choice(prefixes) + prompt
            state = engine.make_request(prompt, _params(draw, vocab))
            engine.add(state)
            running.add(state.request.request_id)
        for state in engine.step():
            if state.request.is_finished:
                running.remove(state.request.request_id)
                counts["finished"] += 1
        if running and draw.random() < ABORTED:
            gone = draw.choice(sorted(running))
            engine.abort(gone)
            running.remove(gone)
            counts["aborted"] += 1
    while engine.has_work:  # the step that ran ahead
        engine.step()


def _params(draw: random.Random, vocab: int) -> SamplingParams:
    """One of the kinds of request that users send."""
    base = SamplingParams(
        temperature=0.0,
        max_tokens=draw.randint(1, LONGEST_ANSWER),
        stop_token_ids=tuple(draw.randrange(vocab) for _ in range(draw.choice((0, 0, 3)))),
    )
    kind = draw.randrange(6)
    if kind < 2:
        return base
    drawn = base.replace(temperature=0.9, seed=draw.randrange(2**32))
    if kind == 2:
        return drawn
    if kind == 3:
        return drawn.replace(top_k=draw.choice((1, 40)), top_p=0.9, min_p=0.02)
    if kind == 4:
        return drawn.replace(repetition_penalty=1.1, presence_penalty=0.3, logprobs=3)
    return drawn.replace(n=2, logit_bias={draw.randrange(vocab): 2.0})


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
