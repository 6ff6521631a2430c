"""Cases: draws, their statistics, log-probabilities.

Knows: where the cases of each idea are. Does not know: what they do.
"""

from __future__ import annotations

from vllm_core_conformance.case import Case
from vllm_core_conformance.cases import sampling_draws, sampling_logprobs, sampling_statistics

CASES: tuple[Case, ...] = (
    *sampling_draws.CASES,
    *sampling_statistics.CASES,
    *sampling_logprobs.CASES,
)
