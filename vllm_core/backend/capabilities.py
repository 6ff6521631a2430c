"""What a backend declares: frozen facts with exact meaning, one per optional thing.

The core resolves model x config x capabilities before it loads anything; it never turns on what was
not declared and never finds out at step time that something is missing.

Knows: facts. Does not know: products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, Features


@dataclass(frozen=True)
class Capabilities:
    """Branch on these, never on a name."""

    dtypes: frozenset[str]
    """Model dtypes that the ops compute in."""
    default_dtype: str
    """What "auto" means where the checkpoint's own dtype is not among `dtypes`."""
    numeric_class: str = "A"
    """A: float32 scores and accumulation; B: 16-bit; C: 8-bit."""
    schemes: frozenset[str] = frozenset({"dense"})
    """Weight schemes that `load` takes."""
    native_schemes: frozenset[str] = frozenset()
    """Those of them that stay codes on the device, a byte or half of one each. A file in such codes
    is then loaded as it is; elsewhere weights are dequantised by `load`, or before it."""
    max_head_dim: int = 256
    max_logit_rows: int | None = None
    """Most rows that get logits in one step; None: no limit."""
    softcap: bool = True
    windows: bool = True
    sinks: bool = True
    return_lse: bool = True
    static_shapes: bool = False
    """Programs are compiled per bucket, and a new shape costs a compilation."""
    batch_invariant: bool = False
    """The same bits for a row whatever else is in the step."""
    shares_host_memory: bool = False
    """The device's memory is the host's: the engine then takes a modest share unless told."""
    exact_host_lengths: bool = False
    """The attention needs exact lengths on the host: the core then does not run ahead."""
    kv_dtypes: frozenset[str] = field(default_factory=frozenset)
    """KV formats beside the model dtype. "int8": codes with a scale per token and KV head
    (`backend.INT8_KV`); other names are reserved."""

    # Reserved: declared by no backend yet, and refused when asked for.
    tier: str = "sampler"
    """"logits" (the host draws) is reserved."""
    max_drafts: int = 0
    compact_tables: bool = False
    q_pos: bool = False
    tree: bool = False
    bidirectional: bool = False
    shard: bool = False

    def choose_dtype(self, wanted: str, checkpoint: str | None) -> str:
        """The dtype to compute in; `wanted` may be "auto". NotSupported names what there is."""
        if wanted == "auto":
            return checkpoint if checkpoint in self.dtypes else self.default_dtype
        if wanted not in self.dtypes:
            raise NotSupported(
                f"dtype {wanted} is not among those of this backend: "
                f"{', '.join(sorted(self.dtypes))}; choose one of them or leave it at auto"
            )
        return wanted


@dataclass(frozen=True)
class StepConstraints:
    """Declared limits that the scheduler obeys; the default is none."""

    mixed_ok: bool = True
    """A step may hold prefill chunks and decoding rows together."""
    max_prefills: int | None = None
    """Most rows with more than one token in a step."""
    chunk_multiple: int = 1
    """A prefill chunk that is not the last of its prompt is a multiple of this."""
    max_tokens: int | None = None
    """Most tokens in a step."""


@dataclass(frozen=True)
class BucketPolicy:
    """Which static shapes exist. An empty list of sizes means: any."""

    tokens: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    features: tuple[Features, ...] = ()
    on_miss: str = "compile"
    """compile: a step that no bucket covers costs a compilation and is counted; refuse: an
    error."""

    def cover(self, key: BucketKey) -> BucketKey | None:
        """The smallest declared key that covers this one; None where there is none."""
        tokens = _cover(self.tokens, key.tokens)
        rows = _cover(self.rows, key.rows)
        widths = [_cover(self.widths, width) for width in key.widths]
        features = _cover_features(self.features, key.features)
        if tokens is None or rows is None or None in widths or features is None:
            return None
        return replace(
            key,
            tokens=tokens,
            rows=rows,
            widths=tuple(w for w in widths if w is not None),
            features=features,
        )

    def cover_logprobs(self, count: int) -> int:
        """Alternatives per token that a program for `count` of them reports."""
        found = [f.logprobs for f in self.features if f.logprobs >= count]
        return min(found, default=count)


def _cover(sizes: Iterable[int], need: int) -> int | None:
    sizes = tuple(sizes)
    if not sizes:
        return need
    return min((size for size in sizes if size >= need), default=None)


def _cover_features(choices: tuple[Features, ...], need: Features) -> Features | None:
    if not choices:
        return need
    return next((f for f in choices if f.covers(need)), None)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one device as its runtime sees them now."""

    total: int
    free: int
