"""What a caller gets back.

Knows: tokens, text, log-probabilities, why a sequence ended. Does not know: how they were made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""stop: end-of-sequence, stop id or stop string; length: max_tokens or the context; abort;
error."""


@dataclass(frozen=True)
class Logprob:
    """One token's natural-log probability under the raw logits."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    token: str | None = None
    """Text of the token alone."""


TokenLogprobs = dict[int, Logprob]
"""By token id: the chosen token and the alternatives asked for."""


@dataclass(frozen=True)
class CompletionOutput:
    """One sequence of a request, so far or finished."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it; None for end-of-sequence."""


@dataclass(frozen=True)
class RequestOutput:
    """One request, so far or finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    is_finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token; the first is None, as nothing precedes it."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    num_preemptions: int = 0
    error: str | None = None
    """Why the request failed, when a finish_reason is "error"."""
