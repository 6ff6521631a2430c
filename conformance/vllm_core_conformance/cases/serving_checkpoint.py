"""A checkpoint in files: recipe, rules, lazy tensors, fused parts, the backend's `load`; served and
read back.

Knows: names of a Llama checkpoint. Does not know: what is right (judge).
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vllm_core.models.registry import find_recipe
from vllm_core.weights.loader import load_params
from vllm_core.weights.source import open_safetensors
from vllm_core_conformance.case import Evidence
from vllm_core_conformance.cases.serving_engine import Setup, run, serve
from vllm_core_conformance.cases.serving_judge import Judge
from vllm_core_conformance.oracle.model import Blueprint, Layer
from vllm_core_conformance.target import Target, calling, numpy_dtype
from vllm_core_conformance.tiny import VOCAB

Numbers = NDArray[Any]

HEADS, KV_HEADS, DIM, FFN, HIDDEN = 4, 2, 8, 48, 32
FILES = Blueprint(
    "files",
    VOCAB,
    HIDDEN,
    (Layer(HEADS, KV_HEADS, DIM, FFN, scale=DIM**-0.5),) * 3,
    theta=10_000.0,
)


def checkpoint(target: Target, seed: int) -> Evidence:
    """Writes the weights as a published model has them, and lets the core load them."""
    rng = np.random.default_rng([seed, zlib.crc32(b"checkpoint")])
    served = serve(target, FILES, seed)
    config: Any = SimpleNamespace(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=len(FILES.layers),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        intermediate_size=FFN,
        rms_norm_eps=FILES.eps,
        hidden_act="silu",
        max_position_embeddings=served.max_len,
        rope_parameters={"rope_type": "default", "rope_theta": FILES.theta},
        tie_word_embeddings=False,
    )
    recipe = find_recipe(config)
    spec = recipe.spec(config, target.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_file(_tensors(served.weights, target.dtype), path / "model.safetensors")
        rules = recipe.weights(spec, config)
        with calling("loading a checkpoint"):
            params = load_params(rules, open_safetensors(path), target.runtime, spec.layers)
    served.runner.params, served.seed = params, None
    requests = [
        served.request(
            rng.integers(0, VOCAB, n),
            f"r{n}",
            temperature=0.0,
            ignore_eos=True,
            logprobs=3,
            max_tokens=6,
        )
        for n in (1, 7, 18, 30)
    ]
    judge = Judge(served, "weights from files")
    judge.all(requests, run(served.engine(Setup()), requests))
    return judge.evidence()


def _tensors(weights: Any, dtype: str) -> dict[str, Numbers]:
    """By the names of the published format, in the dtype itself."""
    kind = numpy_dtype(dtype)
    q, kv = HEADS * DIM, KV_HEADS * DIM
    found = {
        "model.embed_tokens.weight": weights["embed"]["weight"],
        "model.norm.weight": weights["norm"]["weight"],
        "lm_head.weight": weights["head"]["weight"],
    }
    for number, own in enumerate(weights["layers"]):
        prefix = f"model.layers.{number}"
        attention = np.split(own["qkv"]["weight"], (q, q + kv))
        gate, up = np.split(own["gate_up"]["weight"], 2)
        found |= {
            f"{prefix}.{name}.weight": tensor
            for name, tensor in (
                ("input_layernorm", own["input_norm"]["weight"]),
                *zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention),
                ("self_attn.o_proj", own["output"]["weight"]),
                ("post_attention_layernorm", own["ffn_norm"]["weight"]),
                ("mlp.gate_proj", gate),
                ("mlp.up_proj", up),
                ("mlp.down_proj", own["down"]["weight"]),
            )
        }
    return {name: np.ascontiguousarray(x.astype(kind)) for name, x in found.items()}
