"""What a model's own files say about sampling and ends reaches its requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_core import LLM, SamplingParams
from vllm_core.errors import InvalidArgument
from vllm_core.tests.cli.tiny_model import write_tiny_model


def open_llm(folder: Path, generation_config: dict[str, Any] | None = None) -> LLM:
    write_tiny_model(folder)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return LLM(folder, backend="reference", load_format="dummy", max_num_seqs=2, num_kv_blocks=32)  # type: ignore[arg-type]


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    own: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    own["repetition_penalty"] = 1.1
    with open_llm(tmp_path, own | {"do_sample": True, "max_length": 20}) as llm:
        assert llm.default_sampling_params() == SamplingParams(**own)


@pytest.mark.parametrize(
    ("own", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": None, "top_k": None, "top_p": None}, 1.0),
        ({}, 1.0),
        (None, 1.0),
    ],
)
def test_a_model_that_does_not_sample_is_greedy(
    tmp_path: Path, own: dict[str, Any] | None, temperature: float
) -> None:
    with open_llm(tmp_path, own) as llm:
        assert llm.default_sampling_params() == SamplingParams(temperature=temperature)


def test_every_end_that_the_model_names_ends_an_answer(tmp_path: Path) -> None:
    with open_llm(tmp_path, {"eos_token_id": [70, 71, 10**6, -1]}) as llm:
        for end in (70, 71, llm.tokenizer.eos_token_ids[0]):  # type: ignore[union-attr]
            params = SamplingParams(max_tokens=5, allowed_token_ids=(end,))
            [output] = llm.generate("x", params, progress=False)
            assert output.outputs[0].token_ids == [end]
            assert output.outputs[0].finish_reason == "stop"
            assert output.outputs[0].stop_reason is None


@pytest.mark.parametrize(
    "prompt", [[1.5], ["a", 3], [None], {"prompt": "x"}, b"bytes", 5, [[1, "a"]], [["a"]]]
)
def test_a_prompt_of_another_kind_is_refused_in_words(tmp_path: Path, prompt: Any) -> None:
    with open_llm(tmp_path) as llm, pytest.raises(InvalidArgument, match="prompt"):
        llm.generate(prompt, progress=False)


def test_numbers_of_numpy_are_token_ids(tmp_path: Path) -> None:
    import numpy as np

    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    with open_llm(tmp_path) as llm:
        ids = np.array([5, 6, 7])
        given: list[Any] = [[5, 6, 7], list(ids), ids, [ids], (i for i in (5, 6, 7))]
        answers = [llm.generate(prompt, params, progress=False) for prompt in given]
        assert {tuple(a.outputs[0].token_ids) for [a] in answers} == {
            tuple(answers[0][0].outputs[0].token_ids)
        }


def test_a_conversation_of_another_kind_is_refused_in_words(tmp_path: Path) -> None:
    with open_llm(tmp_path) as llm:
        for wrong in ({"role": "user", "content": "x"}, "hello", [5], []):
            with pytest.raises(InvalidArgument, match="message"):
                llm.chat(wrong, progress=False)  # type: ignore[arg-type]
