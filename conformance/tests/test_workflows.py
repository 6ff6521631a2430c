"""CI: the workflows can be read, and the matrix, nox and the kit speak of the same things."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from vllm_core_conformance.case import PROFILES
from vllm_core_conformance.kit.distribution import REPOSITORY, render

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MATRIX = json.loads((ROOT / ".github" / "conformance.json").read_text())


def read(path: Path) -> dict[str, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in found.items()}  # YAML 1.1


def judged() -> set[str]:
    """Backends of nox's session, from the text: nox itself need not be installed."""
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "JUDGED":
            return set(ast.literal_eval(node.value))
    raise AssertionError("the noxfile has no JUDGED")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_limits_and_asks_for_no_rights(path: Path) -> None:
    workflow = read(path)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"], name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            # text of others must not become part of a script
            assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_no_host(path: Path) -> None:
    assert not re.search(r"https?://|\w\.(org|com|io)/", path.read_text())


def test_every_enabled_backend_has_a_nox_session_and_the_others_are_named() -> None:
    names = [row["backend"] for row in MATRIX]
    assert len(set(names)) == len(names)
    assert {row["backend"] for row in MATRIX if row["enabled"]} == judged()
    assert not all(row["enabled"] for row in MATRIX)
    assert all(row["runner"] for row in MATRIX)


def test_profiles_of_the_workflows_exist() -> None:
    texts = [path.read_text() for path in WORKFLOWS]
    texts += [render("acme", "torch")[".github/workflows/conformance.yml"]]
    found = {
        name
        for text in texts
        for names in re.findall(r"contract[\w,]*", text)
        for name in names.split(",")
    }
    assert found and found <= set(PROFILES)


def test_the_kit_calls_the_reusable_workflow_with_inputs_that_it_has() -> None:
    ours = read(ROOT / ".github" / "workflows" / "conformance-reusable.yml")
    inputs = ours["on"]["workflow_call"]["inputs"]
    theirs = yaml.safe_load(render("acme", "none")[".github/workflows/conformance.yml"])
    job = theirs["jobs"]["conformance"]
    assert job["uses"].startswith(f"{REPOSITORY}/.github/workflows/conformance-reusable.yml@")
    assert set(job["with"]) <= set(inputs)
    required = {name for name, facts in inputs.items() if facts.get("required")}
    assert required <= set(job["with"])
