"""The reference runtime catches who uses a consumed value."""

from __future__ import annotations

import numpy as np

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup, OpenConfig, Program, Runtime
from vllm_core.bindings.numpy import open_runtime
from vllm_core.ops import HostArray


def runtime() -> Runtime:
    return open_runtime(OpenConfig(dtype="float32"))


def test_consumed_buffers_are_poisoned_and_the_results_are_not() -> None:
    kv = (np.ones(3, np.float32), np.arange(3, dtype=np.int32))
    other = np.ones(3, np.float32)
    program = Program("step", lambda kv, x: (kv, kv[0] + x), consumes=(0,))
    new, total = runtime().compile(program, None)(kv, other)
    assert np.isnan(kv[0]).all()
    assert (kv[1] < 0).all()
    assert new[0].tolist() == [1, 1, 1]
    assert new[1].tolist() == [0, 1, 2]
    assert total.tolist() == [2, 2, 2]
    assert other.tolist() == [1, 1, 1]


def test_a_program_that_writes_in_place_does_not_reach_what_it_does_not_consume() -> None:
    state = np.zeros(3, np.float32)

    def write(state: HostArray) -> tuple[HostArray]:
        state[0] = 7
        return (state,)

    (new,) = runtime().compile(Program("apply", write, consumes=(0,)), None)(state)
    assert new.tolist() == [7, 0, 0]
    assert np.isnan(state).all()


def test_a_cache_slot_that_was_never_written_is_poison() -> None:
    spec = AttentionSpec(2, 1, 4, 4, 0.5, KVFormat("float32"), 0)
    group = KVGroup(0, "full", 2, 1, spec, 0)
    (pool,) = runtime().attention.alloc([group], {0: 3})
    assert np.isnan(pool).all()
    assert pool.nbytes == 3 * runtime().attention.block_bytes(group)
