"""What the host does per step, by itself: schedule, build, update, while every row decodes.

The null backend answers at once, so the time of a step is the engine's own: stop checks, block
allocation and hashing are in, detokenisation is not. The garbage collector runs as a user has it,
unless --gc says otherwise; its collections during the measured steps are counted and timed. CPU
time stands beside the clock's, since other work on the machine only shows in the latter.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_core.errors import InvalidArgument

if TYPE_CHECKING:
    from vllm_core.engine.core import EngineCore

SUMMARY = "milliseconds of host work per step"

CONTEXT = 4096
PROMPT_LEN = 1000
TOKEN_BUDGET = 8192
WARM_UP_STEPS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=(16, 64, 256, 1024), metavar="N")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="measured steps")
    parser.add_argument(
        "--gc",
        choices=("on", "frozen", "off"),
        default="on",
        help="frozen: what exists when measuring starts is never looked at again",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    most = CONTEXT - PROMPT_LEN - WARM_UP_STEPS - 2
    if not 1 <= args.steps <= most:
        raise InvalidArgument(f"--steps must be between 1 and {most}, not {args.steps}")
    for rows in args.rows:
        if not 1 <= rows <= TOKEN_BUDGET:
            raise InvalidArgument(f"--rows must be between 1 and {TOKEN_BUDGET}, not {rows}")
    head = ("p50 ms", "p99 ms", "CPU p99", "us per row")
    print(f"{'rows':>6}" + "".join(f"{name:>12}" for name in head), file=sys.stderr)
    results = []
    for rows in args.rows:
        found = _measure_rows(rows, args.steps, args.gc)
        results.append(found)
        figures = [found[name] for name in ("p50_ms", "p99_ms", "cpu_p99_ms")]
        figures.append(found["p50_ms"] * 1e3 / rows)
        line = f"{rows:>6}" + "".join(f"{figure:>12.3f}" for figure in figures)
        print(line, file=sys.stderr, flush=True)
    return {"prompt_len": PROMPT_LEN, "steps": args.steps, "gc": args.gc, "results": results}


def _measure_rows(num_rows: int, num_steps: int, mode: str) -> dict[str, Any]:
    import numpy as np

    core = _decoding_core(num_rows, num_steps)
    for _ in range(WARM_UP_STEPS):
        core.step()
    seconds, busy = np.zeros(num_steps), np.zeros(num_steps)
    with _collector(mode) as collections:
        for i in range(num_steps):
            start, start_busy = time.perf_counter(), time.thread_time()
            core.step()
            seconds[i] = time.perf_counter() - start
            busy[i] = time.thread_time() - start_busy
    core.close()
    milliseconds, busy = seconds * 1e3, busy * 1e3
    return {
        "rows": num_rows,
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "max_ms": float(milliseconds.max()),
        "mean_ms": float(milliseconds.mean()),
        "cpu_p50_ms": float(np.percentile(busy, 50)),
        "cpu_p99_ms": float(np.percentile(busy, 99)),
        "collections": collections.counts,
        "longest_collection_ms": collections.longest * 1e3,
        "collection_ms_per_step": collections.total * 1e3 / num_steps,
    }


def _decoding_core(num_rows: int, num_steps: int) -> EngineCore:
    """Every prompt is computed, and every row has more to draw than will be asked."""
    from vllm_core.cli.null_core import VOCAB_SIZE, default_block_size, open_null_core
    from vllm_core.engine.request import Request
    from vllm_core.params import SamplingParams

    size = default_block_size()
    core = open_null_core(
        num_rows=num_rows,
        context=CONTEXT,
        block_size=size,
        num_blocks=1 + num_rows * (CONTEXT // size + 1),
        token_budget=TOKEN_BUDGET,
    )
    for number in range(num_rows):
        params = SamplingParams(
            max_tokens=None, temperature=1.0, top_p=0.9, seed=number, stop_token_ids=(3, 5)
        )
        prompt = [11 + number] * PROMPT_LEN  # nothing shared: every row hashes its own blocks
        core.add(Request(f"{number}", prompt, params, (2,), CONTEXT, VOCAB_SIZE))
    rows = core.scheduler.rows
    while not (rows.active.all() and (rows.bound >= rows.goal).all()):
        core.step()
        if (rows.bound[rows.active] + num_steps + WARM_UP_STEPS + 1 >= CONTEXT).any():
            raise InvalidArgument(
                f"--rows {num_rows} with --steps {num_steps}: the first row ends before the last "
                "prompt is computed; lower one of them"
            )
    return core


@dataclass
class Collections:
    """What the garbage collector did."""

    counts: list[int]
    """By generation."""
    total: float = 0.0
    longest: float = 0.0
    """Seconds."""


@contextmanager
def _collector(mode: str) -> Iterator[Collections]:
    """Runs the body under a garbage collector that is on, frozen or off, and watches it."""
    found = Collections([0, 0, 0])
    started = 0.0

    def watch(phase: str, info: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.perf_counter()
            return
        seconds = time.perf_counter() - started
        found.counts[info["generation"]] += 1
        found.total += seconds
        found.longest = max(found.longest, seconds)

    was_enabled = gc.isenabled()
    if mode == "off":
        gc.disable()
    else:
        gc.enable()
    if mode == "frozen":
        gc.collect()
        gc.freeze()
    gc.callbacks.append(watch)
    try:
        yield found
    finally:
        gc.callbacks.remove(watch)
        if mode == "frozen":
            gc.unfreeze()
        if was_enabled:
            gc.enable()
        else:
            gc.disable()
