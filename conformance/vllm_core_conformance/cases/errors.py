"""Cases: refusals. Of the right kind, in words that help, and the runtime works afterwards.

Windows, softcap, sinks and lse that are not declared are judged where they are computed (attention,
by `needs`). Reserved fields of a spec are refused by the core before any backend sees them.

Knows: kinds of errors, what must be refused. Does not know: numbers, but for heads of odd shapes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import AttentionSpec, Capabilities, KVFormat, OpenConfig
from vllm_core.errors import InvalidArgument, NotSupported, VllmCoreError
from vllm_core.ops import ParamSpec, Part
from vllm_core_conformance import score
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.attention_shapes import batches
from vllm_core_conformance.cases.contract_works import (
    exercise,
    require_equal_caps,
    require_steady,
)
from vllm_core_conformance.cases.programs_echo import Weights
from vllm_core_conformance.cases.programs_session import Session, healthy
from vllm_core_conformance.oracle import attention as oracle
from vllm_core_conformance.steps import Scene, Shape, play
from vllm_core_conformance.target import Raised, Target, calling, wide

Numbers = NDArray[Any]
Body = Callable[[Target, np.random.Generator], Evidence]

RESERVED = (
    "tier", "max_drafts", "compact_tables", "q_pos", "tree", "bidirectional", "shard"
)  # fmt: skip
"""Bits that this seam knows by name only."""
SHORTEST = 15
"""Characters of a message that says what was wanted and what to change."""


def _refused(
    what: str, kind: type[VllmCoreError], call: Callable[[], object], *names: str
) -> Evidence:
    """call() raises `kind` with a message that names one of `names`, if there are any."""
    try:
        with calling(what):
            call()
    except Raised as raised:
        error = raised.error
    else:
        raise Failed(f"{what} seemed to work; expected {kind.__name__}")
    require(
        isinstance(error, kind),
        f"{what} raised {type(error).__name__} ({_first(error)!r}); expected {kind.__name__}, so "
        "that the caller can tell a refusal from a defect",
    )
    require(
        len(str(error)) > SHORTEST,
        f"{what} was refused with {str(error)!r}: say what was wanted and what to change",
    )
    require(
        not names or any(name in str(error) for name in names),
        f"{what} was refused with {_first(error)!r}, which names none of {', '.join(names)}",
    )
    return Evidence(checks=3)


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _scene(target: Target, shape: Shape, rng: np.random.Generator) -> Scene:
    """Two rows, one decoding and one with a cached prefix; one of them where a step may not hold
    both."""
    rows = batches(target, [(17, 1), (5, 6)])[-1]
    cached, query = (np.array(x) for x in zip(*rows, strict=True))
    total, dim_v = int(query.sum()), shape.dim_v or shape.dim
    heads = (shape.num_blocks, shape.layers, shape.block_tokens, shape.num_kv_heads)

    def normal(*size: int) -> Numbers:
        return target.round(rng.normal(size=size))

    blocks = rng.permutation(np.arange(1, shape.num_blocks))[: len(rows) * shape.width]
    return Scene(
        shape,
        state_rows=np.array([1, 0])[: len(rows)],
        cached=cached,
        query=query,
        tables=blocks.reshape(len(rows), shape.width).astype(np.int32),
        keys=normal(*heads, shape.dim),
        values=normal(*heads, dim_v),
        q=normal(total, shape.num_q_heads, shape.dim),
        k=normal(total, shape.num_kv_heads, shape.dim),
        v=normal(total, shape.num_kv_heads, dim_v),
        sinks=normal(shape.num_q_heads) if shape.sinks else None,
    )


def _shape(target: Target, dim: int, **more: Any) -> Shape:
    spec = AttentionSpec(4, 2, dim, dim, 0.3, KVFormat(target.dtype), group=0)
    size = target.usual_block(spec)
    width = -(-18 // size)  # of the longest row of `_scene`
    return Shape(
        num_q_heads=4,
        num_kv_heads=2,
        dim=dim,
        block_tokens=size,
        num_blocks=2 * width + 4,
        tokens=min(8, target.constraints().max_tokens or 8),
        rows=2,
        width=width,
        scale=0.3,
        **more,
    )


def lse_with_sinks(target: Target, rng: np.random.Generator) -> Evidence:
    """return_lse with sinks: InvalidArgument, from the call or from the wait."""
    evidence = _sinks_with_lse(target, rng)
    evidence += healthy(target, int(rng.integers(1000)), "return_lse with sinks was refused")
    return evidence


def unknown_scheme(target: Target, rng: np.random.Generator) -> Evidence:
    """A weight in a scheme that is not declared is refused, alone or as a part of a fused one."""
    scheme = "ternary_w2a7_of_nobody"
    weight = target.round(rng.normal(size=(8, 16))).astype(np.float32)
    spec = ParamSpec("layer.7.qkv", (16, 16), "linear")
    unknown, dense = (Part(s, {"weight": weight}, 8) for s in (scheme, "dense"))
    evidence = Evidence()
    for parts in ([unknown, unknown], [dense, unknown]):
        evidence += _refused(
            f"load of a weight whose parts are {' and '.join(p.scheme for p in parts)}",
            NotSupported,
            lambda parts=parts: target.runtime.load(spec, parts),  # type: ignore[misc]
            scheme,
            spec.name,
        )
    param = target.load(spec, [dense, dense])
    with calling("unload"):
        found = target.runtime.unload(param)
    evidence += score.require_equal(
        wide(found["weight"]),
        wide(np.concatenate((weight, weight))),
        "a dense weight loaded after others were refused",
        axes=("out", "in"),
    )
    return evidence


def reserved(target: Target, rng: np.random.Generator) -> Evidence:
    """Reserved bits are not declared; update and transfer are refused, or right."""
    evidence = Evidence()
    usual = Capabilities(dtypes=frozenset(), default_dtype="")
    for name in RESERVED:
        value, default = getattr(target.caps, name), getattr(usual, name)
        require(
            value == default,
            f"caps.{name} is {value!r}, but it is reserved: nothing in the seam serves it yet",
        )
        evidence.checks += 1
    unknown = target.caps.kv_dtypes - {"int8"}
    require(
        not unknown,
        f"caps.kv_dtypes names {', '.join(sorted(unknown))}, which is reserved: int8 is what the "
        "seam defines",
    )
    evidence.checks += 1
    evidence += _reserved_calls(target, rng)
    return evidence


def _reserved_calls(target: Target, rng: np.random.Generator) -> Evidence:
    """By a backend ahead of its time they may work."""
    weight = target.round(rng.normal(size=(8, 16)))
    newer = target.round(rng.normal(size=(8, 16)))
    param = target.param("linear", {"weight": weight})
    x = target.array(weight)
    evidence = Evidence()

    def update() -> Numbers:
        part = Part("dense", {"weight": newer.astype(np.float32)}, 8)
        new = target.runtime.update(param, [part])
        return wide(target.runtime.unload(new)["weight"])

    def transfer() -> Numbers:
        (found,) = target.fetch((target.runtime.transfer(x, 0),))
        return wide(found)

    for what, call, want in (("update of a weight", update, newer), ("transfer", transfer, weight)):
        try:
            with calling(what):
                found = call()
        except Raised as raised:
            require(
                isinstance(raised.error, NotSupported) and len(str(raised.error)) > SHORTEST,
                f"{what} is reserved and raised {type(raised.error).__name__} "
                f"({_first(raised.error)!r}); expected NotSupported that says what to do instead",
            )
            evidence.checks += 1
        else:
            evidence += score.require_equal(found, want, f"{what}, which did not refuse")
    return evidence


def middle(target: Target, rng: np.random.Generator) -> Evidence:
    """Refusals while a session runs: each of its kind, whatever went before, and nothing of them
    stays. Then all that is declared works as if nothing had been."""
    weights, session = Weights.make(target, rng), Session(target, rng)
    session.admit(2, 5)
    session.admit(4, 2)
    evidence = session.check(session.submit([(2, 5), (4, 2)], weights))
    for what, refuse in (
        ("a weight of an unknown scheme", _unknown_scheme_again),
        ("dtypes that nobody has", _unknown_dtypes),
        ("sinks with return_lse", _sinks_with_lse),
        ("dtype auto", _auto),
        ("an unknown axis", _unknown_axis),
        ("what is reserved", _reserved_calls),
    ):
        before = session.submit([(4, 1), (2, 1)], weights)
        evidence += refuse(target, rng)
        evidence += session.check(before, when=f" submitted before {what} was refused")
        after = session.submit([(2, 1), (4, 1)], weights)
        evidence += session.check(after, when=f" after {what} was refused")
    evidence += session.check_state(" after refusals")
    evidence += session.check_cache(weights, " after refusals")
    evidence += exercise(target, rng, " after refusals of other things")
    evidence += require_steady(target, "after refusals")
    evidence += require_equal_caps(target)
    return evidence


def _unknown_scheme_again(target: Target, rng: np.random.Generator) -> Evidence:
    part = Part("q3_nobody", {"weight": target.round(rng.normal(size=(32, 4, 16)))}, 32)
    spec = ParamSpec("layer.2.experts", (32, 4, 16), "experts")
    what = "load of experts of an unknown scheme"
    return _refused(what, NotSupported, lambda: target.runtime.load(spec, [part]), "q3_nobody")


def _unknown_dtypes(target: Target, rng: np.random.Generator) -> Evidence:
    evidence = Evidence()
    for dtype in ("float80_of_nobody", "int16"):
        config = OpenConfig(dtype=dtype, checkpoint_dtype="float32", threads=1)
        what = f"opening with dtype {dtype!r}"
        evidence += _refused(what, NotSupported, partial(target.source.open, config))
    return evidence


def _sinks_with_lse(target: Target, rng: np.random.Generator) -> Evidence:
    """Judged where both are declared; without either, any refusal that the core knows will do."""
    both = target.caps.sinks and target.caps.return_lse
    kind = InvalidArgument if both else VllmCoreError
    scene = _scene(target, _shape(target, 32, sinks=True, return_lse=True), rng)
    return _refused("attention with sinks and return_lse", kind, lambda: play(target, scene))


def _auto(target: Target, rng: np.random.Generator) -> Evidence:
    """auto is a declared dtype, also beside a runtime that works in another."""
    for checkpoint in (None, "int8"):
        with calling("open with dtype auto"):
            runtime = target.source.open(OpenConfig(dtype="auto", checkpoint_dtype=checkpoint))
        found = runtime.dtype
        with calling("close"):
            runtime.close()
        require(
            found in target.caps.dtypes,
            f"auto with a checkpoint in {checkpoint} opened {found!r}, which is not declared",
        )
    return Evidence(checks=2)


def _unknown_axis(target: Target, rng: np.random.Generator) -> Evidence:
    what = "comm.axis('sideways')"
    return _refused(what, VllmCoreError, lambda: target.runtime.comm.axis("sideways"))


def odd_heads(target: Target, rng: np.random.Generator) -> Evidence:
    """Heads beyond what is mandatory are computed right or refused, and nothing else."""
    evidence = Evidence()
    beyond = (target.caps.max_head_dim + 8 + 7) // 8 * 8
    for text, shape in (
        ("an odd head size, 33", _shape(target, 33)),
        (f"head size {beyond}, above max_head_dim", _shape(target, beyond)),
        ("V heads of 48 beside K heads of 32", _shape(target, 32, dim_v=48)),
    ):
        if shape.dim > 1024:
            continue  # a backend without a limit: nothing to see
        scene = _scene(target, shape, rng)
        try:
            seen = play(target, scene)
        except Raised as raised:
            _refused(text, NotSupported, _raiser(raised.error))
            evidence.checks += 1
            evidence.notes.append(f"refused: {text}")
            continue
        expected = oracle.attention(scene, target.dtype)
        evidence += score.judge(
            "attention",
            seen.out[: scene.num_tokens],
            expected.out,
            expected.noise,
            dtype=target.dtype,
            numeric_class=target.caps.numeric_class,
            axes=("token", "head", "lane"),
            where=f"attention with {text}, which was not refused",
        )
    evidence += healthy(target, int(rng.integers(1000)), "heads of odd shapes")
    return evidence


def _raiser(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def _case(name: str, says: str, body: Body, *profiles: str, needs: tuple[str, ...] = ()) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        return body(target, np.random.default_rng([seed, zlib.crc32(f"errors.{name}".encode())]))

    return Case(f"errors.{name}", says, run, frozenset(("contract", *profiles)), needs=needs)


CASES: tuple[Case, ...] = (
    _case(
        "lse_with_sinks",
        "return_lse with sinks is an InvalidArgument",
        lse_with_sinks,
        "core",
        needs=("sinks", "return_lse"),
    ),
    _case("unknown_scheme", "weights in a scheme that is not declared are refused", unknown_scheme),
    _case("middle", "refusals in the middle of work leave the work as it was", middle, "core"),
    _case("reserved", "what is reserved refuses with NotSupported", reserved),
    _case("odd_heads", "heads beyond the mandatory are right or refused", odd_heads, "core"),
)
