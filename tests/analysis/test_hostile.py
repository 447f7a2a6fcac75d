"""Mutated results and odd traces: read, or one line that says what is wrong; never a traceback, a hang or a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.sources import OLD_STORM, ROOT, STORM, result_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "count"), [("bytes", 60), ("metadata", 60), ("values", 24), ("schema", 24)], ids=str)
def test_mutated_results(tmp_path: Path, kind: str, count: int) -> None:
    run(result_of(STORM, tmp_path).path, kind, count, tmp_path)


def test_traces_with_odd_metadata(tmp_path: Path) -> None:
    run(OLD_STORM, "trace", 80, tmp_path)


def run(seed: Path, kind: str, count: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.analysis.hostile", str(seed), kind, "0", str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    outcomes = [line["outcome"] for line in lines[1::2]]
    assert len(outcomes) == count
    problems = [one for one in outcomes if one != "read"]
    assert problems
    for one in problems:
        assert one.isprintable(), one
        assert "mutant.parquet" in one
