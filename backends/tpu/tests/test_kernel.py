"""The kernel, interpreted: beside the binding's own attention, under the race detector, its copies
counted.

Knows: jax's TPU interpreter. Does not know: the compiler (test_compile.py).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from tests.steps import Case
from vllm_core.bindings.jax import JaxAttention
from vllm_core_tpu import kernel
from vllm_core_tpu.attention import TpuAttention

DECODE, MIXED = ((5, 1), (40, 1), (100, 1)), ((70, 70), (40, 1), (100, 33))
CASES = {
    "decode": Case(DECODE, 8, 2, 128, 32),
    "decode of narrow heads": Case(DECODE, 4, 2, 64, 16, "bfloat16"),
    "mixed, padded": Case(MIXED, 6, 2, 64, 16, padding=(10, 2)),
    "window, softcap, sinks": Case(
        MIXED, 6, 2, 256, 16, "bfloat16", {"window": 20, "softcap": 5.0, "sinks": True}
    ),
    "LSE of odd heads": Case(((70, 7), (40, 1), (100, 33)), 3, 3, 80, 32, lse=True),
    "both ways": Case(((70, 7), (40, 40), (100, 33)), 2, 1, 32, 32, options={"causal": False}),
    "one token": Case(((1, 1),), 2, 2, 128, 16),
}
STRICT = {"detect_races": True, "uninitialized_memory": "nan", "dma_execution_mode": "on_wait"}


def tpu(interpret: Any = True) -> TpuAttention:
    return TpuAttention(jax.devices("cpu")[0], interpret)


def strict() -> Any:
    return pltpu.InterpretParams(**STRICT)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["values", "copies"])
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_binding_computes(name: str, mode: str) -> None:
    case = CASES[name]
    out, lse, cache = case.run(tpu(True if mode == "values" else strict()))
    expected, expected_lse, expected_cache = case.run(JaxAttention(jax.devices("cpu")[0]))
    limit = 2e-6 if case.dtype == "float32" else 2e-2
    assert np.abs(out - expected).max() < limit
    if lse is not None:
        assert expected_lse is not None and np.abs(lse - expected_lse).max() < limit
    for which, x in cache.items():
        np.testing.assert_array_equal(x, expected_cache[which])
    if mode == "copies":
        assert not interpreter.races.races_found  # type: ignore[union-attr]


def test_a_query_that_is_no_number_has_no_number_for_its_lse() -> None:
    """-inf would say that it saw nothing."""
    out, lse, _ = Case(((20, 2), (9, 1)), 2, 1, 64, 16, lse=True, spoiled=True).run(tpu())
    assert lse is not None and np.isnan(lse[0]).all() and np.isnan(out[0]).all()
    assert np.isfinite(lse[1:]).all() and np.isfinite(out[1:]).all()


@pytest.mark.parametrize("name", ["decode", "mixed, padded"])
def test_keys_that_are_met_before_their_copy_ended_are_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a buffer is waited for behind its use. The values show it (what did not
    come is NaN), and the detector names it."""
    meet, wait, late = kernel._meet, kernel.Ring.wait, []

    def remember(ring: Any, *turn: Any) -> None:
        late.append((ring, *turn))

    def impatient(*args: Any) -> None:
        meet(*args)
        wait(*late.pop())

    monkeypatch.setattr(kernel.Ring, "wait", remember)
    monkeypatch.setattr(kernel, "_meet", impatient)
    out, _, _ = CASES[name].run(tpu(strict()))
    assert np.isnan(out).any()
    assert interpreter.races.races_found  # type: ignore[union-attr]


def test_decoding_at_8k_moves_little_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all copies, and of the blocks that the pipeline moves, over the least possible."""
    moved = []
    execute = interpreter.DMA.execute_read

    def counted(copy: Any) -> None:
        execute(copy)
        moved.append(copy.data_size)

    monkeypatch.setattr(interpreter.DMA, "execute_read", counted)
    rows, kv_heads, group, dim, block = 2, 8, 4, 128, 32
    case = Case(
        ((8192, 1), (8190, 1)), kv_heads * group, kv_heads, dim, block, "bfloat16", layers=1
    )
    case.run(tpu(pltpu.InterpretParams()), layer=0)
    token = 2 * kv_heads * dim * 2  # K and V
    around = rows * (2 * kv_heads * group * dim * 2 + kernel.TILE * token)  # q, out, new
    least = (8192 + 8190) * token + rows * (2 * kv_heads * group * dim * 2 + token)
    ratio = (sum(moved) + around) / least
    print(f"bytes moved over the least possible: {ratio:.4f}")
    assert 1 <= ratio < 1.1
