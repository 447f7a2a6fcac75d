# SPDX-License-Identifier: Apache-2.0
"""Probes that a lab's guest has compiled serve until something changes that they are made from."""

from __future__ import annotations

import ast
from pathlib import Path

from tracer.lab import prebuilt


def imports(path: Path) -> set[Path]:
    """The recorder's modules that a module imports, as files."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    files = {prebuilt.ROOT / f"{name.replace('.', '/')}.py" for name in named if name.startswith("tracer.")}
    return {file for file in files if file.is_file()}


def test_a_change_of_any_module_that_makes_probes_has_them_compiled_anew() -> None:
    sources = {path for part in prebuilt._SOURCES for path in prebuilt.ROOT.glob(part)}
    assert all([*prebuilt.ROOT.glob(part)] for part in prebuilt._SOURCES)
    wanted, found = {prebuilt.ROOT / "tracer/recorder.py"}, set[Path]()
    while wanted:
        found |= wanted
        wanted = {file for path in wanted for file in imports(path)} - found
    assert len(found) > 15
    assert found <= sources
