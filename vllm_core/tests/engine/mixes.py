"""Random mixes of requests and engines, for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vllm_core.backend import StepConstraints
from vllm_core.engine.request import Request
from vllm_core.tests.engine.tiny import (
    FULL,
    TWO_GROUPS,
    TWO_POOLS,
    VOCAB,
    Setup,
    make_request,
)

PREFIXES: tuple[list[int], ...] = ([], [7, 8, 9, 10, 11], list(range(20, 36)))
"""Starts that prompts may share."""

LONGEST = 16 + 8 + 16
"""Longest prompt and answer of a mix."""

tokens = st.integers(0, VOCAB - 1)


@st.composite
def sampling(draw: Any, plain: bool) -> dict[str, Any]:
    """Keyword arguments of SamplingParams; plain: greedy, nothing but stop ids."""
    params: dict[str, Any] = {
        "max_tokens": draw(st.sampled_from((1, 3, 8, 16, 16))),
        "seed": draw(st.integers(0, 9)),
    }
    params["temperature"] = 0.0
    if draw(st.booleans()):
        params["stop_token_ids"] = tuple(draw(st.lists(tokens, max_size=6)))
    params["ignore_eos"] = draw(st.booleans())
    if plain:
        return params
    if draw(st.booleans()):
        params["min_tokens"] = draw(st.integers(0, params["max_tokens"]))
    if draw(st.booleans()):
        params["temperature"] = draw(st.sampled_from((0.5, 1.0, 1.7)))
        params["n"] = draw(st.sampled_from((1, 1, 2, 3)))
        params["top_k"] = draw(st.sampled_from((0, 1, 5, 40)))
        params["top_p"] = draw(st.sampled_from((1.0, 0.9, 0.3)))
        params["min_p"] = draw(st.sampled_from((0.0, 0.05)))
    if draw(st.integers(0, 2)) == 0:
        params["repetition_penalty"] = draw(st.sampled_from((1.0, 1.3, 0.8)))
        params["presence_penalty"] = draw(st.sampled_from((0.0, 0.7)))
        params["frequency_penalty"] = draw(st.sampled_from((0.0, 0.9)))
    if draw(st.integers(0, 2)) == 0:
        params["logit_bias"] = draw(
            st.dictionaries(tokens, st.sampled_from((-3.0, 4.0)), max_size=3)
        )
        params["banned_token_ids"] = tuple(draw(st.lists(tokens, max_size=3)))
    if draw(st.integers(0, 2)) == 0:
        params["logprobs"] = draw(st.sampled_from((0, 3)))
    if draw(st.integers(0, 3)) == 0:
        params["prompt_logprobs"] = draw(st.sampled_from((0, 2)))
    return params


@st.composite
def requests(draw: Any, num_alternatives: int | None = None) -> list[Request]:
    """With num_alternatives each reports as many, and three of four are plain."""
    found = []
    for i in range(draw(st.integers(2, 7))):
        prompt = draw(st.sampled_from(PREFIXES)) + draw(st.lists(tokens, min_size=1, max_size=8))
        priority = draw(st.integers(0, 2))
        is_plain = num_alternatives is not None and draw(st.integers(0, 3)) > 0
        params = draw(sampling(is_plain))
        if num_alternatives is not None:
            params["logprobs"] = num_alternatives
        found.append(make_request(prompt, f"r{i}", priority, **params))
    return found


constraints = st.builds(
    StepConstraints,
    mixed_ok=st.booleans(),
    max_prefills=st.sampled_from((None, 1, 2)),
    chunk_multiple=st.sampled_from((1, 1, 2, 4)),
    max_tokens=st.sampled_from((None, None, 7)),
)


@st.composite
def setups(draw: Any, constrained: bool = True) -> Setup:
    """Engines whose cache holds one longest sequence, or a little more."""
    windows = draw(st.sampled_from((FULL, TWO_GROUPS, TWO_POOLS)))
    block_tokens = draw(st.sampled_from((1, 2, 4, 8, 16)))
    longest = -(-LONGEST // block_tokens) * (2 if windows == TWO_GROUPS else 1) + 1
    slack = draw(st.sampled_from((0, 1, 3, longest, 10 * longest)))
    num_rows = draw(st.integers(1, 6))
    return Setup(
        windows=windows,
        block_tokens=block_tokens,
        num_blocks=longest + slack,
        num_rows=num_rows,
        token_budget=draw(st.sampled_from((5, 8, 17, 64))),
        enable_prefix_caching=draw(st.booleans()),
        is_async=draw(st.booleans()),
        policy=draw(st.sampled_from(("fcfs", "priority"))),
        max_draws=draw(st.sampled_from((None, 1, 2))),
        num_slots=draw(st.sampled_from((None, 1))),
        constraints=draw(constraints) if constrained else StepConstraints(),
    )
