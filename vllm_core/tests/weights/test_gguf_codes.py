"""Codes read from GGUF blocks are worth what the gguf library makes of them, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from vllm_core.errors import WeightError
from vllm_core.ops import HostArray, quantized
from vllm_core.tests.weights.checkpoints import LLAMA, convert, write_gguf
from vllm_core.tests.weights.test_gguf import CASES, dense, open_llama
from vllm_core.weights.demo import demo_model_path
from vllm_core.weights.gguf import GGUFFile
from vllm_core.weights.gguf_codes import FORMATS, decode

Q = gguf.GGMLQuantizationType
KIND = Q.__members__
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def values(tensors: dict[str, HostArray], scheme: str) -> Any:
    return quantized.dequantize(tensors, quantized.BITS[scheme]).view(np.uint32)


def raw_blocks(kind: str) -> HostArray:
    """Every bit at random but those of the float16 scales, which are ordinary numbers."""
    rng = np.random.default_rng(3)
    size = gguf.GGML_QUANT_SIZES[KIND[kind]][1]
    blocks = rng.integers(0, 256, (5, 3, size), dtype=np.uint8)
    has_two = kind in ("Q4_1", "Q4_K", "Q5_1", "Q5_K")
    places = (208,) if kind == "Q6_K" else (0, 2) if has_two else (0,)
    for at in places:
        scales = rng.standard_normal((5, 3, 1)).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8).reshape(5, 3, 2)
    return blocks.reshape(5, -1)


@pytest.mark.parametrize("kind", FORMATS)
def test_random_blocks_of_each_type_are_read_to_the_bit(kind: str) -> None:
    raw, form = raw_blocks(kind), FORMATS[kind]
    tensors = decode(kind, raw)
    size = 3 * gguf.GGML_QUANT_SIZES[KIND[kind]][0]
    quantized.check(tensors, form.scheme, 5, size)
    assert tensors["scales"].shape == (5, size // form.group)
    assert ("mins" in tensors) == form.has_mins
    want = gguf.quants.dequantize(raw, KIND[kind]) + np.float32(0)  # -0.0 is 0.0
    found = quantized.dequantize(tensors, quantized.BITS[form.scheme]) + np.float32(0)
    assert (found.view(np.uint32) == want.view(np.uint32)).all()


def test_the_demo_model_is_read_to_the_bit() -> None:
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not on this machine: no real file of codes was read")
    file = GGUFFile(path)
    some = [name for name in file.names() if "layers.7." in name or "embed" in name]
    coded = {name: file.codes(name) for name in some}
    assert sum(form is not None for form in coded.values()) == 8
    for name, form in coded.items():
        if form is not None:
            found = values(file.load_codes(name), form.scheme)
            assert (found == file.load(name).view(np.uint32)).all(), name


def test_rows_of_codes_are_in_the_order_of_dequantised_rows(tmp_path: Path) -> None:
    converted = convert("llama", dense())
    kinds = {name: Q.Q4_1 for name, array in converted.items() if array.ndim > 1}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, converted, kinds))
    for name in file.names():
        form = file.codes(name)
        if "norm" in name:
            assert form is None
            continue
        assert form is not None and (form.scheme, form.has_mins) == ("int4", True)
        found = values(file.load_codes(name), "int4")
        assert (found == file.load(name).view(np.uint32)).all(), name


def test_what_the_converter_turned_or_stacked_is_no_codes(tmp_path: Path) -> None:
    for case, name in (
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w1.weight"),
    ):
        architecture, keys, tensors = CASES[case]
        converted = convert(architecture, tensors)
        kinds = {n: Q.Q8_0 for n, array in converted.items() if array.ndim > 1}
        file = GGUFFile(write_gguf(tmp_path / case, architecture, keys, converted, kinds))
        assert file.codes(name) is None
        assert file.load(name).dtype == np.float32


def test_plain_tensors_have_no_codes(tmp_path: Path) -> None:
    file = open_llama(tmp_path)
    assert file.codes(Q_PROJ) is None
    with pytest.raises(WeightError, match="cannot be had as codes"):
        file.load_codes(Q_PROJ)
