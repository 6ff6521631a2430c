"""What a caller may ask of one request's sampling.

Knows: ranges, defaults, contradictions. Does not know: tokenizers, models, devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_core.errors import InvalidArgument

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for per token."""

MAX_SEQUENCES = 16_384
"""Most sequences of one request."""

MAX_MIN_TOKENS_STOP_IDS = 16
"""Most stop ids (end-of-sequence included) that `min_tokens` can hold back, a fixed width on the
device."""


@dataclass(frozen=True)
class SamplingParams:
    """How to draw the tokens of one request.

    Order of application (seam, section 8): allowed, banned and biased tokens, penalties,
    temperature, top-k, top-p, min-p, draw. Log-probabilities are those of the raw logits.
    """

    n: int = 1
    """Sequences drawn for the prompt; they share its KV blocks."""
    max_tokens: int | None = 16
    """Most tokens drawn per sequence; None: until the context is full."""
    min_tokens: int = 0
    """End-of-sequence, stop ids and stop strings are held back for this many tokens."""
    temperature: float = 1.0
    """0 is greedy (ties to the lowest id)."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the shortest prefix of the most likely tokens with at least this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was drawn before."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the token was drawn before."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, below 0) the logit of every token seen in prompt or output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[int, ...] | None = None
    """When given, only these tokens can be drawn."""
    banned_token_ids: tuple[int, ...] = ()
    """Never drawn."""
    seed: int | None = None
    """64-bit seed; None: a fresh one per request."""
    stop: tuple[str, ...] = ()
    """Output ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Output ends after one of these ids."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on behind the model's end-of-sequence ids (stop_token_ids still end)."""
    logprobs: int | None = None
    """Alternatives reported per drawn token; 0: the drawn token only; None: none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "banned_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if value is None and name != "allowed_token_ids":
                value = ()
            if value is not None:
                _require(
                    isinstance(value, Iterable) and not isinstance(value, (str, bytes)),
                    f"{name} must be a list, not {value!r}",
                )
                object.__setattr__(self, name, tuple(value))
        bias = {} if self.logit_bias is None else self.logit_bias
        _require(
            isinstance(bias, Mapping), f"logit_bias must map token ids to numbers, not {bias!r}"
        )
        object.__setattr__(self, "logit_bias", dict(bias))
        _check(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the device must know every token of the sequence."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )

    @property
    def needs_bias(self) -> bool:
        """Whether the device must hold one value per token of the vocabulary for this request."""
        return bool(self.logit_bias or self.banned_token_ids) or self.allowed_token_ids is not None

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed; checked like a new one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        unknown = changes.keys() - values.keys()
        if unknown:
            raise InvalidArgument(f"SamplingParams has no field {sorted(unknown)[0]!r}")
        return SamplingParams(**(values | changes))


def _require(claim: bool, message: str) -> None:
    if not claim:
        raise InvalidArgument(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits_float(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _finite(name: str, value: object) -> None:
    _require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and _fits_float(value),
        f"{name} must be a finite number, not {value!r:.40}",
    )


def _ids(name: str, values: Sequence[int]) -> None:
    _require(
        all(_is_int(v) and v >= 0 for v in values), f"{name} must hold token ids, not {values!r}"
    )


def _check(p: SamplingParams) -> None:
    for name in ("n", "min_tokens", "top_k"):
        _require(_is_int(getattr(p, name)), f"{name} must be a whole number")
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    ):
        _finite(name, getattr(p, name))
    _require(p.n >= 1, f"n must be at least 1, not {p.n}")
    _require(p.n <= MAX_SEQUENCES, f"n must be at most {MAX_SEQUENCES}, not {p.n}")
    if p.max_tokens is not None:
        _require(
            _is_int(p.max_tokens) and p.max_tokens >= 1,
            f"max_tokens must be at least 1, not {p.max_tokens!r}",
        )
        _require(
            p.min_tokens <= p.max_tokens,
            f"min_tokens {p.min_tokens} is above max_tokens {p.max_tokens}",
        )
    _require(p.min_tokens >= 0, f"min_tokens must not be negative, but is {p.min_tokens}")
    _require(p.temperature >= 0, f"temperature must not be negative, but is {p.temperature}")
    _require(p.top_k >= 0, f"top_k must be 0 (off) or a count, not {p.top_k}")
    _require(0 < p.top_p <= 1, f"top_p must be above 0 and at most 1, not {p.top_p}")
    _require(0 <= p.min_p <= 1, f"min_p must be between 0 and 1, not {p.min_p}")
    _require(
        -2 <= p.presence_penalty <= 2,
        f"presence_penalty must be between -2 and 2, not {p.presence_penalty}",
    )
    _require(
        -2 <= p.frequency_penalty <= 2,
        f"frequency_penalty must be between -2 and 2, not {p.frequency_penalty}",
    )
    _require(
        p.repetition_penalty > 0, f"repetition_penalty must be above 0, not {p.repetition_penalty}"
    )
    _ids("stop_token_ids", p.stop_token_ids)
    _ids("banned_token_ids", p.banned_token_ids)
    _ids("logit_bias", tuple(p.logit_bias))
    for token, bias in p.logit_bias.items():
        _require(
            isinstance(bias, (int, float)) and -100 <= bias <= 100,
            f"logit_bias of token {token} must be between -100 and 100, not {bias!r}",
        )
    if p.allowed_token_ids is not None:
        _ids("allowed_token_ids", p.allowed_token_ids)
        left = set(p.allowed_token_ids) - set(p.banned_token_ids)
        _require(bool(left), "allowed_token_ids less banned_token_ids leaves no token to draw")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        if value is not None:
            _require(
                _is_int(value) and 0 <= value <= MAX_LOGPROBS,
                f"{name} must be between 0 and {MAX_LOGPROBS}, not {value!r}",
            )
    if p.seed is not None:
        _require(
            _is_int(p.seed) and -(2**63) <= p.seed < 2**64, f"seed must fit 64 bits, not {p.seed!r}"
        )
    _require(
        all(isinstance(s, str) and s for s in p.stop), "stop must hold strings that are not empty"
    )
    _require(
        p.n == 1 or not p.is_greedy,
        f"n={p.n} with temperature 0 would draw the same sequence {p.n} times; "
        "raise temperature or set n=1",
    )
