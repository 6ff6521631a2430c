"""One worker process seen from outside: starts it, asks it, reads its answers, ends it.

Whatever is no proper answer is `Broken`: nothing that a worker says is taken on trust.

Knows: pipes, process groups, signals. Does not know: cases, what to do next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_REPLY = 32 * 2**20
"""Bytes; a longer answer is garbage."""
TAIL = 2_000
"""Characters of a worker's own output that go into a result."""
STACK_SECONDS = 0.3
"""So long a hanging worker may take to say where it hangs."""


class Broken(Exception):
    """The worker did not answer as it must. `status` is that of the case it was at; `also_before`:
    the answer before this one is doubtful too."""

    def __init__(self, status: str, sentence: str, *, also_before: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.also_before = status, sentence, also_before


@dataclass
class Awaited:
    """The request that a worker is at."""

    ticket: int
    kind: str
    begin: float
    limit: float


class WorkerProcess:
    """Alive from construction until `kill`."""

    def __init__(self, number: int, backend: str, cases: str, path: Sequence[str]) -> None:
        self.number = number
        self.awaited: Awaited | None = None
        self._tickets = 0
        self._buffer = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)  # it is emptied between requests
        requests, self._requests = os.pipe()
        self.replies, replies = os.pipe()
        life, self._life = os.pipe()
        options = {
            "requests": requests,
            "replies": replies,
            "life": life,
            "backend": backend,
            "cases": cases,
            "path": list(path),
        }
        arguments = ["-u", "-m", "vllm_core_conformance.worker", json.dumps(options)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(requests, replies, life),
                start_new_session=True,  # a group to kill as one, which Ctrl-C does not reach
            )
        finally:
            for end in (requests, replies, life):
                os.close(end)
        os.set_blocking(self.replies, False)

    # ---- asking
    def ask(self, what: dict[str, Any], kind: str, limit: float) -> None:
        """Sends a request whose answer must be of `kind` and come within `limit` seconds."""
        self._tickets += 1
        self.awaited = Awaited(self._tickets, kind, time.monotonic(), limit)
        self._log.truncate(0)
        line = json.dumps(what | {"ticket": self._tickets}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it died since; reading says so
            os.write(self._requests, line)

    @property
    def deadline(self) -> float | None:
        return self.awaited.begin + self.awaited.limit if self.awaited else None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.awaited.begin if self.awaited else 0.0

    # ---- listening
    @property
    def has_ended(self) -> bool:
        """The process has; its pipe may be held open by a child of its own."""
        return self._process.poll() is not None

    def read(self) -> dict[str, Any] | None:
        """The answer, once it is complete; Broken when the worker died or said something else."""
        ended = self.has_ended  # before reading: what it said last is in the pipe
        while True:
            try:
                data = os.read(self.replies, 2**16)
            except BlockingIOError:
                break
            if not data:
                ended = True
                break
            self._buffer += data
            if len(self._buffer) > MAX_REPLY:
                raise Broken("harness_error", "the worker's answer has no end")
        line, newline, rest = self._buffer.partition(b"\n")
        if newline:
            self._buffer = rest
            return self._checked(line, rest)
        if ended:
            raise Broken("crash", self._obituary())
        return None

    def _checked(self, line: bytes, rest: bytes) -> dict[str, Any]:
        awaited, self.awaited = self.awaited, None
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            said = line[:80].decode("utf-8", "replace")
            raise Broken("harness_error", f"the worker's answer is no answer: {said!r}")
        if awaited is None:
            raise Broken("harness_error", "the worker spoke without being asked", also_before=True)
        if reply.get("ticket") != awaited.ticket:
            raise Broken(
                "harness_error",
                f"the worker answered request {reply.get('ticket')!r}, but was at "
                f"{awaited.ticket}: one of them was answered twice",
                also_before=True,
            )
        if rest:
            raise Broken("harness_error", "the worker answered twice")
        if reply.get("kind") == "died":
            raise Broken("crash", str(reply.get("sentence")))
        if reply.get("kind") not in (awaited.kind, "failed"):
            raise Broken("harness_error", f"the worker answered with {reply.get('kind')!r}")
        return reply

    def _obituary(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe and lives on"
        if code < 0:
            more = ", as it does when memory runs out" if code == -signal.SIGKILL else ""
            return f"the worker process died of {signal.Signals(-code).name}{more}"
        return f"the worker process ended with exit code {code} in the middle of its work"

    def tail(self) -> str:
        """The last lines that the vendor's code printed since the last request."""
        size = os.fstat(self._log.fileno()).st_size
        data = os.pread(self._log.fileno(), 4 * TAIL, max(0, size - 4 * TAIL))
        return data.decode("utf-8", "replace")[-TAIL:]

    # ---- ending
    def ask_for_stack(self) -> None:
        """A hanging worker writes where it is into its log."""
        size = os.fstat(self._log.fileno()).st_size
        try:
            os.kill(self._process.pid, signal.SIGUSR1)
        except ProcessLookupError:
            return
        until = time.monotonic() + STACK_SECONDS
        while time.monotonic() < until:
            time.sleep(0.02)
            if os.fstat(self._log.fileno()).st_size > size:
                time.sleep(0.05)
                return

    def kill(self) -> None:
        """The process and everything that it started; at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._requests, self.replies, self._life):
            os.close(end)
        self._log.close()
