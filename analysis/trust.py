"""What a report's figures rest on: events and losses, coverage, validation, costs, kernel, and what is left open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from analysis.sources import Recording, Result
from analysis.validation import Validated
from traces.durations import duration
from traces.metadata import Metadata

_SHOWN: Final = 3
_MAIN: Final = ("fault", "switch", "created")  # the costs that make up most of a refill


def trust(
    recording: Recording | None, result: Result | None, validation: Validated | str, remarks: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Name and text, one line each. `validation` is why there is none, where there is none; `remarks` come first."""
    for remark in remarks:
        yield "note", remark
    if recording is not None:
        yield "kernel", _kernel(recording.metadata)
        yield "events", _events(recording.metadata)
        yield "coverage", _coverage(recording)
    elif result is not None:
        yield "kernel", result.kernel or "unknown"
        yield "events", f"{result.trace_events:,}"
    if result is not None:
        if result.missing:
            yield "missing", _some(list(result.missing))
        yield from (("broken", line) for line in result.broken[:_SHOWN])
    yield "validated", validation if isinstance(validation, str) else validation.text
    if result is not None:
        yield "costs", _costs(result)
        yield from [("marked", f"VM {vm.vm}: {vm.marked}") for vm in result.vms if vm.marked][:_SHOWN]
        yield from (("left open", line) for line in _open(result))


def _kernel(meta: Metadata) -> str:
    host = meta.raw.get("host")
    model = host.get("model", "") if isinstance(host, dict) else ""
    synthetic = meta.raw.get("origin") == "synthetic"
    parts = [meta.kernel or "unknown", f"{meta.policy or 'unknown'} roots"]
    parts.append("synthetic: nobody recorded it" if synthetic else str(model))
    if meta.raw.get("lab"):  # {} on a host
        parts.append("lab, under QEMU's emulation")
    return ", ".join(part for part in parts if part)


def _events(meta: Metadata) -> str:
    by_kind = sorted(((meta.lost_of(kind), kind) for kind in meta.loss), reverse=True)
    lost = [f"{count:,} {kind}" for count, kind in by_kind if count]
    text = f"{meta.events:,} stored, {meta.lost:,} lost"
    text += f" ({_some(lost)})" if lost else ""
    return text + (f"; {meta.discrepancies[0]}" if meta.discrepancies else "")


def _coverage(recording: Recording) -> str:
    meta = recording.metadata
    unseen = sorted({str(probe.get("kind")) for probe in meta.probes if probe.get("how") == "none"} - recording.kinds)
    before = sum(vm["origin"] == "snapshot" for vm in meta.vms)
    parts = [f"preset {meta.raw.get('preset') or 'unknown'}", f"{len(recording.kinds)} kinds of event watched"]
    if unseen:
        parts.append(f"not observable here: {_some(unseen)}")
    vms = "1 VM" if len(meta.vms) == 1 else f"{len(meta.vms)} VMs"
    parts.append(f"{before} of {vms} running before" if before else f"{vms} from the start")
    return ", ".join(parts)


def _costs(result: Result) -> str:
    """Of the first VM that has times; the query `costs` has all."""
    refused = [f"VM {vm.vm}: no times: {vm.refused}" for vm in result.vms if vm.refused]
    vms = [vm for vm in result.vms if not vm.refused]
    if not vms:
        return _some(refused) if refused else "none: this result has no times"
    measured = {cost.name: cost for cost in vms[0].costs if cost.measured}
    assumed = [cost.name for cost in vms[0].costs if not cost.measured]
    main = [f"{name} {duration(measured[name].ns)}" for name in _MAIN if name in measured]
    text = f"{len(measured)} measured in this recording" + (f" ({', '.join(main)})" if main else "")
    text += f", {len(assumed)} assumed ({', '.join(assumed)})" if assumed else ""
    text += f" (VM {vms[0].vm} of {len(vms)})" if len(vms) > 1 else ""
    return "; ".join([text, *refused[:_SHOWN]])


def _open(result: Result) -> Iterator[str]:
    assumed = f"assumed: --refault {result.refault}" if result.refault else "least .. most"
    lines: dict[str, list[str]] = {}
    for policy in result.policies:
        for line in policy.open:
            lines.setdefault(f"{line} ({assumed})", []).append(policy.name)
        if policy.assumes:
            lines.setdefault(policy.assumes, []).append(policy.name)
        if policy.own and result.timed:
            lines.setdefault("counted only: policies of users are not timed", []).append(policy.name)
    for line, names in lines.items():
        yield f"{', '.join(names)}: {line}"


def _some(lines: list[Any]) -> str:
    more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(str(line) for line in lines[:_SHOWN]) + more
