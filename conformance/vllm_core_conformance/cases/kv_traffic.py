"""Case: the KV cache under traffic: imports, copies, exports and steps in any order, over groups
and layers of one cache, against a model on the host, bit for bit.

Knows: who wrote what into which slot. Does not know: layouts, what attention computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.attention_shapes import batches, shape_of
from vllm_core_conformance.cases.kv_cache import Cache
from vllm_core_conformance.inputs import REGIMES, Random, fill, lay_out, random
from vllm_core_conformance.steps import Stage
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]

SHAPES = ("mixed", "largest_block", "smallest_block")
"""Two groups of different layers with a pool each; two groups in one pool; odd numbers of heads."""
EVENTS = ("import", "copy", "step", "copy", "export", "import", "step")
COPIES = 24
"""Places of a copy; those that are left are padding."""
FULL = 7
"""Places of every other copy, none of which is padding."""


class Traffic:
    """One cache under steps of its last group."""

    def __init__(self, target: Target, name: str, rng: Random) -> None:
        self.target, self.rng = target, rng
        self.shape = shape_of(target, name)
        self.stage = Stage(target, self.shape)
        self.cache = Cache(target, self.stage.groups, self.shape.num_blocks)
        self.evidence = Evidence()
        self.num_copies = 0
        for index in range(len(self.stage.groups)):
            self._put(index, [int(i) for i in np.arange(1, self.shape.num_blocks)])

    def _put(self, index: int, ids: list[int]) -> None:
        group = self.cache.groups[index]
        self.cache.put(index, ids, self.cache.draw(self.rng, group, len(ids)))

    def _known(self, index: int) -> list[int]:
        return [int(i) for i in self.rng.permutation(np.flatnonzero(self.cache.known[index]))]

    def do(self, event: str) -> None:
        index = int(self.rng.integers(len(self.cache.groups)))
        if event == "step" or not self._known(index):
            index = len(self.cache.groups) - 1
        ids = self._known(index)
        if event == "import" or not ids:
            every = self.rng.permutation(np.arange(1, self.shape.num_blocks))
            self._put(index, [int(i) for i in every[: self.rng.integers(1, 7)]])
        elif event == "copy":
            self._copy(index, ids)
        elif event == "export":
            some = sorted(ids)[: int(self.rng.integers(1, len(ids) + 1))]
            self.evidence += self.cache.require(index, some, "exported under traffic")
        else:
            self._step(index)

    def _copy(self, index: int, ids: list[int]) -> None:
        """No block is source and destination; a source may have several destinations."""
        self.num_copies += 1
        places = COPIES if self.num_copies % 2 else FULL
        dst = ids[: min(places - (places == COPIES), 2 * len(ids) // 3)]
        sources = ids[len(dst) :]
        if not dst or not sources:
            return
        src = [int(i) for i in self.rng.choice(sources, len(dst))]
        padding = [0] * (places - len(dst))
        self.cache.copy(index, src + padding, dst + padding)

    def _step(self, index: int) -> None:
        """Some rows write their tokens; what stands in the cache is no matter."""
        size = self.shape.block_tokens
        rows = [(int(self.rng.integers(0, 2 * size)), 1), (int(self.rng.integers(size)), 1)]
        rows.append((int(self.rng.integers(size)), int(self.rng.integers(2, 20))))
        for step in batches(self.target, rows):
            layout = lay_out(self.shape, self.rng, step)
            scene = fill(layout, self.rng, REGIMES["normal"], self.target.round, self.target.dtype)
            self.stage.kv = self.cache.kv
            self.stage.play(scene)
            self.cache.kv = self.stage.kv
            token = 0
            for row, (cached, count) in enumerate(zip(scene.cached, scene.query, strict=True)):
                for at in range(int(cached), int(cached + count)):
                    place = self.shape.layer, int(scene.tables[row, at // size]), at % size
                    for name, x in (("k", scene.k), ("v", scene.v)):
                        self.cache.content[index][name][place] = x[token].astype(self.cache.dtype)
                    token += 1
            if self.shape.share_pool:
                self.cache.forget(index, [int(i) for i in np.unique(scene.tables)])


def _traffic(target: Target, seed: int) -> Evidence:
    rng, evidence = random(seed, "kv.traffic"), Evidence()
    for name in SHAPES:
        traffic = Traffic(target, name, rng)
        evidence += traffic.cache.require_all("first imports")
        events = [str(x) for x in rng.permutation(EVENTS)]
        for number, event in enumerate((*events, "import", "step", "copy")):
            traffic.do(event)
            done = f"event {number} of the traffic ({event})"
            if number % 3 == 0:  # the first, every third and the last
                evidence += traffic.cache.require_all(f"after {done}")
        evidence += traffic.evidence
    return evidence


CASES: tuple[Case, ...] = (
    Case(
        "kv.traffic",
        "imports, copies, exports and steps in any order leave what the model of the cache holds",
        _traffic,
        frozenset({"core"}),
        every_dtype=True,
    ),
)
