"""Cases: what a backend declares, and whether it is true in itself.

A device that the probe names and that is not computed on cannot be told from its numbers. What can
be seen through the seam is checked: the memory that the runtime reports is of the size that the
probe told, and is where the cache goes (memory.blocks_fit measures it there).

Knows: manifest, capabilities, buckets, signatures. Does not know: numbers of kernels.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import (
    SEAM_VERSION,
    AttentionSpec,
    BackendInfo,
    BucketPolicy,
    Capabilities,
    DeviceInfo,
    HostStep,
    KVFormat,
    KVGroup,
    OpenConfig,
    Probe,
    StepConstraints,
)
from vllm_core.backend.communicator import AXES
from vllm_core.backend.lies import missing_methods
from vllm_core.errors import NotSupported, VllmCoreError
from vllm_core.ops import ARRAY_VOCABULARY, BucketKey, Features
from vllm_core.params import MAX_LOGPROBS
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.contract_listing import listing, listing_bare, require_memory
from vllm_core_conformance.cases.contract_signatures import signatures
from vllm_core_conformance.cases.contract_works import two_runtimes, works
from vllm_core_conformance.cases.programs_echo import ROWS, SMALL
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Raised, Target, calling, wide

Numbers = NDArray[Any]
Body = Callable[[Target, np.random.Generator], Evidence]

DTYPES = ("float64", "float32", "bfloat16", "float16")
NO_DTYPES = ("float8_e4m3fn", "int8", "complex64", "float33")
"""Model dtypes that nobody offers in this version of the seam."""


def manifest(target: Target, rng: np.random.Generator) -> Evidence:
    """BackendInfo has its fields, speaks this seam, and its functions exist."""
    require(bool(target.source.name.strip()), "the backend has no name")
    evidence, info = Evidence(checks=1), target.source.info
    if info is None:
        evidence.notes.append("opened by a function: there is no manifest to check")
        return evidence
    kinds = {"name": str, "api": str, "summary": str, "priority": int, "only_by_name": bool}
    for field, kind in {**kinds, "probe": str, "open": str}.items():
        value = getattr(info, field)
        require(
            type(value) is kind, f"BackendInfo.{field} is {value!r}, which is no {kind.__name__}"
        )
    require(
        info.name == target.source.name,
        f"BackendInfo.name is {info.name!r}, but it was found as {target.source.name!r}",
    )
    require(len(info.summary) > 5, f"BackendInfo.summary says nothing: {info.summary!r}")
    require(
        _admits(info.api, SEAM_VERSION),
        f"BackendInfo.api {info.api!r} does not admit this seam, {SEAM_VERSION}",
    )
    for field in ("probe", "open"):
        text = getattr(info, field)
        module, _, name = text.partition(":")
        with calling(f"import of {module}"):
            function = getattr(importlib.import_module(module), name, None)
        require(callable(function), f'BackendInfo.{field} {text!r} is no "module:function"')
    evidence.checks += 12
    evidence += _probe(target, info)
    return evidence


def _probe(target: Target, info: BackendInfo) -> Evidence:
    module, _, name = info.probe.partition(":")
    with calling("probe"):
        probe = getattr(importlib.import_module(module), name)()
    require(isinstance(probe, Probe), f"probe returned a {type(probe).__name__}, not a Probe")
    require(
        len(probe.devices) > 0,
        "the runtime opens, but its probe finds no device: nobody would choose it "
        f"({probe.reason!r})",
    )
    for device in probe.devices:
        require(
            isinstance(device, DeviceInfo)
            and isinstance(device.memory_bytes, int)
            and device.memory_bytes >= 0
            and bool(device.kind),
            f"probe found {device!r}, which is no DeviceInfo with a kind and bytes >= 0",
        )
    evidence = Evidence(checks=3)
    evidence += require_memory(target, probe.devices[0].memory_bytes)
    return evidence


def _admits(api: str, version: tuple[int, ...]) -> bool:
    """Whether a range like ">=0.1,<0.2" holds the version."""
    for clause in api.split(","):
        clause = clause.strip()
        sign = clause[:2] if clause[:2] in (">=", "<=", "==") else clause[:1]
        parts = clause[len(sign) :].strip().split(".")
        if sign not in (">=", "<=", "==", "<", ">") or not all(p.isdigit() for p in parts):
            return False
        size = max(len(parts), len(version))
        bound = tuple(int(p) for p in parts) + (0,) * (size - len(parts))
        ours = version + (0,) * (size - len(version))
        order = (ours > bound) - (ours < bound)
        if order not in {">=": (0, 1), "<=": (0, -1), "==": (0,), "<": (-1,), ">": (1,)}[sign]:
            return False
    return True


def capabilities(target: Target, rng: np.random.Generator) -> Evidence:
    """Declared facts are frozen, of their types, and agree with each other and with the parts."""
    caps = target.caps
    require(isinstance(caps, Capabilities), f"caps is a {type(caps).__name__}")
    lies = missing_methods(target.runtime)
    require(not lies, "; ".join(lies))
    try:
        hash(caps)
    except TypeError as error:
        raise Failed(f"caps cannot be hashed, so no plan can be cached by it: {error}") from error
    usual = Capabilities(dtypes=frozenset({"float32"}), default_dtype="float32")
    for field in dataclasses.fields(Capabilities):
        value, default = getattr(caps, field.name), getattr(usual, field.name)
        if isinstance(default, bool):
            require(type(value) is bool, f"caps.{field.name} is {value!r}, neither True nor False")
    unknown = set(caps.dtypes) - set(DTYPES)
    require(
        isinstance(caps.dtypes, frozenset) and bool(caps.dtypes) and not unknown,
        f"caps.dtypes is {caps.dtypes!r}; known are {', '.join(DTYPES)}",
    )
    require(
        caps.numeric_class in ("A", "B", "C"),
        f"caps.numeric_class is {caps.numeric_class!r}; known are A, B and C",
    )
    require("dense" in caps.schemes, f"caps.schemes {set(caps.schemes)} lacks 'dense'")
    require(
        caps.max_head_dim >= 256,
        f"caps.max_head_dim is {caps.max_head_dim}: every even head size up to 256 is mandatory",
    )
    rows = caps.max_logit_rows
    require(
        rows is None or (isinstance(rows, int) and rows > 0), f"caps.max_logit_rows is {rows!r}"
    )
    require(
        target.runtime.dtype == target.dtype and target.dtype in caps.dtypes,
        f"the runtime's dtype {target.runtime.dtype!r} is not among caps.dtypes",
    )
    require(target.runtime.caps == caps, "caps changed since the runtime was opened")
    with calling("constraints"):
        found = target.runtime.constraints()
    require(isinstance(found, StepConstraints), f"constraints() gave a {type(found).__name__}")
    for name, low in (("max_prefills", 1), ("chunk_multiple", 1), ("max_tokens", 1)):
        value = getattr(found, name)
        optional = name != "chunk_multiple"
        require(
            (value is None and optional) or (isinstance(value, int) and value >= low),
            f"constraints().{name} is {value!r}: no step could ever run",
        )
    return Evidence(checks=14)


def dtypes(target: Target, rng: np.random.Generator) -> Evidence:
    """Every declared dtype opens and computes in itself; what is not declared is refused."""
    evidence, declared = Evidence(), target.caps.dtypes
    numbers = rng.integers(-8, 9, (min(130, target.caps.max_logit_rows or 130), 8))
    weight = rng.integers(-8, 9, (4, 8)).astype(np.float64)
    for dtype in sorted(declared):
        own = target.fresh(dtype)
        require(
            own.runtime.dtype == dtype, f"opened with {dtype}, its dtype is {own.runtime.dtype!r}"
        )
        require(
            own.caps.dtypes == declared,
            f"opened with {dtype} it declares {sorted(own.caps.dtypes)}, with {target.dtype} "
            f"{sorted(declared)}",
        )
        param = own.param("linear", {"weight": weight})
        out, logits = own.call(
            "dtypes",
            lambda x, p, ops=own.ops: (ops.linear(x, p), ops.logits(x, p)),
            own.array(numbers.astype(np.float64)),
            param,
        )
        name = np.asarray(out).dtype.name
        require(name == dtype, f"opened with {dtype}, linear gives {name}")
        what = f"linear of small whole numbers in {dtype}"
        evidence += require_equal(wide(out) + 0.0, own.round(numbers @ weight.T) + 0.0, what)
        what = f"logits of {len(numbers)} rows of small whole numbers in {dtype}"
        evidence += require_equal(wide(logits) + 0.0, numbers @ weight.T + 0.0, what)
        own.close()
        evidence.checks += 3
    for dtype in (*(d for d in DTYPES if d not in declared), *NO_DTYPES):
        try:
            with calling(f"open with dtype {dtype!r}"):
                runtime = target.source.open(OpenConfig(dtype=dtype))
        except Raised as raised:
            require(
                isinstance(raised.error, NotSupported),
                f"dtype {dtype!r} is not declared and was refused with "
                f"{type(raised.error).__name__}, not with NotSupported",
            )
        else:
            got = runtime.dtype
            runtime.close()
            raise Failed(f"dtype {dtype!r} is not declared, yet opened (as {got!r})")
        evidence.checks += 1
    return evidence


def auto_dtype(target: Target, rng: np.random.Generator) -> Evidence:
    """What `auto` may become, and that a dtype that was asked for is never changed."""
    evidence, caps = Evidence(), target.caps

    def opened(dtype: str, checkpoint: str | None) -> str:
        with calling(f"open with dtype {dtype!r} of a checkpoint in {checkpoint}"):
            runtime = target.source.open(OpenConfig(dtype=dtype, checkpoint_dtype=checkpoint))
        found = runtime.dtype
        runtime.close()
        evidence.checks += 1
        return found

    for checkpoint in (None, "float8_e4m3fn", "int32"):
        found = opened("auto", checkpoint)
        require(
            found == caps.default_dtype,
            f"auto with a checkpoint in {checkpoint} opened {found!r}; default_dtype is "
            f"{caps.default_dtype!r}",
        )
    for checkpoint in DTYPES:
        found = opened("auto", checkpoint)
        require(
            found in caps.dtypes,
            f"auto with a checkpoint in {checkpoint} opened {found!r}, which is not declared",
        )
        other = str(rng.choice(sorted(caps.dtypes)))
        found = opened(other, checkpoint)
        require(
            found == other,
            f"asked for {other} with a checkpoint in {checkpoint}, it opened {found!r}",
        )
    return evidence


def buckets(target: Target, rng: np.random.Generator) -> Evidence:
    """Every step within what was announced finds a bucket that covers it."""
    evidence = Evidence()
    choices = [Features(*bits) for bits in itertools.product((False, True), repeat=4)]
    for announced in ((1, 1, 1), (SMALL, ROWS, 3), (48, 4, 8), (2048, 256, 128), (8192, 7, 33)):
        with calling("buckets"):
            policy = target.runtime.buckets(*announced)
            again = target.runtime.buckets(*announced)
        require(isinstance(policy, BucketPolicy), f"buckets() gave a {type(policy).__name__}")
        require(policy == again, f"buckets{announced} gave two different answers")
        for axis in ("tokens", "rows", "widths"):
            sizes = getattr(policy, axis)
            require(
                isinstance(sizes, tuple) and all(isinstance(s, int) and s > 0 for s in sizes),
                f"buckets{announced}.{axis} is {sizes!r}: expected a tuple of sizes above 0",
            )
        require(
            not target.is_static or bool(policy.tokens or policy.rows or policy.widths),
            f"static shapes are declared, yet buckets{announced} are any: each new length would "
            "cost a compilation",
        )
        evidence.checks += 6
        most_tokens, most_rows, most_width = announced
        most_tokens = min(most_tokens, target.constraints().max_tokens or most_tokens)
        for at in range(60):
            edge = at < 4
            rows = most_rows if edge else int(rng.integers(1, most_rows + 1))
            tokens = most_tokens if edge else int(rng.integers(1, most_tokens + 1))
            widths = (most_width, 1) if edge else tuple(rng.integers(1, most_width + 1, 2).tolist())
            features = dataclasses.replace(
                choices[int(rng.integers(16))],
                logprobs=int(rng.choice([-1, 0, 1, 5, MAX_LOGPROBS])),
                keep_hidden=bool(rng.integers(2)),
            )
            key = BucketKey(tokens, rows, widths, features)
            evidence += _covers(policy, key, announced)
    return evidence


def _covers(policy: BucketPolicy, key: BucketKey, announced: tuple[int, ...]) -> Evidence:
    found = policy.cover(key)
    if found is None:
        raise Failed(f"no bucket covers {key}, though {announced} was announced as the largest")
    fits = found.tokens >= key.tokens and found.rows >= key.rows and found.drafts == key.drafts
    fits &= len(found.widths) == len(key.widths)
    fits &= all(a >= b for a, b in zip(found.widths, key.widths, strict=True))
    fits &= found.features.covers(key.features)
    require(fits, f"the bucket {found} does not cover the step {key}")
    return Evidence(checks=1)


def attention_facts(target: Target, rng: np.random.Generator) -> Evidence:
    """block_tokens offers sizes; block_bytes and fingerprint answer for each."""
    evidence, attention = Evidence(), target.runtime.attention
    one, host = np.ones(1, np.int32), []
    with calling("buckets"):
        key = target.runtime.buckets(8, 2, 4).cover(BucketKey(8, 2, (4,)))
    if key is None:
        raise Failed("no bucket covers the largest step of buckets(8, 2, 4)")
    for length in (5, 9):
        with calling("plan_host"):
            found = attention.plan_host(HostStep(one, one * length, (1, 1, 1)), key)
        host.append({name: np.asarray(x).tolist() for name, x in found.items()})
    require(
        not target.caps.exact_host_lengths or host[0] != host[1],
        "exact_host_lengths is declared, so that steps wait for each other, yet plan_host makes "
        f"{host[0]!r} of a row of 5 tokens and of one of 9",
    )
    evidence.checks += 1
    some = 33 if target.caps.windows else None
    for heads, kv_heads, dim, window in ((4, 2, 64, None), (7, 1, 128, some), (6, 6, 80, None)):
        spec = AttentionSpec(
            heads, kv_heads, dim, dim, 0.1, KVFormat(target.dtype), group=0, window=window
        )
        with calling("block_tokens"):
            sizes = attention.block_tokens(spec)
        require(
            isinstance(sizes, tuple) and len(sizes) > 0 and len(set(sizes)) == len(sizes),
            f"block_tokens gave {sizes!r}: expected a tuple of distinct sizes",
        )
        require(
            all(isinstance(s, int) and s > 0 for s in sizes),
            f"block_tokens gave {sizes!r}: sizes are whole numbers above 0",
        )
        evidence.checks += 2
        kind: Any = "full" if window is None else "window"
        by_size, prints = {}, {}
        for size in sizes:
            group = KVGroup(0, kind, size, 3, spec, 0)
            with calling("block_bytes and layout_fingerprint"):
                by_size[size] = attention.block_bytes(group)
                prints[size] = attention.layout_fingerprint(group)
                again = attention.layout_fingerprint(KVGroup(0, kind, size, 3, spec, 0))
            require(
                isinstance(again, str) and again == prints[size],
                f"layout_fingerprint of one group is {prints[size]!r} and then {again!r}",
            )
            evidence.checks += 1
        require(
            len(set(prints.values())) == len(sizes),
            "blocks of different block_tokens share a layout_fingerprint, so that raw bytes of one "
            "would be read as the other",
        )
        ordered = [by_size[size] for size in sorted(sizes)]
        require(
            ordered == sorted(ordered),
            f"block_bytes does not grow with block_tokens: {dict(sorted(by_size.items()))}",
        )
        evidence.checks += 2
    return evidence


def collectives(target: Target, rng: np.random.Generator) -> Evidence:
    """On one device each collective of each axis is the identity; unknown axes are refused."""
    x = target.round(rng.normal(size=(4, 6)))
    evidence = Evidence()

    def fn(x: Any) -> tuple[Any, ...]:
        found = []
        for name in AXES:
            group = target.runtime.comm.axis(name)
            found += [group.all_reduce(x) + 0, group.all_gather(x, 0) + 0]
            found += [group.reduce_scatter(x, 1) + 0, group.all_to_all(x, 0) + 0]
        return tuple(found)

    for name in AXES:
        with calling(f"comm.axis({name!r})"):
            group = target.runtime.comm.axis(name)
            size, index = group.size, group.index()
        require(size == 1, f"axis {name!r} has size {size} in a runtime of one device")
        index = index if isinstance(index, int) else target.fetch((index,))[0]
        require(int(index) == 0, f"on axis {name!r} of size 1 the index is {index}")
        evidence.checks += 2
    results = target.call("identity collectives", fn, target.array(x))
    whats = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    for (name, what), out in zip(itertools.product(AXES, whats), results, strict=True):
        evidence += require_equal(wide(out), x, f"{what} over axis {name!r} of size 1")
    try:
        with calling("comm.axis of an unknown name"):
            target.runtime.comm.axis("sideways")
    except Raised as raised:
        require(
            isinstance(raised.error, VllmCoreError),
            f"the unknown axis 'sideways' raised {type(raised.error).__name__}, not NotSupported",
        )
    else:
        raise Failed("comm.axis('sideways') gave a group: a misspelt axis would reduce nothing")
    evidence.checks += 1
    return evidence


def vocabulary(target: Target, rng: np.random.Generator) -> Evidence:
    """xp has the words that model code uses, with their meaning at the edges."""
    xp = target.ops.xp
    missing = [name for name in ARRAY_VOCABULARY if not callable(getattr(xp, name, None))]
    require(not missing, f"ops.xp lacks {', '.join(missing)}")
    ops = target.ops
    ties = np.array([[3, 7, 7, 1], [5, 5, 5, 5]], np.int32)
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4, 7.6], np.float32)
    edges = np.array([0, 2, 2, 5, 9], np.int32)
    asked = rng.integers(0, 10, 16).astype(np.int32)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, 3.0], np.float32)

    def fn(ties: Any, halves: Any, edges: Any, asked: Any, odd: Any) -> tuple[Any, ...]:
        return (
            xp.argmax(ties, -1),
            xp.round(halves),
            xp.searchsorted(edges, asked, side="right"),
            xp.isfinite(odd),
            xp.cumsum(ties, -1),
            xp.sum(ties, -1),
            xp.clip(ties, 2, 6),
            xp.concatenate((ties, ties), -1),
            xp.where(ties > 4, ties, -1),
            xp.zeros_like(halves),
            ops.arange(5),
        )

    arrays = [target.array(a, "float32") if a.dtype.kind == "f" else target.array(a)
              for a in (ties, halves, edges, asked, odd)]  # fmt: skip
    found = target.call("vocabulary", fn, *arrays)
    exact: tuple[Numbers, ...] = (
        np.array([1, 0]),
        np.array([0.0, 2.0, 2.0, 0.0, -2.0, 2.0, 8.0]),
        np.array([int((edges <= a).sum()) for a in asked]),
        np.array([False, False, False, True, True]),
        np.array([[3, 10, 17, 18], [5, 10, 15, 20]]),
        np.array([18, 20]),
        np.array([[3, 6, 6, 2], [5, 5, 5, 5]]),
        np.concatenate((ties, ties), -1),
        np.array([[-1, 7, 7, -1], [5, 5, 5, 5]]),
        np.zeros(7),
        np.arange(5),
    )
    names = "argmax round searchsorted isfinite cumsum sum clip concatenate where zeros_like arange"
    evidence = Evidence(checks=len(ARRAY_VOCABULARY))
    for name, out, want in zip(names.split(), found, exact, strict=True):
        same = wide(out) + 0.0 if np.asarray(out).dtype.kind == "f" else np.asarray(out)
        evidence += require_equal(same, want, f"{name} of the array vocabulary")
    return evidence


def _case(name: str, says: str, body: Body, *profiles: str) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        return body(target, np.random.default_rng([seed, zlib.crc32(f"contract.{name}".encode())]))

    return Case(f"contract.{name}", says, run, frozenset(("contract", *profiles)))


CASES: tuple[Case, ...] = (
    _case("manifest", "BackendInfo and probe say who it is, and are true", manifest),
    _case("listing", "listing and probing are quick, import no framework, never raise", listing),
    _case("listing.bare", "so they are where no framework is installed", listing_bare),
    _case("capabilities", "what is declared is well formed and there", capabilities, "smoke"),
    _case("signatures", "every method takes what the seam passes", signatures, "smoke"),
    _case("dtypes", "declared dtypes open, others are refused with NotSupported", dtypes),
    _case("dtypes.auto", "auto becomes a declared dtype, a named one stays", auto_dtype),
    _case("buckets", "each announced step finds a bucket that covers it", buckets, "smoke"),
    _case("attention_facts", "block sizes, bytes and fingerprints answer", attention_facts),
    _case("collectives", "collectives of one device are the identity", collectives, "core"),
    _case(
        "vocabulary", "the array vocabulary is there and agrees at the edges", vocabulary, "core"
    ),
    _case("works", "each declared thing works, all else is refused or right", works, "core"),
    _case("two_runtimes", "two runtimes do not disturb each other", two_runtimes, "core"),
)
