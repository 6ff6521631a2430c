from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_core.errors import InvalidArgument
from vllm_core.text.detokenizer import IncrementalDetokenizer
from vllm_core.text.tokenizer import Tokenizer

few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def token_ids(tokenizer: Tokenizer, max_size: int = 12) -> st.SearchStrategy[list[int]]:
    """Any tokens, those that make text hard (bytes, special and unknown ids) as often as others."""
    parts = [i for i in range(min(tokenizer.vocab_size, 300)) if tokenizer.token_bytes(i) > b"\x7f"]
    hard = [*tokenizer.fallback_bytes, *parts, *tokenizer.special_ids, tokenizer.vocab_size + 5]
    text = "😀你é\ufffd a\n"
    spelled = [tokenizer.encode(c, add_special_tokens=False) for c in text]
    run = st.one_of(
        st.integers(0, tokenizer.vocab_size - 1).map(lambda i: [i]),
        st.sampled_from(hard).map(lambda i: [i]),
        st.sampled_from(spelled),
    )
    return st.lists(run, max_size=max_size).map(lambda runs: [i for r in runs for i in r])


def text_behind(
    tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool
) -> str:
    """The law: what the output adds to the text of the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    same = 0
    while same < min(len(before), len(whole)) and before[same] == whole[same]:
        same += 1
    return whole[same:]


def cut_at_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The law of stop strings, by looking at every place of the whole text."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def in_chunks(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4), label="cuts"))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]


@few
@given(data=st.data())
def test_pieces_make_up_the_text_behind_the_prompt(any_tokenizer, data):
    ids = token_ids(any_tokenizer)
    prompt, output = data.draw(ids, label="prompt"), data.draw(ids, label="output")
    skip = data.draw(st.booleans(), label="skip")
    detokenizer = IncrementalDetokenizer(any_tokenizer, prompt, skip_special_tokens=skip)
    pieces = [detokenizer.push(chunk) for chunk in in_chunks(data, output)]
    assert detokenizer.text == "".join(pieces)
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == text_behind(any_tokenizer, prompt, output, skip)
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.num_tokens == len(output)


@few
@given(data=st.data())
def test_text_given_out_never_changes(any_tokenizer, data):
    ids = token_ids(any_tokenizer)
    prompt, output = data.draw(ids, label="prompt"), data.draw(ids, label="output")
    detokenizer = IncrementalDetokenizer(any_tokenizer, prompt)
    detokenizer.push(output)
    more = data.draw(ids, label="what may follow")
    assert text_behind(any_tokenizer, prompt, output + more, True).startswith(detokenizer.text)


@few
@given(data=st.data())
def test_stop_strings_cut_as_a_search_of_the_whole_text_would(any_tokenizer, data):
    ids = token_ids(any_tokenizer)
    prompt, output = data.draw(ids, label="prompt"), data.draw(ids, label="output")
    whole = text_behind(any_tokenizer, prompt, output, True)
    inside = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 6)).map(
        lambda place: whole[place[0] : place[0] + place[1]] or "x"
    )
    stop = data.draw(st.lists(inside | st.text("ab\ufffd", min_size=1), max_size=4), label="stop")
    include = data.draw(st.booleans(), label="include")
    detokenizer = IncrementalDetokenizer(any_tokenizer, prompt, stop=stop, include_stop=include)
    wanted, found = cut_at_stop(whole, stop, include)
    shown = ""
    for chunk in in_chunks(data, output):
        shown += detokenizer.push(chunk)
        assert wanted.startswith(shown)
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == (wanted, found)


@few
@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
    include=st.booleans(),
)
def test_overlapping_stop_strings_are_found(byte_level, text, stop, include):
    detokenizer = IncrementalDetokenizer(byte_level, [], stop=stop, include_stop=include)
    shown = "".join(detokenizer.push([i]) for i in letters(byte_level, text))
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == cut_at_stop(text, stop, include)


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per character of a text."""
    return [i for c in text for i in tokenizer.encode(c, add_special_tokens=False)]


