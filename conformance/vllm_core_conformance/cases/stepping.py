"""Cases: stepping."""

from __future__ import annotations

from vllm_core_conformance.case import Case

CASES: tuple[Case, ...] = ()
