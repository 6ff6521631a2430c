"""Our own kernels: the shared library, the instruction set of this processor, typed functions.

    kernels, why_not = native.load()      # Native, or None: then portable ops run
    kernels.set_threads(2)                # that calls run on
    kernels.linear(ctypes.addressof(weight), x.data_ptr(), x.stride(0), out.data_ptr(), m)

The structs mirror csrc/kernels.h; when the library is loaded every offset and every signature is
compared with what its compiler saw. Calls release the interpreter's lock.

Knows: the C interface, how a library is found and why not. Does not know: tensors, frameworks, what
kernels compute.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from vllm_core import envs
from vllm_core.errors import InvalidArgument
from vllm_core.log import get_logger

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "_kernels.so"
WHY_PURE = PACKAGE / "_kernels_missing.txt"
"""Where a build without a library wrote its reason."""
SOURCES = PACKAGE / "csrc"
"""In a source tree only, not in a wheel."""
PORTABLE = "portable"
"""In VLLM_CORE_CPU_ISA: no kernels of our own."""

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""Dtype in kernels.h."""
PANEL = 64
"""Rows of a weight in one panel (linear.h); a gated one has a multiple of twice this."""


class Linear(ctypes.Structure):
    """One packed weight."""

    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("out_stride", c_int64),
        ("group", c_int64),
        ("bits", c_int32),
        ("wide_inputs", c_int32),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
        ("epilogue", c_int32),
    )


