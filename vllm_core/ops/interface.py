"""The contract of every op: signature, shapes, meaning. A binding implements it, a backend
overrides it one by one.

Model code and the step's programs use nothing but these methods, `xp` with the names in
ARRAY_VOCABULARY, operators, indexing, `.shape`, `.dtype` and `.reshape`. The numpy binding is the
law; `catalogue` says how to test.

Knows: what each op computes. Does not know: how.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from vllm_core.ops import sampling, stepping
from vllm_core.ops.arrays import Array, HostArray, Param
from vllm_core.ops.block_table import BlockTables
from vllm_core.ops.step import (
    Changes,
    DeviceState,
    Features,
    Logprobs,
    StepInput,
    StepView,
)

ARRAY_VOCABULARY = (
    "argmax clip concatenate cumsum exp isfinite log round searchsorted sum tanh where zeros_like"
).split()
"""Names of `Ops.xp` that shared code may use, where numpy, torch and jax.numpy agree."""

LayerBody = Callable[..., tuple[Array, Any]]
"""body(x, kv, params, spec, layer, *shared) -> (x, kv); `layer` indexes the KV group and may be
traced."""


class Ops(ABC):
    """The op table of one framework on one device."""

    name: str
    """Name of the binding, for load plans and messages."""
    xp: Any
    """The framework's own namespace: numpy, torch or jax.numpy."""

    # ---- array vocabulary: where frameworks differ, and no more
    @abstractmethod
    def asarray(self, host: HostArray) -> Array:
        """A device array with the host array's content and dtype; never an alias of host memory."""

    @abstractmethod
    def host(self, x: Array) -> HostArray:
        """The content on the host; waits for the device."""

    @abstractmethod
    def cast(self, x: Array, dtype: str) -> Array:
        """`dtype`: a numpy name ("int32", "float32", "bfloat16", ...)."""

    @abstractmethod
    def arange(self, count: int) -> Array:
        """0 .. count-1 as int32, on the device."""

    @abstractmethod
    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Array:
        """An array of one value, on the device."""

    @abstractmethod
    def put(self, x: Array, index: tuple[Array, ...], value: Array | int | float) -> Array:
        """x[index] = value; consumes x. Where an index repeats, any of the values stays."""

    @abstractmethod
    def accumulate(self, x: Array, index: tuple[Array, ...], value: Array) -> Array:
        """x[index] += value, repeated indices adding up; consumes x."""

    @abstractmethod
    def amax(self, x: Array) -> Array:
        """Maximum over the last axis."""

    @abstractmethod
    def top(self, x: Array, count: int) -> tuple[Array, Array]:
        """(values, int32 ids) [..., count] of the largest along the last axis, largest first."""

    @abstractmethod
    def bits(self, x: Array) -> Array:
        """float32 seen as int32."""

    @abstractmethod
    def floats(self, x: Array) -> Array:
        """int32 seen as float32."""

    @abstractmethod
    def words(self, x: Array) -> Array:
        """An integer array as words: a type that holds unsigned 32-bit values and their
        arithmetic."""

    @abstractmethod
    def word(self, value: int) -> Array | int:
        """One unsigned 32-bit constant as a word."""

    @abstractmethod
    def stack_layers(self, layers: Sequence[Any], specs: Sequence[Any]) -> Any:
        """Per-layer parameter trees in the form that `layers` walks; runs of equal specs may be
        stacked."""

    @abstractmethod
    def layers(
        self,
        body: LayerBody,
        x: Array,
        kv: Any,
        params: Any,
        specs: Sequence[Any],
        shared: tuple[Any, ...] = (),
    ) -> tuple[Array, Any]:
        """Runs body over the layers; spec.kv_layer is the layer's index in its KV group.

        shared: what every layer reads of the step (rope tables, attention plans). What of the step
        reaches the body comes through x, kv and shared, so that a device may record the walk of one
        step and run the record with the values of another.
        """

    def repeat(self, count: int, body: Callable[[Any], Any], carry: Any) -> Any:
        """body applied `count` times to a tree of arrays; worth a loop where programs are
        traced."""
        for _ in range(count):
            carry = body(carry)
        return carry

    # ---- fused ops of models
    @abstractmethod
    def embed(self, ids: Array, param: Param) -> Array:
        """[T] int32, weight [V, H] -> [T, H]."""

    @abstractmethod
    def linear(self, x: Array, param: Param) -> Array:
        """x [T, in] @ weight [out, in].T + bias, float32 accumulation -> [T, out] in x's dtype."""

    @abstractmethod
    def logits(self, x: Array, param: Param) -> Array:
        """As linear, but float32 (or better) out: [R, H] -> [R, V]."""

    @abstractmethod
    def rms_norm(self, x: Array, param: Param, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 -> x's
        dtype."""

    @abstractmethod
    def add_rms_norm(
        self, x: Array, residual: Array, param: Param, eps: float
    ) -> tuple[Array, Array]:
        """(rms_norm(x + residual), x + residual)."""

    @abstractmethod
    def layer_norm(self, x: Array, param: Param, eps: float) -> Array:
        """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, computed in float32."""

    @abstractmethod
    def rope_table(
        self, positions: Array, inverse_frequency: HostArray, scale: float
    ) -> tuple[Array, Array]:
        """(cos, sin) [T, rotary/2] float32 of float32 position x float32 inverse frequency, times
        scale."""

    @abstractmethod
    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotates x [T, heads, D]: pairs (i, i + rotary/2) of the first 2 * cos.shape[-1] dims; the
        rest stays."""

    @abstractmethod
    def silu_and_mul(self, x: Array) -> Array:
        """[T, 2F] -> silu(x[:, :F]) * x[:, F:]."""

    @abstractmethod
    def gelu_and_mul(self, x: Array) -> Array:
        """[T, 2F] -> gelu_tanh(x[:, :F]) * x[:, F:]."""

    def gated_linear(self, x: Array, param: Param, kind: str) -> Array:
        """linear, then its gate: weight [2F, in] -> [T, F]. kind: silu | gelu_tanh. Worth a kernel
        that rounds once and never writes the [T, 2F] between."""
        both = self.linear(x, param)
        return self.silu_and_mul(both) if kind == "silu" else self.gelu_and_mul(both)

    @abstractmethod
    def activation(self, x: Array, kind: str) -> Array:
        """kind: relu | gelu (erf) | gelu_tanh | silu."""

    @abstractmethod
    def moe_route(
        self, logits: Array, top_k: int, renormalize: bool, valid: Array
    ) -> tuple[Array, Array]:
        """[T, E] router logits -> (expert ids [T, k] int32, weights [T, k] float32).

        Softmax in float32 over all experts, the k largest (ties to the lowest id), rescaled to sum
        1 when
        `renormalize`. Tokens that are not valid go to expert E, which does not exist, with weight
        0.
        """

    @abstractmethod
    def moe_experts(
        self, x: Array, ids: Array, weights: Array, gate_up: Param, down: Param
    ) -> Array:
        """sum_k weights[t,k] * down[e] @ silu_and_mul(gate_up[e] @ x[t]) with e = ids[t,k]; e >= E
        adds 0.

        x [T, H], gate_up weight [E, 2F, H], down weight [E, H, F] -> [T, H].
        """

    # ---- ops of the step: one text over the vocabulary, in `stepping` and `sampling`
    def apply(self, block_tables: BlockTables, state: DeviceState, changes: Changes) -> DeviceState:
        """See stepping.apply."""
        return stepping.apply(self, block_tables, state, changes)

    def expand(
        self,
        block_tables: BlockTables,
        state: DeviceState,
        step: StepInput,
        block_tokens: tuple[int, ...],
        vocab_size: int,
    ) -> tuple[StepView, DeviceState]:
        """See stepping.expand."""
        return stepping.expand(self, block_tables, state, step, block_tokens, vocab_size)

    def advance(
        self, state: DeviceState, step: StepInput, view: StepView, tokens: Array
    ) -> tuple[Array, DeviceState]:
        """See stepping.advance."""
        return stepping.advance(self, state, step, view, tokens)

    def sample(
        self,
        logits: Array,
        params: Array,
        positions: Array,
        history: Array,
        bias: Array,
        features: Features,
    ) -> tuple[Array, Array]:
        """See sampling.sample."""
        return sampling.sample(self, logits, params, positions, history, bias, features)

    def keep_top(self, z: Array, w: Array, unit: Array, need: tuple[Array, Array]) -> Array:
        """See sampling.keep_top; worth a sort or a candidate list of the device's own."""
        return sampling.keep_top(self, z, w, unit, need)

    def logprobs(self, logits: Array, targets: Array, count: int) -> Logprobs:
        """See sampling.logprobs."""
        return sampling.logprobs(self, logits, targets, count)

    def provider(self, op: str) -> str:
        """Which class implements an op: the load plan names it."""
        for cls in type(self).__mro__:
            if op in vars(cls):
                return f"{cls.__module__}.{cls.__qualname__}"
        raise AttributeError(op)
