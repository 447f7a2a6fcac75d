# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace diff`: compares two recordings or results, vCPU by vCPU and phase by phase, the largest cost first.

A recording is replayed under its own policy (or the one asked for), so that both sides are results. VMs are matched as
asked for, else by name, else in order of their ids; vCPUs are matched by their ids. A phase is a tenth of a vCPU's
guest work, which no root policy changes if both sides ran the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from analysis.machines import changed, unlike
from analysis.queries import recorded, replayed
from analysis.reading.matched import MatchedVms, VmsOfSide
from analysis.reading.result_source import Result
from analysis.reading.sources import Recording, open_source
from analysis.report_model.assemble import ROWS
from analysis.report_model.report import Report
from analysis.report_model.report_table import Column, ReportTable
from analysis.report_model.units import Unit, span
from analysis.reporting import recording_of, replayed_under
from replay.decode.capabilities import Capabilities
from replay.result import SPENT
from traces.errors import Problem
from traces.selection import ALL, Selection
from traces.text import printable, some

PHASES: Final = 10
_COUNTS: Final = (*replayed.COUNTS, "roots_peak", "tables_peak")
_SAID: Final = {"roots_created": "roots", "faults": "faults", "refaults": "re-faults"}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a result, the policy of it to compare, and the recording where it is at hand."""

    path: Path
    result: Result
    policy: str
    recording: Recording | None
    vms: VmsOfSide
    vcpus: Sequence[int] = ()  # the vCPUs to compare; empty: all

    @property
    def name(self) -> str:
        return printable(f"{self.path} ({self.policy})")


def opened(
    path: Path, policy: str, scratch: Path, remarks: list[str], recorded_policy: str = "", selection: Selection = ALL
) -> Side:
    """Open one side, or what is selected of it; a recording is replayed into `scratch`.

    What a reader of the report must know is appended to `remarks`. Raises Problem where the policy to compare is
    ambiguous or missing.
    """
    source = open_source(path, recorded_policy, selection)
    recording: Recording | None
    if isinstance(source, Recording):
        recording, result = source, replayed_under(source, (policy or Capabilities(source.trace).own.name,), scratch)
    else:
        recording, result = recording_of(source, remarks, selection), source
    names = [each.name for each in result.policies]
    own = next((each.name for each in result.policies if each.recorded), names[0] if len(names) == 1 else "")
    if (policy or own) not in names:
        what = f"no policy {policy}" if policy else "it has no recorded policy: say which with --policy"
        raise Problem(f"{path}: {what}; there are {printable(', '.join(names))}")
    ids = result.scan().select(pl.col("vm").drop_nulls().unique().sort()).collect(engine="streaming")["vm"].to_list()
    return Side(
        path, result, policy or own, recording, VmsOfSide(ids, selection.vms, recording), tuple(selection.vcpus)
    )


def times(base: Side, new: Side) -> pl.LazyFrame:
    """Return each vCPU's ns by category and their changes, the largest first; `what` is `wall` for all its time."""
    names, matched = ("wall_ns", *SPENT), MatchedVms.of(base.vms, new.vms)

    def of(side: Side) -> pl.LazyFrame:
        rows = _of_vcpus(replayed.vcpus(side.result).filter(pl.col("wall_ns").is_not_null()), side, matched)
        return _long(rows, ["vm", "vcpu"], names).with_columns(pl.col("what").str.strip_suffix("_ns"))

    return _compared(of(base), of(new), ["vm", "vcpu", "what"])


def counts(base: Side, new: Side) -> pl.LazyFrame:
    """Return the counts over all VMs that differ between the sides, and their changes, the largest first."""

    def of(side: Side) -> pl.LazyFrame:
        rows = replayed.policies(side.result).filter(pl.col("policy") == side.policy)
        ends = [
            rows.select(what=pl.lit(name), low=pl.col(f"{name}_low"), high=pl.col(f"{name}_high")) for name in _COUNTS
        ]
        return pl.concat(ends)

    return _compared(of(base), of(new), ["what"])


def phases(base: Side, new: Side) -> pl.LazyFrame:
    """Return the ns that each vCPU took for each tenth of its guest work, and the changes, the largest first."""
    matched = MatchedVms.of(base.vms, new.vms)
    return _compared(_tenths(base, matched), _tenths(new, matched), ["vm", "vcpu", "phase"])


def causes(base: Side, new: Side) -> pl.LazyFrame:
    """Return the number of roots freed by each cause, and the changes, the largest first."""

    def of(side: Side) -> pl.LazyFrame:
        rows = replayed.causes(side.result).filter(pl.col("policy") == side.policy)
        return rows.select("cause", low="freed_low", high="freed_high")

    return _compared(of(base), of(new), ["cause"], missing=0)


def events(base: Side, new: Side) -> pl.LazyFrame:
    """Return the number of events of each kind, null where it was not watched, and the changes, the largest first."""

    def of(side: Side) -> pl.LazyFrame:
        if side.recording is None:
            raise Problem(f"{side.path}: query kinds: the recording is not at hand")
        count = pl.when("watched").then(pl.col("events"))
        return recorded.kinds(side.recording).select("kind", low=count, high=count)

    return _compared(of(base), of(new), ["kind"])


