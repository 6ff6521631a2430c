"""TFLOP/s of bfloat16 products on a model's shapes at 1,024 rows: by our kernel and by torch's.

Knows: shapes of a decoder's layer. Does not know: the rest of a model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from vllm_core.ops import Param
from vllm_core_cpu import native
from vllm_core_cpu.memory import Buffers
from vllm_core_cpu.ops import CpuOps
from vllm_core_cpu.weights import pack

TOKENS = 1024
SECONDS = 1.0


def shapes(folder: Path) -> list[tuple[int, int]]:
    """(outputs, inputs) of the products of one layer."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * dim
    return [(qkv, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)]


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    kernels, why = native.load()
    if kernels is None:
        raise SystemExit(why)
    kernels.set_threads(threads)
    ops = CpuOps(kernels, Buffers().empty, torch.device("cpu"))
    totals = {"ours": 0.0, "torch": 0.0}
    operations = 0
    with torch.inference_mode():
        for n, k in shapes(folder):
            x = torch.randn(TOKENS, k).bfloat16()
            weight = (torch.randn(n, k) / k**0.5).bfloat16()
            param = Param(*pack(kernels, [weight], None))
            totals["ours"] += median(partial(ops.linear, x, param))
            totals["torch"] += median(partial(F.linear, x, weight))
            operations += 2 * TOKENS * n * k
    print(
        json.dumps({f"matmul TFLOP/s, {name}": operations / s / 1e12 for name, s in totals.items()})
    )


def median(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
