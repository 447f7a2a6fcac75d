# SPDX-License-Identifier: Apache-2.0
"""Files of released versions read as they did when they were made."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tests.golden.make import HERE, content, records
from tests.traces.reference import row
from traces.schema import FORMAT_MAJOR, FORMAT_MINOR

GOLDEN = sorted(HERE.glob("trace-*.parquet"))


def test_there_is_one_of_this_version() -> None:
    assert HERE / f"trace-{FORMAT_MAJOR}.{FORMAT_MINOR}.parquet" in GOLDEN


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_it_reads_the_same(path: Path) -> None:
    assert json.loads(json.dumps(content(path))) == json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_polars_reads_the_same_rows(path: Path) -> None:
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert pl.scan_parquet(path).sort("seq").collect().to_dicts() == rows


def test_what_is_expected_is_right() -> None:
    rows = json.loads((HERE / f"trace-{FORMAT_MAJOR}.{FORMAT_MINOR}.json").read_text())["rows"]
    assert [{name: value for name, value in found.items() if name not in ("vm", "root")} for found in rows] == [
        row(record, seq) for seq, record in enumerate(records())
    ]