def compare(base: Side, new: Side, *, mark: bool, remarks: Sequence[str] = ()) -> Report:
    """Return the report of a comparison; each of its tables compares rows of the query that it names.

    Raises Problem for recordings of unlike machines, unless `mark` is set: then the differences are reported.
    """
    apart = list(unlike(base.recording, new.recording))
    if apart and not mark:
        raise Problem(f"{base.path} and {new.path}: unlike: {'; '.join(apart)} (--unlike compares them all the same)")
    matched = MatchedVms.of(base.vms, new.vms)
    how = f"{_how(base, new)}, vCPUs by id, phases by tenths of guest work: holds if both ran the same program"
    trust = [
        *(("unlike", f"{line}: times are not comparable") for line in apart),
        *changed(base.recording, new.recording),
        *(("note", remark) for remark in remarks),
        *(("no times", f"the replay of {side.path} has none") for side in (base, new) if not side.result.timed),
        *(("undecided", line) for line in _assumed(base, new)),
        *(("no times", line) for side in (base, new) for line in _without_times(side)),
        *(("matched", line) for line in (how, *matched.lines())),
    ]
    return Report(
        title=f"{base.name} against {new.name}",
        verdict=tuple(map(printable, _verdict(base, new, matched))),
        trust=tuple((name, printable(text)) for name, text in trust),
        tables=tuple(_tables(base, new, matched)),
    )


def _of_vcpus(rows: pl.LazyFrame, side: Side, matched: MatchedVms) -> pl.LazyFrame:
    """Return a side's rows under its policy, of VMs that both sides have, with the VM ids of the first side."""
    numbers = matched.numbers(side.vms)
    mine = rows.filter(pl.col("policy") == side.policy, pl.col("vm").is_in(list(numbers)))
    mine = mine.filter(pl.col("vcpu").is_in(list(side.vcpus))) if side.vcpus else mine
    return mine.with_columns(vm=pl.col("vm").replace_strict(numbers, return_dtype=pl.Int64))


def _long(rows: pl.LazyFrame, keys: list[str], names: Sequence[str]) -> pl.LazyFrame:
    """Turn columns into rows; `low` and `high` are the least and the greatest value over the bounds."""
    ends = rows.unpivot(on=list(names), index=keys, variable_name="what", value_name="value")
    return ends.group_by(*keys, "what").agg(low=pl.col("value").min(), high=pl.col("value").max())


def _compared(base: pl.LazyFrame, new: pl.LazyFrame, keys: list[str], missing: int | None = None) -> pl.LazyFrame:
    names = ("base_low", "base_high", "new_low", "new_high")
    both = base.select(*keys, base_low="low", base_high="high").join(
        new.select(*keys, new_low="low", new_high="high"), on=keys, how="full", coalesce=True
    )
    if missing is not None:
        both = both.with_columns(pl.col(names).fill_null(missing))
    change = both.with_columns(
        change_low=pl.col("new_low") - pl.col("base_high"), change_high=pl.col("new_high") - pl.col("base_low")
    )
    size = pl.max_horizontal(pl.col("change_low").abs(), pl.col("change_high").abs())
    differs = (size > 0) | size.is_null() & pl.any_horizontal(pl.col(names).is_not_null())
    return change.filter(differs).sort(size, *keys, descending=[True, *[False] * len(keys)], nulls_last=True)


def _tenths(side: Side, matched: MatchedVms) -> pl.LazyFrame:
    """Return the ns of each tenth of a vCPU's guest work, interpolated linearly between its rows of progress.

    A vCPU with fewer rows of progress than tenths is left out: its tenths would be of unequal work.
    """
    rows = _of_vcpus(replayed.progress(side.result), side, matched)
    found = []
    seen = rows.select("vm", "vcpu", "bound", "guest_ns", "clock").drop_nulls().collect(engine="streaming")
    for (vm, vcpu, _), one in seen.group_by("vm", "vcpu", "bound", maintain_order=True):
        moments = one.sort("clock")
        guest, clock = (moments[name].to_numpy() for name in ("guest_ns", "clock"))
        if len(guest) >= PHASES:
            ends = np.interp(guest[-1] * np.arange(1, PHASES + 1) / PHASES, guest, clock).round().astype(np.int64)
            ends[-1] = clock[-1]
            found += [(vm, vcpu, phase, ns) for phase, ns in enumerate(np.diff(ends, prepend=0).tolist(), 1)]
    schema = {"vm": pl.Int64, "vcpu": pl.Int16, "phase": pl.Int64, "ns": pl.Int64}
    lengths = pl.LazyFrame(found, schema=schema, orient="row")
    return lengths.group_by("vm", "vcpu", "phase").agg(low=pl.col("ns").min(), high=pl.col("ns").max())


