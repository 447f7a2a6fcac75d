# SPDX-License-Identifier: Apache-2.0
"""Small recordings for the tests of the format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests import streams
from traces.record import RECORD
from traces.recording.compact import compact
from traces.recording.recording_summary import Summary
from traces.recording.segment_writer import SegmentWriter
from traces.recording.segments import SegmentReader
from traces.schema import BY_NAME

KVM_A, KVM_B = 0xFFFF888100000000, 0xFFFF888100010000


def numbered(count: int, first: int = 0) -> np.ndarray[Any, Any]:
    """Records that carry their own number in `time` and `w0`."""
    records = np.zeros(count, RECORD)
    records["time"] = records["w0"] = np.arange(first, first + count)
    records["kind"] = BY_NAME["kvm_mmu_zap_all_fast"].code
    records["vcpu"] = -1
    return records


def event(kind: str, **fields: Any) -> np.ndarray[Any, Any]:
    """One record; fields not given are 0, `vcpu` is -1."""
    record = np.zeros(1, RECORD)
    record["kind"] = BY_NAME[kind].code
    record["vcpu"] = -1
    for name, value in fields.items():
        record[name] = value
    return record


def stream(events: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Single records as one stream, a microsecond apart."""
    records = np.concatenate(list(events))
    records["time"] = 1_000 * np.arange(1, len(records) + 1)
    return records


def write(directory: Path, records: np.ndarray[Any, Any], manifest: dict[str, Any] | None = None) -> Path:
    """A recording that ended cleanly and lost nothing; its directory."""
    writer = SegmentWriter(directory, manifest or {})
    writer.write(records)
    writer.close({"loss": streams.loss_table(records)})
    return directory


def trace(path: Path, records: np.ndarray[Any, Any], manifest: dict[str, Any] | None = None) -> Summary:
    return compact(write(path.with_suffix(".kvmt"), records, manifest), path)


def numbers_read(directory: Path) -> list[int]:
    """The `w0` of all rows that a recording's directory still yields, in order."""
    return [int(number) for _, columns in SegmentReader(directory).batches() for number in columns["w0"]]
