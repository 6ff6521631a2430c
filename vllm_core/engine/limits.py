"""What one step may hold, and what has happened so far.

Knows: numbers. Does not know: who obeys them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_core.backend import StepConstraints


@dataclass(frozen=True)
class Limits:
    """What the engine and the backend allow in one step."""

    num_rows: int
    token_budget: int
    max_model_len: int
    num_history_slots: int
    num_bias_slots: int
    max_draws: int
    constraints: StepConstraints = field(default_factory=StepConstraints)
    enable_prefix_caching: bool = True
    policy: str = "fcfs"


@dataclass
class Stats:
    """Counters since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_hit_tokens: int = 0
    num_drawn_tokens: int = 0
