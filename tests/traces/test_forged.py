# SPDX-License-Identifier: Apache-2.0
"""Forged traces and recordings whose checksums fit: the right rows or one line; no abort, hang or traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import CORPUS
from tests.thinned import thinned
from tests.traces.forged import KINDS, File, rows_of, through_verbs

ROOT = Path(__file__).parents[2]


def test_what_is_taken_apart_is_put_together_the_same(seed: Path, tmp_path: Path) -> None:
    for path in (seed, CORPUS / "huge-6.1.parquet"):
        (tmp_path / "again.parquet").write_bytes(File(path.read_bytes()).written())
        assert rows_of(tmp_path / "again.parquet") == rows_of(path)


def outcomes(seed: Path, kind: str, first: int, count: int, scratch: Path, *more: str) -> list[str]:
    """What became of each; the process that read them ended well and stayed small."""
    command = [
        sys.executable,
        "-m",
        "tests.traces.forged",
        str(seed),
        kind,
        str(first),
        str(count),
        str(scratch),
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    assert lines[-1]["peak"] < 1 << 30
    assert [line["mutant"] for line in lines[:-1:2]] == list(range(first, first + count))
    found = [line["outcome"] for line in lines[1:-1:2]]
    for one in found:
        assert one in ("read", "other rows") or ("forged.parquet: " in one and one.isprintable()), one
    return found


def check(kind: str, found: list[str]) -> None:
    refused = [one for one in found if one not in ("read", "other rows")]
    if kind == "statistics":
        assert set(found) == {"read"}, "statistics are not believed"
    elif kind == "deep":
        assert len(refused) == len(found)
    elif kind == "rows":
        assert not refused, "each is a sound file"
    elif kind != "segments":
        assert len(refused) > len(found) // 8, "the forgeries must bite"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "segments"])
def test_some_of_each_kind(kind: str, seed: Path, tmp_path: Path) -> None:
    check(kind, outcomes(seed, kind, 0, 30, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "segments"])
def test_many_of_each_kind(kind: str, seed: Path, tmp_path: Path) -> None:
    check(kind, outcomes(seed, kind, 30, 400, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "json", "payloads", "footer"])
def test_verbs_answer_or_say_why_not(kind: str, tmp_path: Path) -> None:
    assert "read" in outcomes(CORPUS / "huge-6.1.parquet", kind, 0, 25, tmp_path, "verbs")


@pytest.mark.parametrize(
    "odd",
    thinned(4, [
        {"cut": {"rows_missing": {}}}, {"cut": []}, {"cut": {"rows_missing": "x"}}, {"layout": {"missing": 5}},
        {"layout": []}, {"modules": {"kvm": {"tdp_mmu": []}}}, {"modules": 5}, {"missed": {"mmu_load": []}},
        {"gaps": [{}]}, {"gaps": [{"since": "x", "until": 0}]}, {"host": []}, {"preset": {"a": "\x1b[31m"}},
    ]),
    ids=str,
)  # fmt: skip
def test_metadata_of_other_types_is_answered_or_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    file = File((CORPUS / "huge-6.1.parquet").read_bytes())
    file.metadata |= odd
    path = tmp_path / "forged.parquet"
    path.write_bytes(file.written())
    verbs = ["info {0}", "validate {0}", "replay {0} --no-time", "report {0} --no-replay"]
    assert through_verbs(path, verbs) == "read" or "gaps" in odd
