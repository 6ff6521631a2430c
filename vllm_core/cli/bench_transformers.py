"""The engine beside transformers' generate: same weights, dtype, threads and requests, in one run.

Requests have the lengths of the trace's first rows, cut to --max-len, and random token ids; answers
have fixed lengths and count up to these only. Ours takes them all at once. transformers takes them
in left-padded static batches in the order of the trace, each until its longest answer is done; the
best batch size is the denominator.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vllm_core.cli.description import format_description
from vllm_core.cli.engine_options import add_engine_options, engine_config, open_llm
from vllm_core.cli.workload import Workload, make_workload, read_lengths, sharegpt_trace
from vllm_core.errors import InvalidArgument, NotSupported, RequestFailed
from vllm_core.params import SamplingParams

if TYPE_CHECKING:
    from vllm_core.llm import LLM

SUMMARY = "output tokens per second beside those of transformers"

PEER = "vllm_core.bindings.torch.peer"
"""Named, not imported: the core works where there is no torch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help=".csv or .csv.gz of prompt and answer lengths (default: that of VLLM_CORE_TEST_DATA)",
    )
    parser.add_argument("--num-requests", type=int, default=32, metavar="N")
    parser.add_argument(
        "--max-len", type=int, default=512, metavar="N", help="most tokens of a prompt or an answer"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(8, 16, 32), metavar="N")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="of everything; the median counts"
    )
    add_engine_options(parser)
    parser.set_defaults(threads=2)


@dataclass(frozen=True)
class Run:
    """One pass over all requests."""

    answers: list[list[int]]
    seconds: float
    cpu_seconds: float
    """Of all threads, waiting in a loop included: with one thread it does not see other work."""


def _timed(generate: Callable[[], list[list[int]]]) -> Run:
    start, start_busy = time.perf_counter(), time.process_time()
    answers = generate()
    return Run(answers, time.perf_counter() - start, time.process_time() - start_busy)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    peer_module = _import_peer()
    lengths = _lengths(args)
    with open_llm(args) as llm:
        description, config = llm.describe(), asdict(llm.config)
        print(format_description(description), file=sys.stderr, flush=True)
        vocab_size = description["model"]["vocab_size"]
        # Other ids in every repeat: the prefix cache must not know the prompts.
        works = [make_workload(lengths, vocab_size, seed) for seed in range(1 + args.repeats)]
        warm_up = _first(works.pop(), 2, 4)
        _generate(llm, warm_up)
        before = llm.stats()["num_steps"]
        ours = [_timed(partial(_generate, llm, work)) for work in works]
        num_steps = (llm.stats()["num_steps"] - before) / args.repeats
    useful = sum(output for _, output in lengths)
    own = _figures("vllm-core", ours, useful)

    # Ours is closed by now: its threads would wait beside those of the other side.
    peer = _open_peer(peer_module, args, description["model"]["dtype"])
    peer.generate(warm_up.prompts, warm_up.output_lens, 2)
    batches = []
    for size in args.batch_sizes:
        runs = [
            _timed(partial(peer.generate, work.prompts, work.output_lens, size)) for work in works
        ]
        figures = _figures(f"transformers, batches of {size}", runs, useful)
        same = partial(_agreement, ours[0].answers, runs[0].answers)
        batches.append(
            {
                "batch_size": size,
                **figures,
                "same_first_tokens": same(1),
                "same_leading_tokens": same(None),
            }
        )
    best = max(batch["output_tokens_per_s"] for batch in batches)
    ratio = own["output_tokens_per_s"] / best
    print(f"ratio to the best: {ratio:.2f}", file=sys.stderr)
    return {
        "engine": description,
        "config": config,
        "versions": peer_module.versions(),
        "num_requests": len(lengths),
        "max_len": args.max_len,
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "useful_output_tokens": useful,
        "ours": {**own, "num_steps": num_steps},
        "transformers": batches,
        "ratio": ratio,
    }


def _import_peer() -> Any:
    try:
        return importlib.import_module(PEER)
    except ImportError as error:
        raise NotSupported(
            f"this benchmark runs transformers' models and needs torch ({error}); "
            "pip install 'vllm-core[cpu]'"
        ) from error


def _lengths(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The first rows of the trace, cut."""
    for name in ("num_requests", "max_len", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise InvalidArgument(f"{name} must be at least 1, not {getattr(args, name)}")
    if min(args.batch_sizes) < 1:
        raise InvalidArgument(f"a batch size must be at least 1, not {min(args.batch_sizes)}")
    if engine_config(args).load_format == "dummy":
        raise InvalidArgument("load_format dummy has no weights that both sides could load")
    trace = sharegpt_trace(args.trace)
    pairs = read_lengths(trace)[: args.num_requests]
    if len(pairs) < args.num_requests:
        raise InvalidArgument(
            f"--trace {trace} has {len(pairs)} requests, fewer than --num-requests "
            f"{args.num_requests}"
        )
    return [(min(prompt, args.max_len), min(output, args.max_len)) for prompt, output in pairs]


def _first(work: Workload, num: int, num_tokens: int) -> Workload:
    """A small piece of it, for first calls, which allocate and compile."""
    return Workload(work.prompts[:num], [num_tokens] * len(work.prompts[:num]))


def _generate(llm: LLM, work: Workload) -> list[list[int]]:
    base = SamplingParams(temperature=0.0, ignore_eos=True)
    params = [base.replace(max_tokens=length) for length in work.output_lens]
    outputs = llm.generate(work.prompts, params, progress=False)
    for output in outputs:
        if output.error is not None:
            raise RequestFailed(f"request {output.request_id}: {output.error}")
    return [output.outputs[0].token_ids for output in outputs]


def _open_peer(module: Any, args: argparse.Namespace, dtype: str) -> Any:
    from vllm_core.weights.resolve import resolve

    config = engine_config(args)
    files = resolve(config.model, revision=config.revision, load_format=config.load_format)
    source = files.open_weights()
    tensors = ((name, source.load(name)) for name in source.names())
    return module.Peer(files.config, tensors, dtype, args.threads)


def _agreement(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], upto: int | None
) -> float:
    """Share of tokens before the first difference of each answer: both must do the same work.

    Not a test: near ties fall either way, and bfloat16 makes them common.
    """
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = list(zip(a[:upto], b[:upto], strict=True))
        total += len(pairs)
        same += next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    return same / total


def _figures(name: str, runs: Sequence[Run], useful: int) -> dict[str, Any]:
    """Printed for people, too."""
    rate = useful / median(run.seconds for run in runs)
    print(f"{name:<32}{rate:>9.1f} output tokens/s", file=sys.stderr, flush=True)
    return {
        "output_tokens_per_s": rate,
        "elapsed_s": [run.seconds for run in runs],
        "cpu_s": [run.cpu_seconds for run in runs],
    }
