"""Renders a conversation into the token ids that a chat model expects.

Knows: messages, the model's Jinja template. Does not know: how the template is compiled and kept
from doing harm (transformers), requests, models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_core.errors import InvalidArgument, ModelError
from vllm_core.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

_OTHER_ARGUMENTS = frozenset(
    "conversation chat_template add_generation_prompt tokenize sanitize_control_tokens padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs".split()
)
"""Names that mean something else to transformers than a variable of the template."""


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation, ending where the answer begins.

    `template` replaces the model's own; `variables` (tools, enable_thinking, ...) are what it may
    ask for. Raises InvalidArgument for messages of a wrong form or that the template refuses, and
    for a given template that fails; ModelError for a model with no template, or one that fails.
    """
    chosen = template or tokenizer.chat_template
    if chosen is None:
        raise ModelError(
            "the model has no chat template, so it is not known how it marks turns; "
            "use generate instead of chat, or name a template with --chat-template FILE"
        )
    reserved = _OTHER_ARGUMENTS & variables.keys()
    if reserved:
        raise InvalidArgument(f"{min(reserved)!r} cannot be a variable of a chat template")
    plain = _check_messages(messages)
    text = _render_text(tokenizer, chosen, plain, add_generation_prompt, variables, bool(template))
    # The template has written every special token itself.
    return tokenizer.encode(text, add_special_tokens=False)


def _render_text(
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    is_given: bool,
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.hf.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )
    except Exception as error:  # a template runs like a program and can fail like one
        reason = " ".join(str(error).split()) or type(error).__name__
        # `raise_exception` in a template raises the base class: it speaks about the messages.
        if type(error) is TemplateError:
            raise InvalidArgument(f"the chat template refuses the messages: {reason}") from error
        if is_given:
            raise InvalidArgument(f"the given chat template fails: {reason}") from error
        raise ModelError(
            f"the model's chat template fails: {reason}; name another with --chat-template FILE"
        ) from error
    return str(text)


def _check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgument(
            f"messages must be a list of messages, not {type(messages).__name__}; "
            'one message is {"role": "user", "content": "..."}'
        )
    if not messages:
        raise InvalidArgument("messages must hold at least one message")
    return [_check_message(number, message) for number, message in enumerate(messages)]


def _check_message(number: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidArgument(f"message {number} must be a mapping, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidArgument(f"message {number} must have a role such as 'user', not {role!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)  # a turn that only calls tools says nothing
    return {**message, "content": _content_text(number, content)}


def _content_text(number: int, content: object) -> str:
    """The text of a message; several parts are several lines, as other servers have it."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = [part.get("text") for part in content if _is_text_part(part)]
        if texts and len(texts) == len(content):
            return "\n".join(str(text) for text in texts)
    raise InvalidArgument(
        f"the content of message {number} must be a string or a list of "
        f'{{"type": "text", "text": "..."}}, not {content!r:.60}'
    )


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )
