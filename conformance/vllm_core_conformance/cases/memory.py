"""Cases: memory. Advertised blocks fit, nothing leaks, what cannot fit is refused, close closes.

What is held is read from the process where the device shares the host's memory, else from the
device's own report. Limits are half of what a leak of everything would show: allocators keep some.

Knows: sizes, cycles. Does not know: allocators.
"""

from __future__ import annotations

import gc
import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from vllm_core.backend import AttentionSpec, HostStep, KVFormat, KVGroup, MemoryReport, StepLayout
from vllm_core.errors import OutOfMemory
from vllm_core.ops import BucketKey, ParamSpec, Part
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.memory_pool import (
    BUDGET,
    CHUNK,
    INSANE,
    MIB,
    SLACK,
    Pool,
    content_bytes,
    group_of,
    held,
)
from vllm_core_conformance.cases.programs_session import healthy
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Raised, Target, calling, numpy_dtype, wide

Numbers = NDArray[Any]
Body = Callable[[Target, np.random.Generator], Evidence]


def report(target: Target, rng: np.random.Generator) -> Evidence:
    """memory() tells bytes that can be."""
    evidence = Evidence()
    for _ in range(2):
        with calling("memory"):
            found = target.runtime.memory()
        require(isinstance(found, MemoryReport), f"memory() gave a {type(found).__name__}")
        for name in ("total", "free"):
            value = getattr(found, name)
            require(
                isinstance(value, int) and not isinstance(value, bool),
                f"memory().{name} is {value!r}: bytes are whole numbers",
            )
        require(
            0 < found.free <= found.total,
            f"memory() tells {found.free} bytes free of {found.total}: expected 0 < free <= total",
        )
        require(
            found.total >= 64 * MIB,
            f"memory() tells {found.total} bytes in all: are these bytes, or MiB?",
        )
        evidence.checks += 4
    if target.caps.shares_host_memory:
        host = int(psutil.virtual_memory().total)
        require(
            found.total <= 1.05 * host,
            f"memory() tells {found.total} bytes, but the device shares the host's {host}",
        )
        evidence.checks += 1
    evidence.figures |= {"memory free, GiB": found.free / 2**30}
    return evidence


def block_bytes(target: Target, rng: np.random.Generator) -> Evidence:
    """block_bytes is neither less than a block's content nor many times that."""
    evidence = Evidence()
    heads = int(rng.choice([1, 2, 3, 8]))
    layers = int(rng.integers(1, 7))
    for group, most in (
        (group_of(target, heads, int(rng.choice([64, 80, 128])), layers), None),
        (group_of(target, 8, 128, layers), 4.0),  # nothing to pad up to here
    ):
        with calling("block_bytes"):
            size = target.runtime.attention.block_bytes(group)
        content, spec = content_bytes(group, target.dtype), group.spec
        what = (
            f"block_bytes of {layers} layers, {group.block_tokens} tokens, {spec.num_kv_heads} KV "
            f"heads of {spec.dim_qk} in {target.dtype}"
        )
        require(isinstance(size, int), f"{what} is {size!r}: bytes are whole numbers")
        require(
            size >= content,
            f"{what} is {size}, but K and V of a block are {content} bytes: pools sized with it "
            "do not fit",
        )
        require(
            most is None or size <= most * content,
            f"{what} is {size}, {size / content:.1f} times its content of {content} bytes",
        )
        evidence.checks += 3
    return evidence


