"""A GGUF file as a checkpoint: a config, and tensors under their Hugging Face names.

Knows: how values were changed on the way into GGUF and how to undo it. Does not know: tokenizers,
devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_core.errors import ModelError, WeightError
from vllm_core.weights.gguf_architectures import (
    ARCHITECTURES,
    MISTRAL,
    MIXTRAL,
    NOT_WEIGHTS,
    Architecture,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from gguf import GGUFReader, ReaderTensor

    from vllm_core.weights.source import CodeFormat

_TENSOR_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_PLAIN_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class GGUFFile:
    """One GGUF file: metadata, config and a WeightSource.

    Tensors in F32, F16, BF16 and F64 keep their dtype, every other type is dequantised to float32
    by `load`; some can be had as codes too. A tensor that stacks the experts of a layer appears as
    one tensor per expert.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a file that is no GGUF or has an unknown architecture, WeightError
        for one that is truncated or whose tensors overlap."""
        from vllm_core.weights.gguf_config import config_fields
        from vllm_core.weights.gguf_reader import open_gguf

        self.path = path
        reader = open_gguf(path)
        self.metadata: Mapping[str, Any] = _Metadata(path, reader)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = _find_architecture(path, self.metadata)
        self._located = self._locate_all()
        self._config = config_fields(self)

    def config(self) -> dict[str, Any]:
        """The fields of the Hugging Face config class named by "model_type"."""
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json would hold: ids that end a sequence, sampling defaults."""
        from vllm_core.weights.gguf_config import generation_fields

        return generation_fields(self.metadata)

    def names(self) -> list[str]:
        return list(self._located)

    def shape(self, name: str) -> tuple[int, ...]:
        at = self._find(name)
        shape = _shape_of(at.tensor)
        if at.expert is not None:
            shape = shape[1:]
        return shape[::-1] if at.stem in self.architecture.transposed else shape

    def dtype(self, name: str) -> str:
        return _PLAIN_DTYPES.get(self._find(name).tensor.tensor_type.name, "float32")

    def num_bytes(self) -> int:
        return sum(int(tensor.n_bytes) for tensor in self._tensors.values())

    def load(self, name: str) -> npt.NDArray[Any]:
        import numpy as np

        at = self._find(name)
        array = self._unpermuted(at.stem, _dequantise(at.tensor, at.expert))
        if at.stem in self.architecture.transposed and array.ndim == 2:
            array = np.ascontiguousarray(array.T)
        elif self.architecture.norm_offset and at.stem.endswith("norm"):
            array = array - array.dtype.type(self.architecture.norm_offset)
        return array

    def codes(self, name: str) -> CodeFormat | None:
        from vllm_core.weights.gguf_codes import FORMATS

        at = self._find(name)
        is_plain = at.expert is None and at.stem not in self.architecture.transposed
        return FORMATS.get(at.tensor.tensor_type.name) if is_plain else None

    def load_codes(self, name: str) -> dict[str, npt.NDArray[Any]]:
        from vllm_core.weights.gguf_codes import decode

        at = self._find(name)
        if self.codes(name) is None:
            raise WeightError(f"tensor {name!r} of {self.path} cannot be had as codes; load it")
        found = decode(at.tensor.tensor_type.name, at.tensor.data)
        return {key: self._unpermuted(at.stem, array) for key, array in found.items()}

    def _unpermuted(self, stem: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows in Hugging Face's order."""
        if stem not in self.architecture.permuted:
            return array
        heads = "num_attention_heads" if stem == "attn_q" else "num_key_value_heads"
        return _unpermute(array, self._config[heads])

    def has_tensor(self, name: str) -> bool:
        """Whether the file holds a tensor of this GGUF name."""
        return name in self._tensors

    def gguf_tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor by its GGUF name, as it lies in the file, dequantised."""
        return _dequantise(self._tensors[name], None)

    def gguf_shape(self, name: str) -> tuple[int, ...]:
        return _shape_of(self._tensors[name])

    def gguf_dtypes(self) -> set[str]:
        """The types of all matrices, e.g. {"Q4_1", "Q8_0"}."""
        return {t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1}

    def _find(self, name: str) -> _Located:
        try:
            return self._located[name]
        except KeyError:
            raise WeightError(f"{self.path} holds no tensor {name!r}") from None

    def _locate_all(self) -> dict[str, _Located]:
        located: dict[str, _Located] = {}
        for tensor in self._tensors.values():
            match = _TENSOR_NAME.fullmatch(tensor.name)
            layer, stem, kind = match.groups() if match else (None, "", "")
            if stem in NOT_WEIGHTS:
                continue
            table = self.architecture.top if layer is None else self.architecture.block
            if stem not in table:
                raise WeightError(
                    f"{self.path} holds a tensor {tensor.name!r} that a "
                    f"{self.architecture.model_type} model does not have"
                )
            prefix = "" if layer is None else f"{self.architecture.layers}{layer}."
            name = f"{prefix}{table[stem]}.{kind}"
            if "{expert}" in name:
                for expert in range(_shape_of(tensor)[0]):
                    located[name.format(expert=expert)] = _Located(tensor, stem, expert)
            else:
                located[name] = _Located(tensor, stem, None)
        return located


@dataclass(frozen=True)
class _Located:
    """Where a Hugging Face tensor lies in the file."""

    tensor: ReaderTensor
    stem: str
    expert: int | None


class _Metadata(Mapping[str, Any]):
    """The key-value pairs of a file, decoded when asked for."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self._path = path
        self._fields = {k: v for k, v in reader.fields.items() if not k.startswith("GGUF.")}

    def __getitem__(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise ModelError(f"{key} of {self._path} is not valid UTF-8: {error}") from error

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _find_architecture(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    name = metadata.get("general.architecture")
    if name == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    if name == "llama" and metadata.get("llama.attention.sliding_window"):
        return MISTRAL
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{path} has the GGUF architecture {name!r}; known are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _shape_of(tensor: ReaderTensor) -> tuple[int, ...]:
    """Rows first; GGUF writes the fastest axis first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantise(tensor: ReaderTensor, expert: int | None) -> npt.NDArray[Any]:
    import ml_dtypes
    import numpy as np
    from gguf.quants import dequantize

    data = tensor.data if expert is None else tensor.data[expert]
    kind = tensor.tensor_type.name
    if kind == "BF16":
        return np.array(data.view(ml_dtypes.bfloat16))
    if kind in _PLAIN_DTYPES:
        return np.array(data)
    try:
        return np.ascontiguousarray(dequantize(data, tensor.tensor_type))
    except NotImplementedError as error:
        raise WeightError(
            f"tensor {tensor.name!r} is quantised as {kind}, "
            "which the gguf library cannot dequantise"
        ) from error


def _unpermute(array: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Rows of each head from (pair, half) order, which interleaved rope wants, to (half, pair)."""
    import numpy as np

    halves = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
