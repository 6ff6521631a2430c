"""What doctor says about this machine, with plug-ins that work and plug-ins that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_core.tests.cli.command import run_command

WORKS = """
from dataclasses import replace
from vllm_core.backend import BackendInfo, hookimpl
from vllm_core.backend import Probe

@hookimpl
def vllm_core_backends():
    return [BackendInfo(
        name="{name}", api="{api}", summary="a plug-in of a test", priority={priority},
        probe="{probe}", open="{open}", only_by_name={shy},
    )]

def lie(config):
    from vllm_core.bindings.numpy import NumpyRuntime
    runtime = NumpyRuntime()
    runtime.caps = replace(runtime.caps, static_shapes=True)
    return runtime

def garbled():
    return Probe(["a card"])
"""
GOOD = {
    "api": ">=0.1,<0.2",
    "priority": 1000,
    "probe": "vllm_core.backend.builtin:probe",
    "open": "vllm_core.bindings.numpy:open_runtime",
    "shy": False,
}

NO_FRAMEWORK = (
    "sys.modules['torch'] = sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
    "import importlib.metadata as m\n"
    "given = m.entry_points\n"
    "m.entry_points = lambda **k: [e for e in given(**k) if e.name != 'cpu']"
)


def install_plugin(folder: Path, name: str, source: str) -> None:
    """A distribution as pip would leave it: a module, and metadata with its entry point."""
    (folder / f"{name}_plugin.py").write_text(source)
    facts = folder / f"vllm_core_{name}-7.8.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm-core-{name}\nVersion: 7.8\n"
    )
    (facts / "entry_points.txt").write_text(f"[vllm_core]\n{name} = {name}_plugin\n")


def works(name: str, **changes: object) -> str:
    return WORKS.format(name=name, **(GOOD | changes))


def doctor(folder: Path, *arguments: str, before: str = "") -> tuple[int, dict[str, Any]]:
    done = run_command("doctor", "--json", *arguments, extra_path=folder, before=before)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [backend for backend in report["backends"] if backend["name"] == name]
    return dict(found)


def test_a_backend_that_works_is_ready_and_says_what_it_declares(tmp_path: Path) -> None:
    install_plugin(tmp_path, "good", works("good"))
    code, report = doctor(tmp_path)
    assert code == 0
    assert report["is_ready"]
    assert report["verdict"].startswith("ready: the engine takes good")
    good = row(report, "good")
    assert (good["distribution"], good["version"]) == ("vllm-core-good", "7.8")
    assert "float32" in good["capabilities"]["dtypes"]
    assert good["devices"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_framework", "No module named 'no_such_framework'"),
        ("raise SystemExit('goodbye')", "goodbye"),
        ("x = 1", "names no backend"),
        (works("bad", api=">=9,<10"), "seam >=9,<10, this core speaks 0."),
        (works("bad", api="9"), "cannot be read"),
        (works("bad", probe="no_such_module:probe"), "its probe failed"),
        (works("bad", probe="builtins:list"), "not a Probe"),
        (works("bad", open="no_such_module:open"), "cannot be opened"),
        (works("bad", open="builtins:dict"), "cannot be opened"),
        (works("bad", probe="bad_plugin:garbled"), "no list of DeviceInfo"),
        (works("bad", priority="'high'"), "which must be int"),
        (works("bad", open="bad_plugin:lie"), "declares static_shapes without its own"),
        (works("bad", open="bad_plugin:lie", shy=True), "declares static_shapes without its own"),
    ],
)
def test_a_broken_plugin_is_named_with_its_reason_and_hides_no_other(
    tmp_path: Path, source: str, reason: str
) -> None:
    install_plugin(tmp_path, "bad", source)
    install_plugin(tmp_path, "good", works("good", priority=2000))
    code, report = doctor(tmp_path)
    assert code == 0
    assert reason in row(report, "bad")["error"]
    assert row(report, "bad")["distribution"] == "vllm-core-bad"
    assert row(report, "good")["error"] is None
    assert report["verdict"].startswith("ready: the engine takes good")
    assert row(report, "reference")["error"] is None


def test_a_broken_first_choice_is_said_and_the_next_one_offered(tmp_path: Path) -> None:
    install_plugin(tmp_path, "bad", works("bad", open="no_such_module:open", priority=3000))
    install_plugin(tmp_path, "good", works("good", priority=2000))
    code, report = doctor(tmp_path)
    assert code == 0
    assert report["verdict"] == (
        "ready with --backend good: without a name the engine takes bad, which is broken"
    )


def test_a_backend_that_runs_only_when_named_makes_no_machine_ready(tmp_path: Path) -> None:
    install_plugin(tmp_path, "shy", works("shy", shy=True))
    install_plugin(tmp_path, "bad", works("bad", open="no_such_module:open", priority=3000))
    code, report = doctor(tmp_path, before=NO_FRAMEWORK)
    assert code == 1
    assert row(report, "shy")["capabilities"]
    assert report["verdict"].startswith("not ready: without a name the engine takes bad")
    text = run_command("doctor", extra_path=tmp_path).stdout
    assert "runs only when asked for: --backend shy" in text


def test_debug_shows_the_traceback_of_a_broken_plugin(tmp_path: Path) -> None:
    install_plugin(tmp_path, "bad", "import no_such_framework")
    quiet = run_command("doctor", extra_path=tmp_path)
    assert "no_such_framework" in quiet.stdout
    assert "Traceback" not in quiet.stdout + quiet.stderr
    assert "Traceback" in run_command("doctor", "--debug", extra_path=tmp_path).stdout


def test_a_backend_without_a_device_tells_why_and_what_to_do(tmp_path: Path) -> None:
    source = works("bare", probe="bare_plugin:probe") + (
        "\nfrom vllm_core.backend import Probe\n"
        "def probe():\n    return Probe(reason='no such card', fix='buy a card')\n"
    )
    install_plugin(tmp_path, "bare", source)
    text = run_command("doctor", extra_path=tmp_path).stdout
    assert "no device: no such card" in text
    assert "to mend it: buy a card" in text


def test_backends_of_the_core_say_what_there_is_to_choose_in_one_line(tmp_path: Path) -> None:
    lines = run_command("doctor", extra_path=tmp_path).stdout.splitlines()
    (at,) = [place for place, line in enumerate(lines) if line.startswith("reference")]
    facts = [line.strip() for line in lines[at : at + 4]]
    assert "dtypes float32 float64, native_schemes none, kv_dtypes none" in facts
    code, report = doctor(tmp_path)
    assert "int4" in row(report, "reference")["capabilities"]["schemes"] and code == 0
    told = set(row(report, "jax")["capabilities"])  # unopened: the device has its say in these
    assert "dtypes" in told and not told & {"default_dtype", "shares_host_memory"}


def test_without_any_framework_it_still_works_and_says_what_to_install(tmp_path: Path) -> None:
    code, report = doctor(tmp_path, before=NO_FRAMEWORK)
    assert code == 1
    assert not report["is_ready"]
    assert "pip install 'vllm-core[cpu]'" in report["verdict"]
    assert row(report, "jax")["devices"] == []
