"""What an engine may be set up with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_core.config import EngineConfig
from vllm_core.errors import InvalidArgument


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1"),
        ({"block_size": -1}, "block_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"memory_utilization": 0.0}, "memory_utilization must be above 0"),
        ({"memory_utilization": 1.1}, "memory_utilization must be above 0"),
        ({"num_kv_blocks": 1}, "num_kv_blocks must be at least 2"),
        ({"kv_cache_memory": -1}, "kv_cache_memory must be at least 1"),
        ({"max_num_seqs": None}, "max_num_seqs must be a whole number"),
        ({"max_model_len": "64"}, "max_model_len must be a whole number, not '64'"),
        ({"block_size": 1.5}, "block_size must be a whole number"),
        ({"memory_utilization": "all"}, "memory_utilization must be above 0"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"quantization": "int3"}, "quantization must be one of dense, int8, int4, int4-g32"),
        ({"quantization": "int4-g48"}, "int4-g128-weight-only, not 'int4-g48'"),
        ({"quantization": "int4-weight-only-g32"}, "quantization must be one of"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be one of auto, int8, not 'fp8'"),
        ({"load_format": "pickle"}, "load_format must be one of"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy must be one of fcfs, priority"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_words(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        EngineConfig(model="demo", **wrong)
    assert said in str(caught.value)


def test_a_path_may_name_a_model() -> None:
    config = EngineConfig(model=Path("a") / "b", tokenizer=Path("c"))  # type: ignore[arg-type]
    assert (config.model, config.tokenizer) == (str(Path("a") / "b"), "c")


def test_the_defaults_are_valid_and_cannot_be_changed_later() -> None:
    config = EngineConfig(model="demo")
    with pytest.raises(AttributeError):
        config.dtype = "float32"  # type: ignore[misc]
