from __future__ import annotations

from typing import Any

import pytest

from vllm_core.errors import InvalidArgument, ModelError
from vllm_core.text.chat_template import render
from vllm_core.text.tokenizer import Tokenizer, load_tokenizer

PLAIN = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "2 + 2?"},
]
TEMPLATES = [
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3-Coder",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Ministral-3-14B-Reasoning-2512",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def rendered(tokenizer: Tokenizer, messages: Any, **arguments: Any) -> str:
    ids = render(tokenizer, messages, **({"template": PLAIN} | arguments))
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_template_turns_messages_into_ids(byte_level):
    ids = render(byte_level, CHAT[:1], template=PLAIN)
    text = "<|turn|>user: Hello\n<|turn|>assistant:"
    assert ids == byte_level.encode(text)
    assert ids[0] in byte_level.special_ids


def test_generation_prompt_can_be_left_out(byte_level):
    text = rendered(byte_level, CHAT[:1], add_generation_prompt=False)
    assert text == "<|turn|>user: Hello\n"


def test_tokenizer_adds_no_special_tokens_of_its_own(sentencepiece):
    assert sentencepiece.encode("the")[0] == 1
    ids = render(
        sentencepiece,
        [{"role": "user", "content": "the"}],
        template="{{ bos_token }}{{ messages[0]['content'] }}",
    )
    assert ids == sentencepiece.encode("the")


def test_template_sees_further_variables(byte_level):
    template = "{{ 'yes' if enable_thinking else 'no' }}"
    assert rendered(byte_level, CHAT, template=template) == "no"
    assert rendered(byte_level, CHAT, template=template, enable_thinking=True) == "yes"


def test_parts_of_text_become_lines(byte_level):
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = rendered(byte_level, [{"role": "user", "content": content}])
    assert text.startswith("<|turn|>user: one\ntwo\n")


def test_given_messages_are_not_changed(byte_level):
    content = [{"type": "text", "text": "one"}]
    messages = [{"role": "user", "content": content}]
    rendered(byte_level, messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "one"}]}]


def test_turn_that_calls_tools_needs_no_content(byte_level):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    text = rendered(
        byte_level,
        [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        template="{{ messages[1].tool_calls[0].function.name }}",
    )
    assert text == "f"


def test_model_without_template_suggests_what_to_do(byte_level):
    with pytest.raises(ModelError, match=r"no chat template.*generate.*--chat-template FILE"):
        render(byte_level, CHAT)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hello", "must be a list of messages, not str"),
        ({"role": "user", "content": "x"}, "must be a list of messages, not dict"),
        (7, "must be a list of messages, not int"),
        ([], "at least one message"),
        (["Hello"], "message 0 must be a mapping"),
        ([{"content": "x"}], "message 0 must have a role"),
        ([{"role": 3, "content": "x"}], "message 0 must have a role"),
        ([CHAT[0], {"role": "user"}], "content of message 1 must be a string"),
        ([{"role": "user", "content": 3}], "content of message 0"),
        ([{"role": "user", "content": b"x"}], "content of message 0"),
        ([{"role": "user", "content": []}], "content of message 0"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "list of"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "list of"),
        ([{"role": "user", "content": "a\ud800"}], "lone surrogate"),
    ],
)
def test_messages_of_a_wrong_form_are_refused(byte_level, messages, reason):
    with pytest.raises(InvalidArgument, match=reason) as caught:
        render(byte_level, messages, template=PLAIN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[0].nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_broken_or_malicious_template_is_one_clear_sentence(byte_level, tmp_path, template):
    with pytest.raises(InvalidArgument, match="the given chat template fails") as caught:
        render(byte_level, CHAT, template=template)
    assert "\n" not in str(caught.value)
    byte_level.hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="the model's chat template fails"):
        render(load_tokenizer(tmp_path), CHAT)


def test_what_a_template_refuses_is_the_callers_mistake(byte_level):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidArgument, match="refuses the messages: roles must alternate"):
        render(byte_level, CHAT, template=template)


@pytest.mark.parametrize("name", ["tokenize", "return_tensors", "truncation"])
def test_variable_with_a_meaning_of_its_own_is_refused(byte_level, name):
    with pytest.raises(InvalidArgument, match=f"'{name}' cannot be a variable"):
        render(byte_level, CHAT, template=PLAIN, **{name: True})


def test_golden_chats_have_the_recorded_prompt_ids(real_directory, real, data, goldens):
    template = (data / "models/smollm2-135m-instruct/chat_template.jinja").read_text()
    for tokenizer in (real("smollm2"), load_tokenizer(real_directory("smollm2"))):
        for row in goldens("smollm2-135m-instruct"):
            assert render(tokenizer, row["prompt"]) == row["prompt_token_ids"]
            assert render(tokenizer, row["prompt"], template=template) == row["prompt_token_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_well_known_template_renders_a_chat(real, data, name):
    template = (data / "templates" / f"{name}.jinja").read_text()
    tokenizer = real("qwen3" if "Qwen" in name else "llama3.2")
    tools: dict[str, Any] = {"tools": [TOOL]} if name.endswith("tool_use") else {}
    text = tokenizer.decode(render(tokenizer, CHAT, template=template, **tools))
    positions = [text.index(message["content"]) for message in CHAT]
    assert positions == sorted(positions)


def test_every_template_of_the_test_data_is_checked(data):
    assert sorted(file.stem for file in (data / "templates").glob("*.jinja")) == TEMPLATES
