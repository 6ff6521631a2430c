"""Facts about an opened engine as text: what was chosen, the memory plan, use of the KV cache.

Knows: the plain data of LLM.describe() and LLM.stats(). Does not know: where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_LABEL_WIDTH = 11


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def format_fields(label: str, lines: Iterable[str]) -> str:
    """The label beside the first line, the others below it."""
    first, *rest = list(lines) or [""]
    return "\n".join(
        [f"{label:<{_LABEL_WIDTH}}{first}", *(" " * _LABEL_WIDTH + line for line in rest)]
    )


def format_description(description: Mapping[str, Any]) -> str:
    """LLM.describe() as a few aligned lines."""
    memory: list[tuple[str, int]] = description["memory"]
    width = max((len(label) for label, _ in memory), default=0)
    blocks, size = description["num_kv_blocks"], description["block_size"]
    model: Mapping[str, object] = description["model"]
    return "\n".join(
        (
            format_fields("backend", [f"{description['backend']} on {description['device']}"]),
            format_fields("", [f"({description['reason']})"]),
            format_fields("model", [", ".join(f"{k} {v}" for k, v in model.items())]),
            format_fields("memory", [f"{k:<{width}}  {format_bytes(v):>10}" for k, v in memory]),
            format_fields(
                "KV cache",
                [
                    f"{blocks:,} blocks of {size} tokens = {description['kv_tokens']:,} tokens, "
                    f"expected waste {description['expected_waste']:.1%}"
                ],
            ),
        )
    )


def format_kv_use(used: int, stats: Mapping[str, Any]) -> str:
    """How full the KV cache was: `used` blocks at its fullest, and what stays for later prompts."""
    total = max(int(stats["kv_blocks_total"]), 1)
    return (
        f"KV cache {used:,} of {total:,} blocks ({used / total:.1%}) in use, "
        f"{stats['kv_blocks_cached']:,} kept for reuse"
    )
