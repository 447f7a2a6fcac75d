# SPDX-License-Identifier: Apache-2.0
"""The tables of a report on a fleet: which sums they show, and how their columns read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import polars as pl

from analysis.fleet.judged import AGREES
from analysis.fleet.outcome import FleetOutcome
from analysis.fleet.outliers import outliers, rate
from analysis.fleet.sums import SECOND, STEPS_NS
from analysis.report_model.report_table import Column, ReportTable
from analysis.report_model.units import Unit
from traces.text import printable

ROWS: Final = 20  # rows of each table, in formats with room for them
AS_RECORDED: Final = "as recorded"
_AGREED: Final = "of VMs whose replay agrees with their rows"
_SHOWN: Final = {1: "1 s", 10: "10 s", 60: "1 min"}
TITLES: Final = {
    "host": "host", "kernel": "kernel", "vendor": "vendor", "preset": "preset", "recorded_policy": "recorded",
    "own_policy": "agreement", "day": "day",
}  # fmt: skip


def _interval(name: str, title: str, unit: Unit = Unit.COUNT, *, wide: int = 0, signed: bool = False) -> Column:
    stem, end = (name[: -len("_ns")], "_ns") if name.endswith("_ns") else (name, "")
    return Column(f"{stem}_low{end}", title, unit, high=f"{stem}_high{end}", wide=wide, signed=signed)


_VMS: Final = Column("vms", "VMs")
_HOURS: Final = Column("vcpu_ns", "vCPU time", Unit.LONG, wide=1)
_HUNG: Final = _interval("hung", "hung")
_STALLED: Final = _interval("stalled_ns", "hung for", Unit.LONG, wide=1)
_RATE: Final = Column("rate", "faults/vCPU h", wide=1)
_GAIN: Final = Column("gain", "gain")
_SAVED: Final = _interval("saved_ns", "saved", Unit.LONG)
_SPARED: Final = _interval("spared", "faults spared", wide=1)
_APART: Final = Column("apart", "apart", wide=1)
_POLICY: Final = Column("policy", "policy", Unit.TEXT)


def policies(found: FleetOutcome, agreement: str = AGREES) -> pl.DataFrame:
    """Return what each policy changes for VMs of this agreement, the most certainly saved time first."""
    rows = [found.under(name, agreement=agreement).with_columns(policy=pl.lit(name)) for name in found.policies]
    if not rows:
        return pl.DataFrame()
    order = pl.concat(rows).with_columns(endless=pl.col("saved_high_ns").is_null())
    return order.sort(
        "saved_low_ns", "endless", "saved_high_ns", "policy", descending=[True, True, True, False], nulls_last=True
    )


def stalls(found: FleetOutcome) -> pl.DataFrame:
    """Return how many VMs whose replay agrees had soft-hangs of each length, as recorded and under each policy."""
    agreed = found.groups.filter(own_policy=AGREES)
    rows = [found.recorded(frame=agreed).with_columns(policy=pl.lit(AS_RECORDED))]
    rows += [found.under(name).with_columns(policy=pl.lit(name)) for name in found.policies]
    return pl.concat(rows)


def groups(found: FleetOutcome, keys: tuple[str, ...], frame: pl.DataFrame, best: str) -> pl.DataFrame:
    """Return the sums as recorded by the columns `keys`, and what the policy `best` changes of them."""
    recorded = found.recorded(*keys, frame=frame).with_columns(
        rate=rate("faults_low").round().cast(pl.Int64, strict=False), vcpu_ns=pl.col("vcpu_ms").cast(pl.Int128) * 10**6
    )
    agreed = found.recorded(*keys, frame=frame.filter(own_policy=AGREES)).select(*keys, agreed="vms")
    change = found.under(best, *keys, frame=frame).select(
        *keys, "gain", "lose", "undecided", "saved_low_ns", "saved_high_ns", "spared_low", "spared_high"
    )
    dropped = ["gain", "lose", "undecided", "saved_low_ns", "saved_high_ns", "spared_low", "spared_high"]
    joined = recorded.drop(dropped).join(agreed, on=keys, how="left", nulls_equal=True, maintain_order="left")
    both = joined.join(change, on=keys, how="left", nulls_equal=True, maintain_order="left")
    return both.with_columns(apart=pl.col("vms") - pl.col("agreed").fill_null(0), gain=pl.col("gain").fill_null(0))


def tables(found: FleetOutcome, best: str) -> Iterator[ReportTable]:
    """Yield all tables, the most important first; `best` is the other policy that saves most, empty for none."""
    order = policies(found)
    yield _table(
        "policies", f"What another policy changes, {_AGREED}",
        (_POLICY, Column("others", "VMs"), _GAIN, Column("lose", "lose"), Column("same", "same"),
         Column("undecided", "undecided"), _SAVED, _SPARED),
        order.filter(pl.col("others") > 0) if len(order) else order, kept=True, first=6,
        note="VMs without an upper end are undecided, and not in the time saved",
    )  # fmt: skip
    steps = [_interval(f"step_{STEPS_NS.index(seconds * SECOND)}", f"from {text}") for seconds, text in _SHOWN.items()]
    longest = _interval("longest_ns", "longest", Unit.NS)
    yield _table(
        "stalls", f"VMs by their longest soft-hang, {_AGREED}",
        (_POLICY, Column("timed", "VMs"), _HUNG, *steps, _STALLED, longest), stalls(found), kept=True, first=6,
    )  # fmt: skip
    if found.failed:
        failed = (Column("tasks", "tasks"), Column("reason", "reason", Unit.TEXT),
                  Column("trace", "first of them", Unit.TEXT, wide=1))  # fmt: skip
        yield _table("failures", "Tasks that failed", failed, found.failures, first=2)
    keys = tuple(Column(name, TITLES[name], Unit.TEXT) for name in found.by)
    columns = (_VMS, _HOURS, _HUNG, _STALLED, _RATE, _GAIN, _SAVED, _SPARED, _APART)
    by = groups(found, found.by, found.groups, best)
    title = f"By {' and '.join(TITLES[name] for name in found.by)}"
    yield _table("groups", title, (*keys, *columns), by, first=8, note=_gain_of(best))
    if best:
        hosts = groups(found, ("host", "kernel", "vendor"), found.hosts, best).filter(pl.col("gain") > 0)
        hosts = hosts.sort("saved_low_ns", "saved_high_ns", "host", descending=[True, True, False], nulls_last=True)
        host, kernel = Column("host", "host", Unit.TEXT), Column("kernel", "kernel", Unit.TEXT)
        yield _table("hosts", "Hosts that gain most", (host, kernel, _VMS, _HUNG, _GAIN, _SAVED, _SPARED), hosts,
                     first=5, note=f"under {printable(best)}")  # fmt: skip
        vms = found.gainers.filter(policy=best)
        named = (host, Column("vm", "VM", Unit.ID), Column("vm_name", "name", Unit.TEXT, wide=1),
                 Column("trace", "recording", Unit.TEXT, wide=2))  # fmt: skip
        yield _table("vms", "VMs that gain most", (*named, _SAVED, _SPARED), vms, first=0, more=len(vms) >= ROWS,
                     note=f"under {printable(best)}")  # fmt: skip
    far = outliers(found.recorded("host", "kernel", "vendor", frame=found.hosts)).with_columns(
        pl.col("rate", "median").round().cast(pl.Int64)
    )
    yield _table(
        "outliers", "Hosts out of line",
        (Column("host", "host", Unit.TEXT), Column("kernel", "kernel", Unit.TEXT),
         Column("vendor", "vendor", Unit.TEXT, wide=1), _VMS, Column("rate", "faults/vCPU h"),
         Column("median", "median"), Column("times", "of the median", Unit.RATIO)), far, first=4,
    )  # fmt: skip
    day = (Column("day", "day", Unit.TEXT),)
    yield _table(
        "days", "By day", (*day, *columns), groups(found, ("day",), found.days, best), first=7, note=_gain_of(best)
    )


def _gain_of(best: str) -> str:
    return f"gain and saved are those under {printable(best)}" if best else ""


def _table(
    name: str, title: str, columns: tuple[Column, ...], frame: pl.DataFrame, note: str = "", first: int = 4,
    *, more: bool = False, kept: bool = False,
) -> ReportTable:  # fmt: skip
    shown = frame.head(ROWS)
    if not frame.width:
        shown = pl.DataFrame(schema={column.name: pl.Int64 for column in columns})
    return ReportTable(
        name, title, columns, shown, note, first=first, more=more or len(frame) > ROWS, kept=kept, exported=False
    )


def every_host(found: FleetOutcome, best: str) -> ReportTable:
    """Return the table of all hosts, for a page that can search them."""
    frame = groups(found, ("host", "kernel", "vendor"), found.hosts, best)
    order = frame.sort("saved_low_ns", "host", descending=[True, False], nulls_last=True)
    names = tuple(Column(name, name, Unit.TEXT) for name in ("host", "kernel", "vendor"))
    columns = (*names, _VMS, _HOURS, _HUNG, _STALLED, _RATE, _GAIN, _SAVED, _SPARED, _APART)
    return ReportTable("hosts", "Every host", columns, order, _gain_of(best), exported=False)