def blocks_fit(target: Target, rng: np.random.Generator) -> Evidence:
    """As many blocks as block_bytes says fit a budget: all hold what is written, at that price."""
    pool, small = Pool.of(target, BUDGET), Pool.of(target, MIB)
    content, evidence = pool.content(rng), Evidence()
    small.fill(small.alloc(), content)  # what is compiled or loaded on the way is not the cache's
    growth, before = [0], held(target)
    for _ in range(2):  # something else may have been there meanwhile, but hardly twice
        kv = pool.fill(pool.alloc(), content)
        growth.append(held(target) - before)
        last = pool.num_blocks - 1
        for at in (1, last, int(rng.integers(1, last + 1)), 257 if last > 257 else 2):
            evidence += pool.check(
                kv, [at], content, f"of {pool.num_blocks}, all written", (at - 1) % CHUNK
            )
        del kv
        if growth[-1] <= 1.25 * BUDGET + SLACK:
            break
    else:
        raise Failed(
            f"{pool.num_blocks} blocks should take {BUDGET // MIB} MiB by block_bytes, but the "
            f"memory held grew by {growth[-1] // MIB} MiB (and {growth[1] // MIB} MiB before): "
            "pools sized with block_bytes do not fit"
        )
    with calling("memory"):
        told = target.runtime.memory()
    require(
        told.total >= BUDGET and told.free <= told.total,
        f"memory() tells {told.free} bytes free of {told.total}, after a cache of {BUDGET} fitted",
    )
    evidence.checks += 2
    evidence.figures["growth over block_bytes x blocks"] = growth[-1] / BUDGET
    return evidence


def alloc_twice(target: Target, rng: np.random.Generator) -> Evidence:
    """Two caches of one shape are two; the second survives the end of the first."""
    pool, evidence = Pool.of(target, 2 * MIB), Evidence()
    contents = [pool.content(rng) for _ in range(2)]
    caches = [pool.alloc() for _ in contents]
    ids = sorted({1, 2, pool.num_blocks - 1})
    for which in (0, 1):
        caches[which] = pool.write(caches[which], ids, contents[which])
    for which in (0, 1):
        evidence += pool.check(caches[which], ids, contents[which], f"of cache {which} of two")
    caches[0] = None
    gc.collect()
    third = pool.write(pool.alloc(), ids, contents[0])
    evidence += pool.check(caches[1], ids, contents[1], "after another cache was let go")
    evidence += pool.check(third, ids, contents[0], "of a cache allocated after one was let go")
    return evidence


