"""What a client asked (request) and one token stream of it (sequence).

Knows: tokens, sampling parameters, why a stream ended. Does not know: blocks, rows' arrays,
devices.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vllm_core.errors import InvalidArgument
from vllm_core.ops import NUM_COLUMNS, Column, HostArray, Logprobs
from vllm_core.outputs import FinishReason
from vllm_core.params import MAX_MIN_TOKENS_STOP_IDS, SamplingParams

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would leave float32."""

MAX_PRIORITY = 2**20


@dataclass(eq=False)
class Request:
    """One prompt and its n sequences."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int
    priority: int = 0
    """Lower runs earlier under the policy "priority"."""
    salt: bytes = b""
    """Requests share cached prefixes only with the same salt."""
    arrival: int = 0
    """Sequences that arrived before it, set by the scheduler."""
    hash_root: bytes | None = None
    """Before the hash of its first block, set by the scheduler; None: its blocks are shared with
    nobody."""
    sequences: list[Sequence] = field(default_factory=list)
    bias: HostArray | None = None
    is_paused: bool = False
    """It keeps its place but runs in no step."""
    num_prompt_scored: int = 0
    """Prompt tokens whose log-probabilities are known; the first token has none."""

    def __post_init__(self) -> None:
        p = self.params
        seed = p.seed if p.seed is not None else secrets.randbits(63)
        self.seed = seed % 2**64
        ends = set(p.stop_token_ids)
        if not p.ignore_eos:  # a model's config may name an end that the model cannot draw
            ends |= {token for token in self.eos_token_ids if token < self.vocab_size}
        self.stop_ids = sorted(ends)
        if p.min_tokens and len(ends) > MAX_MIN_TOKENS_STOP_IDS:
            raise InvalidArgument(
                f"min_tokens can hold back at most {MAX_MIN_TOKENS_STOP_IDS} stop ids, not "
                f"{len(ends)}; name fewer"
            )
        allowed = set(p.allowed_token_ids or ()) - set(p.banned_token_ids)
        if p.min_tokens and allowed and allowed <= ends:
            raise InvalidArgument(
                "every one of allowed_token_ids ends the output, which min_tokens forbids; "
                "allow another token or set min_tokens=0"
            )
        if not isinstance(self.priority, int) or abs(self.priority) > MAX_PRIORITY:
            raise InvalidArgument(
                f"priority must be a whole number within ±{MAX_PRIORITY}, not {self.priority!r}"
            )
        self._check_ids()
        self.prompt_ids = np.array(self.prompt, np.int32)
        self.bias = self._bias() if p.needs_bias else None
        limit = self.max_model_len
        if p.max_tokens is not None:
            limit = min(limit, len(self.prompt) + p.max_tokens)
        self.end = limit
        self.sequences = [Sequence(self, index) for index in range(p.n)]

    def _check_ids(self) -> None:
        p, size = self.params, self.vocab_size
        named = [*p.logit_bias, *p.banned_token_ids, *(p.allowed_token_ids or ())]
        named += p.stop_token_ids
        for token in named:
            if token >= size:
                raise InvalidArgument(
                    f"token id {token} does not exist: the vocabulary has {size} tokens"
                )
        for token in self.prompt:
            if not 0 <= token < size:
                raise InvalidArgument(
                    f"prompt token id {token} does not exist: the vocabulary has {size} tokens; "
                    "the tokenizer may belong to another model"
                )

    def _bias(self) -> HostArray:
        """[V] float32: logit_bias, -inf for banned tokens and those not allowed."""
        p = self.params
        values = np.zeros(self.vocab_size, np.float32)
        for token, bias in p.logit_bias.items():
            values[token] = bias
        if p.allowed_token_ids is not None:
            banned = np.ones(self.vocab_size, bool)
            banned[list(p.allowed_token_ids)] = False
            values[banned] = -np.inf
        values[list(p.banned_token_ids)] = -np.inf
        if not np.isfinite(values).any():
            raise InvalidArgument("banned_token_ids leaves no token to draw; ban fewer")
        return values

    @property
    def needs_prompt_scores(self) -> bool:
        """Whether some prompt token's log-probability is still wanted."""
        wanted = self.params.prompt_logprobs is not None
        return wanted and self.num_prompt_scored < len(self.prompt) - 1

    @property
    def is_finished(self) -> bool:
        return all(s.is_finished for s in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One token stream with its own block table and row."""

    request: Request
    index: int
    row: int = -1
    """Row of the device state; -1 while it waits."""
    num_in_flight: int = 0
    """Draws submitted before it was preempted and not yet fetched; it waits for them."""
    epoch: int = 0
    """Which stay with a row these draws belong to."""
    saved: list[int] = field(default_factory=list)
    """Tokens drawn before the last preemption; while it runs, the row table holds them."""
    hashes: dict[int, list[bytes]] = field(default_factory=dict)
    """By block size: the chained hash of each full block of its tokens, as far as known."""
    num_hit_tokens: int = 0
    has_shared: bool = False
    """In its last stay with a row it found blocks in the cache."""
    is_apart: bool = False
    """It drew from NaN after it had shared blocks: it finds none any more."""
    num_preemptions: int = 0
    is_prompt_done: bool = False
    """A planned step completes its prompt's blocks: its siblings may start and share them."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def max_hit(self) -> int:
        """Most tokens that it may find in the cache: it draws from one at least, and where prompt
        tokens are scored it computes all."""
        request = self.request
        is_scored = self.index == 0 and request.needs_prompt_scores
        if request.hash_root is None or self.is_apart or is_scored:
            return 0
        return len(request.prompt) + len(self.saved) - 1

    def tokens(self) -> HostArray:
        """[T] int32: what it has to compute when it is given a row, prompt and what was drawn."""
        return np.concatenate((self.request.prompt_ids, np.array(self.saved, np.int32)))

    def name_of_stop(self, token: int) -> int | None:
        """The stop id that ended it; None for the model's own end."""
        request = self.request
        is_own = token in request.eos_token_ids and token not in request.params.stop_token_ids
        return None if is_own else token

    def own_logprobs(self, logprobs: Logprobs | None, row: int) -> Logprobs | None:
        """What it asked for, of its row of a step; another row may have asked for more."""
        count = self.request.params.logprobs
        if logprobs is None or count is None:
            return None
        width = 1 + count
        return Logprobs(logprobs.ids[row, :width], logprobs.values[row, :width], logprobs.rank[row])

    def param_row(self, history_slot: int, bias_slot: int) -> HostArray:
        """[NUM_COLUMNS] int32: what the device must know of this sequence's sampling."""
        p, request = self.request.params, self.request
        row = np.zeros(NUM_COLUMNS, np.int32)
        floats = row.view(np.float32)
        floats[Column.TEMPERATURE] = p.temperature if p.temperature >= GREEDY_BELOW else 0.0
        row[Column.TOP_K] = min(p.top_k, request.vocab_size)
        floats[Column.TOP_P] = p.top_p
        floats[Column.MIN_P_GAP] = -np.log(p.min_p) if p.min_p > 0 else np.inf
        floats[Column.PRESENCE] = p.presence_penalty
        floats[Column.FREQUENCY] = p.frequency_penalty
        floats[Column.REPETITION] = p.repetition_penalty
        words = np.array([request.seed & 0xFFFFFFFF, request.seed >> 32], np.uint32)
        row[[Column.SEED_LOW, Column.SEED_HIGH]] = words.view(np.int32)
        row[Column.SEQUENCE_INDEX] = self.index
        row[Column.PROMPT_LEN] = len(request.prompt)
        row[Column.HISTORY_SLOT] = history_slot
        row[Column.BIAS_SLOT] = bias_slot
        row[Column.HELD_IDS :] = -1
        if p.min_tokens:
            row[Column.HELD_UNTIL] = min(len(request.prompt) + p.min_tokens, request.end)
            row[Column.HELD_IDS : Column.HELD_IDS + len(request.stop_ids)] = request.stop_ids
        return row


class Event(NamedTuple):
    """One thing that a step did to a sequence. A tuple, since every row makes one in every step."""

    sequence: Sequence
    token: int | None
    """The token drawn; None: its end, only prompt scores, or a draw that is done anew."""
    logprobs: Logprobs | None = None
    """Of the drawn token: arrays of one row."""
    prompt_scores: tuple[int, Logprobs] | None = None
    """(position of the first scored token, arrays with a row per token)."""