@few
@given(
    text=st.text("ab", max_size=20),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
def test_stop_string_counts_when_it_ends_behind_min_tokens(
    byte_level, text, stop, min_tokens, include
):
    detokenizer = IncrementalDetokenizer(
        byte_level, [], stop=stop, min_tokens=min_tokens, include_stop=include
    )
    shown = detokenizer.push(letters(byte_level, text)) + detokenizer.finish()
    ends = (n for n in range(min_tokens + 1, len(text) + 1) if text[:n].endswith(tuple(stop)))
    end = next(ends, None)
    if end is None:
        assert (shown, detokenizer.stopped) == (text, None)
    else:
        assert detokenizer.num_tokens == end
        assert (shown, detokenizer.stopped) == cut_at_last(text[:end], stop, include)


def cut_at_last(text: str, stops: Sequence[str], include: bool) -> tuple[str, str]:
    stop = max((s for s in stops if text.endswith(s)), key=len)
    return text if include else text.removesuffix(stop), stop


def test_half_a_character_is_held_back_until_it_is_whole(byte_level):
    ids = letters(byte_level, "😀")
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(byte_level, [])
    assert [detokenizer.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert detokenizer.finish() == ""


def test_character_begun_by_the_prompt_belongs_to_the_output(byte_level):
    *first, last = letters(byte_level, "😀")
    detokenizer = IncrementalDetokenizer(byte_level, first)
    assert detokenizer.push([last]) == "😀"


def test_unfinished_character_ends_as_a_replacement(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [])
    assert detokenizer.push(letters(byte_level, "a😀")[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == "a\ufffd"


def test_first_word_keeps_its_space_behind_a_prompt(sentencepiece):
    word = sentencepiece.encode("the", add_special_tokens=False)
    assert IncrementalDetokenizer(sentencepiece, word).push(word) == " the"
    assert IncrementalDetokenizer(sentencepiece, [1]).push(word) == "the"
    assert IncrementalDetokenizer(sentencepiece, [1], skip_special_tokens=False).push(word) == (
        " the"
    )


def test_beginning_of_a_stop_string_is_held_back(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [], stop=["abc"])
    ids = letters(byte_level, "xababd")
    assert [detokenizer.push([i]) for i in ids] == ["x", "", "", "ab", "", "abd"]


def test_stop_string_to_be_included_is_not_held_back(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [], stop=["abc"], include_stop=True)
    assert [detokenizer.push([i]) for i in letters(byte_level, "abcd")] == ["a", "b", "c", ""]


def test_held_text_is_given_out_at_the_end(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [], stop=["abc"])
    assert detokenizer.push(letters(byte_level, "ab")) == ""
    assert detokenizer.finish() == "ab"
    assert (detokenizer.text, detokenizer.stopped) == ("ab", None)


def test_tokens_behind_a_stop_string_are_not_taken(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [], stop=["b"])
    assert detokenizer.push(letters(byte_level, "abcd")) == "a"
    assert (detokenizer.stopped, detokenizer.num_tokens) == ("b", 2)
    assert detokenizer.push(letters(byte_level, "efg")) == ""
    assert (detokenizer.finish(), detokenizer.num_tokens) == ("", 2)


def test_stop_string_may_end_within_a_token(byte_level):
    ids = byte_level.encode("quick")
    assert len(ids) < 5
    detokenizer = IncrementalDetokenizer(byte_level, [], stop=["ic", "c"])
    assert detokenizer.push(ids) + detokenizer.finish() == "qu"
    assert detokenizer.stopped == "ic"


def test_stop_string_is_never_looked_for_in_the_prompt(byte_level):
    prompt, output = letters(byte_level, "ab"), letters(byte_level, "cd")
    detokenizer = IncrementalDetokenizer(byte_level, prompt, stop=["bc", "ab"])
    assert detokenizer.push(output) + detokenizer.finish() == "cd"


def test_empty_stop_string_is_refused(byte_level):
    with pytest.raises(InvalidArgument, match="must not be empty"):
        IncrementalDetokenizer(byte_level, [], stop=[""])


def test_long_runs_of_unfinished_text_cost_no_more_than_others(any_tokenizer):
    """A window that is decoded anew for each token would take minutes here."""
    ids = [any_tokenizer.encode("😀", add_special_tokens=False)[-1]] * 50_000
    detokenizer = IncrementalDetokenizer(any_tokenizer, [])
    for token_id in ids:
        detokenizer.push([token_id])
    detokenizer.finish()
    assert detokenizer.text == any_tokenizer.decode(ids)


def test_goldens_read_as_recorded(real, goldens):
    for name, folder in (("smollm2", "smollm2-135m-instruct"), ("stories15M", "stories15M")):
        for row in goldens(folder):
            recorded = row["output_text"]  # decoded alone, where sentencepiece drops a space
            detokenizer = IncrementalDetokenizer(real(name), row["prompt_token_ids"])
            text = "".join(detokenizer.push([i]) for i in row["output_token_ids"])
            assert text + detokenizer.finish() in (recorded, " " + recorded)
