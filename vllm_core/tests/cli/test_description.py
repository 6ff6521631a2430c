"""Facts as text."""

from __future__ import annotations

import pytest

from vllm_core.cli.description import format_bytes, format_description, format_kv_use


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes_are_shown_in_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_description_names_every_fact() -> None:
    text = format_description(
        {
            "backend": "reference",
            "device": "x86_64",
            "reason": "it was named",
            "model": {"name": "tiny", "layers": 2},
            "memory": [("weights", 2**20), ("KV cache", 2**21)],
            "block_size": 16,
            "num_kv_blocks": 1000,
            "kv_tokens": 16000,
            "expected_waste": 0.016,
        }
    )
    assert text.splitlines() == [
        "backend    reference on x86_64",
        "           (it was named)",
        "model      name tiny, layers 2",
        "memory     weights      1.0 MiB",
        "           KV cache     2.0 MiB",
        "KV cache   1,000 blocks of 16 tokens = 16,000 tokens, expected waste 1.6%",
    ]


def test_kv_use_is_a_share_of_the_blocks() -> None:
    stats = {"kv_blocks_total": 200, "kv_blocks_cached": 3}
    assert format_kv_use(50, stats) == "KV cache 50 of 200 blocks (25.0%) in use, 3 kept for reuse"
