"""The offline API on a small engine: texts, stop strings, streams, errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vllm_core import LLM, SamplingParams
from vllm_core.errors import CapacityError, InvalidArgument
from vllm_core.outputs import RequestOutput
from vllm_core.tests.cli.tiny_model import write_tiny_model

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def open_llm(checkpoint: Path, **config: Any) -> LLM:
    options: dict[str, Any] = {
        "backend": "reference",
        "load_format": "dummy",
        "max_num_seqs": 4,
        "num_kv_blocks": 64,
    }
    return LLM(str(checkpoint), **(options | config))


@pytest.fixture(scope="module", params=[True, False], ids=["ahead", "in turn"])
def llm(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with open_llm(checkpoint, async_scheduling=request.param) as llm:
        yield llm
        stats = llm.stats()
        assert stats["kv_blocks_used"] == stats["running"] == stats["waiting"] == 0


def byte_ids(llm: LLM) -> dict[bytes, int]:
    """The tokenizer has a token for each byte."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    return {tokenizer.token_bytes(i): i for i in range(256)}


def letters(llm: LLM, **changes: Any) -> SamplingParams:
    """Seeded answers of lower-case letters, so that stop strings are easily found."""
    ids = byte_ids(llm)
    allowed = tuple(ids[bytes([c])] for c in range(ord("a"), ord("z") + 1))
    own: dict[str, Any] = {"seed": 5, "max_tokens": 40, "allowed_token_ids": allowed}
    return SamplingParams(**(own | changes))


def answer(llm: LLM, params: SamplingParams, prompt: str = PROMPT) -> RequestOutput:
    [output] = llm.generate(prompt, params, progress=False)
    assert output.is_finished and output.error is None
    return output


# ---------------------------------------------------------------- texts
def test_outputs_come_in_the_order_of_the_prompts_with_the_text_of_their_tokens(llm: LLM) -> None:
    prompts = ["a", "bb" * 9, "ccc", "d" * 40, "e", "f" * 3]
    many = [SamplingParams(seed=i, max_tokens=5 + 3 * i) for i in range(6)]
    outputs = llm.generate(prompts, many, progress=False)
    assert [o.prompt for o in outputs] == prompts
    assert llm.tokenizer is not None
    for output, params in zip(outputs, many, strict=True):
        [own] = output.outputs
        assert len(own.token_ids) == params.max_tokens or own.finish_reason == "stop"
        assert own.text == llm.tokenizer.decode(own.token_ids)
        [single] = llm.generate(output.prompt_token_ids, params, progress=False)
        assert single.outputs[0].token_ids == own.token_ids


def test_a_stream_ends_with_the_text_of_the_whole_answer(llm: LLM) -> None:
    """Random bytes: most of them begin characters that never end."""
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True, logprobs=1)
    whole = answer(llm, params)
    pieces = list(llm.stream(PROMPT, params))
    texts = [p.outputs[0].text for p in pieces]
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert texts[-1] == whole.outputs[0].text
    assert pieces[-1].outputs[0] == whole.outputs[0]
    assert len(pieces) == 60 and pieces[-1].is_finished and not pieces[0].is_finished


def test_closing_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert llm.stats()["running"] == 1
    stream.close()
    assert llm.stats()["running"] == 0


def test_two_streams_at_once_both_end_with_their_whole_answers(llm: LLM) -> None:
    params = [SamplingParams(seed=s, max_tokens=n, ignore_eos=True) for s, n in ((1, 9), (2, 4))]
    whole = [answer(llm, p).outputs[0] for p in params]
    first, second = (llm.stream(PROMPT, p) for p in params)
    next(first)
    next(second)
    assert [list(first)[-1].outputs[0], list(second)[-1].outputs[0]] == whole


def test_prompt_log_probabilities_do_not_disturb_the_text_of_a_short_answer(llm: LLM) -> None:
    """Scores and last token come in one step; the prompt ends within a character that it ends."""
    ids = byte_ids(llm)
    params = SamplingParams(
        max_tokens=1, allowed_token_ids=(ids[b"\xa9"],), prompt_logprobs=0, temperature=0
    )
    prompt = [ids[b"a"], ids[b"\xc3"]]
    [output] = llm.generate([prompt], params, progress=False)
    assert output.outputs[0].text == "\u00e9"
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 2
    assert list(llm.stream(prompt, params))[-1].outputs[0].text == "\u00e9"


def test_samples_of_one_prompt_come_as_outputs_with_their_index(llm: LLM) -> None:
    params = letters(llm, n=3, max_tokens=12)
    output = answer(llm, params)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    texts = [o.text for o in output.outputs]
    assert len(set(texts)) == 3
    assert [o.text for o in list(llm.stream(PROMPT, params))[-1].outputs] == texts