class Codes(ctypes.Structure):
    """A weight in codes before it is packed."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("bits", c_int32),
    )


class AttendStep(ctypes.Structure):
    """What the attention layers of one step read alike."""

    _fields_ = (
        ("tables", c_void_p),
        ("rows", c_void_p),
        ("seq_lens", c_void_p),
        ("query_start", c_void_p),
        ("table_stride", c_int64),
        ("num_rows", c_int64),
        ("num_tokens", c_int64),
    )


class Attend(ctypes.Structure):
    """One attention layer of a step."""

    _fields_ = (
        ("step", c_void_p),
        ("cache", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("sinks", c_void_p),
        ("block_stride", c_int64),
        ("layer", c_int64),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("q_heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("dim_v", c_int64),
        ("block_tokens", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("causal", c_int32),
        ("dtype", c_int32),
        ("kv_dtype", c_int32),
    )


class Blocks(ctypes.Structure):
    """Blocks of one layer, and the dense arrays that they come from or go to."""

    _fields_ = (
        ("ids", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("count", c_int64),
        ("to_cache", c_int32),
    )


class Rows(ctypes.Structure):
    """Rows of numbers under a norm or an activation."""

    _fields_ = (
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("total", c_void_p),
        ("rows", c_int64),
        ("size", c_int64),
        ("x_stride", c_int64),
        ("out_stride", c_int64),
        ("eps", c_float),
        ("dtype", c_int32),
    )


class Rope(ctypes.Structure):
    """q and k of a step, rotated on their way."""

    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("out", c_void_p),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("half", c_int64),
        ("x_stride", c_int64),
        ("dtype", c_int32),
    )


class Adjust(ctypes.Structure):
    """Rows of logits, and what is done to them before they draw."""

    _fields_ = (
        ("x", c_void_p),
        ("bias", c_void_p),
        ("history", c_void_p),
        ("params", c_void_p),
        ("positions", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("size", c_int64),
        ("params_stride", c_int64),
        ("bias_slots", c_int64),
        ("history_slots", c_int64),
        ("history_length", c_int64),
    )


class Sample(ctypes.Structure):
    """Rows of logits that draw a token each."""

    _fields_ = (
        ("x", c_void_p),
        ("params", c_void_p),
        ("positions", c_void_p),
        ("token", c_void_p),
        ("fault", c_void_p),
        ("rows", c_int64),
        ("size", c_int64),
        ("params_stride", c_int64),
        ("filters", c_int32),
    )


class Logprobs(ctypes.Structure):
    """Rows of logits whose log-probabilities are wanted."""

    _fields_ = (
        ("x", c_void_p),
        ("targets", c_void_p),
        ("ids", c_void_p),
        ("values", c_void_p),
        ("rank", c_void_p),
        ("rows", c_int64),
        ("size", c_int64),
        ("count", c_int64),
    )


class Call(ctypes.Structure):
    """One call of a function below, kept to be made again."""

    _fields_ = (
        ("kind", c_int32),
        ("gate", c_int32),
        ("record", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("m", c_int64),
    )


STRUCTS = (Linear, Codes, AttendStep, Attend, Blocks, Rows, Rope, Adjust, Sample, Logprobs, Call)

SIGNATURES: Mapping[str, str] = {
    "packed_bytes": "l(ill)",  # dtype, n, k
    "pack": "v(iplllp)",  # dtype, weight, stride, n, k, out
    "packed_code_bytes": "l(ill)",  # bits, n, k
    "quantize": "i(ipppp)",  # dtype, weight, Codes, codes, scales
    "pack_codes": "v(pppp)",  # Codes, out, scales, mins
    "unpack_rows": "v(pplp)",  # Linear, rows, count, out
    "linear": "v(pplpl)",  # Linear, x, x_stride, out, m
    "attend": "v(p)",  # Attend
    "kv_head_size": "l(iilll)",  # dtype, kv_dtype, dim, dim_v, block_tokens
    "move_blocks": "v(pp)",  # Attend, Blocks
    "rms_norm": "v(p)",  # Rows
    "layer_norm": "v(p)",  # Rows
    "gate": "v(pi)",  # Rows, kind
    "rope": "v(p)",  # Rope
    "add": "v(p)",  # Rows
    "largest": "v(pllpp)",  # x, rows, size, index, value
    "adjust": "v(p)",  # Adjust
    "sample": "v(p)",  # Sample
    "logprobs": "v(p)",  # Logprobs
    "replay": "v(pl)",  # Calls, count
}
"""Every function, in the order of the C table: p pointer, i int32, l int64, f float, v nothing. A
pointer is given as an address or as ctypes.byref(struct)."""

TYPES: Mapping[str, Any] = {"p": c_void_p, "i": c_int32, "l": c_int64, "f": c_float, "v": None}
KINDS: Mapping[Any, str] = {c_char_p: "p"} | {kind: letter for letter, kind in TYPES.items()}


def _function_type(signature: str) -> Any:
    result, _, arguments = signature.removesuffix(")").partition("(")
    return ctypes.CFUNCTYPE(TYPES[result], *(TYPES[letter] for letter in arguments))


class Kernels(ctypes.Structure):
    """The C table of one instruction set; `Native` is what callers use."""

    _fields_ = (
        ("name", c_char_p),
        *((name, _function_type(signature)) for name, signature in SIGNATURES.items()),
    )


class _Row(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("kind", c_char_p), ("offset", c_int64), ("size", c_int64))


@dataclass(frozen=True)
class Absent:
    """Why there are no kernels of our own, and what would change that."""

    reason: str
    fix: str


Function: TypeAlias = Callable[..., None]
Size: TypeAlias = Callable[..., int]


@dataclass(frozen=True)
class Native:
    """The kernels of one instruction set. Arguments of each: SIGNATURES."""

    isa: str
    usable: tuple[str, ...]
    """The instruction sets that this library has and this processor runs, best first."""
    library: ctypes.CDLL = field(repr=False)
    packed_bytes: Size = field(repr=False)
    pack: Function = field(repr=False)
    packed_code_bytes: Size = field(repr=False)
    quantize: Size = field(repr=False)
    pack_codes: Function = field(repr=False)
    unpack_rows: Function = field(repr=False)
    linear: Function = field(repr=False)
    attend: Function = field(repr=False)
    kv_head_size: Size = field(repr=False)
    move_blocks: Function = field(repr=False)
    rms_norm: Function = field(repr=False)
    layer_norm: Function = field(repr=False)
    gate: Function = field(repr=False)
    rope: Function = field(repr=False)
    add: Function = field(repr=False)
    largest: Function = field(repr=False)
    adjust: Function = field(repr=False)
    sample: Function = field(repr=False)
    logprobs: Function = field(repr=False)
    replay: Function = field(repr=False)

    def set_threads(self, threads: int) -> None:
        """From now on kernels, of the whole process, run on the caller's thread and threads - 1
        others, which sleep while there is nothing to do."""
        self.library.vc_set_threads(threads)


def load() -> tuple[Native | None, str]:
    """The kernels, and ""; or None and the reason.

    InvalidArgument where VLLM_CORE_CPU_ISA names what this machine cannot run.
    """
    found = find()
    if isinstance(found, Absent):
        get_logger(__name__).info("portable ops: %s; %s", found.reason, found.fix)
        return None, f"{found.reason}; {found.fix}"
    return found, ""


def find(library: Path = LIBRARY) -> Native | Absent:
    """The kernels, or why not; imports no framework. Errors: as `load`."""
    wanted = envs.cpu_isa()
    if wanted == PORTABLE:
        return Absent("VLLM_CORE_CPU_ISA=portable", "unset VLLM_CORE_CPU_ISA")
    found = _open(library)
    if isinstance(found, Absent):
        if wanted is not None:
            raise InvalidArgument(f"VLLM_CORE_CPU_ISA={wanted}: {found.reason}; {found.fix}")
        return found
    isas = list(_isas(found))
    usable = tuple(name for name, runs in isas if runs)
    if wanted is not None and wanted not in usable:
        why = "this processor lacks it" if wanted in dict(isas) else "there is no such kernel"
        raise InvalidArgument(
            f"VLLM_CORE_CPU_ISA={wanted}: {why}; usable here: {', '.join((*usable, PORTABLE))}"
        )
    isa = wanted or usable[0]
    found.vc_kernels.restype = ctypes.POINTER(Kernels)
    table = found.vc_kernels(c_char_p(isa.encode())).contents
    return Native(isa, usable, found, **{name: getattr(table, name) for name in SIGNATURES})


def is_outdated(library: Path = LIBRARY) -> bool:
    """Whether a source, where there are sources, is younger than the library."""
    built = library.stat().st_mtime
    return any(source.stat().st_mtime > built for source in SOURCES.glob("*.[hc]*"))


def how_to_build() -> str:
    """The command that makes the library, here."""
    if SOURCES.is_dir():
        return f"python {os.path.relpath(PACKAGE.parent / 'hatch_build.py')}"
    again = "pip install --force-reinstall --no-deps --no-binary vllm-core-cpu vllm-core-cpu"
    return f"install a C++ compiler (g++ or clang++), then {again}"


def _open(path: Path) -> ctypes.CDLL | Absent:
    if not path.exists():
        why = WHY_PURE.read_text().strip() if WHY_PURE.exists() else ""
        return Absent(f"our kernels were not built{why and f' ({why})'}", how_to_build())
    try:
        library = ctypes.CDLL(str(path))
        library.vc_layout.restype = ctypes.POINTER(_Row)
        library.vc_isa.restype = c_char_p
        library.vc_set_threads.argtypes = (ctypes.c_int,)
        library.vc_set_threads.restype = None
    except (OSError, AttributeError) as error:
        return Absent(f"{path.name} cannot be loaded here: {error}", how_to_build())
    theirs, ours = compiled_layout(library), own_layout()
    if theirs != ours:
        differs = min(set(theirs.items()) ^ set(ours.items()))[0]
        reason = f"{path.name} and native.py differ in {differs}: built from other sources"
        return Absent(reason, how_to_build())
    return library


def own_layout() -> dict[str, tuple[str, int, int]]:
    """Struct or struct.field -> (kind, offset, size), as ctypes has it."""
    rows: dict[str, tuple[str, int, int]] = {}
    for struct in (*STRUCTS, Kernels):
        rows[struct.__name__] = ("s", 0, ctypes.sizeof(struct))
        for name, kind, *_ in struct._fields_:
            at = getattr(struct, name)
            letter = SIGNATURES[name] if hasattr(kind, "argtypes") else KINDS[kind]
            rows[f"{struct.__name__}.{name}"] = (letter, at.offset, at.size)
    return rows


def compiled_layout(library: ctypes.CDLL) -> dict[str, tuple[str, int, int]]:
    """The same, as the compiler of the library had it."""
    rows: dict[str, tuple[str, int, int]] = {}
    table = library.vc_layout()
    for index in range(10_000):
        row = table[index]
        if row.name is None:
            break
        rows[row.name.decode()] = (row.kind.decode(), row.offset, row.size)
    return rows


def _isas(library: ctypes.CDLL) -> Iterator[tuple[str, bool]]:
    """(name, whether this processor runs it), best first."""
    usable = ctypes.c_int()
    for index in range(100):
        name = library.vc_isa(index, ctypes.byref(usable))
        if name is None:
            return
        yield name.decode(), bool(usable.value)
