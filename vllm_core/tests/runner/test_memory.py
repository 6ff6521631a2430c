"""The memory plan: what fits, what is cut, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_core.backend import Capabilities, MemoryReport
from vllm_core.backend.null import NullAttention
from vllm_core.config import EngineConfig
from vllm_core.errors import CapacityError, InvalidArgument
from vllm_core.runner.memory import DEFAULT_HOST_SHARE, MemoryPlan, choose_block_tokens, plan_memory
from vllm_core.tests.engine.tiny import MAX_LEN, TWO_POOLS, make_spec

DEVICE = Capabilities(frozenset({"float32"}), "float32")
HOST = replace(DEVICE, shares_host_memory=True)
GIB = 1 << 30


def plan(
    free: int = GIB,
    *,
    caps: Capabilities = DEVICE,
    windows: tuple[int | None, ...] = (None,),
    context: int = MAX_LEN,
    **config: Any,
) -> MemoryPlan:
    spec = replace(make_spec("float32", windows), max_model_len=context)
    options: dict[str, Any] = {"max_num_seqs": 4, "block_size": 8}
    return plan_memory(
        spec,
        NullAttention(),
        caps,
        MemoryReport(free, free),
        EngineConfig("x", **(options | config)),
        param_bytes=1000,
        token_budget=64,
        dtype="float32",
    )


def kv_bytes(made: MemoryPlan) -> int:
    attention = NullAttention()
    return sum(
        made.num_blocks[pool] * attention.block_bytes(group)
        for pool, group in {g.pool: g for g in made.groups}.items()
    )


def test_the_plan_never_hands_out_more_than_the_share_asked_for() -> None:
    made = plan(context=1 << 14, memory_utilization=0.5, max_num_seqs=64)
    lines = dict(made.lines)
    assert lines["KV cache"] == kv_bytes(made)
    others = lines["weights"] + lines["largest step (estimate)"] + lines["state of rows"]
    assert lines["KV cache"] + others <= GIB // 2


def test_no_more_is_taken_than_all_rows_can_use() -> None:
    made = plan()
    assert made.num_blocks == {0: 4 * MAX_LEN // 8 + 1}


def test_a_device_that_shares_the_hosts_memory_takes_a_modest_part() -> None:
    made = plan(64 * GIB, caps=HOST, context=1 << 20, max_num_seqs=64)
    assert DEFAULT_HOST_SHARE / 2 < kv_bytes(made) <= DEFAULT_HOST_SHARE


def test_a_context_that_does_not_fit_is_cut_unless_it_was_asked_for() -> None:
    long = 1 << 22
    made = plan(context=long, max_num_seqs=1)
    assert 16 <= made.max_model_len < long
    with pytest.raises(CapacityError, match=r"cannot hold one sequence.*lower max_model_len"):
        plan(context=long, max_num_seqs=1, max_model_len=long)


def test_every_pool_holds_the_longest_sequence() -> None:
    made = plan(windows=TWO_POOLS, kv_cache_memory=400 << 10)
    for group in made.groups:
        assert made.num_blocks[group.pool] > group.blocks_held(made.max_model_len, 64)


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(CapacityError, match="raise kv_cache_memory"):
        plan(kv_cache_memory=1000)


@pytest.mark.parametrize("config", [{"kv_cache_memory": 1 << 50}, {"num_kv_blocks": 1 << 40}])
def test_a_cache_larger_than_the_device_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CapacityError, match="lower kv_cache_memory"):
        plan(context=1 << 40, **config)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=f"{MAX_LEN}; lower it"):
        plan(max_model_len=MAX_LEN + 1)


def test_the_block_size_is_the_first_that_wastes_little() -> None:
    specs = make_spec("float32", (None,)).attention_specs
    assert choose_block_tokens(NullAttention(), specs, None) == 32
    with pytest.raises(InvalidArgument, match="it offers"):
        choose_block_tokens(NullAttention(), specs, 7)
