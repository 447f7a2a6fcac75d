# SPDX-License-Identifier: Apache-2.0
"""The columns of `kvmtrace top`: how each is called, written, and sorted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from tracer.top.meter import VcpuSecond
from traces.command_line.durations import duration
from traces.text import printable


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


_COLUMNS: Final[tuple[tuple[str, Callable[[VcpuSecond], str], Callable[[VcpuSecond], Any]], ...]] = (
    ("VM", lambda line: printable(line.vm), lambda line: (line.vm, line.vcpu)),
    ("vCPU", lambda line: str(line.vcpu) if line.vcpu >= 0 else "-", lambda line: line.vcpu),
    ("verdict", lambda line: line.verdict, lambda line: line.verdict),
    ("guest", lambda line: _share(line.guest), lambda line: -1 if line.guest is None else line.guest),
    ("idle", lambda line: _share(line.idle), lambda line: -line.idle),
    ("steal", lambda line: _share(line.steal), lambda line: -line.steal),
    ("faults", lambda line: f"{line.faults:,}", lambda line: -line.faults),
    ("again", lambda line: f"{line.refaults:,}", lambda line: -line.refaults),
    ("roots", lambda line: f"{line.roots:,}", lambda line: -line.roots),
    ("SMIs", lambda line: f"{line.smis:,}", lambda line: -line.smis),
    ("zaps", lambda line: f"{line.zaps:,}", lambda line: -line.zaps),
    ("to VMM", lambda line: f"{line.exits:,}", lambda line: -line.exits),
    ("longest", lambda line: duration(line.longest_ns) if line.longest_ns else "", lambda line: -line.longest_ns),
)
NAMES: Final = tuple(name for name, _, _ in _COLUMNS)

_LEAST_FIRST: Final = (
    "to VMM", "zaps", "longest", "again", "SMIs", "steal", "idle", "roots", "faults", "vCPU", "guest",
)  # fmt: skip
_VM_WIDTH: Final = 28


def cells(line: VcpuSecond) -> list[str]:
    """Return the texts of a line, in the order of NAMES."""
    return [write(line) for _, write, _ in _COLUMNS]


def chosen(lines: Iterable[VcpuSecond], sort: str, wanted: str) -> list[VcpuSecond]:
    """Return the lines with a text in their VM's name or verdict, sorted by a column, the most telling first."""
    by = next(key for name, _, key in _COLUMNS if name == sort)
    return sorted((line for line in lines if wanted.lower() in f"{line.vm} {line.verdict}".lower()), key=by)


def text(lines: Iterable[VcpuSecond], width: int) -> str:
    """Return a plain table of at most `width` columns of text; where that is too narrow, less important columns go."""
    columns = {name: [name] for name in NAMES}
    for line in lines:
        for name, cell in zip(NAMES, cells(line), strict=True):
            columns[name].append(cell)
    columns["VM"] = [cell if len(cell) <= _VM_WIDTH else f"{cell[: _VM_WIDTH - 3]}..." for cell in columns["VM"]]
    widths = {name: max(map(len, column)) for name, column in columns.items()}
    shown = list(NAMES)
    for name in _LEAST_FIRST:
        if sum(widths[each] + 2 for each in shown) - 2 > width:
            shown.remove(name)
    rows = zip(*(columns[name] for name in shown), strict=True)
    return "\n".join(
        "  ".join(cell.ljust(widths[name]) if name == "VM" else cell.rjust(widths[name])
                  for name, cell in zip(shown, row, strict=True)).rstrip()
        for row in rows
    )  # fmt: skip
