# SPDX-License-Identifier: Apache-2.0
"""Assemble the report of a recording, a result, or both: which queries it has, and how their columns are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import polars as pl

from analysis.queries import by_vm, exit_times, guest_tasks, leaves, mapped_pages, recorded, removed, replayed
from analysis.queries.registry import Query, unanswered
from analysis.reading.result_source import Result, ResultPolicy
from analysis.reading.sources import Recording
from analysis.report_model import verdict as sentences
from analysis.report_model.figures import Figures, figures_of
from analysis.report_model.report import Check, Report, Status
from analysis.report_model.report_table import Column, ReportTable
from analysis.report_model.trust import loss, trust
from analysis.report_model.units import Unit
from analysis.report_model.validation import Validated
from replay.run import PROMISED
from traces import kernels
from traces.errors import Problem
from traces.text import printable
from traces.vm_names import VmNames

ROWS: Final = 20  # rows of each table, in formats with room for them
_MOST_VMS: Final = 10_000  # rows in the table of all VMs
_GUEST_IN_IT: Final = "no entry can be seen: the guest's own time is in it"
_VMS_TITLE: Final = "VMs, the worst first"


def _interval(name: str, title: str, unit: Unit = Unit.COUNT, *, wide: int = 0) -> Column:
    return Column(f"{name}_low", title, unit, high=f"{name}_high", wide=wide)


_POLICY: Final = Column("policy", "policy", Unit.TEXT)
_VM: Final = Column("vm", "VM", Unit.ID)
_SYMBOL: Final = Column("symbol", "symbol", Unit.TEXT)
_PROCESS: Final = Column("process", "process", Unit.TEXT, wide=2)
_VCPU: Final = Column("vcpu", "vCPU", Unit.ID)
_SLOT: Final = Column("slot", "slot", Unit.ID)
_FIRST: Final = Column("first_time", "from, s", Unit.BOOT, wide=1)
_LAST: Final = Column("last_time", "to, s", Unit.BOOT, wide=1)

_POLICIES: Final = (
    _POLICY,
    Column("recorded", "recorded", Unit.FLAG, wide=2),
    _interval("wall_ns", "time", Unit.NS),
    _interval("band_ns", "band", Unit.NS, wide=2),
    _interval("stall_share", "stalled", Unit.SHARE),
    _interval("longest_stall_ns", "longest", Unit.NS),
    _interval("roots_created", "roots"),
    _interval("faults", "faults"),
    _interval("refaults", "re-faults"),
    _interval("fixes", "fixes", wide=1),
    _interval("tables_built", "tables", wide=2),
    _interval("memory_bytes", "held", Unit.BYTES, wide=1),
)
_CAUSES: Final = (
    _POLICY,
    Column("cause", "freed by", Unit.TEXT),
    _interval("freed", "roots"),
    _interval("leaves", "leaves lost"),
    _interval("tables", "tables lost"),
)
_WINDOWS: Final = (
    _VM,
    _VCPU,
    Column("time", "boot time, s", Unit.BOOT),
    Column("since_ns", "after", Unit.NS, wide=2),
    Column("length_ns", "length", Unit.NS, wide=2),
    Column("guest_share", "in guest", Unit.SHARE),
    Column("exits", "exits", wide=1),
    Column("faults", "faults"),
    Column("fixes", "fixes", wide=1),
    Column("smis", "SMIs"),
    Column("loads", "loads"),
)
_STALLS: Final = (
    _POLICY,
    Column("bound", "bound", Unit.TEXT, wide=1),
    _VM,
    _VCPU,
    Column("clock", "after", Unit.NS),
    Column("wall_ns", "length", Unit.NS),
    Column("cause", "slots emptied by", Unit.TEXT),
    Column("fault_ns", "on faults", Unit.NS, wide=1),
    Column("load_ns", "on loads", Unit.NS, wide=1),
)
_STUCK: Final = (
    _VM,
    _VCPU,
    Column("rip", "RIP", Unit.HEX),
    Column("exits", "exits"),
    Column("since", "from, s", Unit.BOOT),
    Column("until", "to, s", Unit.BOOT, wide=1),
    Column("why", "why", Unit.TEXT, wide=1),
)
_STUCK_ROWS: Final = (_VM, _VCPU, Column("row", "event", Unit.TEXT))
_GFNS: Final = (_VM, _SLOT, Column("gfn", "gfn", Unit.HEX), Column("level", "level", Unit.ID),
                Column("installs", "installs"), _FIRST, _LAST)  # fmt: skip
_REGIONS: Final = (
    _VM, _SLOT, Column("region", "gfn", Unit.HEX), Column("pages", "pages"), Column("installs", "installs"),
    Column("per_page", "a page", Unit.RATIO), _FIRST, _LAST,
)  # fmt: skip
_UNSERVED: Final = (
    _VM, _VCPU, Column("gfn", "gfn", Unit.HEX), _SLOT, Column("faults", "faults"), Column("served", "served"),
    Column("unserved", "unserved"), Column("why", "why", Unit.TEXT, wide=1), replace(_FIRST, wide=2),
    replace(_LAST, wide=2),
)  # fmt: skip
_ROLES: Final = (
    _VM, Column("role", "role", Unit.HEX), Column("roots", "roots"), Column("median_life_ns", "median life", Unit.NS),
    Column("longest_life_ns", "longest", Unit.NS), Column("loads", "loads"), Column("faults", "faults"),
)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One table of a report: the query, its columns, and how many of its rows are shown.

    `first` is the number of rows on a first screen (plain text), `rows` the number in formats with more room. The table
    is left out where the query has fewer than `least` rows. `note` stands next to the title.
    """

    query: Query[Any]
    title: str
    columns: tuple[Column, ...]
    first: int = 3
    least: int = 0
    note: str = ""
    rows: int = ROWS


