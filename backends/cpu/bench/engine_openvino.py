"""OpenVINO GenAI, for a comparison: its continuous batching over a folder that optimum-intel
exported (beside the model's, named `-ov`).

Knows: openvino_genai. Does not know: other engines.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import openvino
import openvino_genai as genai
from work import MAX_LEN, MAX_ROWS, Run, Stamps, serve


def load(folder: str, threads: int) -> tuple[str, Run]:
    """The pipeline in bfloat16, the KV cache too."""
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = 4
    scheduling.max_num_batched_tokens, scheduling.max_num_seqs = MAX_LEN, MAX_ROWS
    scheduling.dynamic_split_fuse = scheduling.enable_prefix_caching = True
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    place = folder.rstrip("/") + "-ov"
    pipe = genai.ContinuousBatchingPipeline(place, scheduling, "CPU", properties)

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

    return openvino.__version__, run


if __name__ == "__main__":
    serve("openvino-genai", load, sys.argv[1:])
