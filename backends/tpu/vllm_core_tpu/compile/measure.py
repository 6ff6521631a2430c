"""Compiles what is asked for, one process per target, and gathers what each says.

A process per target, because libtpu reads its flags once and a crash of the compiler takes the
process with it.

Knows: processes, folders. Does not know: compilers, budgets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_core_tpu.compile import targets

Facts = dict[str, Any]


def measure(target: str, module: str, work: Sequence[str]) -> Iterator[Facts]:
    """What `python -m MODULE TARGET DUMPS *work` prints, line by line: {kind, step, target, ...}.

    What the process died over has an `error` instead of figures.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-core-compile-") as folder:
        dump, log = Path(folder) / "dump", Path(folder) / "log"
        dump.mkdir()
        inherited = dict(os.environ)  # noqa: TID251 (handed on, not read)
        left = list(work)
        with (
            log.open("w") as errors,
            subprocess.Popen(
                [sys.executable, "-m", module, target, str(dump), *work],
                env=inherited | targets.environment(dump),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as child,
        ):
            try:
                yield from _lines(child, left)
            finally:
                child.kill()  # where nobody reads on; one that has ended is left alone
            status = child.wait()
        last = " ".join(log.read_text(errors="replace").split())[-500:]
        for item in left:
            kind, step = item.split(":")
            error = f"the compiling process ended with status {status}: {last}"
            yield {"kind": kind, "step": step, "target": target, "error": error}


def _lines(child: subprocess.Popen[str], left: list[str]) -> Iterator[Facts]:
    """What it prints as long as it does; takes from `left` what came, and waits for its end."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            facts: Facts = json.loads(line)
            left.remove(f"{facts['kind']}:{facts['step']}")
            yield facts
    child.wait()
