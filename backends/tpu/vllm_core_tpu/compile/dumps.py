"""Reads what the compiler leaves of a kernel: its final bundles, its buffers, its units' use.

A bundle is what the core issues in one cycle, unless it waits. The innermost loop of the attention
is one turn: the blocks of one buffer are met by the unit's queries.

Knows: the compiler's files, whose form nobody promises. Does not know: what was compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+[A-Z]{0,2}\s*: (>*) ?\{")
ALL_BUNDLES = re.compile(r"-\d+-final_bundles\.txt$")
ANALYSIS = re.compile(r"\d+-(.*)-\d+-schedule-analysis_final_bundles\.txt")
TOP = "TLP"  # the program that calls all others
PALLAS = 'custom_call_target="tpu_custom_call"'
SPILL = re.compile(r"(vst|vld)[^;]*_spill")
BUFFER = re.compile(r"#allocation\d+ \[.*space=vmem, size = (0x[0-9a-f]+), offset")
NOTHING = "the compiler left no schedule; its flags may have changed"


@dataclass(frozen=True)
class Schedule:
    """Facts of one kernel."""

    bundles: int
    turn: int
    """Bundles of the innermost loop."""
    spills: int
    """Vector registers stored away and fetched again: instructions."""
    vmem: int
    """Bytes: scratch, and windows with all their buffers."""
    units: dict[str, float]
    """Share of the issue slots of a turn that each unit uses."""


def read(folder: Path, kernel: str) -> Schedule | None:
    """The kernel's schedule from a folder of dumps; None where there is none."""
    bundles = _file(folder, kernel, "final_bundles.txt")
    buffers = _file(folder, kernel, "post-delay-converter.txt")
    use = _file(folder, kernel, "final_hlo-static-per-bundle-utilization.txt")
    if bundles is None or buffers is None:
        return None
    text = bundles.read_text()
    depths = [len(found[1]) for line in text.splitlines() if (found := BUNDLE.match(line))]
    if not depths:
        return None
    inner = [depth == max(depths) for depth in depths]
    return Schedule(
        bundles=len(depths),
        turn=sum(inner),
        spills=len(SPILL.findall(text)),
        vmem=sum(_buffers(buffers)),
        units=_units(use, inner) if use else {},
    )


def kernels(folder: Path) -> list[str]:
    """Names of the Pallas kernels that were compiled; what is alike stands here once."""
    found = ((ANALYSIS.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    names = [name[1] for name, path in found if name and PALLAS in path.read_text()]
    return [name for name in names if name != TOP]


def read_program(folder: Path) -> Schedule | None:
    """All that a program runs, what is alike once: bundles and spills of everything, turns of its
    kernels, and the VMEM of the kernel that takes most. None where a kernel has no schedule."""
    found = [read(folder, kernel) for kernel in kernels(folder)]
    known = [schedule for schedule in found if schedule is not None]
    if not known or len(known) < len(found):
        return None
    texts = [path.read_text() for path in folder.iterdir() if ALL_BUNDLES.search(path.name)]
    return Schedule(
        bundles=sum(1 for text in texts for line in text.splitlines() if BUNDLE.match(line)),
        turn=sum(schedule.turn for schedule in known),
        spills=sum(len(SPILL.findall(text)) for text in texts),
        vmem=max(schedule.vmem for schedule in known),
        units={},
    )


def _file(folder: Path, kernel: str, kind: str) -> Path | None:
    """The last of its kind: <time>-<kernel>-<number of the pass>-<pass>."""
    pattern = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{re.escape(kind)}")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    return found[-1] if found else None


def _buffers(path: Path) -> Iterator[int]:
    """Bytes of each."""
    for line in path.read_text().splitlines():
        found = BUFFER.search(line)
        if found:
            yield int(found[1], 16)


def _units(path: Path, inner: list[bool]) -> dict[str, float]:
    lines = path.read_text().splitlines()
    start = lines.index("== UTILIZATION:")
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(slots) for slots in lines[2].split()]
    used = [[int(x) for x in line.split()] for line in lines[start + 1 :] if line.strip()]
    if len(used) != len(inner):
        return {}
    turns = [row for row, is_inner in zip(used, inner) if is_inner]
    return {
        name: round(sum(row[at] for row in turns) / (slots * len(turns)), 3)
        for at, (name, slots) in enumerate(zip(names, capacity))
    }
