"""Ours, for a comparison.

Knows: LLMEngine. Does not know: peers.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from work import MAX_LEN, MAX_ROWS, Run, Stamps, serve

import vllm_core
from vllm_core.config import EngineConfig
from vllm_core.engine.engine import LLMEngine
from vllm_core.params import SamplingParams

KV_BYTES = 1 << 30
QUANTIZATION = {"int8": "int8", "int4": "int4-g128"}
"""Groups as large as the peers have them."""


def load(folder: str, threads: int, weights: str) -> tuple[dict[str, Any], Run]:
    """The engine in bfloat16, its KV cache too; weights quantised when they are loaded."""
    more: dict[str, Any] = {}
    if weights != "bfloat16":
        more["quantization"] = QUANTIZATION[weights]
    engine = LLMEngine(
        EngineConfig(
            model=folder,
            backend="cpu",
            dtype="bfloat16",
            threads=threads,
            max_model_len=MAX_LEN,
            max_num_seqs=MAX_ROWS,
            max_num_batched_tokens=MAX_LEN,
            kv_cache_memory=KV_BYTES,
            **more,
        )
    )

    def run(prompts: list[list[int]], count: int) -> Stamps:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        states = [engine.make_request(prompt, params) for prompt in prompts]
        for state in states:
            engine.add(state)
        stamps: Stamps = [[] for _ in states]
        while any(not state.request.is_finished for state in states):
            engine.step()
            now = time.perf_counter()
            for own, state in zip(stamps, states, strict=True):
                own += [now] * (len(state.streams[0].tokens) - len(own))
        return stamps

    about = {
        "version": vllm_core.__version__,
        "weights": engine.describe()["model"]["weights"],
        "compute": engine.describe()["model"]["dtype"],
        "kv": ", ".join({a.kv.dtype for a in engine.opened.spec.attention_specs}),
    }
    return about, run


if __name__ == "__main__":
    serve("vllm-core", load, sys.argv[1:])
