"""Rotary frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_core.errors import ModelError, NotSupported
from vllm_core.models.rope import context_length, rope_spec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 0.7},
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707, "factor": 40.0},
    "yarn-one-mscale": YARN | {"mscale": 1.3},
    "yarn-betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-no-ramp": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn-factor-1": YARN | {"factor": 1.0},
}


@pytest.mark.parametrize("dim", (8, 64, 128))
@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scale_are_those_of_transformers(name: str, dim: int) -> None:
    pytest.importorskip("torch", reason="transformers computes its frequencies with torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = CASES[name]
    config = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=dict(parameters),
    )
    want, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    standard: Any = config.rope_parameters
    found = rope_spec(standard, dim, 131072)
    np.testing.assert_allclose(found.inverse_frequency, want.numpy(), rtol=2e-6, atol=0)
    assert found.scale == pytest.approx(scale, rel=1e-12)


def test_default_frequencies_are_powers_of_theta() -> None:
    found = rope_spec({"rope_type": "default", "rope_theta": 10000.0}, 8, 64)
    np.testing.assert_allclose(found.inverse_frequency, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert found.scale == 1.0


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths() -> None:
    implied = rope_spec(YARN | {"factor": None}, 64, 131072)
    assert implied == rope_spec(YARN, 64, 131072)


def test_the_context_follows_yarn_only() -> None:
    assert context_length(YARN, 40960) == 131072
    assert context_length(YARN | {"factor": None}, 40960) == 40960
    assert context_length(LLAMA3, 131072) == 131072


@pytest.mark.parametrize("kind", ("dynamic", "longrope", "su", "proportional"))
def test_an_unknown_scaling_is_refused_with_the_known_ones(kind: str) -> None:
    with pytest.raises(NotSupported, match=f"'{kind}'; known are default, linear, llama3, yarn"):
        rope_spec({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, 8, 64)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(NotSupported, match="mrope_section"):
        rope_spec({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}, 8, 64)
    with pytest.raises(NotSupported, match=r"0\.5 of each head"):
        rope_spec({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, 8, 64)


def test_a_missing_or_broken_key_is_named() -> None:
    with pytest.raises(ModelError, match="'low_freq_factor'"):
        rope_spec({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, 8, 64)
    with pytest.raises(ModelError, match="a number as factor"):
        rope_spec({"rope_type": "linear", "rope_theta": 1e4, "factor": "big"}, 8, 64)
    with pytest.raises(ModelError, match="rope_theta"):
        rope_spec({"rope_type": "default"}, 8, 64)


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(NotSupported, match="head_dim 7"):
        rope_spec({"rope_theta": 1e4}, 7, 64)
