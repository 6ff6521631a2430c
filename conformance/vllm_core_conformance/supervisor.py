"""Runs cases in worker processes and makes of every one of them a result, whatever happens.

A worker that crashes, hangs or talks nonsense costs the case it was at; the next one gets a new
worker. A backend that cannot be opened fails all cases of that dtype. Nothing is left out: there is
one result per task.

Knows: workers, time limits, what an answer must look like. Does not know: backends, reports.
"""

from __future__ import annotations

import selectors
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from vllm_core_conformance.case import Measure
from vllm_core_conformance.outcome import STATUSES, Result
from vllm_core_conformance.process import Broken, WorkerProcess
from vllm_core_conformance.tasks import Task

CASES = "vllm_core_conformance.cases"
MAX_TIMEOUTS = 5
"""So many in a row, and the rest is not waited for."""
TICK = 0.5
"""Seconds until a worker is seen to be dead whose children hold its pipe open."""


@dataclass(frozen=True)
class Settings:
    """How to run; `backend` as in sources.resolve."""

    backend: str
    jobs: int = 1
    timeout_scale: float = 1.0
    open_limit: float = 180.0
    """Seconds until opening a backend has failed."""
    cases: str = CASES
    """Module with all_cases()."""


@dataclass
class Description:
    """What a backend says of itself, or why it cannot."""

    status: str
    """ok | unverified | unknown | any status of a result."""
    sentence: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""


@dataclass
class _Desk:
    """One worker's place in the loop."""

    worker: WorkerProcess
    opened: set[str] = field(default_factory=set)
    task: Task | None = None
    last: Result | None = None
    """Its latest result, which a second answer spoils."""


