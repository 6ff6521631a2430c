"""vLLM's CPU build, for a comparison, in one process.

Knows: vllm. Does not know: other engines.
"""

from __future__ import annotations

import sys
import time

from work import MAX_LEN, MAX_ROWS, Run, Stamps, serve


def load(folder: str, threads: int) -> tuple[str, Run]:
    """The engine in bfloat16."""
    import vllm

    llm = vllm.LLM(
        model=folder,
        dtype="bfloat16",
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
        names = [str(next(number)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        stamps: dict[str, list[float]] = {name: [] for name in names}
        while engine.has_unfinished_requests():
            for output in engine.step():
                own = next(s for n, s in stamps.items() if output.request_id.startswith(n))
                own += [time.perf_counter()] * (len(output.outputs[0].token_ids) - len(own))
        return list(stamps.values())

    return vllm.__version__, run


if __name__ == "__main__":
    serve("vllm-cpu", load, sys.argv[1:])
