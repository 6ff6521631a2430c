"""What a request may ask of sampling."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_core.errors import InvalidArgument, VllmCoreError
from vllm_core.params import MAX_LOGPROBS, MAX_SEQUENCES, SamplingParams


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"n": True}, "n must be a whole number"),
        ({"n": MAX_SEQUENCES + 1}, "n must be at most"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"stop": 5}, "stop must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"banned_token_ids": "5"}, "banned_token_ids must be a list"),
        ({"logit_bias": [5]}, "logit_bias must map"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"min_tokens": -1}, "min_tokens must not be negative"),
        ({"min_tokens": 17}, "min_tokens 17 is above max_tokens 16"),
        ({"temperature": -0.1}, "temperature must not be negative"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_k": 2.0}, "top_k must be a whole number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be between -2 and 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must hold token ids"),
        ({"banned_token_ids": ("a",)}, "banned_token_ids must hold token ids"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3"),
        ({"logit_bias": {-3: 1}}, "logit_bias must hold token ids"),
        ({"allowed_token_ids": ()}, "leaves no token to draw"),
        ({"allowed_token_ids": (1,), "banned_token_ids": (1,)}, "leaves no token to draw"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs must be between 0 and"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be between 0 and"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": 1.0}, "seed must fit 64 bits"),
        ({"stop": ("",)}, "stop must hold strings"),
        ({"n": 2, "temperature": 0.0}, "would draw the same sequence 2 times"),
    ],
)
def test_a_contradiction_is_refused_in_words(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**wrong)
    assert said in str(caught.value)
    assert isinstance(caught.value, (ValueError, VllmCoreError))


@pytest.mark.parametrize("seed", [None, 0, -(2**63), 2**64 - 1])
def test_any_seed_of_64_bits_is_taken(seed: int | None) -> None:
    assert SamplingParams(seed=seed).seed == seed


def test_sequences_are_kept_as_tuples_and_one_stop_string_as_one() -> None:
    given: dict[str, Any] = {"stop": "end", "stop_token_ids": [1, 2], "banned_token_ids": [3]}
    params = SamplingParams(**given)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.banned_token_ids == (3,)


def test_none_means_nothing_where_a_list_is_expected() -> None:
    given: dict[str, Any] = dict.fromkeys(
        ("stop", "stop_token_ids", "banned_token_ids", "allowed_token_ids", "logit_bias")
    )
    assert SamplingParams(**given) == SamplingParams()


def test_a_copy_is_checked_like_a_new_one() -> None:
    params = SamplingParams(temperature=0.5)
    assert params.replace(top_k=3).top_k == 3
    assert params.top_k == 0
    with pytest.raises(InvalidArgument, match="top_p"):
        params.replace(top_p=2.0)
    with pytest.raises(InvalidArgument, match="no field 'topp'"):
        params.replace(topp=0.5)


@pytest.mark.parametrize(
    ("fields", "greedy", "history", "bias"),
    [
        ({}, False, False, False),
        ({"temperature": 0.0}, True, False, False),
        ({"presence_penalty": 0.1}, False, True, False),
        ({"frequency_penalty": -0.1}, False, True, False),
        ({"repetition_penalty": 1.1}, False, True, False),
        ({"logit_bias": {1: 1.0}}, False, False, True),
        ({"banned_token_ids": (1,)}, False, False, True),
        ({"allowed_token_ids": (1,)}, False, False, True),
    ],
)
def test_what_the_device_must_keep_follows_from_the_parameters(
    fields: dict[str, Any], greedy: bool, history: bool, bias: bool
) -> None:
    params = SamplingParams(**fields)
    assert (params.is_greedy, params.needs_history, params.needs_bias) == (greedy, history, bias)
