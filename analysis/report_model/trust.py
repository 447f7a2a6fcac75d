# SPDX-License-Identifier: Apache-2.0
"""What a report's figures rest on: events and losses, coverage, validation, costs, kernel, and what is undetermined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Final

import polars as pl

from analysis.reading.result_source import Result
from analysis.reading.rows import ALL
from analysis.reading.sources import Recording
from analysis.report_model.validation import Validated
from replay.decode.capabilities import LEFT_OUT
from replay.own_policy import Agreement
from traces import kernels, source_notes
from traces.command_line.durations import duration
from traces.dump_texts import dump_texts
from traces.errors import Problem
from traces.metadata import Metadata
from traces.text import some, vms_text
from traces.untrusted import object_at, text_at
from traces.wall_clock import wall_text

REPORTED: Final = ("report", f"kvmtrace {version('kvmtrace')}")
_SAID: Final = ("kvm_entry", "kvm_exit", "kvm_page_fault", "mmu_load", "kvm_mmu_set_spte")  # named if none can be seen
_SHOWN: Final = 3
_MAIN: Final = ("fault", "switch", "created")  # the costs that make up most of a refill


def trust(
    recording: Recording | None, result: Result | None, validation: Validated | str, remarks: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield name and text, one line each, of what a report's figures rest on; `remarks` come first.

    `validation` is the outcome of the conformance check, or a text that says why there was none.
    """
    source = source_notes.notes(recording.metadata.raw) if recording is not None else []
    for remark in remarks:
        yield "note", remark
    if recording is not None:
        yield from made_on(recording.metadata, recording.span)
        yield "events", _events(recording)
        yield "coverage", _coverage(recording)
        yield from (("source", line) for line in source)
    elif result is not None:
        yield "kernel", result.kernel or "unknown"
        yield "events", f"{result.trace_events:,}"
    if result is not None:
        if missing := [line for line in result.missing if line not in source]:
            yield "missing", some(missing)
        yield from (("broken", line) for line in result.broken[:_SHOWN])
    if result is not None:
        yield from (("own policy", line) for line in _own_policy(result))
    yield "validated", validation if isinstance(validation, str) else validation.text
    if result is not None:
        yield "costs", _costs(result)
        yield from [("marked", f"VM {vm.vm}: {vm.marked}") for vm in result.vms if vm.marked][:_SHOWN]
        yield from (("undecided", line) for line in _open(result))
    yield REPORTED


def _own_policy(result: Result) -> Iterator[str]:
    """Yield whether the replay under the recorded policy is what the recording's rows show."""
    if not result.agreements:
        yield "not compared with the rows: this result is older than that"
        return
    agree = sum(each.agreement is Agreement.AGREES for each in result.agreements)
    yield f"its replay equals the rows in {agree:,} of {len(result.agreements):,} VMs"
    others = sorted((each for each in result.agreements if each.text), key=lambda each: -each.differences)
    yield from (each.text for each in others[:_SHOWN])


