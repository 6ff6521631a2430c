"""Bars of a comparison, as SVG: a group per row of work, a bar per engine.

    python backends/cpu/bench/plot.py peers.json peers.svg

Bars of a group are relative to its fastest engine, so that seconds and tokens per second stand in
one picture; figures stand on the bars, how many times ours is ahead of the best peer on the group.

Knows: the JSON of peers.py. Does not know: engines.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from peers import figure_of, lead_of

BAR, GAP, HEIGHT = 34, 26, 200
TOP, BOTTOM, SIDE = 88, 46, 20
COLOURS = ("#1f5fbf", "#e08a2e", "#7a9e5b", "#a56bb0", "#8a8a8a")


def text(x: float, y: float, words: str, size: int = 11, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {more}>{escape(words)}</text>'


def draw(summary: dict[str, Any]) -> str:
    """The whole picture."""
    names, rows = list(summary["engines"]), summary["rows"]
    group = BAR * len(names) + GAP
    width = max(2 * SIDE + group * len(rows), 2 * SIDE + 110 * len(names), 560)
    base = TOP + HEIGHT
    model, weights = summary["model"], summary["weights"]
    about = f"{model}, {weights} weights, {summary['threads']} threads, {summary['date']}"
    parts = [text(SIDE, 20, f"{about}: speed, medians", 13, 'font-weight="bold"')]
    for index, name in enumerate(names):
        x, colour = SIDE + 110.0 * index, COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{x:.0f}" y="30" width="11" height="11" fill="{colour}"/>')
        parts.append(text(x + 16, 40, name))
    for number, row in enumerate(rows):
        figure, unit = figure_of(row)
        values = {name: summary["medians"][name][row][figure] for name in names}
        speeds = {n: v if unit == "tok/s" else 1 / v for n, v in values.items()}
        left, lead = SIDE + GAP / 2 + group * number, lead_of(values, unit)
        middle = left + BAR * len(names) / 2
        for index, name in enumerate(names):
            tall = HEIGHT * speeds[name] / max(speeds.values())
            x, colour = left + BAR * index, COLOURS[index % len(COLOURS)]
            parts.append(
                f'<rect x="{x + 2:.1f}" y="{base - tall:.1f}" width="{BAR - 4}" '
                f'height="{tall:.1f}" fill="{colour}"/>'
            )
            shown = f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:.1f}"
            parts.append(text(x + BAR / 2, base - tall - 4, shown, 9, 'text-anchor="middle"'))
        label = 'text-anchor="middle" font-weight="bold"'
        if lead is not None:
            parts.append(text(middle, TOP - 18, f"{lead:.2f}×", 12, label))
        first, _, rest = row.partition(", ")
        parts.append(text(middle, base + 16, f"{first}, {unit}", 11, 'text-anchor="middle"'))
        parts.append(text(middle, base + 30, rest, 10, 'text-anchor="middle"'))
    parts.append(f'<path d="M{SIDE} {base}H{width - SIDE}" stroke="#444" fill="none"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {base + BOTTOM}" '
        f'width="{width}" font-family="sans-serif" fill="#222">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    source, target = sys.argv[1:]
    Path(target).write_text(draw(json.loads(Path(source).read_text())))


if __name__ == "__main__":
    main()
