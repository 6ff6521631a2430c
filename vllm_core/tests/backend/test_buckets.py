"""Which compiled shape covers a step."""

from __future__ import annotations

import pytest

from vllm_core.backend import BucketPolicy
from vllm_core.ops import BucketKey, Features

POLICY = BucketPolicy(
    tokens=(16, 64, 256),
    rows=(4, 16),
    widths=(8, 32),
    features=(Features(), Features(draw=True), Features(draw=True, filters=True, logprobs=20)),
)


@pytest.mark.parametrize(
    ("need", "cover"),
    [
        (BucketKey(1, 1, (1,)), BucketKey(16, 4, (8,))),
        (BucketKey(16, 4, (8, 9)), BucketKey(16, 4, (8, 32))),
        (BucketKey(17, 5, (32, 1)), BucketKey(64, 16, (32, 8))),
        (BucketKey(5, 1, (), Features(draw=True)), BucketKey(16, 4, (), Features(draw=True))),
        (
            BucketKey(5, 1, (), Features(logprobs=0)),
            BucketKey(16, 4, (), Features(draw=True, filters=True, logprobs=20)),
        ),
    ],
)
def test_the_smallest_bucket_that_covers_is_taken(need: BucketKey, cover: BucketKey) -> None:
    assert POLICY.cover(need) == cover


@pytest.mark.parametrize(
    "need",
    [
        BucketKey(257, 1, (1,)),
        BucketKey(1, 17, (1,)),
        BucketKey(1, 1, (1, 33)),
        BucketKey(1, 1, (1,), Features(penalties=True)),
        BucketKey(1, 1, (1,), Features(logprobs=21)),
    ],
)
def test_what_no_bucket_covers_is_said(need: BucketKey) -> None:
    assert POLICY.cover(need) is None


def test_a_policy_of_any_keeps_the_key() -> None:
    key = BucketKey(7, 3, (5, 6), Features(draw=True))
    assert BucketPolicy().cover(key) == key


@pytest.mark.parametrize("field", ["draw", "filters", "penalties", "bias", "keep_hidden"])
def test_features_cover_themselves_and_less(field: str) -> None:
    some, none = Features(**{field: True}), Features()
    assert some.covers(some)
    assert some.covers(none)
    assert not none.covers(some)
