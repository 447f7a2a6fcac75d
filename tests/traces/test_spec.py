# SPDX-License-Identifier: Apache-2.0
"""SPEC.md says what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import traces
from tests.traces.making import event, stream, trace
from traces.encoding import MAGIC
from traces.frame import MAX_ROW_GROUP_ROWS
from traces.kernels import Kernel
from traces.metadata import MAX_BYTES
from traces.reader import UNKNOWN_CODE, Trace
from traces.recording.bookkeeping import MAX_ENTRIES, MAX_GAPS
from traces.recording.memslots import MAX_SLOTS
from traces.schema import BY_CODE, COLUMN_TYPES, FORMAT_MAJOR, FORMAT_MINOR, KINDS, NULLABLE, UNKNOWN

SPEC = (Path(traces.__path__[0]) / "SPEC.md").read_text()


def _rows(section: str) -> list[list[str]]:
    """The cells of the table in a numbered section, without its head."""
    text = SPEC.split(f"\n## {section}. ")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_version() -> None:
    assert SPEC.startswith(f"# The kvmtrace trace format, version {FORMAT_MAJOR}.{FORMAT_MINOR}\n")


def test_the_table_of_columns() -> None:
    assert [(name, kind, null) for name, kind, null, _ in _rows("4")] == [
        (f"`{name}`", "dictionary of strings" if kind == "kind" else kind, "yes" if name in NULLABLE else "no")
        for name, kind in COLUMN_TYPES.items()
    ]


def test_the_table_of_kinds() -> None:
    assert _rows("5") == [
        [
            str(kind.code),
            f"`{kind.name}`",
            kind.meaning,
            ", ".join(f"`{column}`" for column in kind.columns),
            ", ".join(f"{bit}: {flag}" for bit, flag in enumerate(kind.flags) if flag),
        ]
        for kind in KINDS
    ]


def test_the_numbers() -> None:
    for number in (MAX_ROW_GROUP_ROWS, MAX_ENTRIES, MAX_GAPS, MAX_SLOTS):
        assert f"{number:,}" in SPEC
    assert f"{MAX_BYTES >> 20} MiB" in SPEC
    assert f"`{MAGIC.decode()}`" in SPEC
    assert UNKNOWN_CODE not in BY_CODE
    assert f"Code {UNKNOWN_CODE} is no kind" in SPEC
    assert UNKNOWN not in {kind.name for kind in KINDS}


def test_the_metadata_that_is_always_there(tmp_path: Path) -> None:
    trace(tmp_path / "a.parquet", stream([event("kvm_entry")]))
    promised = re.findall(r"`(\w+)`", SPEC.split("6.2 ")[1].split("6.3 ")[0])
    assert set(promised) == set(Trace.open(tmp_path / "a.parquet").metadata.raw)


def test_the_kernels_description_is_there_where_the_recording_says_which_it_is(tmp_path: Path) -> None:
    trace(tmp_path / "a.parquet", stream([event("kvm_entry")]), {"host": {"kernel": "6.12.1"}})
    said = Trace.open(tmp_path / "a.parquet").metadata.raw["kernel"]
    assert set(said) == {field.name for field in fields(Kernel)}
    assert "\n6.9 `kernel` (since 1.1)" in SPEC


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_fills_its_columns_and_no_other(tmp_path: Path, kind: object) -> None:
    name = kind.name  # type: ignore[attr-defined]
    fields = {"w0": 11, "w1": 12, "w2": 13, "w3": 14, "n": 15, "role": 16, "level": 1, "as_id": 1, "flags": 3}
    trace(tmp_path / "a.parquet", stream([event(name, root=99, kvm=5, tgid=6, tid=7, cpu=8, **fields)]))
    (row,) = next(iter(Trace.open(tmp_path / "a.parquet").batches())).to_pylist()
    common = {"seq", "time", "vm", "vcpu", "cpu", "tid", "kind"}
    filled = {column for column, value in row.items() if value not in (0, None)} - common
    wanted = set(kind.columns)  # type: ignore[attr-defined]
    assert filled == (wanted if name != "gap" else {"value", "code", "addr"})
    assert np.isin(list(wanted), list(COLUMN_TYPES)).all()
