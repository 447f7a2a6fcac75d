"""What `kvmtrace info` says about a trace: a document for programs, and one screen for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from traces import source_notes
from traces.metadata import Metadata
from traces.reader import Trace
from traces.screen import page, text_of
from traces.text import printable
from traces.untrusted import object_at, text_at
from traces.wall_clock import wall_text

WIDTH: Final = 100
_VMS_SHOWN: Final = 8


def info(path: Path) -> dict[str, Any]:
    """`kvmtrace info --json`: sizes in bytes, times in ns. Raises Problem for a file that is no trace."""
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
    """The same on one screen; plain text where standard output is no terminal."""
    facts = info(path)
    console = page(WIDTH)
    console.print(_head(facts))
    console.print(_vms(facts))
    console.print(_kinds(facts))
    console.print(_probes(facts))
    return text_of(console)


def _utc(meta: Metadata, boot: int) -> str:
    """A boot time as UTC to the second; empty where that is not known."""
    text = wall_text(meta, boot)
    return f"{text[:19].replace(' ', 'T')}Z" if text else ""


def _kvm_counted(meta: Metadata) -> dict[str, int]:
    """How far KVM's own fault counters rose while recording, at least, over all VMs; a cross-check.

    What a VM counted goes with it, and recorders look once a second.
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


def _head(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    each = f", {facts['bytes_per_event']} bytes each" if facts["events"] else ""
    host = facts["host"] if isinstance(facts["host"], dict) else {}
    rows = {
        "trace": f"{facts['path']} (format {facts['format']}, {facts['size']:,} bytes{each})",
        "recorded": (f"{facts['began']} to {facts['ended']}" if facts["began"] else "no wall clock")
        + f", {facts['duration'] / 1e9:.3f} s, "
        f"preset {facts['preset'] or 'unknown'}",
        "kernel": f"{facts['kernel'] or 'unknown'}  {host.get('model', '')}",
        "policy": facts["policy_text"],
        "events": f"{facts['events']:,} stored, {facts['lost']:,} lost, {facts['gaps']:,} gaps",
    }
    if facts["flight"]:
        text = text_at(facts["flight"], "text")
        rows["dump"] = f"of a flight, by {text_at(facts['flight'], 'trigger')}" + (f": {text}" if text else "")
    if facts["kvm_counted"]:
        counted = ", ".join(f"{name} {count:,}" for name, count in facts["kvm_counted"].items())
        rows["KVM itself"] = f"{counted} (the trace has {facts['kinds'].get('kvm_page_fault', 0):,} kvm_page_fault)"
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    for probe, runs in list(facts["missed"].items())[:5]:
        text = f"the kernel skipped {probe} {runs:,} times: these events were never seen"
        table.add_row(Text("unseen", style="bold red"), Text(printable(text)))
    for line in facts["source"]:
        table.add_row(Text("source", style="bold"), Text(line))
    for line in facts["discrepancies"][:5]:
        table.add_row(Text("incomplete", style="bold red"), Text(printable(line)))
    return table


def _vms(facts: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("VM", "process", "vCPUs", "slots", "seen"):
        table.add_column(name, justify="left" if name in ("process", "seen") else "right")
    for vm in facts["vms"][:_VMS_SHOWN]:
        seen = str(vm["origin"]) + ("" if vm["until"] is None else ", destroyed")
        process = printable(f"{vm['comm'] or '?'} ({vm['pid']})")
        table.add_row(str(vm["id"]), Text(process), str(vm["vcpus"]), str(vm["slots"]), Text(printable(seen)))
    if len(facts["vms"]) > _VMS_SHOWN:
        table.add_row("...", f"{len(facts['vms']) - _VMS_SHOWN} more", "", "", "")
    return table


def _kinds(facts: dict[str, Any]) -> Table:
    """Kinds by count, two to a line: name, stored, lost where any were."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    names = list(facts["kinds"]) + [name for name in facts["lost_kinds"] if name not in facts["kinds"]]
    for _ in range(2):
        table.add_column("kind")
        table.add_column("stored", justify="right")
        table.add_column("lost", justify="right")
    cells = [
        (printable(name), f"{facts['kinds'].get(name, 0):,}", f"{facts['lost_kinds'].get(name, 0) or ''}")
        for name in names
    ]
    half = (len(cells) + 1) // 2
    for left, right in zip(cells[:half], [*cells[half:], ("", "", "")], strict=False):
        table.add_row(*left, *right)
    return table


def _probes(facts: dict[str, Any]) -> Text:
    attached = {str(probe.get("kind")) for probe in facts["probes"] if probe.get("how") != "none"}
    lacking = sorted({str(probe.get("kind")) for probe in facts["probes"]} - attached)
    text = f"{len(attached)} kinds observed"
    if lacking:
        text += f"; not observable here: {', '.join(lacking)}"
    return Text(printable(text))
