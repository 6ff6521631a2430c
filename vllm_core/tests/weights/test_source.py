from __future__ import annotations

import json
import mmap
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from vllm_core import envs
from vllm_core.errors import ModelError, WeightError
from vllm_core.weights import source as source_module
from vllm_core.weights.source import open_safetensors, read_header

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 2),
    "c.weight": np.arange(3, dtype=np.float16),
    "scalar": np.full((), 7.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    names = {"one.safetensors": ["a.weight", "c.weight"], "two.safetensors": ["b.weight"]}
    for file, members in names.items():
        save_file({name: TENSORS[name] for name in members}, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, members in names.items() for name in members}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_every_tensor_comes_back_in_its_own_dtype_and_shape(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert sorted(source.names()) == sorted(TENSORS)
    for name, array in TENSORS.items():
        loaded = source.load(name)
        assert (source.shape(name), source.dtype(name)) == (array.shape, str(array.dtype))
        assert loaded.dtype == array.dtype and loaded.flags.c_contiguous
        np.testing.assert_array_equal(loaded, array)
    assert source.num_bytes() == sum(array.nbytes for array in TENSORS.values())


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="NOT CHECKED: this system does not tell memory"
)
def test_what_was_read_a_while_ago_leaves_memory_and_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 << 20
    tensors = {str(i): np.full(size, i, np.uint8) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(source_module, "RESIDENT_BYTES", 2 * size)
    source = open_safetensors(tmp_path)
    before = resident_bytes()
    loaded = []
    for name, expected in tensors.items():
        loaded.append(source.load(name))
        assert (loaded[-1] == expected[0]).all()
    assert resident_bytes() - before < 5 * size
    for array, expected in zip(loaded, tensors.values(), strict=True):
        np.testing.assert_array_equal(array, expected)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_shards_form_one_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path)
    source = open_safetensors(tmp_path)
    for name in ("a.weight", "b.weight", "c.weight"):
        np.testing.assert_array_equal(source.load(name), TENSORS[name])


def test_shards_without_an_index_form_one_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert sorted(open_safetensors(tmp_path).names()) == ["a.weight", "b.weight", "c.weight"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(WeightError, match=r"lacks 1 of 2 .*two\.safetensors"):
        open_safetensors(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.weight": "one.safetensors", "x.weight": "two.safetensors"})
    with pytest.raises(WeightError, match=r"'x\.weight' in two\.safetensors, which lacks it"):
        open_safetensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "three.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightError, match="stands in two files"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("file", ["../one.safetensors", "/one.safetensors", 3, ""])
def test_an_index_may_not_point_outside_the_directory(tmp_path: Path, file: Any) -> None:
    write_shards(tmp_path, {"a.weight": file})
    with pytest.raises(WeightError, match="no file name"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match="index"):
        open_safetensors(tmp_path)


def test_a_file_cut_anywhere_is_a_weight_error(tmp_path: Path) -> None:
    whole = save(TENSORS)
    path = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightError):
            open_safetensors(tmp_path)


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(TENSORS)[:-5])
    with pytest.raises(WeightError, match=r"truncated: its tensors need \d+ bytes"):
        open_safetensors(tmp_path)


def entry(start: int, stop: int, shape: object = None, dtype: object = "U8") -> dict[str, Any]:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, "overlap"),
        ({"a": entry(0, 4), "b": entry(0, 4), "c": entry(4, 8)}, "overlap"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, "2 unused bytes before 'b'"),
        ({"a": entry(0, 9)}, "truncated"),
        ({"a": entry(0, 7)}, "1 bytes that belong to no tensor"),
        ({"a": entry(0, 8, [3])}, "needs 3 bytes"),
        ({"a": entry(0, 8, [2], "F64")}, "needs 16 bytes"),
        ({"a": entry(0, 8, [-8])}, "no list of sizes"),
        ({"a": entry(0, 8, [True, 8])}, "no list of sizes"),
        ({"a": entry(0, 8, "8")}, "no list of sizes"),
        ({"a": entry(0, 8, dtype="F7")}, "dtype 'F7'; known are"),
        ({"a": entry(0, 8, dtype=["F32"])}, "known are"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}, "no range"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0]}}, "no range"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "no range"),
        ({"a": 3}, "no description"),
        ([], "JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": {}, "a": {}}', "'a' stands in it 2 times"),
    ],
)
def test_header_nonsense_is_one_clear_sentence(
    tmp_path: Path, header: object, message: str
) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(WeightError, match=message):
        read_header(path)


def test_an_absurd_header_length_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(WeightError, match="claims a header"):
        read_header(path)


@given(position=st.integers(0, 399), value=st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_but_weight_errors(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    data = bytearray(save(TENSORS))
    data[position % len(data)] = value
    folder = tmp_path_factory.mktemp("changed")
    (folder / "model.safetensors").write_bytes(data)
    try:
        source = open_safetensors(folder)
        for name in source.names():
            source.load(name)
    except WeightError:
        pass


def test_an_eight_bit_tensor_is_listed_but_not_loaded(tmp_path: Path) -> None:
    save_file({"q": np.ones(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source.dtype("q") == "float8_e4m3fn"
    with pytest.raises(WeightError, match="needs quantised compute"):
        source.load("q")


def test_an_unknown_tensor_is_a_weight_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="holds no tensor 'x'"):
        open_safetensors(tmp_path).load("x")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=rf"pickled weights \({name}\).*save_pretrained"):
        open_safetensors(tmp_path)


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds no weights"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("model", ["stories260K", "stories15M"])
def test_real_checkpoints_equal_what_the_library_reads(model: str) -> None:
    data = envs.test_data()
    if data is None:
        pytest.skip(f"VLLM_CORE_TEST_DATA is not set: the weights of {model} were not read")
    source = open_safetensors(data / "models" / model)
    expected = load_file(data / "models" / model / "model.safetensors")
    assert sorted(source.names()) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(source.load(name), array)
