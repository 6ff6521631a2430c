"""The frame of the command line: speed, errors, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vllm_core
from vllm_core.cli.main import main
from vllm_core.errors import InvalidArgument
from vllm_core.tests.cli.command import TREE, run_command

HEAVY = ("torch", "jax", "numpy", "transformers", "tokenizers", "gguf", "huggingface_hub", "rich")
IS_HEAVY_IMPORTED = f"print('imported:', [n for n in {HEAVY} if n in sys.modules])"


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["bench", "latency", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    report = f"import atexit\natexit.register(lambda: {IS_HEAVY_IMPORTED})"
    done = run_command(*arguments, before=report)
    assert done.returncode == 0
    assert "imported: []" in done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = f"import sys, vllm_core, vllm_core.params, vllm_core.outputs\n{IS_HEAVY_IMPORTED}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=TREE)
    assert done.stdout.strip() == "imported: []"


@pytest.mark.parametrize("name", vllm_core.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(vllm_core, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = vllm_core.NoSuchName


def test_an_error_is_one_line_and_exit_code_1() -> None:
    done = run_command("generate", "--block-size", "0", "x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: block_size must be at least 1, not 0\n"


@pytest.mark.parametrize("arguments", [["--debug", "generate"], ["generate", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str]) -> None:
    done = run_command(*arguments, "--block-size", "0", "x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: block_size")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "--max-tokens", "many"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = run_command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--temperature", "-1", "x"], "temperature must not be negative"),
        (["generate", "--temperature", "0", "-n", "2", "x"], "raise temperature or set n=1"),
        (["chat", "--prompt", "x", "--top-p", "0"], "top_p must be above 0"),
        (["chat", "--prompt", " "], "the prompt is empty"),
        (["chat"], "the prompt is empty"),
        (["generate"], "a prompt is empty"),
        (["generate", "x", "--prompt-file", "y"], "give one of them"),
        (["generate", "--prompt-file", "no-such-file"], "no-such-file cannot be read"),
        (["generate", "--dtype", "float7", "x"], "dtype must be one of"),
        (["bench", "latency", "--iterations", "0"], "iterations must be at least 1"),
        (["bench", "throughput", "--num-prompts", "0"], "num_prompts must be at least 1"),
        (["bench", "latency", "--output", "no-such-folder/x.json"], "no-such-folder"),
        (["bench", "throughput", "--trace", "no-such-file.csv"], "no-such-file.csv cannot be read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            assert main(arguments) == 1
        finally:
            sys.stdin = stdin
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_invalid_argument_is_a_value_error_too() -> None:
    assert issubclass(InvalidArgument, ValueError)


def test_an_interrupt_ends_with_130_and_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vllm_core.cli.main", "generate"],
        stdin=subprocess.PIPE,  # it waits for the prompt
        stderr=subprocess.PIPE,
        text=True,
        cwd=TREE,
    ) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(30) == 130
    assert "Traceback" not in said


def test_a_reader_that_went_away_is_no_traceback(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "vllm_core.cli.main", "doctor"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TREE,
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == ""
