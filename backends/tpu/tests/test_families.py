"""Every family of the core through the kernel, interpreted, beside transformers: as the core's own
tests hold its bindings to it.

Knows: the core's tests. Does not know: models, kernels.
"""

from __future__ import annotations

import pytest

from vllm_core.backend import OpenConfig
from vllm_core.models import find_recipe
from vllm_core.tests.models.harness import Harness
from vllm_core.tests.models.test_families import (
    Oracle,
    oracle,
    test_awkward_chunks_and_decoding_give_transformers_logits,
    test_ragged_steps_of_two_sequences_give_transformers_logits,
    test_whole_prefill_gives_transformers_logits,
)
from vllm_core.weights.loader import load_params
from vllm_core.weights.source import open_safetensors
from vllm_core_tpu.attention import why_not
from vllm_core_tpu.runtime import open_runtime

__all__ = [
    "oracle",
    "test_awkward_chunks_and_decoding_give_transformers_logits",
    "test_ragged_steps_of_two_sequences_give_transformers_logits",
    "test_whole_prefill_gives_transformers_logits",
]

BLOCK_TOKENS = 16
"""The kernel's least; windows of the families are shorter than two of them."""


@pytest.fixture(scope="module")
def harness_of(oracle: Oracle) -> Harness:
    from transformers import AutoConfig

    runtime = open_runtime(OpenConfig("float32", options={"platform": "cpu"}))
    config = AutoConfig.from_pretrained(oracle.folder)
    recipe = find_recipe(config)
    spec = recipe.spec(config, runtime.dtype)
    assert not any(map(why_not, spec.attention_specs))
    rules = recipe.weights(spec, config)
    params = load_params(rules, open_safetensors(oracle.folder), runtime, spec.layers)
    return Harness(runtime, spec, params, block_tokens=BLOCK_TOKENS)
