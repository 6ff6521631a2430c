"""One batch at a time, again and again: how long an answer takes."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

from vllm_core.cli.description import format_description
from vllm_core.cli.engine_options import add_engine_options, open_llm
from vllm_core.cli.workload import make_workload
from vllm_core.errors import InvalidArgument
from vllm_core.params import SamplingParams

SUMMARY = "seconds per batch, as percentiles"

PERCENTILES = (50, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--input-len", type=int, default=32, metavar="N", help="tokens per prompt")
    parser.add_argument("--output-len", type=int, default=128, metavar="N", help="per answer")
    parser.add_argument("--iterations", type=int, default=10, metavar="N")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="not counted")
    add_engine_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    for name, least in (
        ("batch_size", 1),
        ("input_len", 1),
        ("output_len", 1),
        ("iterations", 1),
        ("warm_up", 0),
    ):
        if getattr(args, name) < least:
            raise InvalidArgument(f"{name} must be at least {least}, not {getattr(args, name)}")
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    lengths = [(args.input_len, args.output_len)] * args.batch_size
    seed = getattr(args, "seed", None) or 0
    seconds: list[float] = []
    with open_llm(args) as llm:
        description = llm.describe()
        vocab_size = description["model"]["vocab_size"]
        config = asdict(llm.config)
        print(format_description(description), file=sys.stderr, flush=True)
        for iteration in range(args.warm_up + args.iterations):
            # New ids every time: a repeated prompt would come from the prefix cache.
            work = make_workload(lengths, vocab_size, seed + iteration)
            start = time.perf_counter()
            llm.generate(work.prompts, params, progress=False)
            seconds.append(time.perf_counter() - start)
    counted = seconds[args.warm_up :]
    return {
        "engine": description,
        "config": config,
        "batch_size": args.batch_size,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "iterations": args.iterations,
        "latency_s": _summary(counted),
        "latency_per_output_token_s": _summary([s / args.output_len for s in counted]),
    }


def _summary(values: list[float]) -> dict[str, float]:
    import numpy as np

    return {"mean": float(np.mean(values))} | {
        f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES
    }