def test_the_same_seed_of_the_engine_gives_the_same_answers(checkpoint: Path) -> None:
    texts = []
    for _ in range(2):
        with open_llm(checkpoint, seed=7) as llm:
            outputs = llm.generate(
                ["a", "b"], SamplingParams(max_tokens=9, ignore_eos=True), progress=False
            )
            texts.append([o.outputs[0].token_ids for o in outputs])
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- stop strings
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_an_answer_ends_before_a_stop_string_that_spans_tokens(llm: LLM, length: int) -> None:
    whole = answer(llm, letters(llm)).outputs[0].text
    assert len(whole) == 40
    stop = whole[12 : 12 + length]
    place = whole.index(stop)
    for include in (False, True):
        params = letters(llm, stop=(stop, "never#"), include_stop_str_in_output=include)
        [own] = answer(llm, params).outputs
        assert own.text == whole[: place + length * include]
        assert (own.finish_reason, own.stop_reason) == ("stop", stop)
        assert len(own.token_ids) == place + length
        pieces = list(llm.stream(PROMPT, params))
        assert pieces[-1].outputs == [own]
        assert all(stop not in p.outputs[0].text or include for p in pieces)


def test_text_that_only_began_a_stop_string_is_given_out_at_the_end(llm: LLM) -> None:
    whole = answer(llm, letters(llm)).outputs[0].text
    params = letters(llm, stop=(whole[-3:] + "#",))
    assert answer(llm, params).outputs[0].text == whole
    assert list(llm.stream(PROMPT, params))[-1].outputs[0].text == whole


def test_a_stop_string_that_the_last_allowed_token_completes_is_the_reason(llm: LLM) -> None:
    whole = answer(llm, letters(llm)).outputs[0].text
    stop = whole[10:14]
    params = letters(llm, stop=stop, max_tokens=whole.index(stop) + 4)
    [own] = answer(llm, params).outputs
    assert (own.finish_reason, own.stop_reason) == ("stop", stop)
    assert own.text == whole[: whole.index(stop)]


def test_a_stop_string_within_min_tokens_does_not_count(llm: LLM) -> None:
    whole = answer(llm, letters(llm)).outputs[0].text
    stop = whole[5]
    first = whole.index(stop)
    params = letters(llm, stop=stop, min_tokens=first + 1)
    later = whole.find(stop, first + 1)
    [own] = answer(llm, params).outputs
    assert own.text == (whole if later < 0 else whole[:later])


def test_of_samples_one_may_stop_while_the_others_go_on(llm: LLM) -> None:
    params = letters(llm, n=3)
    texts = [o.text for o in answer(llm, params).outputs]
    stop = next(
        texts[1][i : i + 3]
        for i in range(30)
        if texts[1][i : i + 3] not in texts[0] and texts[1][i : i + 3] not in texts[2]
    )
    outputs = answer(llm, params.replace(stop=stop)).outputs
    assert [o.finish_reason for o in outputs] == ["length", "stop", "length"]
    assert [outputs[0].text, outputs[2].text] == [texts[0], texts[2]]
    assert outputs[1].text == texts[1][: texts[1].index(stop)]


# ---------------------------------------------------------------- errors
def test_a_bad_prompt_among_good_ones_raises_before_anything_runs(llm: LLM) -> None:
    steps = llm.stats()["num_steps"]
    with pytest.raises(InvalidArgument, match="empty"):
        llm.generate(["a", ""], progress=False)
    with pytest.raises(InvalidArgument, match="999 does not exist"):
        llm.generate([[1], [999]], progress=False)
    with pytest.raises(InvalidArgument, match="no prompts"):
        llm.generate([], progress=False)
    with pytest.raises(InvalidArgument, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [SamplingParams()], progress=False)
    with pytest.raises(CapacityError, match="300 tokens"):
        llm.generate(["a", "b" * 300], progress=False)
    assert llm.stats()["num_steps"] == steps
    assert answer(llm, SamplingParams(max_tokens=2)).is_finished


def test_an_interrupted_call_leaves_nothing_running(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = llm._engine.core.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._engine.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=30, ignore_eos=True), progress=False)
    assert llm.stats()["running"] == llm.stats()["kv_blocks_used"] == 0
    monkeypatch.undo()
    assert answer(llm, SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].token_ids


def test_priorities_decide_who_runs_first(checkpoint: Path) -> None:
    with open_llm(checkpoint, max_num_seqs=1, scheduling_policy="priority") as llm:
        engine, ended = llm._engine, []
        states = [
            engine.make_request(p, SamplingParams(max_tokens=3, ignore_eos=True), priority=rank)
            for p, rank in (("a", 2), ("b", 0), ("c", 1), ("d", 0))
        ]
        for state in states:
            engine.add(state)
        while engine.has_work:
            ended += [s.prompt for s in engine.step() if s.request.is_finished]
        assert ended == ["b", "d", "c", "a"]
