"""The seam does not change by accident."""

from __future__ import annotations

import difflib
from pathlib import Path

from vllm_core.tests.backend.seam import surface


def test_the_seam_is_the_one_that_was_written_down() -> None:
    kept = (Path(__file__).parent / "seam.txt").read_text()
    changes = "\n".join(
        difflib.unified_diff(
            kept.splitlines(), surface().splitlines(), "seam.txt", "code", lineterm=""
        )
    )
    assert not changes, (
        "the seam changed. If that is meant, raise SEAM_VERSION in vllm_core/backend/interface.py "
        "(unless nothing was released since the last change), mend the page of the seam, and run: "
        "python -m vllm_core.tests.backend.seam > vllm_core/tests/backend/seam.txt\n"
        f"{changes}"
    )