def made_on(meta: Metadata, span: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield where, when and on what a recording was made; `span` is boot ns of the rows that count."""
    yield "host", _host(meta)
    yield "recorded", _recorded(meta, *span)
    yield from (("dump", line) for line in dump_texts(meta))
    yield "kernel", f"{meta.kernel or 'unknown'}, {meta.policy or 'unknown'} roots, by {meta.policy_by}"
    with suppress(Problem):  # of a kernel that is not known, or has no TDP MMU
        if newer := kernels.newer_than_known(kernels.recorded(meta).version):
            yield "kernel", newer


def loss(recording: Recording | None, result: Result | None) -> str:
    """Return which events are missing, for a report's first line; empty if none are known to be."""
    if recording is None:
        missing = result.missing if result is not None else ()
        return next((line for line in missing if " lost in " in line or LEFT_OUT in line), "")
    meta = recording.metadata
    if meta.lost:
        return f"{meta.lost:,} of {meta.emitted:,} events lost"
    if meta.gap_count:
        return f"events lost in {meta.gap_count:,} gaps"
    return left_out(meta)


def left_out(meta: Metadata) -> str:
    """Return what the recorder left out to cost less, and for how long; empty where it left out nothing."""
    ns: dict[str, int] = {}
    for kind in {kind for each in meta.left_out for kind in each["kinds"]}:
        ns[kind] = sum(until - since for since, until in meta.left_out_of(kind))
    if not ns:
        return ""
    return f"{len(ns):,} kinds of event left out for up to {duration(max(ns.values()))}, so that recording cost less"


def _host(meta: Metadata) -> str:
    host = object_at(meta.raw, "host")
    if meta.raw.get("origin") == "synthetic":
        return "synthetic: nobody recorded it"
    if source_notes.imported(meta.raw):
        return source_notes.origin(meta.raw)
    cpus = host.get("cpus")
    parts = [
        text_at(host, "name").replace("(none)", "") or "name not recorded",  # uname's, where nobody gave it one
        f"{cpus} CPUs" if isinstance(cpus, int) else "",
        text_at(host, "model"),
        "lab, under emulation" if meta.raw.get("lab") else "",  # {} on a host
    ]
    return ", ".join(part for part in parts if part)


def _recorded(meta: Metadata, first: int, last: int) -> str:
    began, ended = (wall_text(meta, boot) for boot in (first, last))
    # The date once, where it is the same day.
    ended = ended[11:] if ended[:11] == began[:11] else ended
    when = f"{began} to {ended} UTC" if began else f"from {first / 1e9:.6f} s of boot time, no wall clock"
    by = text_at(meta.raw, "recorder")
    return f"{when}, {duration(last - first)}" + (f", by kvmtrace {by}" if by else "")


def _events(recording: Recording) -> str:
    meta = recording.metadata
    by_kind = sorted(((meta.lost_of(kind), kind) for kind in meta.loss), reverse=True)
    lost = [f"{count:,} {kind}" for count, kind in by_kind if count]
    text = f"{meta.events:,} stored, {meta.lost:,} lost"
    if recording.window != ALL:
        text = f"{recording.scan().select(pl.len()).collect().item():,} of these {text}"
    text += f" ({some(lost)})" if lost else ""
    text += f"; {left_out(meta)}" if meta.left_out else ""
    return text + (f"; {meta.discrepancies[0]}" if meta.discrepancies else "")


def _coverage(recording: Recording) -> str:
    meta = recording.metadata
    unseen = sorted({str(probe.get("kind")) for probe in meta.probes if probe.get("how") == "none"} - recording.kinds)
    before = sum(vm["origin"] == "snapshot" for vm in meta.vms)
    parts = [f"preset {meta.raw.get('preset') or 'unknown'}", f"{len(recording.kinds)} kinds of event watched"]
    if unseen:
        parts.append(f"not observable here: {some(unseen)}")
    if recording.hidden:
        parts.append(f"nor of these guests: {', '.join(kind for kind in _SAID if kind in recording.hidden)}")
    vms = "1 VM" if len(meta.vms) == 1 else f"{len(meta.vms)} VMs"
    parts.append(f"{before} of {vms} running before" if before else f"{vms} from the start")
    return ", ".join(parts)


def _costs(result: Result) -> str:
    """Return the costs of the first VM that has times, as text; the query `costs` has those of all."""
    by_why: dict[str, list[int]] = {}
    for vm in result.vms:
        if vm.refused:
            by_why.setdefault(vm.refused, []).append(vm.vm)
    refused = [f"no times of {vms_text(ids)}: {why}" for why, ids in by_why.items()]
    vms = [vm for vm in result.vms if not vm.refused]
    if not vms:
        return some(refused) if refused else "none: this result has no times"
    measured = {cost.name: cost for cost in vms[0].costs if cost.measured}
    assumed = [cost.name for cost in vms[0].costs if not cost.measured]
    main = [f"{name} {duration(measured[name].ns)}" for name in _MAIN if name in measured]
    text = f"{len(measured)} measured in this recording" + (f" ({', '.join(main)})" if main else "")
    text += f", {len(assumed)} assumed ({', '.join(assumed)})" if assumed else ""
    text += f" (VM {vms[0].vm} of {len(vms)})" if len(vms) > 1 else ""
    return "; ".join([text, *refused[:_SHOWN]])


def _open(result: Result) -> Iterator[str]:
    lines: dict[str, list[str]] = {}
    for policy in result.policies:
        for line in policy.open:
            lines.setdefault(f"{line} ({policy.given(result.refault)})", []).append(policy.name)
        if policy.assumes:
            lines.setdefault(policy.assumes, []).append(policy.name)
        if policy.own and result.timed:
            lines.setdefault("counted only: policies of users are not timed", []).append(policy.name)
    for line, names in lines.items():
        yield f"{', '.join(names)}: {line}"