_OVERVIEW: Final = (
    _VM,
    replace(_PROCESS, wide=0),
    Column("vcpus", "vCPUs", wide=1),
    Column("time", "from, s", Unit.BOOT, wide=2),
    Column("length_ns", "length", Unit.NS, wide=1),
    Column("guest_share", "in guest", Unit.SHARE),
    Column("exits", "exits", wide=1),
    Column("faults", "faults"),
    Column("fixes", "fixes", wide=2),
    Column("smis", "SMIs", wide=2),
    Column("roots", "roots"),
    Column("note", "note", Unit.TEXT, wide=1),
)
_RANKED: Final = (
    _interval("refill_share", "lost", Unit.SHARE),
    _interval("stalls", "hangs", wide=1),
    _interval("longest_stall_ns", "longest", Unit.NS),
    _interval("refaults", "re-faults", wide=2),
)
_RANKING: Final = (
    _VM, *_RANKED[:3], _interval("roots_created", "roots"), _interval("faults", "faults"), _RANKED[3],
    _interval("fixes", "fixes", wide=2),
)  # fmt: skip


_OF_RESULT: Final = (
    _Part(replayed.policies, "Policies", _POLICIES, first=4),
    _Part(replayed.causes, "Why roots were freed", _CAUSES, first=3),
    _Part(replayed.stalls, "Longest soft-hangs, in virtual time", _STALLS, first=1, least=1),
)
_LASTED: Final = (
    Column("share", "of time", Unit.SHARE),
    Column("p50_ns", "p50", Unit.NS),
    Column("p99_ns", "p99", Unit.NS),
    Column("longest_ns", "longest", Unit.NS),
)
_EXITS: Final = (_VM, Column("reason", "reason", Unit.TEXT), Column("exits", "exits"), *_LASTED)
_RETURNS: Final = (_VM, Column("reason", "reason", Unit.TEXT), Column("returns", "returns"), *_LASTED)
_IOCTLS: Final = (
    _VM, Column("ioctl", "ioctl", Unit.TEXT), Column("calls", "calls"), Column("ns", "in all", Unit.NS), *_LASTED[1:],
)  # fmt: skip
_RIPS: Final = (
    _VM, Column("rip", "RIP", Unit.HEX), Column("faults", "faults"),
    Column("share", "of faults", Unit.SHARE), _FIRST, _LAST,
)  # fmt: skip
_TASKS: Final = (
    _VM, Column("task", "task", Unit.TEXT), Column("pid", "PID", Unit.ID), Column("faults", "faults"),
    Column("share", "of faults", Unit.SHARE), Column("fault_ns", "time", Unit.NS), Column("roots", "roots"),
    Column("vcpus", "vCPUs", wide=1), _FIRST, _LAST,
)  # fmt: skip
_CHANGES: Final = (
    _VM, Column("kind", "event", Unit.TEXT), Column("task", "task", Unit.TEXT), Column("events", "events"),
    _FIRST, _LAST,
)  # fmt: skip
_REFAULTS: Final = (
    _VM, Column("by", "last mapping gone by", Unit.TEXT), Column("task", "task", Unit.TEXT), Column("mapped", "mapped"),
    Column("fixes", "fixes"), Column("share", "of faults", Unit.SHARE),
)  # fmt: skip
_REMOVALS: Final = (
    _VM, Column("by", "by", Unit.TEXT), Column("task", "task", Unit.TEXT), Column("operations", "times"),
    Column("leaves", "leaves"), Column("tables", "tables", wide=1), Column("protected", "protected"),
    Column("aged", "aged", wide=2), Column("low_gfn", "from gfn", Unit.HEX, wide=1),
    Column("high_gfn", "to gfn", Unit.HEX, wide=1), Column("ns", "at least", Unit.NS, wide=1),
    Column("longest_ns", "longest", Unit.NS),
)  # fmt: skip
_TYPES: Final = (
    _VM, Column("type", "type", Unit.TEXT), Column("ignores_pat", "PAT ignored", Unit.FLAG), Column("leaves", "leaves"),
    Column("low_gfn", "from gfn", Unit.HEX), Column("high_gfn", "to gfn", Unit.HEX),
)  # fmt: skip
_OF_RECORDING: Final = (
    _Part(recorded.windows, "Worst windows as recorded", _WINDOWS, first=2),
    _Part(recorded.stuck, "vCPUs that get no further", _STUCK, first=3, least=1),
    _Part(recorded.stuck_rows, "What shows that", _STUCK_ROWS, first=5, least=1),
    _Part(removed.refaults, "Why pages were mapped, or permissions repaired", _REFAULTS, first=3, least=2),
    _Part(removed.removals, "What removed or protected pages", _REMOVALS, first=3, least=1),
    _Part(exit_times.exits, "Exits by reason", _EXITS, first=4),
    _Part(exit_times.user_exits, "Returns to userspace by reason", _RETURNS, first=4, least=1),
    _Part(exit_times.ioctls, "ioctls", _IOCTLS, first=2, least=1),
    _Part(exit_times.changes, "What was done to memory and roots", _CHANGES, first=2, least=1),
    _Part(guest_tasks.guest_tasks, "Guest tasks by the time of their faults", _TASKS, first=5, least=1),
    _Part(exit_times.rips, "Guest RIPs by faults", _RIPS, first=2, least=1),
    _Part(recorded.roles, "Lifetimes of roots as recorded", _ROLES, first=0),
    _Part(mapped_pages.gfns, "Hottest gfns as recorded", _GFNS, first=2),
    _Part(mapped_pages.regions, "Hottest 2 MiB regions as recorded", _REGIONS, first=2),
    _Part(leaves.memory_types, "Memory types of leaves", _TYPES, first=0, least=1),
    _Part(mapped_pages.unserved, "Faults for which nothing was mapped", _UNSERVED, first=2, least=1),
)


