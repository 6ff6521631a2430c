"""The process in which the vendor's code runs: opens the backend, runs cases, answers in JSON.

    python -m vllm_core_conformance.worker '{"requests": 5, "replies": 6, "life": 7, ...}'

Requests and replies are lines on pipes of their own, since a vendor's code prints; its standard
output is a log that the supervisor keeps. Every reply carries the ticket of its request.

Knows: the pipes, how to open and run. Does not know: time limits, which cases make a profile.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import os
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_core_conformance.case import Case
    from vllm_core_conformance.target import Source, Target

MAX_TEXT = 8_000
"""Characters of one text in a reply; the middle is left out."""


def main(argv: list[str]) -> None:
    options = json.loads(argv[1])
    _guard(options["life"])  # before anything is imported that might start a thread
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks where a case hangs
    sys.path += [entry for entry in options["path"] if entry not in sys.path]
    worker = Worker(options["backend"], options["cases"])
    with open(options["requests"], "rb") as requests:
        for line in requests:
            request = json.loads(line)
            reply = worker.answer(request)
            sys.stdout.flush()
            _send(options["replies"], reply | {"ticket": request["ticket"]})
            if reply["kind"] == "closed":
                break
    os._exit(0)  # what a framework does at exit is no part of any case


def _guard(life: int) -> None:
    """Starts a process beside this one that ends the whole group when the supervisor is gone,
    even while this one hangs without the interpreter's lock."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os.close(life)
        return
    if os.fork():
        os._exit(0)  # the guard is nobody's child, so that no vendor's `wait` meets it
    os.closerange(3, life)
    os.closerange(life + 1, life + 256)
    os.read(life, 1)  # ends when the other end is closed
    os.killpg(0, signal.SIGKILL)


def _send(file: int, reply: dict[str, Any]) -> None:
    data = json.dumps(plain(reply), allow_nan=False).encode() + b"\n"
    while data:
        data = data[os.write(file, data) :]


class Worker:
    """Answers one request after the other."""

    def __init__(self, backend: str, cases: str) -> None:
        self._backend = backend
        self._cases_module = cases
        self._cases: dict[str, Case] = {}
        self._source: Source | None = None
        self._targets: dict[str, Target] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Never raises for what the vendor's code does."""
        answers = {
            "describe": self._describe,
            "open": self._open,
            "run": self._run,
            "close": self._close,
        }
        try:
            return answers[request["do"]](request)
        except Exception as error:
            return _opening_failed(error)
        except BaseException as error:  # SystemExit and the like end a process: ours goes on
            said = f"{type(error).__name__}({', '.join(map(repr, error.args))})"
            sentence = f"the backend raised {said}, which ends the process that calls it"
            return {"kind": "died", "status": "crash", "sentence": sentence}

    # ---- opening
    def _target(self, dtype: str) -> Target:
        from vllm_core_conformance.sources import resolve
        from vllm_core_conformance.target import Target

        if self._source is None:
            self._source = resolve(self._backend)
            # with the opening, so that importing costs no case its time
            self._cases = dict(importlib.import_module(self._cases_module).all_cases())
        found = self._targets.get(dtype)
        if found is None:
            found = Target(self._source, dtype)
            self._targets[dtype] = found
            self._targets.setdefault(found.dtype, found)
        return found

    def _describe(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm_core_conformance.sources import devices_of, plain_capabilities

        target = self._target("auto")
        source = target.source
        facts = {
            "name": source.name,
            "distribution": source.distribution,
            "version": source.version,
            "summary": source.info.summary if source.info else "",
            "devices": devices_of(source),
            "capabilities": plain_capabilities(target.caps),
            "dtype": target.dtype,
            "packages": loaded_versions(),
        }
        return {"kind": "described", "status": "ok", "facts": facts}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self._target(request["dtype"])
        if request["dtype"] not in ("auto", target.dtype):
            sentence = f"opened with dtype {request['dtype']}, the runtime says {target.dtype}"
            return {"kind": "opened", "status": "capability_lie", "sentence": sentence}
        return {"kind": "opened", "status": "ok", "dtype": target.dtype}

    # ---- cases
    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        from vllm_core_conformance.outcome import execute

        target = self._targets[request["dtype"]]
        result = execute(self._cases[request["case"]], target, request["seed"])
        return {"kind": "result", "result": asdict(result)}

    def _close(self, request: dict[str, Any]) -> dict[str, Any]:
        faults = []
        for target in dict.fromkeys(self._targets.values()):
            try:
                target.close()
            except Exception as error:
                faults.append(str(error))
        return {"kind": "closed", "faults": faults}


def _opening_failed(error: Exception) -> dict[str, Any]:
    import traceback

    from vllm_core_conformance.sources import NoDevice, Unknown

    status = "fail"
    sentence = f"{type(error).__name__}: {error}"
    if isinstance(error, (NoDevice, Unknown)):
        status, sentence = "unverified" if isinstance(error, NoDevice) else "unknown", str(error)
    text = "".join(traceback.format_exception(error))
    return {"kind": "failed", "status": status, "sentence": sentence, "traceback": text}


def loaded_versions() -> dict[str, str]:
    """Of every package that is imported by now and says its version."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        version = getattr(module, "__version__", None)
        is_foreign = "." not in name and name not in sys.stdlib_module_names
        if is_foreign and not name.startswith("_") and isinstance(version, str):
            found[name] = version
    return found


def plain(value: Any) -> Any:
    """Data that JSON holds: no NaN, no numpy; what is none of that becomes text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        half = MAX_TEXT // 2
        return value if len(value) <= MAX_TEXT else f"{value[:half]}\n[...]\n{value[-half:]}"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    for convert in ("tolist", "item"):
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    return str(value)[:MAX_TEXT]


if __name__ == "__main__":
    main(sys.argv)
