"""Cases: weights and caches of few bits.

Schemes that the contract defines are judged in `quantised_weights`, caches of 8 bits in
`quantised_kv`; what has other names is refused where it is undeclared, and fails where it is
declared.

Knows: names of schemes in common use. Does not know: their mathematics.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup
from vllm_core.errors import NotSupported, VllmCoreError
from vllm_core.ops import LazyArray, ParamSpec, Part
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases import quantised_kv, quantised_weights
from vllm_core_conformance.cases.quantised_products import BITS, make_codes
from vllm_core_conformance.target import Target, numpy_dtype, wide

Numbers = NDArray[Any]

ROWS, SIZE = 6, 64
SCHEMES = ("int3", "fp8", "mxfp4", "gptq", "awq", "q4_0", "q8_0", "no such scheme")
JUDGED = frozenset({"dense", *BITS})
"""Schemes that some case of this requirement set judges."""
JUDGED_KV = frozenset({"int8"})


def _tensors(scheme: str, rng: np.random.Generator) -> Mapping[str, Numbers]:
    """As a checkpoint of such a scheme might have them."""
    if scheme in ("mxfp4", "gptq", "awq", "q4_0"):
        weight = rng.integers(0, 256, (ROWS, SIZE // 2), dtype=np.uint8)
        return {"weight": weight, "scale": np.full((ROWS, 2), 0.5, np.float32)}
    weight = rng.integers(-127, 128, (ROWS, SIZE)).astype(np.int8)
    return {"weight": weight, "scale": np.full((ROWS, 1), 0.5, np.float32)}


def _dense(rng: np.random.Generator, rows: int) -> Part:
    weight = rng.integers(-3, 4, (rows, SIZE)).astype(np.float32)
    return Part("dense", {"weight": weight}, rows)


def _still_works(target: Target, rng: np.random.Generator) -> int:
    """A dense weight of integers loads, and multiplies exactly."""
    part = _dense(rng, ROWS)
    param = target.load(ParamSpec("dense", (ROWS, SIZE), "linear"), [part])
    x = rng.integers(-2, 3, (4, SIZE)).astype(np.float64)
    (got,) = target.call(
        "quantised.linear", lambda x, p: (target.ops.linear(x, p),), target.array(x), param
    )
    exact = target.round(x @ np.asarray(part.tensors["weight"], np.float64).T)
    require(
        bool((wide(got) == exact).all()),
        "after a refused weight scheme, a dense linear of small integers is no longer exact",
    )
    return int(exact.size)


def schemes(target: Target, seed: int) -> Evidence:
    """Each undeclared scheme, alone and beside dense rows; then dense weights as if nothing had
    been."""
    rng = np.random.default_rng([seed, zlib.crc32(b"quantised.schemes")])
    found = Evidence()
    for scheme in SCHEMES:
        part = Part(scheme, _tensors(scheme, rng), ROWS)
        if scheme in target.caps.schemes:
            _taken(target, part)
            found.checks += 1
            continue
        for parts in ([part], [_dense(rng, 2), part]):
            spec = ParamSpec("weight", (sum(p.rows for p in parts), SIZE), "linear")
            _refused(target, spec, parts, scheme)
            found.checks += 1
    lazy = LazyArray((ROWS, SIZE), "int8", lambda: np.ones((ROWS, SIZE), np.int8))
    spec = ParamSpec("weight", (ROWS, SIZE), "linear")
    _refused(target, spec, [Part("no such scheme", {"weight": lazy}, ROWS)], "no such scheme")
    asked = replace(spec, scheme="no such scheme")
    _refused(target, asked, [_dense(rng, ROWS)], "no such scheme")
    found.checks += 2
    found += _damaged(target, rng)
    found.checks += _still_works(target, rng)
    return found


def _damaged(target: Target, rng: np.random.Generator) -> Evidence:
    """Codes of a declared scheme that cannot be right are refused, not guessed at."""
    found = Evidence()
    for scheme in sorted(set(BITS) & target.caps.schemes):
        right = make_codes(rng, scheme, ROWS, SIZE, 32).tensors
        for what, change in {
            "of one row less": {"codes": right["codes"][1:]},
            "with half as many inputs": {"codes": right["codes"][:, ::2]},
            "with scales for one row less": {"scales": right["scales"][1:]},
            "with scales for three groups of 64 inputs": {"scales": np.ones((ROWS, 3), np.float32)},
        }.items():
            part = Part(scheme, {**right, **change}, ROWS)
            try:
                target.runtime.load(ParamSpec("weight", (ROWS, SIZE), "linear"), [part])
            except VllmCoreError:
                found.checks += 1
                continue
            except Exception as error:
                raise Failed(
                    f"load of {scheme} codes {what} raised {type(error).__name__}, which does not "
                    "say whose fault it is"
                ) from error
            raise Failed(f"load took {scheme} codes {what}")
    return found


def _taken(target: Target, part: Part) -> None:
    """A declared scheme may want other tensors than ours, but it is not refused as such."""
    try:
        target.runtime.load(ParamSpec("weight", (ROWS, SIZE), "linear"), [part])
    except NotSupported as error:
        raise Failed(
            f"weight scheme {part.scheme!r} is declared, and load refuses it: {error}"
        ) from error
    except Exception:
        return


def _refused(target: Target, spec: ParamSpec, parts: list[Part], scheme: str) -> None:
    try:
        target.runtime.load(spec, parts)
    except NotSupported:
        return
    except Exception as error:
        raise Failed(
            f"load of a weight of scheme {scheme!r}, which is not declared, raised "
            f"{type(error).__name__}, expected NotSupported"
        ) from error
    raise Failed(
        f"load took a weight of scheme {scheme!r}, which is not declared: it would compute with "
        "codes as if they were values"
    )


def declared(target: Target, seed: int) -> Evidence:
    """What is declared beyond the contract's schemes and formats has no judge in this requirement
    set, and must not pass for right."""
    for what, names in (
        ("weight scheme", target.caps.schemes - JUDGED),
        ("KV format", target.caps.kv_dtypes - JUDGED_KV),
    ):
        require(
            not names,
            f"{what} {', '.join(map(repr, sorted(names)))} is declared, but no case of this "
            "requirement set judges it yet; leave it undeclared until one does",
        )
    require(
        "dense" in target.caps.schemes,
        "the weight scheme 'dense' is not declared; all models have dense weights",
    )
    return Evidence(checks=3)


def caches(target: Target, seed: int) -> Evidence:
    """A cache with scales beside another dtype than int8, or of another dtype without, is refused;
    one of the model's dtype keeps small integers."""
    rng = np.random.default_rng([seed, zlib.crc32(b"quantised.caches")])
    found = Evidence()
    for kv in (KVFormat("int8"), KVFormat("float8_e4m3fn"), KVFormat(target.dtype, scales=True)):
        found += _cache(target, kv, rng)
    found += _cache(target, KVFormat(target.dtype), rng)
    return found


