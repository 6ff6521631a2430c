"""Cases: the KV cache as data: written, exported, imported, copied, and nothing else touched.

Bit for bit: no case here asks what attention computes.

Knows: blocks, layers, groups, pools. Does not know: layouts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import HostStep, KVGroup
from vllm_core.ops import BucketKey
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases import kv_steps, kv_traffic
from vllm_core_conformance.cases.attention_shapes import batches, shape_of
from vllm_core_conformance.cases.kv_cache import Cache
from vllm_core_conformance.inputs import random
from vllm_core_conformance.steps import Shape
from vllm_core_conformance.target import Target, calling, numpy_dtype

Numbers = NDArray[Any]


def _caches(target: Target, prefix: str, num_blocks: int = 15) -> list[tuple[str, Cache]]:
    """One group; two groups with a pool each; two groups in one pool; the smallest blocks.

    prefix: of the recipes' names: plain caches, or those of 8 bits."""
    found = []
    for name in ("heads_7", "mixed", "largest_block", "smallest_block"):
        groups = shape_of(target, prefix + name).groups(target.dtype)
        found.append((name, Cache(target, groups, num_blocks)))
    return found


def round_trip(target: Target, seed: int, prefix: str = "") -> Evidence:
    rng, evidence = random(seed, "kv.round_trip"), Evidence()
    for _, cache in _caches(target, prefix):
        ids = [int(i) for i in rng.permutation(np.arange(1, cache.num_blocks))]
        for index, group in enumerate(cache.groups):
            part = ids[index :: len(cache.groups)]  # groups of one pool share its ids
            cache.put(index, part, cache.draw(rng, group, len(part)))
            evidence += cache.require(index, part, "what was imported is exported")
            evidence += cache.require(index, part[::-1], "in another order")
            evidence += cache.require(index, part[3:4], "one block alone")
        evidence += cache.require_all("after imports into every group")
    return evidence


def import_few(target: Target, seed: int, prefix: str = "") -> Evidence:
    rng, evidence = random(seed, "kv.import_few"), Evidence()
    for _, cache in _caches(target, prefix):
        ids = [int(i) for i in rng.permutation(np.arange(1, cache.num_blocks))]
        for index, group in enumerate(cache.groups):
            part = ids[index :: len(cache.groups)]
            cache.put(index, part, cache.draw(rng, group, len(part)))
        for index, group in enumerate(cache.groups):
            few = [int(i) for i in rng.choice(ids[index :: len(cache.groups)], 3, replace=False)]
            for some in (
                few,
                [cache.num_blocks - 1] if index == len(cache.groups) - 1 else few[:1],
            ):
                cache.put(index, some, cache.draw(rng, group, len(some)))
                evidence += cache.require_all(f"import into blocks {some} only")
    return evidence


