# SPDX-License-Identifier: Apache-2.0
"""What stands in more than one file about versions agrees, and each source file names the licence."""

from __future__ import annotations

import re
import subprocess
import tomllib
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.documents import REPOSITORY

PYPROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT: Final[dict[str, Any]] = PYPROJECT["project"]
SOURCES: Final = (".py", ".c", ".h", ".S", ".css", ".js", ".html", ".toml", ".yml", ".cff", ".service")
LICENCE: Final = "SPDX-License-Identifier: Apache-2.0"


def unlicensed(texts: dict[str, str]) -> list[str]:
    """The source files, and the scripts without a suffix, whose first line after a `#!` does not name the licence."""
    found = []
    for name, text in texts.items():
        lines = text.splitlines()
        script = bool(lines) and lines[0].startswith("#!")
        if (script or name.endswith(SOURCES) or name == "Makefile") and not any(
            LICENCE in line for line in lines[script : script + 1]
        ):
            found.append(name)
    return found


def test_each_source_file_names_the_licence() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    binary = (".parquet", ".xz", ".png")
    listed_names = listed.stdout.splitlines()
    files = [name for name in listed_names if not name.endswith(binary) and (REPOSITORY / name).is_file()]
    texts = {name: (REPOSITORY / name).read_text(errors="replace") for name in files}
    assert sum(name.endswith(SOURCES) for name in texts) > 500
    assert unlicensed(texts) == []


def test_a_file_without_the_licence_is_found() -> None:
    texts = {
        "a.py": f"# {LICENCE}\n", "b": f"#!/bin/sh\n# {LICENCE}\n", "c.md": "text\n",
        "d.py": "", "e.c": "int a;\n", "f": "#!/bin/sh\n", "g.py": f"import os\n# {LICENCE}\n",
    }  # fmt: skip
    assert unlicensed(texts) == ["d.py", "e.c", "f", "g.py"]


def test_a_citation_names_the_version() -> None:
    cited = re.search(r"^version: (.+)$", (REPOSITORY / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert cited[1] == PROJECT["version"]


def test_changelogs_begin_with_the_version() -> None:
    debian = (REPOSITORY / "debian/changelog").read_text()
    assert debian.startswith(f"kvmtrace ({PROJECT['version']}) ")
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


def test_constraints_have_a_version_that_fits_for_every_dependency() -> None:
    lines = [line.partition("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    pinned = {canonicalize_name(name): version for name, _, version in lines if version}
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:  # an extra of ours that brings another one
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (text, version)
