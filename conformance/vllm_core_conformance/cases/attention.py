"""Cases: attention.

Knows: where they are. Does not know: what they do.
"""

from __future__ import annotations

from vllm_core_conformance.case import Case
from vllm_core_conformance.cases import (
    attention_coded,
    attention_count,
    attention_edges,
    attention_numbers,
    attention_poison,
)

CASES: tuple[Case, ...] = (
    attention_coded.CASES
    + attention_count.CASES
    + attention_poison.CASES
    + attention_numbers.CASES
    + attention_edges.CASES
)
