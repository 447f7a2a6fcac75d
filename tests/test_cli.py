# SPDX-License-Identifier: Apache-2.0
"""The command line itself: help that is quick, usage errors in one line with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def kvmtrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmtrace", *arguments],
        capture_output=True, text=True, timeout=1200, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['kvmtrace', '--help']\ntry:\n import kvmtrace; kvmtrace.main()\n"
    code += "except SystemExit: pass\n"
    code += "print(sorted({'numpy', 'polars', 'pyarrow', 'rich', 'bcc'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=True)
    assert done.stderr.strip() == "[]"
    assert "record" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("info", "/nonexistent.parquet"), "/nonexistent.parquet"),
        pytest.param(("recover", "/nonexistent.kvmt"), "/nonexistent.kvmt", marks=pytest.mark.slow),
        pytest.param(("info", "/etc/passwd"), "/etc/passwd", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_there_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = kvmtrace(*arguments)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kvmtrace: ")
    assert said in lines[0]


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    done = kvmtrace("info", str(tmp_path / "pipe.parquet"))
    assert done.returncode == 2
    assert "not a file" in done.stderr


@pytest.mark.slow
def test_unknown_verb_and_option_are_usage_errors() -> None:
    assert kvmtrace("replya").returncode == 2
    assert kvmtrace("record", "--fast").returncode == 2
    assert kvmtrace("record", "--duration", "-1").returncode == 2
