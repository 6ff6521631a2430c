"""Commands that the tests of the CPU backend start.

Knows: processes. Does not know: compilers, kernels.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BACKEND = Path(__file__).resolve().parents[1]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` with `environment` added to ours; never raises for an exit code."""
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | environment,
    )
