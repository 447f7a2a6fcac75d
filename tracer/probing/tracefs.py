# SPDX-License-Identifier: Apache-2.0
"""Tracepoint formats as tracefs prints them: which events this kernel has, and where fields lie in a record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOUNT_POINTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
MOUNT_COMMAND = "mount -t tracefs tracefs /sys/kernel/tracing"

_FIELD = re.compile(
    r"field:(?P<decl>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);"
)


@dataclass(frozen=True)
class Field:
    """Where a field of a tracepoint's record lies: its offset and size in bytes."""

    offset: int
    size: int
    signed: bool

    @property
    def ctype(self) -> str:
        return f"{'s' if self.signed else 'u'}{8 * self.size}"


def parse_format(text: str) -> dict[str, Field]:
    """Return the fields of a tracepoint by name, from its `format` file, without the common_* fields."""
    fields = {}
    for match in _FIELD.finditer(text):
        name = re.sub(r"\[.*\]$", "", match["decl"].split()[-1]).lstrip("*")
        if not name.startswith("common_"):
            fields[name] = Field(int(match["offset"]), int(match["size"]), match["signed"] == "1")
    return fields


def tracefs() -> Path | None:
    """Return where tracefs is mounted and readable, or None."""
    for mount in MOUNT_POINTS:
        try:
            if (mount / "events").is_dir():
                return mount
        except PermissionError:
            continue
    return None


def tracepoint(root: Path, where: str) -> dict[str, Field] | None:
    """Return the fields of tracepoint `system:name`, or None where this kernel has no such event."""
    system, name = where.split(":")
    try:
        return parse_format((root / "events" / system / name / "format").read_text())
    except OSError:
        return None


def event_id(where: str) -> int:
    """Return the kernel's number of tracepoint `system:name`. Raises OSError where there is none."""
    system, name = where.split(":")
    return int(((tracefs() or MOUNT_POINTS[0]) / "events" / system / name / "id").read_text())