class Supervisor:
    """Use as a context: leaving it ends every worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.results: list[Result] = []
        """In the order in which they came."""
        self.faults: list[str] = []
        """What went wrong outside of any case; a run with one does not pass."""
        self._desks: list[_Desk] = []
        self._num_workers = 0
        self._unopened: dict[str, Result] = {}
        self._timeouts = 0

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self.kill()

    # ---- public
    def describe(self) -> Description:
        """Opens the backend with its default dtype and asks what it is. Never raises for its
        faults."""
        desk = self._hire()
        desk.worker.ask({"do": "describe"}, "described", self._open_limit)
        try:
            reply = self._wait(desk)
        except Broken as broken:
            tail = desk.worker.tail()
            self._dismiss(desk)
            sentence = f"opening the backend: {broken.sentence}"
            return Description(broken.status, sentence, traceback=tail)
        if reply["kind"] == "failed" or reply.get("status") != "ok":
            self._dismiss(desk)
            said, trace = str(reply.get("sentence")), str(reply.get("traceback", ""))
            return Description(_opening_status(reply), said, traceback=trace)
        facts: dict[str, Any] = reply.get("facts") or {}
        if not _is_description(facts):
            self._dismiss(desk)
            return Description("harness_error", "the worker's description cannot be read")
        desk.opened.add(facts["dtype"])
        return Description("ok", facts=facts)

    def run(
        self, tasks: Sequence[Task], on_result: Callable[[Task, Result], bool | None] | None = None
    ) -> list[Result]:
        """One result per task, in the order of the tasks. `on_result` may return True to stop."""
        queue = deque(tasks)
        found: dict[int, Result] = {}
        place = {id(task): at for at, task in enumerate(tasks)}
        stopped = False

        def finish(task: Task, result: Result) -> None:
            nonlocal stopped
            found[place[id(task)]] = result
            self.results.append(result)
            if on_result is not None and on_result(task, result):
                stopped = True

        while not stopped:
            self._deal(queue, finish)
            if not any(desk.task for desk in self._desks):
                break
            self._turn(finish)
        for desk in [desk for desk in self._desks if desk.task]:
            self._dismiss(desk)  # stopped: what it is at will not be waited for
        return [found[at] for at in sorted(found)]

    def run_one(self, task: Task) -> Result:
        (result,) = self.run([task])
        return result

    def close(self) -> None:
        """Lets every worker close its backend; a crash or hang in it is a fault of the run."""
        for desk in list(self._desks):
            desk.worker.ask({"do": "close"}, "closed", self._open_limit)
            try:
                reply = self._wait(desk)
                self.faults += [f"closing the backend: {said}" for said in reply.get("faults", ())]
            except Broken as broken:
                self._spoil(desk, broken)
                self.faults.append(f"closing the backend: {broken.sentence}")
            self._dismiss(desk)

    def kill(self) -> None:
        for desk in list(self._desks):
            self._dismiss(desk)

    # ---- workers
    @property
    def _open_limit(self) -> float:
        return self.settings.open_limit * self.settings.timeout_scale

    def _hire(self) -> _Desk:
        self._num_workers += 1
        settings = self.settings
        path = [entry for entry in sys.path if entry]
        worker = WorkerProcess(self._num_workers, settings.backend, settings.cases, path)
        desk = _Desk(worker)
        self._desks.append(desk)
        return desk

    def _dismiss(self, desk: _Desk) -> None:
        self._desks.remove(desk)
        desk.worker.kill()

    def _wait(self, desk: _Desk) -> dict[str, Any]:
        """The answer of one worker; Broken when it does not come."""
        with selectors.DefaultSelector() as selector:
            selector.register(desk.worker.replies, selectors.EVENT_READ)
            while True:
                deadline = desk.worker.deadline
                assert deadline is not None
                selector.select(min(TICK, max(0.0, deadline - time.monotonic())))
                reply = desk.worker.read()
                if reply is not None:
                    return reply
                if time.monotonic() >= deadline:
                    raise self._too_late(desk)

    def _too_late(self, desk: _Desk) -> Broken:
        limit = desk.worker.awaited.limit if desk.worker.awaited else 0.0
        desk.worker.ask_for_stack()
        return Broken("timeout", f"no answer within {limit:.3g} seconds")

    # ---- the loop
    def _deal(self, queue: deque[Task], finish: Callable[[Task, Result], None]) -> None:
        """Gives every idle worker something to do; hires as many as there are jobs."""
        while queue:
            task = queue[0]
            if self._timeouts >= MAX_TIMEOUTS:
                said = f"not waited for: the {MAX_TIMEOUTS} cases before it gave no answer"
                finish(queue.popleft(), _result(task, "timeout", said))
                continue
            if task.dtype in self._unopened:
                finish(queue.popleft(), self._unopened_result(task))
                continue
            desk = next((desk for desk in self._desks if desk.task is None), None)
            if desk is None:
                if len(self._desks) >= max(1, self.settings.jobs):
                    return
                desk = self._hire()
            desk.task = queue.popleft()
            self._proceed(desk)

    def _proceed(self, desk: _Desk) -> None:
        """The next request for the worker's task."""
        task = desk.task
        assert task is not None
        if task.dtype not in desk.opened:
            desk.worker.ask({"do": "open", "dtype": task.dtype}, "opened", self._open_limit)
            return
        request = {"do": "run", "case": task.case.id, "dtype": task.dtype, "seed": task.seed}
        desk.worker.ask(request, "result", task.case.time_limit * self.settings.timeout_scale)

    def _turn(self, finish: Callable[[Task, Result], None]) -> None:
        """Waits until a worker answers, dies, or is late."""
        with selectors.DefaultSelector() as selector:
            for desk in self._desks:
                selector.register(desk.worker.replies, selectors.EVENT_READ, desk)
            deadlines = [desk.worker.deadline for desk in self._desks]
            until = min(deadline for deadline in deadlines if deadline is not None)
            ready = {id(key.data) for key, _ in selector.select(max(0.0, until - time.monotonic()))}
        for desk in list(self._desks):
            deadline = desk.worker.deadline
            is_late = deadline is not None and time.monotonic() >= deadline
            if id(desk) not in ready and not is_late and not desk.worker.has_ended:
                continue
            try:
                reply = desk.worker.read()
                if reply is None and is_late:
                    raise self._too_late(desk)
                if reply is not None:
                    self._take(desk, reply, finish)
            except Broken as broken:
                self._broken(desk, broken, finish)

    def _take(
        self, desk: _Desk, reply: dict[str, Any], finish: Callable[[Task, Result], None]
    ) -> None:
        task = desk.task
        assert task is not None
        if reply["kind"] == "opened" and reply.get("status") == "ok":
            desk.opened.add(task.dtype)
            self._proceed(desk)
            return
        if reply["kind"] == "result":
            result = read_result(reply.get("result"), task)
            result.worker = desk.worker.number
            if result.status not in ("pass", "not_supported"):
                _add_output(result, desk.worker.tail())
            self._timeouts = 0
        elif task.dtype in desk.opened:
            raise Broken("harness_error", f"the suite failed: {reply.get('sentence')}")
        else:
            sentence = f"opening the backend: {reply.get('sentence')}"
            result = _result(task, _opening_status(reply), sentence)
            result.traceback = str(reply.get("traceback", ""))
            _add_output(result, desk.worker.tail())
            self._unopened[task.dtype] = result
        desk.task, desk.last = None, result
        finish(task, result)

    def _broken(self, desk: _Desk, broken: Broken, finish: Callable[[Task, Result], None]) -> None:
        """The worker is of no more use; its task has a result all the same."""
        task, seconds = desk.task, desk.worker.elapsed
        self._spoil(desk, broken)
        if task is not None:
            result = _result(task, broken.status, broken.sentence)
            result.seconds, result.worker = seconds, desk.worker.number
            _add_output(result, desk.worker.tail())
            if task.dtype not in desk.opened:
                result.sentence = f"opening the backend: {broken.sentence}"
                self._unopened[task.dtype] = result
            self._timeouts = self._timeouts + 1 if broken.status == "timeout" else 0
        else:
            after = desk.last.case if desk.last else "opening the backend"
            self.faults.append(f"after {after}: {broken.sentence}")
        self._dismiss(desk)
        if task is not None:
            finish(task, result)

    def _spoil(self, desk: _Desk, broken: Broken) -> None:
        """A worker that said more than it was asked may have lied before."""
        if broken.also_before and desk.last is not None:
            desk.last.status, desk.last.sentence = "harness_error", broken.sentence

    def _unopened_result(self, task: Task) -> Result:
        found = self._unopened[task.dtype]
        return _result(task, found.status, found.sentence)


