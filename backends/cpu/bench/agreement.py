"""How far our logits are from transformers', on the prompts of the comparison: share of equal most
likely tokens, and mean KL(ours || theirs).

    python backends/cpu/bench/agreement.py --peers DIR --weights bfloat16,int8,int4-g128

DIR/transformers is an environment with transformers, DIR/models/NAME the model. Its logits come
once in bfloat16 and once in float32, which shows how far two correct engines differ. Three places
are judged apart, each on its own way through the engine:

    prompt   tokens of a prompt, forced (prompt log-probabilities)
    first    the end of a prompt: the first token that is drawn
    decode   the same token ids, the last one computed as a decode step in a batch of 8

Knows: one model, our engine, files of logits. Does not know: kernels, transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from work import make_prompts

from vllm_core.config import EngineConfig
from vllm_core.engine.engine import LLMEngine
from vllm_core.engine.output import RequestState
from vllm_core.ops import Array, Ops, Param
from vllm_core.params import SamplingParams

PLACE = Path(__file__).resolve().parent
Floats = npt.NDArray[np.float32]
DTYPES = ("bfloat16", "float32")
BATCH = 8
"""Rows of a decode step; every engine can force that many tokens at once."""
EVERY = 16
"""Of the prompts' positions, which are compared; the last one is."""
SEED = 77


class Recorder:
    """Keeps the logits of every call of the head."""

    def __init__(self, ops: Ops) -> None:
        self._ops, self._logits = ops, ops.logits
        self._calls: list[Floats] = []
        ops.logits = self.logits  # type: ignore[method-assign]

    def logits(self, x: Array, param: Param) -> Array:
        out = self._logits(x, param)
        self._calls.append(np.array(self._ops.host(out), np.float32))
        return out

    def take(self) -> list[Floats]:
        """[rows, V] of each call since the last time."""
        calls, self._calls = self._calls, []
        return calls


def ours(
    model: Path, weights: str, threads: int, prompts: list[list[int]], positions: list[int]
) -> tuple[Floats, Floats]:
    """-> logits [prompts, positions, V] as prefill gives them; of the last position [prompts, V]
    as decode does."""
    more: dict[str, Any] = {} if weights == "bfloat16" else {"quantization": weights}
    longest = len(prompts[0])
    engine = LLMEngine(
        EngineConfig(
            model=str(model), backend="cpu", dtype="bfloat16", threads=threads,
            max_model_len=longest + 2, max_num_seqs=BATCH, enable_prefix_caching=False,
            max_num_batched_tokens=BATCH * longest, kv_cache_memory=1 << 28, **more,
        )
    )  # fmt: skip
    recorder = Recorder(engine.opened.runner.runtime.ops)
    try:
        prefill = [_prefill(engine, recorder, prompt, positions) for prompt in prompts]
        decode = [
            _decode(engine, recorder, prompts[at : at + BATCH])
            for at in range(0, len(prompts), BATCH)
        ]
    finally:
        engine.close()
    return np.stack(prefill), np.concatenate(decode)


def _prefill(
    engine: LLMEngine, recorder: Recorder, prompt: list[int], positions: list[int]
) -> Floats:
    """[positions, V] of one prompt, computed in one step. The first call of the head draws from
    the last position, the others score the ones before it."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    _run(engine, [engine.make_request(prompt, params)])
    drawn, *scored = recorder.take()
    logits = np.concatenate(scored)[: len(prompt) - 1]
    return np.concatenate([logits, drawn])[positions]


def _decode(engine: LLMEngine, recorder: Recorder, prompts: list[list[int]]) -> Floats:
    """[prompts, V]: each prompt less its last token, which is then the only one that can be drawn;
    the step behind it is what is wanted."""
    states = [
        engine.make_request(
            prompt[:-1],
            SamplingParams(
                temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=1,
                allowed_token_ids=(prompt[-1],),
            ),
        )
        for prompt in prompts
    ]  # fmt: skip
    _run(engine, states)
    logits = recorder.take()[-1]
    for row, state in zip(logits, states, strict=True):  # whose row is it?
        told = state.output().outputs[0].logprobs
        assert told is not None
        (best,) = [token for token, found in told[1].items() if found.rank == 1]
        if row[best] != row.max():
            raise RuntimeError("the rows of the last step are not in the order of the requests")
    return logits


def _run(engine: LLMEngine, states: list[RequestState]) -> None:
    for state in states:
        engine.add(state)
    while engine.has_work:
        engine.step()


def theirs(
    python: Path, model: Path, threads: int, prompts: list[list[int]], positions: list[int]
) -> dict[str, Floats]:
    """By dtype of transformers' model: [prompts, positions, V]."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.json", Path(folder) / "logits.npy"
        ids.write_text(json.dumps({"prompts": prompts, "positions": positions}))
        for dtype in DTYPES:
            what = (str(model), str(ids), dtype, str(threads), str(out))
            subprocess.run([str(python), str(PLACE / "reference_logits.py"), *what], check=True)
            found[dtype] = np.load(out)
    return found


def compare(a: Floats, b: Floats) -> dict[str, float]:
    """Of logits [n, V]: share of rows with the same largest one, mean KL(a || b) in nats."""
    same, divergence = 0, 0.0
    for left, right in zip(a, b, strict=True):
        p, q = _log_softmax(left), _log_softmax(right)
        same += int(left.argmax() == right.argmax())
        divergence += float((np.exp(p) * (p - q)).sum())
    return {"rows": len(a), "top-1": same / len(a), "KL": divergence / len(a)}


def _log_softmax(row: Floats) -> npt.NDArray[np.float64]:
    wide = row.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    return wide


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "peers")
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a folder below PEERS/models")
    parser.add_argument(
        "--weights", default="bfloat16,int8,int4-g128", help="ours, one after another"
    )
    parser.add_argument("--prompts", type=int, default=32, help="at most 32, of 128 tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="the figures as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model = args.peers / "models" / args.model
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    prompts = make_prompts("decode 32", vocab, SEED)[: args.prompts]
    positions = list(range(EVERY - 1, len(prompts[0]), EVERY))
    python = args.peers / "transformers" / "bin" / "python"
    reference = theirs(python, model, args.threads, prompts, positions)
    places = {d: _places(logits, logits[:, -1]) for d, logits in reference.items()}
    engines = {"transformers bfloat16": places["bfloat16"]}
    results = []
    print("| logits of | against transformers' | place | rows | top-1 | KL, nats |")
    print("|---|---|---|---:|---:|---:|")
    for name in ("transformers bfloat16", *args.weights.split(",")):
        own = engines.get(name) or _places(*ours(model, name, args.threads, prompts, positions))
        for dtype in DTYPES:
            if name == f"transformers {dtype}":
                continue
            for place, logits in own.items():
                found = compare(logits, places[dtype][place])
                results.append({"weights": name, "against": dtype, "place": place, **found})
                cells = f"{found['rows']} | {found['top-1']:.3f} | {found['KL']:.2e}"
                print(f"| {name} | {dtype} | {place} | {cells} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


def _places(prefill: Floats, decode: Floats) -> dict[str, Floats]:
    before = prefill[:, :-1].reshape(-1, prefill.shape[-1])
    return {"prompt": before, "first": prefill[:, -1], "decode": decode}


if __name__ == "__main__":
    main()