def assemble(
    recording: Recording | None,
    result: Result | None,
    validation: Validated | str,
    *,
    remarks: tuple[str, ...] = (),
    drawn: Iterable[Query[Recording]] = (),
    gates: Callable[[Figures], Iterable[Check]] = lambda _: (),
    step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Return the report of one source, or of both a recording and its replay.

    `drawn` are further queries that the report's format makes for its pictures; they share one pass over the rows with
    those of the tables. `gates` turns the report's figures into checks. `step` is called with the name of each query,
    to show progress.
    """
    parts = list(_parts(recording, result))
    if recording is not None:
        step("rows")
        with suppress(Problem):  # where the file is damaged, each query reports that itself
            recording.ask(*(question for query in asked(drawn) for question in query.questions(recording)))
    names = VmNames(recording.metadata) if recording is not None and len(recording.metadata.vms) > 1 else None
    tables: list[ReportTable] = []
    notes = unanswered(recording, (part.query for part, _ in parts)) if recording is not None else []
    for part, source in parts:
        if part.query.lacking(source):
            continue
        step(part.query.name)
        try:
            table = _table(part, source, recording, result, names)
        except Problem as problem:
            notes.append(str(problem).removeprefix(f"{source.path}: "))
            continue
        if len(table.frame) >= part.least:
            tables.append(table)
    notes += recording.notes if recording is not None else []
    figures = figures_of(recording, result, validation)
    path = recording.path if recording is not None else result.path if result is not None else ""
    return Report(
        title=printable(path),
        verdict=tuple(map(printable, sentences.verdict(result, recording))),
        trust=tuple(
            (name, printable(text))
            for name, text in trust(recording, result, validation, tuple(dict.fromkeys((*remarks, *notes))))
        ),
        tables=tuple(tables),
        checks=(*gates(figures), *_invariants(result, validation)),
        figures=figures,
        loss=printable(loss(recording, result)),
        recording=recording,
        result=result,
    )


def asked(drawn: Iterable[Query[Recording]] = ()) -> list[Query[Recording]]:
    """Return the queries that a report makes of a recording, with those that its format makes (`drawn`)."""
    return [by_vm.overview, *(part.query for part in _OF_RECORDING), *drawn]


def _parts(recording: Recording | None, result: Result | None) -> Iterator[tuple[_Part, Recording | Result]]:
    """Yield the tables of a report in their order, each with the source that its query is asked of."""
    if recording is not None:
        found = (*_OVERVIEW[:-1], *(_RANKED if result is not None else ()), _OVERVIEW[-1])
        yield _Part(by_vm.overview, _VMS_TITLE, found, first=8, least=2, rows=_MOST_VMS), recording
    elif result is not None:
        yield _Part(by_vm.ranking, _VMS_TITLE, _RANKING, first=8, least=2, rows=_MOST_VMS), result
    yield from ((part, result) for part in _OF_RESULT if result is not None)
    for part in _OF_RECORDING:
        if recording is None:
            return
        if part.query is leaves.memory_types and not leaves.have_types(recording):
            continue
        if part.query is guest_tasks.guest_tasks and recording.guest is None:
            continue
        blind = part.query is exit_times.user_exits and "kvm_entry" not in recording.kinds
        yield replace(part, note=_GUEST_IN_IT) if blind else part, recording


def _table(
    part: _Part,
    source: Recording | Result,
    recording: Recording | None,
    result: Result | None,
    names: VmNames | None,
) -> ReportTable:
    options: dict[str, Any] = {}
    if part.query is mapped_pages.gfns:
        options["top"] = part.rows + 1
    elif part.query is by_vm.overview:
        options["result"] = result
    rows = part.query(source, **options)
    if recording is not None and recording.window.vcpus and "vcpu" in rows.collect_schema():
        rows = rows.filter(pl.col("vcpu").is_in(list(recording.window.vcpus)))
    frame = rows.head(part.rows + 1).collect(engine="streaming")
    columns = part.columns
    if recording is not None and recording.symbol is not None and "rip" in frame.columns:
        named = pl.col("rip").map_elements(recording.symbol, pl.String).alias("symbol")
        frame = frame.with_columns(named)
        at = next(place for place, column in enumerate(columns) if column.name == "rip") + 1
        columns = (*columns[:at], _SYMBOL, *columns[at:])
    if names is not None and "vm" in frame.columns and "process" not in frame.columns:
        processes = [names.process(vm) for vm in frame["vm"]]
        frame = frame.with_columns(pl.Series("process", processes, pl.String))
        at = columns.index(_VM) + 1
        columns = (*columns[:at], _PROCESS, *columns[at:])
    return ReportTable(
        query=part.query.name, title=part.title, columns=columns, frame=frame.head(part.rows), note=part.note,
        first=part.first, more=len(frame) > part.rows, kept=part.rows > ROWS,
    )  # fmt: skip


def _invariants(result: Result | None, validation: Validated | str) -> Iterator[Check]:
    """Yield the checks that every report has, whatever its gates are; one that fails makes the report fail."""
    for policy in result.policies if result is not None else ():
        broken = [line for line in result.broken if f", {policy.name}: " in line] if result is not None else []
        if broken or _promises(policy):
            status = Status.FAILED if broken else Status.PASSED
            name = f"at most {PROMISED} role words under {policy.name}"
            yield Check("invariant", printable(name), status, printable("; ".join(broken) or "kept"))
    if isinstance(validation, str):
        yield Check("invariant", "responses matched", Status.SKIPPED, validation)
    else:
        yield Check(
            "invariant", "responses matched", Status.PASSED if validation.holds else Status.FAILED, validation.text
        )


def _promises(policy: ResultPolicy) -> bool:
    """Whether the policy bounds the number of roots: it keeps them, and guests control no bit of role words."""
    try:
        return policy.keeps and not kernels.at(policy.kernel).layout.guest_bits
    except Problem:
        return False
