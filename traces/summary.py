# SPDX-License-Identifier: Apache-2.0
"""What `kvmtrace info` says about a trace: a document for programs, and one screen for people."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from traces import source_notes
from traces.command_line.layout import TextColumn
from traces.command_line.screen import VMS_SHOWN, Page
from traces.dump_texts import dump_texts
from traces.metadata import Metadata
from traces.reader import Trace
from traces.untrusted import object_at
from traces.wall_clock import wall_text

_NAMES: Final = 12  # columns of the names of facts
_TOLD: Final = 5


def info(path: Path) -> dict[str, Any]:
    """Return the document of `kvmtrace info --json`: sizes in bytes, times in ns. Raises Problem for other files."""
    trace = Trace.open(path)
    meta = trace.metadata
    first, last = meta.span
    size = path.stat().st_size
    return {
        "schema": 1,
        "path": str(path),
        "format": f"{meta.format[0]}.{meta.format[1]}",
        "size": size,
        "bytes_per_event": round(size / meta.events, 2) if meta.events else None,
        "events": meta.events,
        "emitted": meta.emitted,
        "lost": meta.lost,
        "complete": meta.complete,
        "discrepancies": list(meta.discrepancies),
        "gaps": meta.gap_count,
        "missed": meta.missed,
        "kvm_counted": _kvm_counted(meta),
        "first_time": first,
        "last_time": last,
        "duration": last - first,
        "began": _utc(meta, first),
        "ended": _utc(meta, last),
        "kernel": meta.kernel,
        "policy": meta.policy,
        "policy_by": meta.policy_by,
        "policy_text": meta.policy_text,
        "host": meta.raw.get("host", {}),
        "recorder": meta.raw.get("recorder", ""),
        "preset": meta.raw.get("preset", ""),
        "source": source_notes.notes(meta.raw),
        "command": meta.raw.get("command", []),
        "flight": object_at(meta.raw, "flight"),
        "dump": dump_texts(meta),
        "kinds": dict(sorted(meta.kinds.items(), key=lambda item: -item[1])),
        "lost_kinds": {name: lost for name in meta.loss if (lost := meta.lost_of(name))},
        "roots": meta.root_count,
        "vms": [
            {key: vm.get(key) for key in ("id", "pid", "comm", "origin", "since", "until")}
            | {"vcpus": len({vcpu.get("id") for vcpu in vm["vcpus"]}), "slots": len(vm["slots"])}
            for vm in meta.vms
        ],
        "probes": [dict(probe) for probe in meta.probes],
    }


def render(path: Path) -> str:
    """Return the same facts as text on one screen."""
    facts = info(path)
    page = Page()
    _say_head(page, facts)
    _say_vms(page, facts)
    _say_kinds(page, facts)
    _say_probes(page, facts)
    return page.text


def _utc(meta: Metadata, boot: int) -> str:
    """Return a boot time as UTC to the second; empty where that is not known."""
    text = wall_text(meta, boot)
    return f"{text[:19].replace(' ', 'T')}Z" if text else ""


def _kvm_counted(meta: Metadata) -> dict[str, int]:
    """Return how far KVM's own fault counters rose while recording, at least, over all VMs; a cross-check.

    A VM's counts vanish with it, and recorders look once a second.
    """
    stats = meta.raw.get("stats")
    start, end = (stats.get(key) if isinstance(stats, dict) else None for key in ("start", "end"))
    rose: dict[str, int] = {}
    for vm, counters in end.items() if isinstance(end, dict) else ():
        before = start.get(vm) if isinstance(start, dict) else None
        for name, value in counters.items() if isinstance(counters, dict) else ():
            base = before.get(name, 0) if isinstance(before, dict) else 0
            if name.startswith("pf_") and isinstance(value, int) and isinstance(base, int):
                rose[name] = rose.get(name, 0) + value - base
    return {name: count for name, count in sorted(rose.items()) if count}


def _say_head(page: Page, facts: dict[str, Any]) -> None:
    each = f", {facts['bytes_per_event']} bytes each" if facts["events"] else ""
    host = facts["host"] if isinstance(facts["host"], dict) else {}
    when = f"{facts['began']} to {facts['ended']}" if facts["began"] else "no wall clock"
    seconds = f"{facts['duration'] / 1e9:.3f} s"
    rows = [
        ("trace", f"{facts['path']} (format {facts['format']}, {facts['size']:,} bytes{each})"),
        ("recorded", f"{when}, {seconds}, preset {facts['preset'] or 'unknown'}"),
        ("kernel", f"{facts['kernel'] or 'unknown'}  {host.get('model', '')}"),
        ("policy", facts["policy_text"]),
        ("events", f"{facts['events']:,} stored, {facts['lost']:,} lost, {facts['gaps']:,} gaps"),
    ]
    rows += [("dump", line) for line in facts["dump"]]
    if facts["kvm_counted"]:
        counted = ", ".join(f"{name} {count:,}" for name, count in facts["kvm_counted"].items())
        faults = facts["kinds"].get("kvm_page_fault", 0)
        rows.append(("KVM itself", f"{counted} (the trace has {faults:,} kvm_page_fault)"))
    page.facts(rows, at=_NAMES)
    for probe, runs in list(facts["missed"].items())[:_TOLD]:
        text = f"the kernel skipped {probe} {runs:,} times: these events were never seen"
        page.facts([("unseen", text)], "bold red", _NAMES)
    page.more(len(facts["missed"]) - _TOLD, "such probes")
    for line in facts["source"]:
        page.facts([("source", line)], at=_NAMES)
    for line in facts["discrepancies"][:_TOLD]:
        page.facts([("incomplete", line)], "bold red", _NAMES)
    page.more(len(facts["discrepancies"]) - _TOLD, "such lines")


def _say_vms(page: Page, facts: dict[str, Any]) -> None:
    rows = [
        [
            str(vm["id"]),
            f"{vm['comm'] or '?'} ({vm['pid']})",
            str(vm["vcpus"]),
            str(vm["slots"]),
            str(vm["origin"]) + ("" if vm["until"] is None else ", destroyed"),
        ]
        for vm in facts["vms"][:VMS_SHOWN]
    ]
    columns = [TextColumn("VM"), TextColumn("process", right=False), TextColumn("vCPUs"), TextColumn("slots")]
    page.table([*columns, TextColumn("seen", right=False)], rows)
    page.more(len(facts["vms"]) - VMS_SHOWN, "VMs")


def _say_kinds(page: Page, facts: dict[str, Any]) -> None:
    """Add kinds by count, two to a line where there is room: name, stored, and lost where any were."""
    names = list(facts["kinds"]) + [name for name in facts["lost_kinds"] if name not in facts["kinds"]]
    cells = [[name, f"{facts['kinds'].get(name, 0):,}", f"{facts['lost_kinds'].get(name) or ''}"] for name in names]
    columns = [TextColumn("kind", right=False), TextColumn("stored"), TextColumn("lost")]
    half = (len(cells) + 1) // 2
    beside = [[*left, *right] for left, right in zip_longest(cells[:half], cells[half:], fillvalue=[""] * 3)]
    if half and page.has_room_for([*columns, *columns], beside):
        page.table([*columns, *columns], beside)
    else:
        page.table(columns, cells)


def _say_probes(page: Page, facts: dict[str, Any]) -> None:
    attached = {str(probe.get("kind")) for probe in facts["probes"] if probe.get("how") != "none"}
    lacking = sorted({str(probe.get("kind")) for probe in facts["probes"]} - attached)
    text = f"{len(attached)} kinds observed"
    if lacking:
        text += f"; not observable here: {', '.join(lacking)}"
    page.say(text)
