# SPDX-License-Identifier: Apache-2.0
"""A recording of which kinds of event were left out at times, to cost less: no gate passes on what nobody saw."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from analysis.reading.result_source import Result
from analysis.reading.sources import Recording
from analysis.report_model.figures import figures_of
from tests.analysis.sources import OLD_STORM, STORM
from tests.tracer.test_record_live import run
from tests.traces.hostile import parts, with_metadata
from traces.metadata import KEY
from traces.reader import Trace

pytestmark = pytest.mark.slow


def leaving_out(source: Path, path: Path, begins: float, ends: float | None, *kinds: str) -> Path:
    """A recording that says that kinds were left out of a part of it, as shares of its time."""
    table, file = pq.read_table(source), pq.ParquetFile(source)
    first, last = Trace.open(source).metadata.span
    raw = json.loads(file.metadata.metadata[KEY])
    until = None if ends is None else int(first + ends * (last - first))
    raw["left_out"] = [
        {"kinds": list(kinds), "since": int(first + begins * (last - first)), "until": until, "level": 1}
    ]
    groups = [file.metadata.row_group(at).num_rows for at in range(file.metadata.num_row_groups)]
    data = with_metadata(table, groups, b"{}")
    starts = [starts_at(pq.read_metadata(io.BytesIO(data)).row_group(at)) for at in range(len(groups))]
    ends_at = len(parts(data)[0])
    for group, start, end in zip(raw["row_groups"], starts, [*starts[1:], ends_at], strict=True):
        group |= {"offset": start, "size": end - start, "crc32": zlib.crc32(data[start:end])}
    path.write_bytes(with_metadata(table, groups, json.dumps(raw).encode()))
    return path


def starts_at(group: Any) -> int:
    columns = [group.column(at) for at in range(group.num_columns)]
    return min(
        column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset for column in columns
    )


def checks(report: Path, *gates: str) -> dict[str, tuple[str, str]]:
    done = run("report", report, "--format", "json", *(word for gate in gates for word in ("--fail-on", gate)))
    (document,) = json.loads(done.stdout)["reports"]
    found = {check["name"]: (check["status"], check["why"]) for check in document["checks"]}
    asked: dict[str, tuple[str, str]] = {}
    for gate in gates:
        (asked[gate],) = [outcome for name, outcome in found.items() if name.split(".")[-1] == gate]
    assert done.returncode == any(status in ("failed", "undecided") for status, _ in asked.values())
    return asked


GATES = ("fidelity < 1", "own_policy_mismatch > 0", "refaults > 100000", "roots_created > 100000", "faults > 100000")


def test_what_would_pass_is_undecided_and_says_why(tmp_path: Path) -> None:
    """These pass on the recording that left out nothing."""
    assert {status for status, _ in checks(OLD_STORM, *GATES).values()} == {"passed"}
    part = leaving_out(OLD_STORM, tmp_path / "part.parquet", 0.5, 0.7, "kvm_page_fault", "mmu_load", "kvm_entry")
    found = checks(part, *GATES)
    assert {gate: status for gate, (status, _) in found.items()} == dict.fromkeys(GATES, "undecided")
    assert "the recorder left out kinds of event, to cost less; validated up to there" in found["fidelity < 1"][1]
    assert "left out kinds of event" in found["own_policy_mismatch > 0"][1]


def test_what_is_certain_fails_all_the_same(tmp_path: Path) -> None:
    part = leaving_out(OLD_STORM, tmp_path / "part.parquet", 0.5, None, "kvm_page_fault", "mmu_load", "kvm_entry")
    assert checks(part, "refaults > 100")["refaults > 100"][0] == "failed", "that many there were without the rest"


def test_a_result_alone_says_so_as_well(tmp_path: Path) -> None:
    part = leaving_out(STORM, tmp_path / "part.parquet", 0.5, 0.7, "kvm_page_fault", "mmu_load")
    out = tmp_path / "result.parquet"
    assert run("replay", part, "-o", out).returncode == 0
    part.unlink()
    assert "the recorder left out 2 kinds of event" in run("report", out).stdout.splitlines()[0]
    found = checks(out, "own_policy_mismatch > 0", "refaults > 100000")
    assert {status for status, _ in found.values()} == {"undecided"}


def test_a_stretch_before_a_vm_is_not_its_own(tmp_path: Path) -> None:
    """What was left out while a VM was not there yet says nothing of it."""
    two = STORM.with_name("churn-6.1.parquet")
    part = leaving_out(two, tmp_path / "part.parquet", 0.0, 0.2, "kvm_page_fault")
    out = tmp_path / "result.parquet"
    assert run("replay", part, "-o", out).returncode == 0
    result = Result.open(out)
    agreements: list[Any] = [each.agreement.value for each in result.agreements]
    assert (agreements[0], agreements[-1]) == ("open", "agrees")
    figures = figures_of(Recording.open(part), result, "not done")
    assert figures.whole["own_policy_mismatch"] == (0, agreements.count("open"))
