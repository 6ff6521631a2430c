"""Writes tiny checkpoints for the tests of this folder.

Knows: how llama.cpp's converter changes values on the way into GGUF. Does not know: how we read
them back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LLAMA = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 8,
}
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HIDDEN, FFN, VOCAB, NUM_EXPERTS = 2, 4, 2, 32, 64, 48, 3
HEAD = HIDDEN // NUM_HEADS


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Array],
    quantise: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file; keys outside `general`, `tokenizer` and `split` go below the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        is_global = key.split(".")[0] in ("general", "tokenizer", "split")
        _add(writer, key if is_global else f"{architecture}.{key}", value)
    for name, array in tensors.items():
        kind = (quantise or {}).get(name)
        if kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        elif array.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def llama_shapes(*, tied: bool = True, prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of a tiny dense model."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (VOCAB, HIDDEN),
        f"{prefix}norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(NUM_LAYERS):
        at = f"{prefix}layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (NUM_HEADS * HEAD, HIDDEN),
            f"{at}self_attn.k_proj.weight": (NUM_KV_HEADS * HEAD, HIDDEN),
            f"{at}self_attn.v_proj.weight": (NUM_KV_HEADS * HEAD, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, NUM_HEADS * HEAD),
            f"{at}mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{at}mlp.up_proj.weight": (FFN, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def convert(architecture: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """What convert_hf_to_gguf.py makes of a checkpoint, named by the gguf library's own table."""
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, NUM_LAYERS)
    found: dict[str, Array] = {}
    for name, array in _stack_experts(tensors).items():
        module, _, suffix = name.rpartition(".")
        new = table.get_name(module)
        assert new is not None, name
        if architecture == "llama" and new.endswith(("attn_q", "attn_k")):
            array = permute(array, NUM_HEADS if new.endswith("q") else NUM_KV_HEADS)
        if architecture.startswith("gemma") and new.endswith("norm"):
            array = array + np.float32(1)
        if architecture == "gpt2" and new.endswith(("qkv", "output", "up", "down")):
            array = array.T if new.startswith("blk") else array
        found[f"{new}.{suffix}"] = np.ascontiguousarray(array)
    return found


def permute(array: Array, num_heads: int) -> Array:
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _stack_experts(tensors: Mapping[str, Array]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    stacks: dict[str, list[Array]] = {}
    for name, array in tensors.items():
        stacked = re.sub(r"experts\.\d+\.", "experts.", name)
        if stacked == name:
            found[name] = array
        else:
            stacks.setdefault(stacked, []).append(array)
    return found | {name: np.stack(arrays) for name, arrays in stacks.items()}
