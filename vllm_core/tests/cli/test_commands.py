"""The commands that run a model, on the reference backend and random weights."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_core.cli.main import main
from vllm_core.tests.cli.command import TREE
from vllm_core.tests.cli.tiny_model import write_tiny_model

ENGINE = ["--load-format", "dummy", "--backend", "reference", "--kv-cache-memory", "1M"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--model", str(write_tiny_model(tmp_path_factory.mktemp("model"))), *ENGINE]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_prints_the_text_alone_for_one_prompt(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = [*options, "--temperature", "0", "--max-tokens", "5", "--ignore-eos"]
    code, text, _ = run(capsys, "generate", "hello", *greedy)
    assert code == 0
    code, lines, _ = run(capsys, "generate", "hello", "--json", *greedy)
    assert code == 0
    (output,) = map(json.loads, lines.splitlines())
    assert text == output["outputs"][0]["text"] + "\n"
    assert output["prompt"] == "hello"
    assert len(output["outputs"][0]["token_ids"]) == 5
    assert output["outputs"][0]["finish_reason"] == "length"


def test_generate_reads_a_file_of_prompts_and_numbers_the_answers(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    code, text, _ = run(
        capsys, "generate", "--prompt-file", str(file), "-n", "2", "--max-tokens", "3", *options
    )
    assert code == 0
    heads = [line for line in text.splitlines() if line.startswith("=== ")]
    assert heads == [
        "=== 1/2 answer 0: 'one'",
        "=== 1/2 answer 1: 'one'",
        "=== 2/2 answer 0: 'two'",
        "=== 2/2 answer 1: 'two'",
    ]


def test_the_same_seed_gives_the_same_text(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    seeded = ["--seed", "7", "--max-tokens", "20", "--ignore-eos", *options]
    first = run(capsys, "generate", "hello", *seeded)
    assert run(capsys, "generate", "hello", *seeded)[:2] == first[:2]


def test_json_holds_the_log_probabilities(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines, _ = run(
        capsys,
        *["generate", "ab", "--json", "--logprobs", "2", "--prompt-logprobs", "1"],
        *["--max-tokens", "2", "--ignore-eos", *options],
    )
    output = json.loads(lines)
    assert len(output["outputs"][0]["logprobs"]) == 2
    assert all(len(row) >= 2 for row in output["outputs"][0]["logprobs"])
    assert output["prompt_logprobs"][0] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x" * 300], "256"),
        (["generate", "x", "--max-model-len", "100000"], "max_model_len"),
        (["generate", "x", "--backend", "nonsense"], "nonsense"),
        (["chat", "--prompt", "x", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_the_engine_refuses_is_one_line(
    options: list[str], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, errors = run(capsys, arguments[0], *options, *arguments[1:])
    assert (code, text) == (1, "")
    assert errors.splitlines()[-1].startswith("error: ")
    assert said in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_chat_prints_the_answer_alone_to_stdout(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["chat", "--prompt", "hi", "--temperature", "0", "--max-tokens", "8", *options]
    code, answer, told = run(capsys, *ask)
    assert code == 0
    assert "KV cache" in told
    assert "tokens/s" in told
    code, quiet_answer, quiet_told = run(capsys, *ask, "--quiet")
    assert (code, quiet_answer, quiet_told) == (0, answer, "")


def test_models_lists_what_the_core_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "models")
    assert code == 0
    assert "LlamaForCausalLM" in text
    code, as_json, _ = run(capsys, "models", "--json")
    assert "LlamaForCausalLM" in json.loads(as_json)["architectures"]


def test_bench_throughput_counts_every_token(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    code, text, _ = run(
        capsys,
        *["bench", "throughput", "--output", str(file), "--num-prompts", "3"],
        *["--input-len", "10", "--output-len", "4", *options],
    )
    assert (code, text) == (0, "")
    report = json.loads(file.read_text())
    assert report["benchmark"] == "throughput"
    assert (report["prompt_tokens"], report["output_tokens"]) == (30, 12)
    assert report["output_tokens_per_s"] == pytest.approx(12 / report["elapsed_s"])
    assert report["num_steps"] >= 4
    assert report["engine"]["backend"] == "reference"


def test_bench_throughput_cuts_a_trace(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt_tokens,output_tokens\n500,2\n3,500\n")
    code, text, _ = run(
        capsys,
        *["bench", "throughput", "--trace", str(trace), "--num-prompts", "2"],
        *["--input-len", "9", "--output-len", "6", *options],
    )
    assert code == 0
    report = json.loads(text)
    assert (report["prompt_tokens"], report["output_tokens"]) == (12, 8)


def test_bench_latency_reports_percentiles(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(
        capsys,
        *["bench", "latency", "--iterations", "3", "--batch-size", "2"],
        *["--input-len", "4", "--output-len", "3", *options],
    )
    assert code == 0
    report = json.loads(text)
    assert 0 < report["latency_s"]["p50"] <= report["latency_s"]["p99"]
    per_token = report["latency_per_output_token_s"]["p50"]
    assert per_token == pytest.approx(report["latency_s"]["p50"] / 3)


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self._master = master
        self._seen = ""
        self.process = process

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """What came up to `text`; fails when the chat ends or stays silent."""
        deadline = time.monotonic() + 60
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen
            self._read()
        found, self._seen = self._seen.split(text, 1)
        return found

    def wait_for_anything(self) -> None:
        """Returns when something stands behind what was waited for last."""
        if not self._seen:
            self._read()

    def _read(self) -> None:
        assert select.select([self._master], [], [], 60)[0], f"silence after: {self._seen}"
        try:
            self._seen += os.read(self._master, 4096).decode(errors="replace")
        except OSError:
            raise AssertionError(f"the chat ended: {self._seen}") from None


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_core.cli.main", "chat", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=TREE,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _take_terminal() -> None:
    """Makes the terminal the process's own, so that Ctrl-C reaches it as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_chat_in_a_terminal_answers_forgets_and_leaves(options: list[str]) -> None:
    with terminal(*options, "--max-tokens", "4", "--ignore-eos") as chat:
        chat.wait_for("> ")
        chat.type("hello\n")
        chat.wait_for("[4 tokens, ")
        chat.wait_for("> ")
        chat.type("/system be brief\n")
        chat.wait_for("> ")
        chat.type("/reset\n")
        chat.wait_for("> ")
        chat.type("/nonsense\n")
        chat.wait_for("/reset forgets the conversation")
        chat.wait_for("> ")
        chat.type("x" * 300 + "\n")
        chat.wait_for("error: ")
        chat.wait_for("> ")
        chat.type("\x04")
        assert chat.process.wait(30) == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(options: list[str]) -> None:
    many = [*options, "--max-model-len", "256", "--max-tokens", "200", "--ignore-eos"]
    with terminal(*many, "--prompt", "hi", "--interactive") as chat:
        chat.wait_for("> hi\r\n")
        chat.wait_for_anything()  # the answer is under way
        chat.type("\x03")
        told = chat.wait_for(" tokens, ")
        assert int(told.rsplit("[", 1)[1]) < 200
        chat.wait_for("> ")
        chat.type("/exit\n")
        assert chat.process.wait(30) == 0
