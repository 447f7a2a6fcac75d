# SPDX-License-Identifier: Apache-2.0
"""Mutated results and odd traces: read, or one line that says what is wrong; never a traceback, a hang or a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.analysis.hostile import FORGED
from tests.analysis.sources import OLD_STORM, ROOT, STORM, result_of
from tests.traces.forged import File

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "count"), [("bytes", 60), ("values", 24), ("schema", 24)], ids=str)
def test_mutated_results(tmp_path: Path, kind: str, count: int) -> None:
    run(result_of(STORM, tmp_path).path, kind, count, tmp_path)


@pytest.mark.parametrize("kind", FORGED)
def test_forged_results(tmp_path: Path, kind: str) -> None:
    run(result_of(STORM, tmp_path).path, kind, 40, tmp_path, refuses=kind != "statistics")


def test_a_result_that_is_taken_apart_is_put_together_the_same(tmp_path: Path) -> None:
    path = result_of(STORM, tmp_path).path
    again = tmp_path / "again.parquet"
    again.write_bytes(File(path.read_bytes()).written())
    assert pq.read_table(again).equals(pq.read_table(path))


def test_traces_with_odd_metadata(tmp_path: Path) -> None:
    run(OLD_STORM, "trace", 80, tmp_path)


def run(seed: Path, kind: str, count: int, tmp_path: Path, *, refuses: bool = True) -> None:
    command = [sys.executable, "-m", "tests.analysis.hostile", str(seed), kind, "0", str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    outcomes = [line["outcome"] for line in lines[1::2]]
    assert len(outcomes) == count
    problems = [one for one in outcomes if one != "read"]
    assert bool(problems) == refuses
    for one in problems:
        assert one.isprintable(), one
        assert "mutant.parquet" in one
