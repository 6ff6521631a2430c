"""Bad input through the command line: one sentence, exit code 1, no traceback."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_core.cli.main import main
from vllm_core.tests.cli.tiny_model import write_tiny_model

HIDDEN, INNER, VOCAB = 16, 32, 259
ENGINE = ["--backend", "reference", "--max-num-seqs", "2", "--max-tokens", "3"]


def weights() -> dict[str, np.ndarray[Any, Any]]:
    """What the config of the tiny model asks for."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "lm_head": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}"] = (HIDDEN,)
        for which, rows in (("q", 16), ("k", 8), ("v", 8), ("o", 16)):
            shapes[f"{layer}.self_attn.{which}_proj"] = (rows, HIDDEN)
        for which in ("gate", "up"):
            shapes[f"{layer}.mlp.{which}_proj"] = (INNER, HIDDEN)
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, INNER)
    draw = np.random.default_rng(0)
    return {
        f"{name}.weight": draw.standard_normal(shape, np.float32) / 4
        for name, shape in shapes.items()
    }


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overlap(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    last = max(header, key=lambda name: header[name]["data_offsets"])
    twin = next(n for n in header if n != last and header[n]["shape"] == header[last]["shape"])
    header[last]["data_offsets"] = header[twin]["data_offsets"]
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def lose_a_shard(folder: Path) -> None:
    names = dict.fromkeys(weights(), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def drop_a_weight(folder: Path) -> None:
    save_file(
        {k: v for k, v in weights().items() if k != "lm_head.weight"}, folder / "model.safetensors"
    )


def add_a_weight(folder: Path) -> None:
    save_file(weights() | {"extra.weight": np.zeros(3)}, folder / "model.safetensors")


def fill_with_nan(folder: Path) -> None:
    save_file(
        {k: v * np.float32("nan") for k, v in weights().items()}, folder / "model.safetensors"
    )


def end_nowhere(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, null]}')


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown architecture": (
        lambda folder: change_config(folder, architectures=["LamaForCausalLM"]),
        "LlamaForCausalLM",
    ),
    "unknown model type": (
        lambda folder: change_config(folder, model_type="lama"),
        "did you mean llama",
    ),
    "unknown rope scaling": (
        lambda folder: change_config(folder, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "known are default, linear, llama3, yarn",
    ),
    "truncated": (truncate, "truncated"),
    "overlapping": (overlap, "overlap"),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors"),
    "missing tokenizer": (lose_the_tokenizer, "--tokenizer"),
    "missing weight": (drop_a_weight, "lm_head.weight"),
    "unused weight": (add_a_weight, "extra.weight"),
    "ends that are no tokens": (end_nowhere, "eos_token_id"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "tiny")
    save_file(weights(), tmp_path / "tiny" / "model.safetensors")
    return tmp_path / "tiny"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_the_model_itself_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--model", str(folder), *ENGINE]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_bad_model_is_refused_in_a_sentence(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = BAD_MODELS[what]
    spoil(folder)
    assert said in refused(capsys, "generate", "hello", "--model", str(folder), *ENGINE)


def test_a_request_with_nan_logits_is_an_error_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_with_nan(folder)
    arguments = ["generate", "hello", "--model", str(folder), *ENGINE]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "not finite" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kv-cache-memory", "1K"], "cannot hold one sequence"),
        (["--max-num-seqs", "1000000000", "--kv-cache-memory", "1M"], "max_num_seqs"),
        (["--block-size", "7"], "it offers"),
        (["--max-model-len", "1" + "0" * 30], "max_model_len"),
        (["--top-k", "-1"], "top_k"),
        (["--min-tokens", "-1"], "min_tokens"),
        (["--stop-token-ids", "1" + "0" * 30], "does not exist"),
        (["-n", "1000000000"], "n must be at most"),
        (["--seed", "1" + "0" * 30], "64 bits"),
        (["--stop", ""], "stop must hold strings"),
        (["--threads", "0"], "threads must be at least 1"),
    ],
)
def test_an_option_out_of_range_is_refused_in_a_sentence(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "generate", "x", "--model", str(folder), *ENGINE, *options)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-has-this-name/model", "a/b/c/d", " "])
def test_a_name_that_is_no_model_is_refused_in_a_sentence(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model" in refused(capsys, "generate", "x", "--model", name)


def test_a_negative_seed_is_a_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(folder), "--load-format", "dummy", "--seed", "-1"]
    assert main(["generate", "hello", *options, *ENGINE]) == 0


def test_a_seed_at_the_end_of_its_range_seeds_many_prompts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = ["--seed", str(2**64 - 1)]
    assert main(["generate", "a", "b", "c", "--model", str(folder), *ENGINE, *seed]) == 0


def test_defaults_of_the_model_that_cannot_be_followed_are_told_and_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"temperature": 0, "top_k": None, "top_p": 0, "min_p": "much", "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    assert main(["generate", "hello", "--model", str(folder), *ENGINE]) == 0
    assert "top_p must be above 0" in caplog.text
    assert "min_p must be a finite number" in caplog.text


@pytest.mark.parametrize("command", [["generate"], ["chat"]])
def test_input_that_is_no_text_is_refused_in_a_sentence(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"))
    assert "not valid UTF-8" in refused(capsys, *command)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"\xff", "cannot be read"), (b"{{", "the given chat template")],
)
def test_a_chat_template_that_cannot_be_used_is_refused_in_a_sentence(
    folder: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    ask = ["chat", "--prompt", "x", "--chat-template", str(file), "--model", str(folder), *ENGINE]
    assert said in refused(capsys, *ask)


def test_a_chat_template_of_ones_own_is_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = folder / "tokenizer_config.json"
    facts = json.loads(settings.read_text())
    del facts["chat_template"]
    settings.write_text(json.dumps(facts))
    ask = ["chat", "--prompt", "x", "--model", str(folder), *ENGINE]
    assert "--chat-template FILE" in refused(capsys, *ask)
    (folder / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert main([*ask, "--chat-template", str(folder / "own.jinja")]) == 0


@pytest.mark.parametrize("name", ["", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    output = str(tmp_path / name)
    assert "cannot be written" in refused(capsys, "bench", "host", "--output", output)


def test_an_unknown_level_of_the_log_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_CORE_LOG_LEVEL", "loud")
    assert "VLLM_CORE_LOG_LEVEL must be one of debug" in refused(capsys, "models")
