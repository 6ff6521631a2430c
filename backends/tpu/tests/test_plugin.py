"""What the TPU backend says of itself, and which device it opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup, OpenConfig
from vllm_core.errors import BackendError
from vllm_core_tpu import plugin
from vllm_core_tpu.attention import TpuAttention, why_not
from vllm_core_tpu.runtime import open_runtime


@pytest.mark.parametrize(
    ("names", "count"),
    [((), 0), (("null", "tty0"), 0), (("accel0", "accel1"), 2), (("vfio/0",), 1)],
)
def test_chips_are_what_the_system_shows(
    tmp_path: Path, names: tuple[str, ...], count: int
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert plugin.chips(tmp_path) == count


def test_without_a_chip_it_runs_only_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "chips", lambda: 0)
    (info,) = plugin.vllm_core_backends()
    assert info.only_by_name
    probe = plugin.probe()
    assert probe.devices[0].kind == "cpu" and "interpreted" in probe.reason


def test_a_chip_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "chips", lambda: 4)
    monkeypatch.setattr(plugin, "_is_installed", lambda name: name != "libtpu")
    (info,) = plugin.vllm_core_backends()
    assert not info.only_by_name and info.priority > 0
    probe = plugin.probe()
    assert not probe.devices and probe.fix == "pip install 'vllm-core-tpu[device]'"


def test_a_platform_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackendError, match="platform 'nowhere'"):
        open_runtime(OpenConfig("float32", options={"platform": "nowhere"}))
    with pytest.raises(BackendError, match="device 99"):
        open_runtime(OpenConfig("float32", device_index=99, options={"platform": "cpu"}))


def group(dim: int, dim_v: int, dtype: str, block: int = 32) -> KVGroup:
    spec = AttentionSpec(4, 2, dim, dim_v, 0.1, KVFormat(dtype), 0)
    return KVGroup(0, "full", block, 3, spec, 0)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((128, 128, "bfloat16"), None),
        ((256, 256, "float32"), None),
        ((128, 128, "float16"), "a cache of float16"),
        ((64, 32, "bfloat16"), "V heads of another width than K heads"),
    ],
)
def test_what_the_kernel_declines_follows_from_the_layer(
    facts: tuple[int, int, str], reason: str | None
) -> None:
    assert why_not(group(*facts).spec) == reason


@pytest.mark.parametrize(("dim", "kv_heads"), [(64, 2), (128, 4), (80, 4), (256, 4)])
def test_a_block_is_one_contiguous_piece_of_whole_tiles(dim: int, kv_heads: int) -> None:
    attention = open_runtime(OpenConfig("bfloat16", options={"platform": "cpu"})).attention
    assert isinstance(attention, TpuAttention)
    own = group(dim, dim, "bfloat16")
    layers, planes, tokens, lanes = attention.block_shape(own)
    assert (layers, planes, tokens) == (3, kv_heads, 32) and lanes % 128 == 0 and lanes >= dim
    assert attention.block_bytes(own) == layers * planes * tokens * lanes * 2
    assert attention.alloc((own,), {0: 5})[0].shape == (5, layers, planes, tokens, lanes)
    assert np.prod(attention.block_shape(group(dim, dim, "bfloat16", 8))) == 3 * 2 * 8 * 2 * dim
