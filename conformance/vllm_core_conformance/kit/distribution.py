"""Renders the templates of a backend's distribution and writes them into a new folder.

Knows: templates, names, versions. Does not know: the command line.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

import vllm_core
import vllm_core_conformance
from vllm_core.backend import SEAM_VERSION
from vllm_core.backend.manager import BackendManager
from vllm_core.errors import InvalidArgument

REPOSITORY = "vllm-core/vllm-core"
"""Where a vendor's CI finds the reusable workflow."""

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
MAX_NAME = 20

KERNELS = "kernels.py"
"""The file of a generated package that stands for the vendor's own library."""

TEMPLATES = "templates"
SUFFIX = ".j2"
FOLDERS = {"package": "vllm_core_{name}", "github": ".github"}
"""Folders of the templates that are called otherwise where they are written."""
FILES = {"gitignore": ".gitignore"}


@dataclass(frozen=True)
class Framework:
    """What drives the new device."""

    says: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    """Modules that must be there; the probe looks for them without importing them."""


FRAMEWORKS = {
    "torch": Framework("PyTorch drives the device", ("torch>=2.10,<3",), ("torch",)),
    "jax": Framework("JAX drives the device", ("jax>=0.10,<1",), ("jax", "jaxlib")),
    "none": Framework("a library of your own drives it", ("numpy>=2,<3",), ()),
}


def check_name(name: str) -> None:
    """InvalidArgument unless a new backend may be called that."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME or keyword.iskeyword(name):
        raise InvalidArgument(
            f"a backend cannot be called {name!r}: small letters, digits and single underscores, "
            f"a letter first, no Python keyword, {MAX_NAME} characters at most"
        )
    if name in _taken():
        raise InvalidArgument(
            f"the name {name!r} is taken: a backend that `vllm-core doctor` lists has it, or "
            "vllm-core keeps it for one of its own"
        )
    if find_spec(f"vllm_core_{name}") is not None:
        raise InvalidArgument(f"there is a package vllm_core_{name} already; take another name")


def _taken() -> set[str]:
    """Backends that are installed, and those for which the core reserves an extra."""
    taken = {backend.name for backend in BackendManager().discover()}
    try:
        extras = metadata.metadata("vllm-core").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from a tree
        extras = []
    return taken | set(extras)


def render(name: str, framework: str) -> dict[str, str]:
    """Path below the new folder -> text, in the order of a reader."""
    environment = jinja2.Environment(
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    facts = _facts(name, framework)
    root = resources.files(__package__).joinpath(TEMPLATES)
    found: dict[str, str] = {}
    for part in ("common", framework):
        for path, template in _templates(root.joinpath(part)):
            text = environment.from_string(template.read_text(encoding="utf-8")).render(facts)
            found[_path(path, name)] = text
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def write(files: Mapping[str, str], folder: Path) -> None:
    """InvalidArgument when the folder is there already: nothing is ever overwritten."""
    if folder.exists():
        raise InvalidArgument(f"{folder} exists already; name another folder with --output")
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def count_lines(files: Mapping[str, str]) -> tuple[int, int]:
    """Lines of Python that are neither blank nor a comment nor a docstring's: of the package
    without its kernels, and of the kernels."""
    own = kernel = 0
    for path, text in files.items():
        if not path.startswith("vllm_core_") or not path.endswith(".py"):
            continue
        if path.endswith(f"/{KERNELS}"):
            kernel += _code_lines(text)
        else:
            own += _code_lines(text)
    return own, kernel


def _code_lines(text: str) -> int:
    bare = re.sub(r'^\s*"""(?:.|\n)*?"""\s*$', "", text, flags=re.MULTILINE)
    lines = (line.strip() for line in bare.splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def _facts(name: str, framework: str) -> dict[str, Any]:
    major, minor = SEAM_VERSION
    until = f"{major + 1}" if major else f"{major}.{minor + 1}"
    used = FRAMEWORKS[framework]
    return {
        "name": name,
        "title": "".join(word.capitalize() for word in name.split("_")),
        "package": f"vllm_core_{name}",
        "distribution": f"vllm-core-{name.replace('_', '-')}",
        "framework": framework,
        "requirements": used.requirements,
        "packages": _tuple(used.packages),
        "seam": f">={major}.{minor},<{until}",
        "core": _compatible(vllm_core.__version__),
        "suite": _compatible(vllm_core_conformance.__version__),
        "repository": REPOSITORY,
    }


def _tuple(words: tuple[str, ...]) -> str:
    """As it stands in Python; nothing where there is none."""
    quoted = ", ".join(f'"{word}"' for word in words)
    return f"({quoted}{',' if len(words) == 1 else ''})" if words else ""


def _compatible(version: str) -> str:
    """ "0.1.3" -> "==0.1.*": while a distribution is 0.x, each minor may break."""
    major, minor = version.split(".")[:2]
    return f"=={major}.{minor}.*"


def _templates(folder: Traversable, before: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _templates(entry, f"{before}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield f"{before}{entry.name.removesuffix(SUFFIX)}", entry


def _path(path: str, name: str) -> str:
    *folders, file = path.split("/")
    if folders and folders[0] in FOLDERS:
        folders[0] = FOLDERS[folders[0]].format(name=name)
    return "/".join((*folders, FILES.get(file, file)))


def _order(path: str) -> tuple[bool, bool, str]:
    """What lies at the top comes first, hidden folders last."""
    return ("/" in path, path.startswith("."), path)
