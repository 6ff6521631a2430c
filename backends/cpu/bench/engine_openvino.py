"""OpenVINO GenAI, for a comparison: its continuous batching over a folder that optimum-intel
exported (beside the model's, named `-ov`, `-ov-int8` or `-ov-int4`).

Knows: openvino_genai. Does not know: other engines.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from work import MAX_LEN, MAX_ROWS, Run, Stamps, serve

EXPORTS = {"bfloat16": "-ov", "int8": "-ov-int8", "int4": "-ov-int4"}


def load(folder: str, threads: int, weights: str) -> tuple[dict[str, Any], Run]:
    """bfloat16: all of it, the KV cache too. Quantised weights: its own defaults for everything
    else (activations quantised on the way, an 8-bit KV cache)."""
    place = Path(folder.rstrip("/") + EXPORTS[weights])
    if not place.exists():
        what = "fp16" if weights == "bfloat16" else weights
        raise SystemExit(
            f"{place} is not there: optimum-cli export openvino --model {folder} "
            f"--task text-generation-with-past --weight-format {what} {place}"
        )
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if weights == "bfloat16":
        properties |= {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = 4
    scheduling.max_num_batched_tokens, scheduling.max_num_seqs = MAX_LEN, MAX_ROWS
    scheduling.dynamic_split_fuse = scheduling.enable_prefix_caching = True
    pipe = genai.ContinuousBatchingPipeline(str(place), scheduling, "CPU", properties)

    def run(prompts: list[list[int]], count: int) -> Stamps:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        handles = [
            pipe.add_request(i, openvino.Tensor(np.array([prompt], np.int64)), config)
            for i, prompt in enumerate(prompts)
        ]
        stamps: Stamps = [[] for _ in prompts]
        while pipe.has_non_finished_requests():
            pipe.step()
            now = time.perf_counter()
            for own, handle in zip(stamps, handles, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        own += [now] * len(output.generated_ids)
        return stamps

    about = {
        "version": openvino.__version__,
        "weights": weights,
        "compute": _in_force(properties, "INFERENCE_PRECISION_HINT"),
        "kv": _in_force(properties, "KV_CACHE_PRECISION"),
    }
    return about, run


def _in_force(properties: dict[str, Any], name: str) -> str:
    """What was asked for, else what the device does when nothing is."""
    if name in properties:
        return str(properties[name])
    default = openvino.Core().get_property("CPU", name)
    return f"{getattr(default, 'to_string', lambda: default)()} (its default)"


if __name__ == "__main__":
    serve("openvino-genai", load, sys.argv[1:])
