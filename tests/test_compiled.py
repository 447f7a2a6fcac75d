# SPDX-License-Identifier: Apache-2.0
"""Compiled code computes in C's numbers: of a literal above 31 bits Cython makes Python's, a hundred times slower."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = re.findall(r'^    "([a-z_/]+\.py)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
LARGEST = (1 << 31) - 1


def literals(source: str) -> Iterator[tuple[int, int]]:
    """(line, value) of each literal above 31 bits that a function computes with; assigned as it is, one becomes C's."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            whole = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Assign | ast.AnnAssign)}
            for node in ast.walk(function):
                number = node.value if isinstance(node, ast.Constant) and id(node) not in whole else None
                if isinstance(number, int) and number > LARGEST:
                    yield node.lineno, number


def test_all_that_is_compiled_is_known() -> None:
    assert len(COMPILED) > 10
    assert all((ROOT / path).exists() for path in COMPILED)


@pytest.mark.parametrize("path", COMPILED)
def test_no_literal_is_pythons_number(path: str) -> None:
    found = [f"{path}:{line}: {value:#x}" for line, value in literals((ROOT / path).read_text())]
    assert not found, "declare it: _MASK = cython.declare(cython.ulonglong, ...)"


def test_a_literal_in_a_computation_is_found() -> None:
    assert list(literals("def f(x):\n    return x & 0xFFFFFFFF\n")) == [(2, 0xFFFFFFFF)]
    assert not list(literals("M = 0xFFFFFFFF\ndef f(x):\n    y: int = 0xFFFFFFFF\n    return x & M & 0x7FFFFFFF\n"))
