"""The vendor's guide: its commands exist, and its code is judged by the suite."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_core.cli.main import build_parser
from vllm_core_conformance import cli as conformance_command
from vllm_core_conformance.cases import all_cases
from vllm_core_conformance.kit import cli as kit_command
from vllm_core_conformance.kit.distribution import FRAMEWORKS, count_lines, render, write
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.target import Source, Target

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "new-backend.md"
COMMANDS = {"conformance": conformance_command, "new-backend": kit_command}


def blocks(language: str) -> list[str]:
    """Fenced blocks of the guide."""
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text("utf-8"), re.M | re.S)


def lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def cases_like(pattern: str) -> list[str]:
    return [case for case in all_cases() if re.fullmatch(pattern.replace("*", ".*"), case)]


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("vllm-core ")])
def test_a_command_of_the_guide_is_understood(line: str) -> None:
    args = build_parser(COMMANDS).parse_args(shlex.split(line)[1:])
    if getattr(args, "action", None) == "run" and args.case is not None:
        assert cases_like(args.case), line
    if getattr(args, "action", None) == "repro":
        assert args.case in all_cases()


def test_every_other_command_of_the_guide_is_known() -> None:
    noxfile = (ROOT / "noxfile.py").read_text()
    for line in lines():
        word, *rest = shlex.split(line)
        if word == "nox":
            session = rest[1].partition("(")[0]
            assert f"def {session}(" in noxfile, line
        elif word == "python" and rest[0] == "-m":
            module = rest[1].removeprefix("vllm_core_acme.")
            is_ours = f"vllm_core_acme/{module}.py" in render("acme", "torch")
            assert is_ours or find_spec(module) is not None, line
        else:
            assert word in {"vllm-core", "pip", "cd", "pytest", "python"}, line


def test_the_guide_tells_the_lines_that_a_vendor_owns() -> None:
    text = GUIDE.read_text("utf-8")
    for framework in FRAMEWORKS:
        own, _ = count_lines(render("acme", framework))
        assert re.search(rf"^\| `{framework}` .*\| {own} lines", text, re.M), (framework, own)


def test_the_guide_lists_the_files_that_are_written() -> None:
    listed = blocks("text")[0]
    for path in render("acme", "torch"):
        assert f"vllm-core-acme/{path}\n" in listed


def test_the_attention_of_the_guide_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would put it together: the generated backend, two files, two lines."""
    pytest.importorskip("torch", reason="the attention of the guide was not checked")
    files = render("guided", "torch")
    code = [text.replace("vllm_core_acme", "vllm_core_guided") for text in blocks("python")]
    names = re.findall(r"^`vllm_core_acme/(\w+\.py)`$", GUIDE.read_text("utf-8"), re.M)
    assert names == ["attention.py", "kernel.py"] and len(code) == 2
    files |= {f"vllm_core_guided/{name}": text for name, text in zip(names, code, strict=True)}
    runtime = files["vllm_core_guided/runtime.py"]
    runtime = runtime.replace(
        "from vllm_core_guided.ops",
        "from vllm_core_guided.attention import AcmeAttention\nfrom vllm_core_guided.ops",
    )
    wanted = "self.attention = AcmeAttention(device, self.dtype, self.synchronize)"
    assert f"+        {wanted}\n" in blocks("diff")[0]
    runtime = runtime.replace(
        "        self.block_tables =", f"        {wanted}\n        self.block_tables ="
    )
    write(files | {"vllm_core_guided/runtime.py": runtime}, tmp_path / "new")
    monkeypatch.syspath_prepend(str(tmp_path / "new"))
    module = importlib.import_module("vllm_core_guided.runtime")
    target = Target(Source("guided", module.open_runtime), "float32")
    try:
        assert type(target.runtime.attention).__name__ == "AcmeAttention"
        names = cases_like("attention.coded.*")[:2] + cases_like("kv.*")[:1]
        results = [execute(all_cases()[name], target, seed=3) for name in names]
        assert {r.case: r.sentence for r in results if r.status != "pass"} == {}
        assert len(results) == 3
    finally:
        target.close()
        for name in [name for name in sys.modules if name.startswith("vllm_core_guided")]:
            del sys.modules[name]
