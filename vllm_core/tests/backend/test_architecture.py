"""The laws of the house that a linter does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_core
from vllm_core.ops import ARRAY_VOCABULARY

ROOT = Path(vllm_core.__file__).parent
CORE = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("bindings", "tests")
]
SHARED = [
    path
    for path in CORE
    if path.relative_to(ROOT).parts[0] in ("models", "runner")
    or path.name in ("stepping.py", "sampling.py", "block_table.py")
]
FRAMEWORKS = {"torch", "jax", "jaxlib", "triton"}
VENDORS = re.compile(
    r"(?<![a-z])(cuda|rocm|tpu|gaudi|hpu|habana|nvidia|amd|intel|xpu|ascend|npu|neuron|trainium|qualcomm)"
    r"(?![a-z])",
    re.IGNORECASE,
)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def names_of_xp(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Attributes taken of `xp` or of `<anything>.xp`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            is_xp = isinstance(owner, ast.Name) and owner.id == "xp"
            if is_xp or (isinstance(owner, ast.Attribute) and owner.attr == "xp"):
                yield node.attr, node.lineno


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_framework_and_names_no_vendor(path: Path) -> None:
    text = path.read_text()
    found = {name.split(".")[0] for name in imports(ast.parse(text))}
    assert not found & FRAMEWORKS
    lines = [line for line in text.splitlines() if VENDORS.search(line)]
    assert not lines, f"a vendor is named: {lines}"


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_that_every_framework_runs_uses_the_array_vocabulary_only(path: Path) -> None:
    foreign = [
        (n, line)
        for n, line in names_of_xp(ast.parse(path.read_text()))
        if n not in ARRAY_VOCABULARY
    ]
    assert not foreign, f"not in ARRAY_VOCABULARY: {foreign}"


def test_the_array_vocabulary_holds_no_name_that_nobody_uses() -> None:
    used = {name for path in SHARED for name, _ in names_of_xp(ast.parse(path.read_text()))}
    assert set(ARRAY_VOCABULARY) == used


def test_the_checks_see_what_they_look_for() -> None:
    assert {"torch", "jax.numpy"} <= set(
        imports(ast.parse("import torch\nfrom jax.numpy import x"))
    )
    assert list(names_of_xp(ast.parse("ops.xp.sort(xp.exp(a))"))) == [("sort", 1), ("exp", 1)]
    assert VENDORS.search("a CUDA device")
    assert not VENDORS.search("output of the tputs")
