"""Streams, back-pressure, cancellation and failure of the asynchronous façade, on a real engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from vllm_core import SamplingParams
from vllm_core.engine.async_llm import AsyncLLM
from vllm_core.errors import CapacityError, DeviceLost, InvalidArgument, RequestFailed
from vllm_core.outputs import RequestOutput
from vllm_core.tests.cli.tiny_model import write_tiny_model

Scenario = Callable[[AsyncLLM], Coroutine[Any, Any, None]]
Run = Callable[..., None]

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(checkpoint: Path) -> Run:
    """Runs a scenario against an engine of its own, and checks that it leaves nothing behind."""

    def run(scenario: Scenario, **config: Any) -> None:
        async def main() -> None:
            options: dict[str, Any] = {
                "backend": "reference",
                "load_format": "dummy",
                "max_num_seqs": 4,
            } | config
            async with AsyncLLM(str(checkpoint), **options) as llm:
                await asyncio.wait_for(scenario(llm), 60)
                if llm._failure is not None:
                    return
                for _ in range(200):
                    stats = await llm.stats()
                    left = stats["kv_blocks_used"] + stats["running"] + stats["waiting"]
                    if not left:
                        break
                    await asyncio.sleep(0.01)
                assert not left

        asyncio.run(main())

    return run


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def last(stream: AsyncIterator[RequestOutput], pause: float = 0) -> RequestOutput:
    outputs = []
    async for output in stream:
        outputs.append(output)
        await asyncio.sleep(pause)
    return outputs[-1]


def test_many_streams_give_the_same_tokens_as_one_alone(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        alone = await last(llm.generate(PROMPT, greedy(12)))
        many = await asyncio.gather(*(last(llm.generate(PROMPT, greedy(12))) for _ in range(9)))
        found = {tuple(output.outputs[0].token_ids) for output in many}
        assert found == {tuple(alone.outputs[0].token_ids)}

    run(scenario)


def test_outputs_grow_and_only_the_last_one_is_finished(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        lengths, finished = [], []
        async for output in llm.generate(PROMPT, greedy(20)):
            lengths.append(len(output.outputs[0].token_ids))
            finished.append(output.is_finished)
        assert lengths == sorted(set(lengths)) and lengths[-1] == 20
        assert finished == [False] * (len(finished) - 1) + [True]

    run(scenario)


def test_a_slow_reader_is_paused_and_loses_nothing(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        expected = await last(llm.generate(PROMPT, greedy(60)))
        most_unread, taken = 0, 0
        async for output in llm.generate(PROMPT, greedy(60)):
            count = len(output.outputs[0].token_ids)
            most_unread, taken = max(most_unread, count - taken), count
            await asyncio.sleep(0.03)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert most_unread <= 4 + 3  # max_unread, and what was in flight when it was reached

    run(scenario, max_unread=4)


def test_a_cancelled_task_frees_its_request(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        task = asyncio.create_task(last(llm.generate(PROMPT, greedy(90)), pause=0.01))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario, max_unread=8)


def test_abort_ends_the_stream_with_what_there_is(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        async for output in llm.generate(PROMPT, greedy(90), request_id="mine"):
            if len(output.outputs[0].token_ids) >= 5:
                llm.abort("mine")
        assert output.outputs[0].finish_reason == "abort"
        assert 5 <= len(output.outputs[0].token_ids) < 90

    run(scenario, max_unread=8)


def test_callers_beyond_the_limit_wait_their_turn(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                stats = await llm.stats()
                most = max(most, stats["running"] + stats["waiting"])
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(last(llm.generate(PROMPT, greedy(15))) for _ in range(8)))
        watcher.cancel()
        assert 1 <= most <= 2

    run(scenario, max_requests=2)


def test_a_bad_request_fails_alone(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        good = asyncio.create_task(last(llm.generate(PROMPT, greedy(30))))
        with pytest.raises(InvalidArgument, match="does not exist"):
            await last(llm.generate([10**6]))
        with pytest.raises(CapacityError, match="context"):
            await last(llm.generate([5] * 10_000))
        with pytest.raises(InvalidArgument, match="empty"):
            await last(llm.generate([]))
        assert len((await good).outputs[0].token_ids) == 30

    run(scenario)


def test_the_same_id_twice_is_refused(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        first = llm.generate(PROMPT, greedy(40), request_id="one")
        await anext(first)
        with pytest.raises(InvalidArgument, match="running already"):
            await last(llm.generate(PROMPT, greedy(4), request_id="one"))
        assert len((await last(first)).outputs[0].token_ids) == 40

    run(scenario, max_unread=4)


def test_an_engine_that_breaks_tells_every_reader(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        def broken(*args: object) -> None:
            raise RuntimeError("the device burned")

        streams = [llm.generate(PROMPT, greedy(80)) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        llm._engine.core.runner.execute = broken  # type: ignore[method-assign, assignment]
        for stream in streams:
            with pytest.raises(RequestFailed, match="burned"):
                await last(stream)
        with pytest.raises(RequestFailed, match="stopped"):
            await last(llm.generate(PROMPT, greedy(4)))

    run(scenario, max_unread=4)


def test_a_request_on_its_way_to_an_engine_that_breaks_is_told(run: Run) -> None:
    async def scenario(llm: AsyncLLM) -> None:
        is_in_step, may_break = threading.Event(), threading.Event()

        def broken(*args: object) -> None:
            is_in_step.set()
            may_break.wait(30)
            raise DeviceLost("the device burned")

        stream = llm.generate(PROMPT, greedy(80))
        await anext(stream)
        llm._engine.core.runner.execute = broken  # type: ignore[method-assign, assignment]
        first = asyncio.create_task(last(stream))
        await asyncio.to_thread(is_in_step.wait, 30)
        second = asyncio.create_task(last(llm.generate(PROMPT, greedy(4))))
        await asyncio.sleep(0.2)  # by now it waits for the engine's answer
        may_break.set()
        for task in (first, second):
            with pytest.raises(RequestFailed, match="burned"):
                await asyncio.wait_for(task, 30)
        with pytest.raises(RequestFailed, match="stopped"):
            await llm.stats()

    run(scenario)
