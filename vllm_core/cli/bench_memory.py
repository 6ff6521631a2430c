"""How much of the KV cache holds nothing, with a full pool and the lengths of real conversations.

The real scheduler and block tables run the whole trace over the null backend, which computes
nothing. After every step: slots in blocks that live sequences hold (a shared block once) against
the tokens in them; the mean over steps is weighted by slots. Beside it, what allocators without
blocks waste on the same requests in a pool of the same size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_core.cli import contiguous
from vllm_core.cli.workload import Workload, make_workload, read_lengths, sharegpt_trace
from vllm_core.errors import InvalidArgument

SUMMARY = "share of the KV cache that holds nothing"

BLOCK_SIZES = (8, 16, 32, 64, 128)
TOKEN_BUDGET = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help=".csv or .csv.gz of prompt and answer lengths (default: that of VLLM_CORE_TEST_DATA)",
    )
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES, metavar="N")
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="sequences at once")
    parser.add_argument(
        "--pool-share",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the slots that so many sequences of mean length would take",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=2048,
        metavar="N",
        help="prompts are cut until prompt and answer fit",
    )
    parser.add_argument("--num-requests", type=int, metavar="N", help="of the trace's first")


@dataclass
class Use:
    """Sums over the steps in which requests waited."""

    num_steps: int = 0
    slots: int = 0
    """In blocks that live sequences hold."""
    tokens: int = 0
    """Whose KV the submitted steps write."""
    fetched: int = 0
    """The same, without those of the step in flight."""
    live: int = 0
    pool: int = 0
    """Slots of the whole pool."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_core.cli.null_core import VOCAB_SIZE, default_block_size

    lengths = _lengths(args)
    mean = sum(p + o for p, o in lengths) / len(lengths)
    slots = max(int(args.rows * mean * args.pool_share), 2 * args.context)
    work = make_workload(lengths, VOCAB_SIZE, seed=0)
    default = default_block_size()
    print(
        f"{len(lengths)} requests, {slots:,} slots, at most {args.rows} sequences\n"
        f"{'':<50}{'wasted':>8}{'live':>7}{'steps':>8}",
        file=sys.stderr,
    )
    paged = []
    for size in sorted({*args.block_sizes, default}):
        paged.append(_run_paged(work, size, args.rows, args.context, slots))
        name = f"blocks of {size}" + (" (default)" if size == default else "")
        _tell(name, paged[-1]["waste"], paged[-1]["mean_live"], f"{paged[-1]['num_steps']}")
    others = []
    for name, reserve in contiguous.ALLOCATORS.items():
        waste, live = contiguous.waste(lengths, reserve, args.context, args.rows, slots)
        others.append({"allocator": name, "waste": waste, "mean_live": live})
        _tell(name, waste, live, "")
    return {
        "trace": str(sharegpt_trace(args.trace).name),
        "num_requests": len(lengths),
        "context": args.context,
        "mean_prompt_tokens": sum(p for p, _ in lengths) / len(lengths),
        "mean_output_tokens": sum(o for _, o in lengths) / len(lengths),
        "rows": args.rows,
        "pool_slots": slots,
        "default_block_size": default,
        "paged": paged,
        "contiguous": others,
    }


def _tell(name: str, waste: float, live: float, steps: str) -> None:
    print(f"{name:<50}{waste:>8.2%}{live:>7.1f}{steps:>8}", file=sys.stderr, flush=True)


def _lengths(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The trace's pairs in its order, each cut to the context."""
    for name, least in (("rows", 1), ("context", 2), ("num_requests", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InvalidArgument(f"{name} must be at least {least}, not {getattr(args, name)}")
    if not args.pool_share > 0:
        raise InvalidArgument(f"pool_share must be above 0, not {args.pool_share}")
    _check_block_sizes(args.block_sizes, args.context)
    trace = sharegpt_trace(args.trace)
    pairs = read_lengths(trace)
    wanted = args.num_requests or max(1, len(pairs))
    if wanted > len(pairs):
        raise InvalidArgument(f"--trace {trace} has {len(pairs)} requests, but {wanted} are wanted")
    fitted = []
    for prompt, output in pairs[:wanted]:
        output = min(output, args.context - 1)
        fitted.append((min(prompt, args.context - output), output))
    return fitted


def _check_block_sizes(sizes: Sequence[int], context: int) -> None:
    for size in sizes:
        if not 1 <= size <= context:
            raise InvalidArgument(f"block size {size} is not between 1 and the context, {context}")


def _run_paged(
    work: Workload, block_size: int, num_rows: int, context: int, slots: int
) -> dict[str, Any]:
    """All requests at once; counted while some still wait."""
    from vllm_core.cli.null_core import VOCAB_SIZE, open_null_core
    from vllm_core.engine.request import Request
    from vllm_core.params import SamplingParams

    core = open_null_core(
        num_rows=num_rows,
        context=context,
        block_size=block_size,
        num_blocks=1 + slots // block_size,
        token_budget=max(TOKEN_BUDGET, num_rows),
    )
    for number, (prompt, output) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        params = SamplingParams(max_tokens=output, ignore_eos=True, seed=number)
        core.add(Request(f"{number}", prompt, params, (), context, VOCAB_SIZE))
    use, rows, kv = Use(), core.scheduler.rows, core.scheduler.kv
    start = time.perf_counter()
    while core.scheduler.waiting:
        core.step()
        active = rows.active
        held = int(kv.num_blocks[0, active].sum())
        # Only full blocks are shared: each further holder counts its tokens once more.
        twice = (held - kv.pools[0].num_used) * block_size
        use.num_steps += 1
        use.slots += kv.pools[0].num_used * block_size
        use.tokens += int(rows.bound[active].sum()) - twice
        use.fetched += int(rows.computed[active].sum()) - twice
        use.live += int(active.sum())
        use.pool += kv.pools[0].num_usable * block_size
    elapsed = time.perf_counter() - start
    preemptions = core.scheduler.stats.num_preemptions
    core.close()
    return {
        "block_size": block_size,
        "waste": 1 - use.tokens / use.slots,
        "waste_without_step_in_flight": 1 - use.fetched / use.slots,
        "pool_in_use": use.slots / use.pool,
        "mean_live": use.live / use.num_steps,
        "num_steps": use.num_steps,
        "preemptions": preemptions,
        "elapsed_s": elapsed,
    }
