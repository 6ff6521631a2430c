"""Commands that other distributions bring through entry points."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_core.tests.cli.command import run_command

GOOD = """
SUMMARY = "greets 100 % of the time"
def add_arguments(parser): parser.add_argument("--who", default="you")
def run(args): print("hello", args.who); return 7
"""


def install_command(folder: Path, name: str, source: str) -> None:
    """A distribution as pip would leave it: a module, and metadata with its entry point."""
    (folder / f"{name}_command.py").write_text(source.replace("100 %", "100 %%"))
    facts = folder / f"vendor_{name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vendor-{name}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[vllm_core.commands]\n{name} = {name}_command\n")


def test_a_command_of_another_distribution_runs_with_its_arguments(tmp_path: Path) -> None:
    install_command(tmp_path, "greet", GOOD)
    done = run_command("greet", "--who", "world", extra_path=tmp_path)
    assert (done.returncode, done.stdout) == (7, "hello world\n")


def test_help_lists_it_beside_the_own_ones(tmp_path: Path) -> None:
    install_command(tmp_path, "greet", GOOD)
    done = run_command("--help", extra_path=tmp_path)
    assert done.returncode == 0
    assert "greets 100 % of the time" in done.stdout
    assert "chat" in done.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit('goodbye')", "goodbye"),
        ("SUMMARY = 3\ndef add_arguments(p): 0\ndef run(a): 0", "SUMMARY is int"),
        ("SUMMARY = 'x'\ndef add_arguments(p): 0", "no attribute 'run'"),
    ],
)
def test_a_broken_command_is_named_and_hides_nothing(
    tmp_path: Path, source: str, reason: str
) -> None:
    install_command(tmp_path, "broken", source)
    install_command(tmp_path, "greet", GOOD)
    listed = run_command("--help", extra_path=tmp_path)
    assert listed.returncode == 0
    said = " ".join(listed.stdout.split())
    assert "broken broken: " in said
    assert reason in said
    assert "greets" in said
    asked = run_command("broken", "--any", "thing", extra_path=tmp_path)
    assert asked.returncode == 1
    assert asked.stderr.startswith("error: the command 'broken' of vendor-broken cannot be loaded")
    assert reason in asked.stderr


def test_a_command_whose_arguments_are_broken_says_so_when_it_is_asked_for(tmp_path: Path) -> None:
    source = "SUMMARY = 'x'\ndef add_arguments(p): 1/0\ndef run(a): 0"
    install_command(tmp_path, "broken", source)
    done = run_command("broken", extra_path=tmp_path)
    assert done.returncode == 1
    assert "division by zero" in done.stderr


def test_only_the_command_that_is_asked_for_is_loaded(tmp_path: Path) -> None:
    install_command(tmp_path, "loud", "print('loaded')\n" + GOOD)
    install_command(tmp_path, "greet", GOOD)
    assert run_command("greet", extra_path=tmp_path).stdout == "hello you\n"
    assert "loaded" not in run_command("models", "--help", extra_path=tmp_path).stdout


def test_the_name_of_an_own_command_cannot_be_taken(tmp_path: Path) -> None:
    install_command(tmp_path, "models", GOOD)
    done = run_command("models", extra_path=tmp_path)
    assert "architectures" in done.stdout