def _assumed(base: Side, new: Side) -> Iterator[str]:
    for name, side in (("base", base), ("new", new)):
        for policy in side.result.policies:
            if policy.name == side.policy:
                yield from (f"{name}: {line} ({policy.given(side.result.refault)})" for line in policy.open)
    if base.result.refault != new.result.refault:
        yield f"other assumptions: --refault {base.result.refault or '(none)'} against {new.result.refault or '(none)'}"


def _how(base: Side, new: Side) -> str:
    if base.vms.chosen and new.vms.chosen:
        return "VMs as asked for"
    return "VMs by name, others in order" if base.vms.named().keys() & new.vms.named().keys() else "VMs in order"


def _without_times(side: Side) -> Iterator[str]:
    """Yield a line for each reason why VMs have no times in a replay; their counts are compared."""
    by_why: dict[str, list[str]] = {}
    for vm in side.result.vms:
        if vm.refused:
            by_why.setdefault(vm.refused, []).append(side.vms.name(vm.vm))
    yield from (f"{some(names)} of {side.path}: {why}" for why, names in by_why.items())


def _verdict(base: Side, new: Side, matched: MatchedVms) -> Iterator[str]:
    for side in (base, new):
        yield from (line.replace(": ", f": {side.path}: ", 1) for line in side.result.untrusted[:1])
    rows = times(base, new).filter(pl.col("what") == "wall").head(1).collect(engine="streaming")
    for row in rows.drop_nulls().iter_rows(named=True):
        least, most = row["new_low"] / max(row["base_high"], 1), row["new_high"] / max(row["base_low"], 1)
        mine, theirs = (span(row[f"{side}_low"], row[f"{side}_high"], Unit.NS) for side in ("base", "new"))
        who = matched.vcpu(row["vm"], row["vcpu"])
        text = f"{who} takes {span(least, most, Unit.RATIO)} the time: {mine}, then {theirs}"
        bands = [_band(side, matched, row["vm"], row["vcpu"]) for side in (base, new)]
        within = bands[0][0] <= bands[1][1] and bands[1][0] <= bands[0][1]
        yield text + (", a difference within the error of the two" if within else "")
    found = {row["what"]: row for row in counts(base, new).collect(engine="streaming").iter_rows(named=True)}
    said = [
        f"{title} {span(row['base_low'], row['base_high'], Unit.COUNT)}, then "
        f"{span(row['new_low'], row['new_high'], Unit.COUNT)}"
        for name, title in _SAID.items()
        if name in found
        for row in (found[name],)
    ]
    yield "; ".join(said) if said else "no difference in roots, faults and re-faults"


def _band(side: Side, matched: MatchedVms, vm: int, vcpu: int) -> tuple[int, int]:
    rows = _of_vcpus(replayed.vcpus(side.result), side, matched)
    mine = rows.filter(pl.col("vm") == vm, pl.col("vcpu") == vcpu)
    low, high = (
        mine.select(pl.col("wall_low_ns").min(), pl.col("wall_high_ns").max()).collect(engine="streaming").row(0)
    )
    return low or 0, high or 0


def _tables(base: Side, new: Side, matched: MatchedVms) -> Iterator[ReportTable]:
    several = len(matched.pairs) > 1 and any(matched.process(vm) for vm, _ in matched.pairs)
    process = (Column("process", "process", Unit.TEXT, wide=1),) if several else ()
    vcpu = (Column("vm", "VM", Unit.ID), Column("vcpu", "vCPU", Unit.ID))
    what = Column("what", "what", Unit.TEXT)
    tenth, cause, kind = (
        Column("phase", "tenth", Unit.ID),
        Column("cause", "by", Unit.TEXT),
        Column("kind", "kind", Unit.TEXT),
    )
    asked: list[tuple[Callable[[Side, Side], pl.LazyFrame], str, str, tuple[Column, ...], Unit, int, str]] = [
        (times, "vcpus", "Time by category", (vcpu[0], *process, vcpu[1], what), Unit.NS, 8, ""),
        (
            phases,
            "progress",
            "Time, by tenths of guest work",
            (vcpu[0], *process, vcpu[1], tenth),
            Unit.NS,
            4,
            "of vCPUs seen at least ten times, a ms or more apart",
        ),
        (counts, "policies", "Counts", (what,), Unit.COUNT, 6, ""),
        (causes, "causes", "Roots freed", (cause,), Unit.COUNT, 4, ""),
        (events, "kinds", "Events recorded", (kind,), Unit.COUNT, 4, ""),
    ]
    for function, query, title, keys, unit, first, note in asked:
        try:
            frame = function(base, new).head(ROWS + 1).collect(engine="streaming")
        except Problem:
            continue  # without its recording a result has no events
        if several and "vm" in frame.columns:
            frame = frame.with_columns(pl.Series("process", [matched.process(vm) for vm in frame["vm"]], pl.String))
        values = [
            Column(f"{name}_low", name, unit, high=f"{name}_high", signed=name == "change")
            for name in ("base", "new", "change")
        ]  # fmt: skip
        yield ReportTable(
            query,
            title,
            (*keys, *values),
            frame.head(ROWS),
            note,
            first=first,
            more=len(frame) > ROWS,
        )
