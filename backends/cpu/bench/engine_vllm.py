"""vLLM's CPU build, for a comparison.

Knows: vllm. Does not know: other engines.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import vllm
from work import MAX_LEN, MAX_ROWS, Run, Stamps, serve


def load(folder: str, threads: int, weights: str) -> tuple[dict[str, Any], Run]:
    """The engine in bfloat16, its KV cache too. Threads are bound by its environment: peers.py."""
    llm = vllm.LLM(
        model=folder,
        dtype=weights,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_ROWS,
        enable_prefix_caching=True,
        seed=0,
    )
    engine, number = llm.llm_engine, iter(range(10**9))

    def run(prompts: list[list[int]], count: int) -> Stamps:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
        )
        stamps: dict[str, list[float]] = {}
        for prompt in prompts:
            name = str(next(number))
            stamps[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                own = stamps[output.request_id]
                own += [now] * (len(output.outputs[0].token_ids) - len(own))
        return list(stamps.values())

    about = {"version": vllm.__version__, "weights": weights, "compute": weights, "kv": weights}
    return about, run


if __name__ == "__main__":
    serve("vllm-cpu", load, sys.argv[1:])
