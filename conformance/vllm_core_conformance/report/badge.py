"""The badge: a small SVG that says which requirement set was passed, in which class.

Knows: report.json. Does not know: where it will stand.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from vllm_core_conformance.report.markdown import badge_text
from vllm_core_conformance.report.verdict import Report

LABEL = "vllm-core conformance"
COLOURS = {"passed": "#1a7f37", "partial": "#7a6a00", "unverified": "#6e7781", "": "#b42318"}
"""White text on each has a contrast above 4.5."""
CHARACTER = 6.6
"""Pixels; the text is stretched to fit."""


def to_badge(report: Report) -> str:
    text = badge_text(report)
    status = report["verdict"]["status"]
    if status == "passed" and not report["is_whole"]:
        status = "partial"
    colour = COLOURS.get(status, COLOURS[""])
    left, right = (round(len(part) * CHARACTER) + 14 for part in (LABEL, text))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{escape(LABEL)}: {escape(text)}">',
        f"<title>{escape(LABEL)}: {escape(text)}</title>",
        f'<clipPath id="r"><rect width="{left + right}" height="20" rx="3"/></clipPath>',
        '<g clip-path="url(#r)">',
        f'<rect width="{left}" height="20" fill="#30363d"/>',
        f'<rect x="{left}" width="{right}" height="20" fill="{colour}"/></g>',
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" '
        'text-anchor="middle">',
        f'<text x="{left / 2}" y="14" textLength="{left - 12}">{escape(LABEL)}</text>',
        f'<text x="{left + right / 2}" y="14" textLength="{right - 12}">{escape(text)}</text>',
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"
