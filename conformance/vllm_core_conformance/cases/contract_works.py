"""Case: everything that is declared works once, and what is not declared is refused or right.

Each thing is exercised by itself in one small step, so that a lie is named by its own bit.

Knows: which scene needs which bit, an oracle. Does not know: kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.backend import AttentionSpec, KVFormat
from vllm_core.errors import NotSupported
from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.cases.attention_check import play_and_verify
from vllm_core_conformance.cases.attention_shapes import batches, shape_of
from vllm_core_conformance.cases.programs_echo import Weights
from vllm_core_conformance.cases.programs_session import Session
from vllm_core_conformance.inputs import REGIMES, fill, lay_out
from vllm_core_conformance.score import CLASSES, require_equal
from vllm_core_conformance.target import Raised, Target, calling, wide

SCENES = {
    "return_lse": "mixed",
    "windows": "window_short",
    "sinks": "sinks",
    "softcap": "softcap",
    "max_head_dim": "softcap_window",
}
"""Bit -> shape (attention_shapes) that needs it; all are compiled for other cases too."""
ALSO = {"max_head_dim": ("softcap", "windows")}
"""Bits that a scene needs beside its own."""
LOGIT_ROWS = 200


def exercise(target: Target, rng: np.random.Generator, when: str) -> Evidence:
    """Each optional thing of attention, then logits of many rows."""
    evidence, known = Evidence(), tuple(CLASSES)
    require(
        target.caps.numeric_class in known,
        f"caps.numeric_class is {target.caps.numeric_class!r}; known are {', '.join(known)}",
    )
    target.constraints()  # no scene can be made for limits that no step keeps to
    target.block_tokens(AttentionSpec(4, 2, 64, 64, 0.1, KVFormat(target.dtype), group=0))
    for bit in SCENES:
        if all(getattr(target.caps, other) for other in ALSO.get(bit, ())):
            evidence += _scene(target, rng, bit, when)
    evidence += _logit_rows(target, rng, when)
    return evidence


def _scene(target: Target, rng: np.random.Generator, bit: str, when: str) -> Evidence:
    shape = shape_of(target, SCENES[bit])  # with an lse only where that is declared
    if bit == "return_lse":
        shape = replace(shape, return_lse=True)
    value = getattr(target.caps, bit)
    is_declared = value >= shape.dim if bit == "max_head_dim" else bool(value)
    size, evidence = shape.block_tokens, Evidence()
    rows = [(int(rng.integers(3, 20)), 1), (int(rng.integers(4, size + 4)), 5)]
    for step in batches(target, rows):
        layout = lay_out(shape, rng, step)
        scene = fill(layout, rng, REGIMES["normal"], target.round, target.dtype)
        what = f"{bit} {'declared' if is_declared else 'not declared, but accepted'}{when}"
        try:
            evidence += play_and_verify(target, scene, what)
        except Raised as raised:
            if is_declared or not isinstance(raised.error, NotSupported):
                raise
            evidence.checks += 1
            return evidence  # refused, as it may be
    return evidence


def _logit_rows(target: Target, rng: np.random.Generator, when: str) -> Evidence:
    """As many rows of logits as are declared, of small whole numbers: exact."""
    count = min(LOGIT_ROWS, target.caps.max_logit_rows or LOGIT_ROWS)
    hidden = rng.integers(-4, 5, (count, 16)).astype(np.float64)
    hidden[:, 0] = 4  # no row of zeros
    weight = rng.integers(-4, 5, (24, 16)).astype(np.float64)
    param = target.param("linear", {"weight": weight}, "head")

    def fn(x: Any, p: Any) -> tuple[Any, ...]:
        return (target.ops.logits(x, p),)

    (out,) = target.call("works logits", fn, target.array(hidden), param)
    what = f"logits of {count} rows, which max_logit_rows allows{when}"
    return require_equal(wide(out) + 0.0, hidden @ weight.T + 0.0, what, axes=("row", "id"))


def require_steady(target: Target, when: str) -> Evidence:
    """What is declared stays what it was; an eager device compiles nothing."""
    now = target.runtime.caps
    require(
        now == target.caps, f"caps {when} are {now}; when it was opened they were {target.caps}"
    )
    with calling("buckets"):
        first, second = (target.runtime.buckets(96, 8, 12) for _ in range(2))
    require(
        first == second,
        f"buckets(96, 8, 12) {when} are {first} and then {second}: no bucket would be met again",
    )
    compiled = target.runtime.num_compilations()
    require(
        target.is_static or compiled == 0,
        f"num_compilations is {compiled} {when}, but no static shapes are declared: every new "
        "shape would cost a compilation that nobody plans for",
    )
    return Evidence(checks=3)


def require_equal_caps(target: Target) -> Evidence:
    """Two more runtimes of the same dtype declare the same."""
    for number in (2, 3):
        other = target.fresh()
        found = other.caps
        other.close()
        if found != target.caps:
            raise Failed(
                f"runtime {number} in {target.dtype} declares {found}, the first one {target.caps}"
            )
    return Evidence(checks=2)


def works(target: Target, rng: np.random.Generator) -> Evidence:
    """Each declared bit in this dtype; each dtype opens; what is declared stays."""
    evidence = exercise(target, rng, "")
    evidence += require_steady(target, "after each declared thing was used once")
    evidence += require_equal_caps(target)
    return evidence


def two_runtimes(target: Target, rng: np.random.Generator) -> Evidence:
    """Two runtimes open at once, their steps in turn: each computes its own."""
    evidence, other = Evidence(), target.fresh()
    both = [(t, Weights.make(t, rng), Session(t, rng)) for t in (target, other)]
    steps = []
    for number in range(4):
        for which, (_, weights, session) in enumerate(both):
            if number == 0:
                session.admit(3, 4 + which)
                session.admit(which, 2)
                work = [(3, 4 + which), (which, 2)]
            else:
                work = [(which, 1), (3, 1)]
            steps.append((which, session, session.submit(work, weights)))
    for which, session, pending in steps:
        evidence += session.check(pending, when=f" of runtime {which} of two")
    for which, (_, weights, session) in enumerate(both):
        evidence += session.check_state(f" of runtime {which} of two")
        evidence += session.check_cache(weights, f" of runtime {which} of two")
    for t, _, _ in both:
        evidence += require_steady(t, "after steps of two runtimes")
    other.close()
    evidence += require_equal_caps(target)
    return evidence
