"""Runs programs in order on one thread, so that the host prepares the next step meanwhile.

A program that fails fails everything that was submitted behind it, since that would run on
undefined state. Once the caller has been told, by a `wait` or by the next call, the stream goes on.

Knows: order, results that do not exist yet, errors. Does not know: what runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from vllm_core.errors import BackendError


class Deferred:
    """A result that may not exist yet; a field (`result.tokens`) or part (`x[3:5]`) is too."""

    def __init__(self, future: Future[Any], path: tuple[Callable[[Any], Any], ...] = ()) -> None:
        self._future = future
        self._path = path

    def pick(self, step: Callable[[Any], Any]) -> Deferred:
        """step(value), deferred; it runs on the stream and must not block."""
        return Deferred(self._future, (*self._path, step))

    def __getattr__(self, name: str) -> Deferred:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.pick(lambda value: getattr(value, name))

    def __getitem__(self, index: Any) -> Deferred:
        return self.pick(lambda value: value[index])

    def __iter__(self) -> Any:
        raise TypeError("the length of a deferred result is unknown; name its fields or fetch it")

    def _value(self) -> Any:
        """The value, on the stream's own thread: what it depends on has run."""
        value = self._future.result()
        for step in self._path:
            value = step(value)
        return value


def resolve(value: Any) -> Any:
    """A deferred value, or the value itself."""
    return value._value() if isinstance(value, Deferred) else value


class Stream:
    """One thread, strictly in order."""

    def __init__(self, begin: Callable[[], None]) -> None:
        """begin: runs first on the thread (thread settings are per thread)."""
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._tasks = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(begin,), name="vllm-core-stream", daemon=True
        )
        self._thread.start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Raises the failure of an earlier task, if nobody has seen it yet."""
        if self._failure is not None:
            raise self.deliver()
        if not self._thread.is_alive():
            raise BackendError("the runtime is closed; open another")
        future: Future[Any] = Future()
        self._tasks.put((future, task))
        return future

    def wait(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except BaseException as error:
            if self._failure is error:
                self.deliver()
            raise

    def deliver(self) -> BaseException:
        """Takes the failure away, after everything that was behind it has failed as well."""
        self._barrier()
        failure, self._failure = self._failure, None
        assert failure is not None
        return failure

    def synchronize(self) -> None:
        """Waits for what was submitted, unless on the stream's own thread; raises its failure."""
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            return
        self._barrier()
        if self._failure is not None:
            raise self.deliver()

    def close(self) -> None:
        """Ends behind what was submitted. A thread that outlived the interpreter would abort it."""
        self._tasks.put(None)
        if threading.current_thread() is not self._thread:  # a collected runtime may close here
            self._thread.join()

    def _barrier(self) -> None:
        future: Future[Any] = Future()
        self._tasks.put((future, lambda: None))
        future.exception()

    def _run(self, begin: Callable[[], None]) -> None:
        begin()
        with torch.inference_mode():
            while (item := self._tasks.get()) is not None:
                future, task = item
                if self._failure is not None:
                    future.set_exception(self._failure)
                    continue
                try:
                    result = task()
                except BaseException as error:
                    self._failure = error
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
                del future, task, item