def _cache(target: Target, kv: KVFormat, rng: np.random.Generator) -> Evidence:
    attention = target.runtime.attention
    spec = AttentionSpec(4, 2, 16, 16, 0.25, kv, 0)
    size = target.block_tokens(spec)[0]
    group = KVGroup(0, "full", size, 2, spec, 0)
    shape = (group.layers, 2, size, spec.num_kv_heads, spec.dim_qk)
    # integers, which every format holds without a scale
    exact = {name: rng.integers(-7, 8, shape).astype(np.float64) for name in ("k", "v")}
    kind = numpy_dtype(target.dtype)
    is_plain = kv == KVFormat(target.dtype)
    try:
        cache = attention.alloc((group,), {0: 3})
        host = {name: x.astype(kind) for name, x in exact.items()}
        cache = attention.import_blocks(cache, group, [1, 2], host)
        got = attention.export_blocks(cache, group, [1, 2])
    except NotSupported as error:
        require(not is_plain, f"a cache in the model's own dtype is refused: {error}")
        return Evidence(checks=1)
    except Exception as error:
        raise Failed(
            f"a cache of format {kv} raised {type(error).__name__}"
            + ("" if is_plain else ", expected NotSupported: it is not declared")
        ) from error
    require(
        is_plain,
        f"a cache of format {kv} is accepted, which is not declared: alloc must refuse it with "
        "NotSupported (group.spec.kv.refuse_unless does)",
    )
    for name, x in exact.items():
        require(
            bool((wide(got[name]) == x).all()),
            f"a cache of format {kv} does not give back the {name} that was written",
        )
    return Evidence(checks=2 * int(np.prod(shape)))


_PROFILE = frozenset(("quantised",))

CASES: tuple[Case, ...] = (
    Case("quantised.schemes", "refuses weight schemes that it does not declare", schemes, _PROFILE),
    Case("quantised.declared", "declares nothing that nobody judges", declared, _PROFILE),
    Case("quantised.caches", "refuses KV formats that it does not declare", caches, _PROFILE),
    *quantised_weights.CASES,
    *quantised_kv.CASES,
)