def copy(target: Target, seed: int, prefix: str = "") -> Evidence:
    """Ten pairs, one source twice among them; then one pair, in lists padded as a step's are; then
    seven pairs in lists of just that length."""
    rng, evidence = random(seed, "kv.copy"), Evidence()
    for _, cache in _caches(target, prefix, 41):
        ids = [int(i) for i in rng.permutation(np.arange(1, cache.num_blocks))]
        count = len(cache.groups)
        for index, group in enumerate(cache.groups):
            part = ids[index::count]
            cache.put(index, part, cache.draw(rng, group, len(part)))
        for index in range(count):
            part = ids[index::count]
            src, dst = part[: len(part) // 2], part[len(part) // 2 :]
            pairs = list(zip([*src[:9], src[0]], dst))  # one source twice
            pairs += [(0, 0)] * (16 - len(pairs))
            exact = list(zip(src[:7], reversed(dst[:7])))
            for some in (pairs, [*pairs[1:2]] + [(0, 0)] * 15, exact):
                cache.copy(index, [a for a, _ in some], [b for _, b in some])
                real = [f"{a} to {b}" for a, b in some if b]
                evidence += cache.require_all(f"copy of blocks {', '.join(real)}")
    return evidence


def _fresh(target: Target, seed: int) -> Evidence:
    """Two caches of one runtime are two."""
    rng, evidence = random(seed, "kv.two_caches"), Evidence()
    groups = shape_of(target, "mixed").groups(target.dtype)
    first, second = Cache(target, groups, 9), Cache(target, groups, 9)
    for cache in (first, second):
        for index, group in enumerate(groups):
            cache.put(index, [1, 8, 4], cache.draw(rng, group, 3))
    evidence += first.require_all("after imports into another cache of the same runtime")
    evidence += second.require_all("after imports into another cache of the same runtime")
    moved = Cache(target, groups, 30)
    for index, group in enumerate(groups):
        with calling("export_blocks"):
            found = target.runtime.attention.export_blocks(first.kv, group, [1, 8, 4])
        moved.put(index, [29, 2, 17], {name: np.asarray(found[name]) for name in "kv"})
        for name in "kv":
            moved.content[index][name][:, [29, 2, 17]] = first.content[index][name][:, [1, 8, 4]]
    evidence += moved.require_all("blocks moved into a larger cache under other ids")
    with calling("layout_fingerprint"):
        prints = [target.runtime.attention.layout_fingerprint(group) for group in groups]
    require(
        groups[0].layers == groups[1].layers or prints[0] != prints[1],
        f"groups of {groups[0].layers} and of {groups[1].layers} layers have one fingerprint, "
        f"{prints[0]!r}: the raw bytes of one would be read as the other",
    )
    return evidence


# ---------------------------------------------------------------- facts
def _facts(target: Target, seed: int) -> Evidence:
    attention, evidence = target.runtime.attention, Evidence()
    shape = shape_of(target, "decode")
    (group,) = shape.groups(target.dtype)
    with calling("block_tokens"):
        sizes = attention.block_tokens(group.spec)
    require(
        all(int(x) == x and x > 0 for x in sizes) and len(set(sizes)) == len(sizes) > 0,
        f"block_tokens gave {sizes!r}, not distinct block sizes",
    )
    kinds = [replace(group, block_tokens=size) for size in sizes[:4]]
    kinds += [replace(group, layers=layers) for layers in (1, 5)]
    for kind in kinds:
        canonical = _canonical_bytes(target, kind)
        with calling("block_bytes"):
            found = attention.block_bytes(kind)
        require(
            canonical <= found,
            f"block_bytes of {kind.layers} layers of blocks of {kind.block_tokens} tokens is "
            f"{found}, but their K and V alone have {canonical} bytes",
        )
        evidence.checks += 1
    with calling("block_bytes"):
        found = attention.block_bytes(group)
    canonical = _canonical_bytes(target, group)
    require(
        found <= 16 * canonical,
        f"block_bytes is {found}, {found / canonical:.0f} times what K and V have; pools are "
        "sized with it",
    )
    evidence += _fingerprints(target, group)
    evidence += _host_plans(target, shape)
    return evidence


def _canonical_bytes(target: Target, group: KVGroup) -> int:
    spec = group.spec
    numbers = group.layers * group.block_tokens * spec.num_kv_heads * (spec.dim_qk + spec.dim_v)
    return numbers * numpy_dtype(target.dtype).itemsize


def _fingerprints(target: Target, group: KVGroup) -> Evidence:
    with calling("layout_fingerprint"):
        own = target.runtime.attention.layout_fingerprint(group)
        again = target.runtime.attention.layout_fingerprint(replace(group))
        sizes = target.runtime.attention.block_tokens(group.spec)
        others = {
            f"blocks of {size} tokens": target.runtime.attention.layout_fingerprint(
                replace(group, block_tokens=size)
            )
            for size in sizes
            if size != group.block_tokens
        }
        more = replace(group, layers=group.layers + 1)
        others["one layer more"] = target.runtime.attention.layout_fingerprint(more)
        heads = replace(group.spec, num_kv_heads=1, num_q_heads=5)
        fewer = replace(group, spec=heads)
        others["fewer KV heads"] = target.runtime.attention.layout_fingerprint(fewer)
    require(own == again, f"layout_fingerprint of one group differs: {own!r}, {again!r}")
    for what, other in others.items():
        require(
            own != other,
            f"layout_fingerprint is {own!r} for a group and for one with {what}: their raw bytes "
            "are not interchangeable",
        )
    return Evidence(checks=1 + len(others))


def _host_plans(target: Target, shape: Shape) -> Evidence:
    """Shapes fixed by the key, where a device compiles for shapes."""
    with calling("buckets"):
        policy = target.runtime.buckets(shape.tokens, shape.rows, shape.width)
    key = policy.cover(BucketKey(shape.tokens, shape.rows, (shape.width,)))
    if key is None:
        raise Failed("no bucket covers the largest step that was announced")
    steps = (
        step for rows in ([1], [1, 1, 7], [3]) for step in batches(target, [(5, n) for n in rows])
    )
    seen = []
    for query in ([count for _, count in step] for step in steps):
        lengths = np.array(query, np.int32)
        singles = int((lengths == 1).sum())
        host = HostStep(lengths, lengths + 5, (singles, singles, len(query)))
        with calling("plan_host"):
            plan = target.runtime.attention.plan_host(host, key)
        seen.append({name: (np.shape(x), np.asarray(x).dtype) for name, x in plan.items()})
    if target.is_static:
        require(
            all(x == seen[0] for x in seen),
            f"plan_host gives other arrays for other steps of one key: {seen}",
        )
    return Evidence(checks=len(seen))


def _other_dtypes(target: Target, seed: int) -> Evidence:
    """Raw bytes of two dtypes are never interchangeable; of two runtimes of one kind always."""
    prints = {}
    for dtype in sorted(target.caps.dtypes):
        other = target.fresh(dtype)
        try:
            (group,) = shape_of(other, "decode").groups(other.dtype)
            with calling("layout_fingerprint"):
                prints[other.dtype] = other.runtime.attention.layout_fingerprint(group)
            if other.dtype == target.dtype:
                with calling("layout_fingerprint"):
                    own = target.runtime.attention.layout_fingerprint(group)
                require(
                    own == prints[target.dtype],
                    f"two runtimes of one kind: fingerprints {own!r} and {prints[target.dtype]!r}",
                )
        finally:
            other.close()
    require(
        len(set(prints.values())) == len(prints),
        f"layout_fingerprint does not tell dtypes apart: {prints}",
    )
    return Evidence(checks=len(prints))


def _case(name: str, says: str, run: Any, *, smoke: bool = False, every: bool = True) -> Case:
    profiles = frozenset({"core"} | ({"smoke"} if smoke else set()))
    return Case(f"kv.{name}", says, run, profiles, every_dtype=every)


CASES: tuple[Case, ...] = (
    _case("round_trip", "exported blocks are the imported ones, in any order", round_trip),
    _case("import_few", "an import changes its own blocks only", import_few),
    _case("copy", "a copied block is the source's in all layers, K and V", copy, smoke=True),
    _case("two_caches", "caches are apart, and blocks move between them", _fresh),
    _case("facts", "block sizes, bytes and fingerprints are what pools are planned with", _facts),
    _case(
        "fingerprint_dtypes",
        "fingerprints differ between dtypes and agree between runtimes",
        _other_dtypes,
        every=False,
    ),
    *kv_steps.CASES,
    *kv_traffic.CASES,
)
