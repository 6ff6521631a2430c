"""Many requests at once, all waiting from the start: tokens per second."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_core.cli.description import format_description
from vllm_core.cli.engine_options import add_engine_options, open_llm
from vllm_core.cli.workload import make_workload, read_trace
from vllm_core.errors import InvalidArgument, RequestFailed
from vllm_core.params import SamplingParams

SUMMARY = "requests and tokens per second of many requests at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int, default=32, metavar="N")
    parser.add_argument(
        "--input-len",
        type=int,
        metavar="N",
        help="tokens per prompt (default: 128); with --trace the most tokens per prompt",
    )
    parser.add_argument("--output-len", type=int, metavar="N", help="the same for the answers")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help=".csv or .csv.gz of prompt and answer lengths"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X")
    add_engine_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("num_prompts", "input_len", "output_len"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InvalidArgument(f"{name} must be at least 1, not {getattr(args, name)}")
    seed = getattr(args, "seed", None) or 0
    lengths = _lengths(args, seed)
    base = SamplingParams(temperature=args.temperature, ignore_eos=True)
    with open_llm(args) as llm:
        description = llm.describe()
        vocab_size = description["model"]["vocab_size"]
        config = asdict(llm.config)
        print(format_description(description), file=sys.stderr, flush=True)
        work = make_workload(lengths, vocab_size, seed)
        params = [base.replace(max_tokens=length) for length in work.output_lens]
        # First calls allocate and compile. Other ids: the prefix cache must not know the prompts.
        warm_up = make_workload(lengths[:2], vocab_size, seed + 1)
        llm.generate(warm_up.prompts, base.replace(max_tokens=4), progress=False)
        before = llm.stats()
        start = time.perf_counter()
        outputs = llm.generate(work.prompts, params, progress=sys.stderr.isatty())
        elapsed = time.perf_counter() - start
        stats = llm.stats()
    for output in outputs:
        if output.error is not None:
            raise RequestFailed(f"request {output.request_id}: {output.error}")
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "engine": description,
        "config": config,
        "num_prompts": len(outputs),
        "trace": args.trace.name if args.trace else None,
        "seed": seed,
        "temperature": args.temperature,
        "prompt_tokens": work.num_prompt_tokens,
        "output_tokens": num_output,
        "elapsed_s": elapsed,
        "requests_per_s": len(outputs) / elapsed,
        "output_tokens_per_s": num_output / elapsed,
        "total_tokens_per_s": (work.num_prompt_tokens + num_output) / elapsed,
        "num_steps": stats["num_steps"] - before["num_steps"],
        "preemptions": stats["preemptions"] - before["preemptions"],
        "prefix_hit_tokens": stats["prefix_hit_tokens"] - before["prefix_hit_tokens"],
    }


def _lengths(args: argparse.Namespace, seed: int) -> list[tuple[int, int]]:
    if args.trace is None:
        return [(args.input_len or 128, args.output_len or 128)] * args.num_prompts
    pairs = read_trace(args.trace, args.num_prompts, seed)
    return [
        (min(prompt, args.input_len or prompt), min(output, args.output_len or output))
        for prompt, output in pairs
    ]