def _result(task: Task, status: str, sentence: str) -> Result:
    return Result(task.case.id, task.dtype, task.seed, status, sentence)


def _add_output(result: Result, tail: str) -> None:
    if tail.strip():
        result.details = result.details | {"output": tail}


def _opening_status(reply: dict[str, Any]) -> str:
    status = reply.get("status")
    known = {*STATUSES, "unknown"} - {"pass", "not_supported"}
    return str(status) if status in known else "harness_error"


def _is_description(facts: Any) -> bool:
    if not isinstance(facts, dict):
        return False
    caps = facts.get("capabilities")
    return (
        isinstance(facts.get("dtype"), str)
        and isinstance(facts.get("name"), str)
        and isinstance(caps, dict)
        and isinstance(caps.get("dtypes"), list)
        and all(isinstance(dtype, str) for dtype in caps["dtypes"])
    )


_KINDS: dict[str, type | tuple[type, ...]] = {
    "case": str,
    "dtype": str,
    "seed": int,
    "status": str,
    "sentence": str,
    "checks": int,
    "measures": list,
    "figures": dict,
    "notes": list,
    "details": dict,
    "traceback": str,
    "seconds": (int, float),
    "compilations": int,
    "compiled": dict,
    "worker": int,
}


def read_result(found: Any, task: Task) -> Result:
    """What a worker answered for this task; Broken unless it is exactly that."""
    if not isinstance(found, dict) or set(found) != set(_KINDS):
        raise Broken("harness_error", "the worker's result lacks fields or has others")
    for name, kind in _KINDS.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise Broken("harness_error", f"the worker's result has {found[name]!r:.40} as {name}")
    answered = (found["case"], found["dtype"], found["seed"])
    if answered != task.name:
        raise Broken("harness_error", f"asked for {task.name}, the worker answered {answered}")
    if found["status"] not in STATUSES:
        raise Broken("harness_error", f"there is no status {found['status']!r:.40}")
    if found["status"] == "pass" and found["checks"] <= 0:
        raise Broken("harness_error", "a pass without a comparison")
    try:
        measures = [Measure(**measure) for measure in found["measures"]]
        loads = [float(measure.load) for measure in measures]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise Broken("harness_error", f"its measures cannot be read: {error}") from error
    if any(load != load for load in loads):
        raise Broken("harness_error", "its measures are not numbers")
    return Result(**found | {"measures": measures})
