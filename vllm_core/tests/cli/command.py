"""Runs `vllm-core` as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import vllm_core

TREE = Path(vllm_core.__file__).parents[1]


def run_command(
    *arguments: str, stdin: str = "", before: str = "", extra_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`before`: Python that runs ahead of it; `extra_path`: searched for plug-ins first."""
    path = [str(extra_path)] if extra_path else []
    script = f"import sys\n{before}\nfrom vllm_core.cli.main import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(TREE)])},
        timeout=120,
        check=False,
    )