def too_large(target: Target, rng: np.random.Generator) -> Evidence:
    """2^60 bytes of cache or of a weight: OutOfMemory, and the runtime works on."""
    spec = AttentionSpec(64, 64, 256, 256, 0.1, KVFormat(target.dtype), group=0)
    size = max(target.block_tokens(spec))
    group = KVGroup(0, "full", size, 64, spec, 0)
    num_blocks = min(2**31 - 1, INSANE // content_bytes(group, target.dtype))
    try:
        with calling("alloc"):
            target.runtime.attention.alloc((group,), {0: num_blocks})
    except Raised as raised:
        _require_oom(raised.error, f"alloc of {num_blocks} blocks of {size} tokens (1 EiB)")
    else:
        raise Failed(f"alloc of {num_blocks} blocks of {size} tokens (1 EiB) seemed to work")
    evidence = Evidence(checks=1)
    evidence += healthy(target, int(rng.integers(1000)), "an alloc that cannot fit")
    rows, columns = 2**40, 2**18
    weight = np.broadcast_to(np.float32(1), (rows, columns))  # four bytes of the host
    try:
        with calling("load"):
            part = Part("dense", {"weight": weight}, rows)
            target.runtime.load(ParamSpec("huge", (rows, columns), "linear"), [part])
    except Raised as raised:
        # the host may be what has no room for its copy, before the device is asked
        if not isinstance(raised.error, MemoryError):
            _require_oom(raised.error, "load of a weight of 1 EiB")
    else:
        raise Failed("load of a weight of 1 EiB seemed to work")
    evidence.checks += 1
    evidence += healthy(target, int(rng.integers(1000)), "a load that cannot fit")
    return evidence


def _require_oom(error: BaseException, what: str) -> None:
    require(
        isinstance(error, OutOfMemory),
        f"{what} raised {type(error).__name__}; the engine can only recover from OutOfMemory",
    )


def _require_flat(target: Target, what: str, cycle: Callable[[], None], each: int, n: int) -> float:
    """Runs cycles; what is held must not grow by half of `each` bytes per cycle. -> MiB grown."""
    for _ in range(max(2, n // 4)):
        cycle()
    growth: list[int] = []
    flat = 0
    while len(growth) - flat < 2:  # two of three: what was freed before hides a leak for a while
        before = held(target)
        for _ in range(n):
            cycle()
        growth.append(held(target) - before)
        flat += growth[-1] < n * each / 2
        if flat == 2:
            return growth[-1] / MIB
    raise Failed(
        f"{what} leaks: {n} cycles of {each / MIB:.2g} MiB each left {growth[-1] / MIB:.0f} MiB "
        f"more than before, and {growth[-2] / MIB:.0f} MiB the time before that"
    )


def leak_alloc(target: Target, rng: np.random.Generator) -> Evidence:
    """A cache is given back when the caller lets it go."""
    size = 32 * MIB
    pool = Pool.of(target, size)
    content = pool.content(rng)

    def cycle() -> None:
        pool.fill(pool.alloc(), content)

    grown = _require_flat(target, "alloc of a cache that is then let go", cycle, size, 4)
    return Evidence(checks=1, figures={"growth over 4 allocs of 32 MiB, MiB": grown})


def leak_load(target: Target, rng: np.random.Generator) -> Evidence:
    """A weight is given back when the caller lets it go; its tensors come out as they went in."""
    weight = target.round(rng.standard_normal((1024, 2048), np.float32))
    each = weight.size * numpy_dtype(target.dtype).itemsize
    evidence = Evidence()

    def cycle() -> None:
        param = target.param("linear", {"weight": weight})
        with calling("unload"):
            found = target.runtime.unload(param)
        nonlocal evidence
        if not evidence.checks:
            evidence += require_equal(
                wide(found["weight"]), weight, "a weight loaded and unloaded", axes=("out", "in")
            )

    grown = _require_flat(target, "load and unload of a weight", cycle, each, 8)
    evidence.checks += 1
    evidence.figures["growth over 8 loads, MiB"] = grown
    return evidence


def leak_replay(target: Target, rng: np.random.Generator) -> Evidence:
    """200 calls of a program with results of 256 KiB, each fetched, each behind an upload."""
    count = 1 << 16
    cycle, each = _step_of(target, rng, count)
    grown = _require_flat(target, "a step (upload, program, fetch)", cycle, each, 200)
    return Evidence(checks=1, figures={"growth over 200 steps of 256 KiB, MiB": grown})


def leak_arguments(target: Target, rng: np.random.Generator) -> Evidence:
    """50 calls that consume 1 MiB and take 1 MiB that no other call is given."""
    count = 1 << 18
    host = rng.integers(0, 1000, count).astype(np.int32)
    run = target.compile(
        "leak arguments",
        lambda x, y: (x + y, y[:3] + 1),
        consumes=(0,),
        num_results=1,
    )
    x, calls = target.array(np.zeros(count, np.int32)), 0

    def cycle() -> None:
        nonlocal x, calls
        y = target.array(host)
        with calling("a small program"):
            x, result = run(x, y)
        target.fetch((result,))
        calls += 1

    what = "a program that is given new arguments each time"
    grown = _require_flat(target, what, cycle, 4 * count, 50)
    (found,) = target.fetch((x,))
    evidence = require_equal(np.asarray(found), host * calls, f"the sum of {calls} calls")
    evidence.checks += 1
    evidence.figures["growth over 50 new arguments of 1 MiB, MiB"] = grown
    return evidence


def _step_of(
    target: Target, rng: np.random.Generator, count: int
) -> tuple[Callable[[], None], int]:
    """Upload, program and fetch of `count` tokens; the least bytes that each of them handles."""
    with calling("buckets"):
        policy = target.runtime.buckets(count, 4, 4)
    most = min(count, target.constraints().max_tokens or count)
    key = policy.cover(BucketKey(most, 4, (4,)))
    if key is None:
        raise Failed(f"no bucket covers a step of {most} tokens, which was announced as largest")
    layout = StepLayout(key, 4, 0, 0, (16,))
    packed = np.array(layout.template())
    views = layout.views(packed)
    views["row"][0], views["query_start"][1:], views["split"][:] = 0, 1, 1
    one = np.ones(1, np.int32)
    numbers = rng.standard_normal(count).astype(np.float32)
    run = target.compile("leak", lambda x: (x * 2.0,), num_results=1)

    def cycle() -> None:
        with calling("upload"):
            target.runtime.upload(packed, HostStep(one, one, (1, 1, 1)), key)
        x = target.array(numbers, "float32")  # an argument that no other step has
        with calling("a small program"):
            (result,) = run(x)
        target.fetch((result,))

    return cycle, min(4 * count, packed.nbytes) if most == count else 4 * count


def life(target: Target, rng: np.random.Generator) -> Evidence:
    """A runtime's whole life, again and again in one process: weights, two caches, a cache that
    cannot fit, forty steps whose results are fetched. What was let go is gone."""
    own, size = target.fresh(), 8 * MIB
    pool = Pool.of(own, size)
    contents = [pool.content(rng) for _ in range(2)]
    weight = own.round(rng.standard_normal((1024, 2048), np.float32))
    step = _step_of(own, rng, 1 << 12)[0]
    evidence = Evidence()

    def cycle() -> None:
        nonlocal evidence
        own.param("linear", {"weight": weight})
        caches = [pool.fill(pool.alloc(), content) for content in contents]
        _require_no_room(own)
        for _ in range(40):
            step()
        evidence += pool.check(
            caches[0], [1, pool.num_blocks - 1], _ends(contents[0], pool), "of the first of two"
        )

    grown = _require_flat(own, "weights, caches and forty steps", cycle, 6 * MIB, 5)
    evidence += healthy(own, int(rng.integers(1000)), "a long life")
    own.close()
    evidence.checks += 1
    evidence.figures["growth over 5 lives, MiB"] = grown
    return evidence


def _ends(content: dict[str, Numbers], pool: Pool) -> dict[str, Numbers]:
    """What `fill` put into block 1 and into the last one."""
    places = [0, (pool.num_blocks - 2) % CHUNK]
    return {name: x[:, places] for name, x in content.items()}


def _require_no_room(target: Target) -> None:
    """A cache of 1 EiB beside others that fit is refused as such."""
    group = group_of(target, heads=64, dim=128, layers=64)
    num_blocks = min(2**31 - 1, INSANE // content_bytes(group, target.dtype))
    try:
        with calling("alloc"):
            target.runtime.attention.alloc((group,), {0: num_blocks})
    except Raised as raised:
        _require_oom(raised.error, f"alloc of {num_blocks} blocks beside caches that fit")
    else:
        raise Failed(f"alloc of {num_blocks} blocks (about 1 EiB) beside others seemed to work")


def leak_open(target: Target, rng: np.random.Generator) -> Evidence:
    """Opening, allocating, computing and closing leaves no memory, thread or open file behind."""
    size = 16 * MIB
    pool = Pool.of(target, size)
    content, process = pool.content(rng), psutil.Process()
    x = np.arange(64, dtype=np.int32)
    counts: list[tuple[int, int]] = []

    def cycle() -> None:
        own = target.fresh()
        fresh = Pool(own, pool.group, pool.num_blocks)
        kv = fresh.fill(fresh.alloc(), content)
        (result,) = own.call(None, lambda x: (x + 1,), own.array(x))
        require_equal(np.asarray(result), x + 1, "a program of a runtime that was just opened")
        own.close()
        own.close()
        del kv, fresh, own
        gc.collect()
        counts.append((threading.active_count(), process.num_fds()))

    grown = _require_flat(target, "opening and closing a runtime", cycle, size, 4)
    for what, first, last in zip(("thread", "open file"), counts[1], counts[-1], strict=True):
        require(
            last - first < len(counts) - 2,
            f"each runtime leaves a {what} behind: {first} after the second was closed, {last} "
            f"after number {len(counts)}",
        )
    return Evidence(checks=3, figures={"growth over 4 runtimes with 16 MiB, MiB": grown})


def leak_close(target: Target, rng: np.random.Generator) -> Evidence:
    """A runtime is closed while its caller still holds a cache, which is let go behind it."""
    size = 24 * MIB
    pool = Pool.of(target, size)
    content = pool.content(rng)

    def cycle() -> None:
        own = target.fresh()
        fresh = Pool(own, pool.group, pool.num_blocks)
        kv = fresh.fill(fresh.alloc(), content)
        own.close()
        del own, fresh, kv
        gc.collect()

    grown = _require_flat(target, "a cache let go after its runtime was closed", cycle, size, 3)
    return Evidence(checks=1, figures={"growth over 3 runtimes with 24 MiB, MiB": grown})


def close(target: Target, rng: np.random.Generator) -> Evidence:
    """close twice is close once; others live on, and another opens."""
    evidence = _alive(target, rng, "of a runtime that was just opened")
    other = target.fresh()
    evidence += _alive(other, rng, "of a second runtime")
    for time in ("first", "second", "third"):
        with calling(f"the {time} close"):
            target.runtime.close()
        evidence.checks += 1
    evidence += healthy(other, int(rng.integers(1000)), "another runtime was closed")
    third = target.fresh()
    evidence += _alive(third, rng, "of a runtime opened after another was closed")
    third.close()
    evidence += _alive(other, rng, "of a runtime beside which two were closed")
    other.close()
    return evidence


def _alive(target: Target, rng: np.random.Generator, what: str) -> Evidence:
    """A small program and a small cache work."""
    x = rng.integers(0, 1000, 64)
    (found,) = target.call("alive", lambda x: (x * 3 + 1,), target.array(x.astype(np.int32)))
    evidence = require_equal(np.asarray(found), x * 3 + 1, f"a small program {what}")
    pool = Pool.of(target, MIB)
    content = pool.content(rng)
    kv = pool.write(pool.alloc(), [1, 2], content)
    evidence += pool.check(kv, [1, 2], content, what)
    return evidence


def _case(name: str, says: str, body: Body, *profiles: str, fresh: bool = False) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        return body(target, np.random.default_rng([seed, zlib.crc32(f"memory.{name}".encode())]))

    return Case(f"memory.{name}", says, run, frozenset(("core", *profiles)), fresh=fresh)


CASES: tuple[Case, ...] = (
    _case("report", "memory() tells total and free bytes that can be", report, "smoke", "contract"),
    _case("block_bytes", "block_bytes covers a block's content", block_bytes, "smoke"),
    _case(
        "blocks_fit", "the blocks that block_bytes advertises fit, and all can be used", blocks_fit
    ),
    _case("alloc_twice", "two caches are independent of each other", alloc_twice),
    _case("too_large", "what cannot fit is refused with OutOfMemory", too_large, "contract"),
    _case("leak.alloc", "caches that are let go are given back", leak_alloc),
    _case("leak.load", "weights that are let go are given back", leak_load),
    _case("leak.replay", "steps leave nothing behind", leak_replay),
    _case("leak.arguments", "a program keeps none of its arguments", leak_arguments),
    _case("life", "what a runtime lets go in its life is gone", life, "contract"),
    _case("leak.open", "closed runtimes leave nothing behind", leak_open),
    _case("leak.close", "what is let go behind a closed runtime is gone too", leak_close),
    _case(
        "close", "close is idempotent and touches no other runtime", close, "contract", fresh=True
    ),
)
