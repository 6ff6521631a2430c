"""The engine as its two façades see it: prompts in, outputs out.

Knows: tokenizer, defaults of the model, requests' texts. Does not know: threads, event loops,
devices.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_core.config import EngineConfig
from vllm_core.engine.core import EngineCore
from vllm_core.engine.limits import Limits
from vllm_core.engine.output import RequestState
from vllm_core.engine.request import Request
from vllm_core.errors import InvalidArgument, ModelError
from vllm_core.log import get_logger
from vllm_core.params import SamplingParams
from vllm_core.runner.worker import Opened, Progress, no_progress, open_model
from vllm_core.text import chat_template
from vllm_core.text.tokenizer import Tokenizer, load_tokenizer
from vllm_core.weights.resolve import ModelFiles, resolve

logger = get_logger(__name__)

Prompt = str | Many[int]
"""Text, or token ids."""
Message = Mapping[str, Any]


class LLMEngine:
    """One model, ready to answer. Not thread-safe: one thread calls everything."""

    def __init__(self, config: EngineConfig, progress: Progress = no_progress) -> None:
        self.config = config
        self.files = resolve(
            config.model,
            revision=config.revision,
            load_format=config.load_format,
            tokenizer=config.tokenizer,
        )
        self._default_params = _default_params(self.files.generation_config)
        _eos_token_ids(self.files, None)  # wrong ones are refused before weights are read
        self.tokenizer, self.opened = _open_both(config, self.files, progress)
        self.eos_token_ids = _eos_token_ids(self.files, self.tokenizer)
        runner, plan = self.opened.runner, self.opened.plan
        caps = runner.runtime.caps
        limits = Limits(
            num_rows=config.max_num_seqs,
            token_budget=self.opened.token_budget,
            max_model_len=plan.max_model_len,
            num_history_slots=plan.num_history_slots,
            num_bias_slots=plan.num_bias_slots,
            max_draws=min(config.max_num_seqs, caps.max_logit_rows or config.max_num_seqs),
            constraints=runner.runtime.constraints(),
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
        )
        self.core = EngineCore(runner, limits, is_async=config.async_scheduling)
        self._states: dict[str, RequestState] = {}
        self._ids = itertools.count()
        self._num_unseeded = itertools.count()

    # ---------------------------------------------------------------- in
    def default_params(self) -> SamplingParams:
        """What generation_config.json asks for; greedy where it says do_sample is false."""
        return self._default_params

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids). InvalidArgument for an empty prompt."""
        if isinstance(prompt, str):
            ids = self._needs_tokenizer().encode(prompt)
            text: str | None = prompt
        else:
            text, ids = None, _as_ids(prompt)
        if not ids:
            raise InvalidArgument("the prompt is empty; give at least one token")
        return text, ids

    def render(self, messages: Many[Message], template: str | None = None) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer."""
        return chat_template.render(self._needs_tokenizer(), messages, template=template)

    def _needs_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidArgument("this model has no tokenizer; give token ids, or --tokenizer")
        return self.tokenizer

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        is_streaming: bool = False,
    ) -> RequestState:
        """Checks and tokenises; the request runs once `add` has it."""
        text, ids = self.encode(prompt)
        params = params or self.default_params()
        if params.seed is None and self.config.seed is not None:
            seed = (self.config.seed + next(self._num_unseeded)) % 2**64
            params = params.replace(seed=seed)
        if params.stop:
            self._needs_tokenizer()
        request = Request(
            request_id=request_id or f"request-{next(self._ids)}",
            prompt=ids,
            params=params,
            eos_token_ids=self.eos_token_ids,
            max_model_len=self.opened.plan.max_model_len,
            vocab_size=self.opened.spec.vocab_size,
            priority=priority,
        )
        return RequestState(request, text, self.tokenizer, is_streaming)

    def add(self, state: RequestState) -> None:
        """Queues it. CapacityError when it can never run."""
        self.core.add(state.request)
        self._states[state.request.request_id] = state

    def abort(self, request_id: str) -> RequestState | None:
        """Ends a request wherever it is -> its last state; None when it is not running."""
        state = self._states.pop(request_id, None)
        self.core.abort(request_id)
        if state is not None:
            for sequence in state.request.sequences:
                state.end(sequence)
        return state

    # ---------------------------------------------------------------- out
    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def step(self) -> list[RequestState]:
        """One step -> the requests that changed, each once."""
        changed: dict[str, RequestState] = {}
        for event in self.core.step():
            sequence = event.sequence
            request_id = sequence.request.request_id
            state = self._states.get(request_id)
            if state is None:
                continue
            changed[request_id] = state
            stop = state.take(event)
            if stop is not None and sequence.finish_reason in (None, "length"):
                if sequence.finish_reason is None:
                    self.core.finish(sequence, "stop", stop)
                else:  # the last token allowed completed the stop string
                    sequence.finish_reason, sequence.stop_reason = "stop", stop
            if sequence.is_finished and event.prompt_scores is None:  # its last token comes after
                state.end(sequence)
        for request_id, state in changed.items():
            if state.request.is_finished:
                self._states.pop(request_id, None)
        return list(changed.values())

    def describe(self) -> dict[str, Any]:
        """What was found and planned, as plain data for display."""
        opened, spec, plan = self.opened, self.opened.spec, self.opened.plan
        backend = opened.choice.backend
        devices = backend.probe.devices if backend.probe else ()
        num_blocks = sum(plan.num_blocks.values()) - len(plan.num_blocks)
        return {
            "backend": backend.name,
            "device": devices[0].kind if devices else "none",
            "reason": opened.choice.reason,
            "model": {
                "name": self.files.name,
                "architecture": spec.architecture,
                "layers": len(spec.layers),
                "vocab_size": spec.vocab_size,
                "dtype": opened.runner.runtime.dtype,
                "weights": opened.weights,
                "kv_cache_dtype": spec.attention_specs[0].kv.dtype,
                "context": plan.max_model_len,
            },
            "memory": list(plan.lines),
            "block_size": plan.block_tokens,
            "num_kv_blocks": num_blocks,
            "kv_tokens": num_blocks * plan.block_tokens,
            "expected_waste": plan.expected_waste,
        }

    def close(self) -> None:
        self._states.clear()
        self.core.close()


def _as_ids(prompt: object) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]  # type: ignore[attr-defined]
    except TypeError:
        raise InvalidArgument(
            f"a prompt must be text or a list of token ids, not {prompt!r:.60}"
        ) from None


def _default_params(own: Mapping[str, Any]) -> SamplingParams:
    """Of a generation_config.json; what it says amiss is left out, and said."""
    params = SamplingParams()
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if own.get(name) is not None:
            try:
                params = params.replace(**{name: own[name]})
            except InvalidArgument as error:
                logger.warning("the model's generation_config is not followed: %s", error)
    return params.replace(temperature=0.0) if own.get("do_sample") is False else params


def _open_both(
    config: EngineConfig, files: ModelFiles, progress: Progress
) -> tuple[Tokenizer | None, Opened]:
    """The tokenizer is read while the weights are; one that cannot be read ends that at once."""
    with ThreadPoolExecutor(1, "tokenizer") as executor:
        tokenizer = executor.submit(_open_tokenizer, files)

        def watched(what: str, done: int, total: int | None) -> None:
            if tokenizer.done():
                tokenizer.result()
            progress(what, done, total)

        opened = open_model(config, files, watched)
        try:
            return tokenizer.result(), opened
        except BaseException:
            opened.runner.close()
            raise


def _open_tokenizer(files: ModelFiles) -> Tokenizer | None:
    try:
        return load_tokenizer(files.tokenizer)
    except ModelError:
        if files.load_format == "dummy":  # random weights say nothing anyway
            return None
        raise


def _eos_token_ids(files: ModelFiles, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Of generation_config.json, else of the config; and the tokenizer's own."""
    own = files.generation_config.get("eos_token_id")
    if own is None:
        own = getattr(files.config, "eos_token_id", None)
    ids = [] if own is None else own if isinstance(own, list) else [own]
    if not all(type(token) is int for token in ids):
        raise ModelError(
            f"the eos_token_id of {files.name} must be a token id or a list of them, not {own!r}"
        )
    if tokenizer is not None:
        ids = [*ids, *tokenizer.eos_token_ids]
    return tuple(dict.fromkeys(token for token in ids if token >= 0))
