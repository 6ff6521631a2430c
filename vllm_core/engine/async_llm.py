"""The engine for many callers at once: a thread runs the loop, event loops get streams.

Back-pressure works twice: at most `max_requests` run or wait, further callers wait their turn; and
a request whose reader falls more than `max_unread` tokens behind is paused until the reader has
caught up with half of them.

Knows: threads, event loops, streams. Does not know: scheduling, devices, protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Many
from types import TracebackType
from typing import Any

from vllm_core.config import EngineConfig
from vllm_core.engine.engine import LLMEngine, Message, Prompt
from vllm_core.engine.output import RequestState
from vllm_core.errors import InvalidArgument, RequestFailed
from vllm_core.log import get_logger
from vllm_core.outputs import RequestOutput
from vllm_core.params import SamplingParams
from vllm_core.progress import load_progress
from vllm_core.text.tokenizer import Tokenizer

logger = get_logger(__name__)

IDLE_SECONDS = 0.05
"""How long the loop sleeps when every request is paused and no command comes."""


class _Stream:
    """One request on its way from the engine's thread to a reader's event loop."""

    def __init__(self, state: RequestState, loop: asyncio.AbstractEventLoop) -> None:
        self.state, self.loop = state, loop
        self.ready = asyncio.Event()
        self.output: RequestOutput | None = None
        """The newest snapshot that the reader has not taken; older ones are not kept."""
        self.is_stale = False
        """The engine went on since that snapshot."""
        self.is_paused = False
        self.num_taken = 0
        self.error: BaseException | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.state.streams)


class AsyncLLM:
    """A model that serves many coroutines. Keyword arguments are the fields of EngineConfig.

    >>> async with AsyncLLM("demo") as llm:
    ...     async for output in llm.chat([{"role": "user", "content": "Hello"}]):
    ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        max_requests: int = 1024,
        max_unread: int = 256,
        progress: bool = False,
        **config: Any,
    ) -> None:
        if max_requests < 1 or max_unread < 1:
            raise InvalidArgument("max_requests and max_unread must be at least 1")
        try:
            self.config = EngineConfig(model=model, **config)
        except TypeError as error:
            text = str(error).replace("EngineConfig.__init__()", "AsyncLLM()")
            raise InvalidArgument(text) from None
        with load_progress(progress) as report:
            self._engine = LLMEngine(self.config, report)
        self._max_unread = max_unread
        self._slots = asyncio.Semaphore(max_requests)
        self._streams: dict[str, _Stream] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._is_closing = False
        self._gate = threading.Lock()
        self._has_stopped = False
        """No command is taken any more; changes under the gate, so that none is lost."""
        self._thread = threading.Thread(target=self._run, name="vllm-core-engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- for callers, on their event
    # loop
    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, whenever it changed; slow readers get fewer, newer ones.

        Closing the iterator (or cancelling its task) ends the request. Raises InvalidArgument and
        CapacityError before anything runs, RequestFailed when the request or the engine failed.
        """
        state = await asyncio.to_thread(
            self._engine.make_request,
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            is_streaming=True,
        )
        async with self._slots:
            stream = _Stream(state, asyncio.get_running_loop())
            try:
                await self._add(stream)
                while True:
                    output = await self._take(stream)
                    yield output
                    if output.is_finished:
                        return
            finally:
                self._send(lambda: self._remove(state.request.request_id, stream))

    async def chat(
        self,
        messages: Many[Message],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation."""
        ids = await asyncio.to_thread(self._engine.render, messages, chat_template)
        stream = self.generate(ids, sampling_params, request_id=request_id, priority=priority)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    def abort(self, request_id: str) -> None:
        """Ends a request; its reader gets what there is, with finish_reason "abort"."""
        self._send(lambda: self._abort(request_id))

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        return self._engine.default_params()

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()

    async def stats(self) -> dict[str, int]:
        """Counters, read by the engine's thread between two steps."""
        answer: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def read() -> None:
            found = self._engine.core.stats()
            loop.call_soon_threadsafe(_settle, answer, found)

        self._check_alive()
        self._send_or_fail(read)
        return await answer

    def close(self) -> None:
        """Ends every request and gives the device back; waits for the step in flight."""
        if not self._is_closing:
            self._is_closing = True
            self._send(lambda: None)
            self._thread.join()
            self._engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _add(self, stream: _Stream) -> None:
        self._check_alive()
        added: asyncio.Future[None] = stream.loop.create_future()

        def add() -> None:
            error: BaseException | None = None
            try:
                self._check_alive()  # again: it may have ended since
                self._engine.add(stream.state)
                self._streams[stream.state.request.request_id] = stream
            except BaseException as caught:
                error = caught
            stream.loop.call_soon_threadsafe(_settle, added, None, error)

        self._send_or_fail(add)
        await added

    async def _take(self, stream: _Stream) -> RequestOutput:
        await stream.ready.wait()
        stream.ready.clear()
        output, stream.output = stream.output, None
        if output is None:
            error = stream.error or RequestFailed("the engine was closed")
            raise RequestFailed(f"the request failed: {error}") from stream.error
        stream.num_taken = sum(len(o.token_ids) for o in output.outputs)
        if stream.is_stale or stream.is_paused:
            self._send(lambda: self._refresh(stream))
        if output.error is not None:
            raise RequestFailed(output.error)
        return output

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RequestFailed(f"the engine has stopped: {self._failure}") from self._failure
        if self._is_closing:
            raise RequestFailed("the engine was closed")

    def _send(self, command: Callable[[], None]) -> bool:
        """Hands a command to the engine's thread; False when that has ended."""
        with self._gate:
            if not self._has_stopped:
                self._inbox.put(command)
            return not self._has_stopped

    def _send_or_fail(self, command: Callable[[], None]) -> None:
        if not self._send(command):
            self._check_alive()
            raise RequestFailed("the engine has stopped")

    # ---------------------------------------------------------------- on the engine's thread
    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._take_commands()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("the engine has stopped")
            self._failure = error
        with self._gate:
            self._has_stopped = True
        while not self._inbox.empty():  # nobody may wait for an answer that never comes
            with contextlib.suppress(Exception):
                self._inbox.get()()
        for stream in list(self._streams.values()):
            stream.error = self._failure
            stream.output = None
            _wake([stream])
        self._streams.clear()

    def _take_commands(self) -> None:
        """Runs what callers asked for; sleeps while there is nothing to do."""
        try:
            if not self._engine.has_work:
                self._inbox.get()()
            elif self._engine.core.is_stalled:
                self._inbox.get(timeout=IDLE_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _deliver(self, changed: list[RequestState]) -> None:
        fresh = []
        for state in changed:
            stream = self._streams.get(state.request.request_id)
            if stream is None:
                continue
            if stream.num_tokens - stream.num_taken > self._max_unread and not stream.is_paused:
                stream.is_paused = True
                self._engine.core.scheduler.pause(state.request.request_id, True)
            if stream.output is None or state.request.is_finished:
                stream.output, stream.is_stale = state.output(), False
                fresh.append(stream)
            else:
                stream.is_stale = True
        _wake(fresh)

    def _refresh(self, stream: _Stream) -> None:
        """The reader took a snapshot: gives it the newer one, and lets a paused request go on."""
        if stream.is_stale:
            stream.output, stream.is_stale = stream.state.output(), False
            _wake([stream])
        if stream.is_paused and stream.num_tokens - stream.num_taken <= self._max_unread // 2:
            stream.is_paused = False
            self._engine.core.scheduler.pause(stream.state.request.request_id, False)

    def _abort(self, request_id: str) -> None:
        state = self._engine.abort(request_id)
        if state is not None:
            self._deliver([state])

    def _remove(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)


def _wake(streams: list[_Stream]) -> None:
    """One call per event loop, however many streams changed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, own in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_all, own)


def _set_all(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.ready.set()


def _settle(future: asyncio.Future[Any], value: Any, error: BaseException | None = None) -> None:
    if not future.done():
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
