# SPDX-License-Identifier: Apache-2.0
"""Counts of a recording against those of its import, in the form of `replay --json`."""

from __future__ import annotations

from typing import Any


def outside(native: Any, imported: Any, where: str = "") -> list[str]:
    """Which counts of a native recording are not within those of its import."""
    if isinstance(native, dict):
        names = {*native, *imported} - {"policy", "vcpu", "stuck_at"}
        return [
            line
            for name in sorted(names)
            for line in outside(native.get(name, 0), imported.get(name, 0), f"{where} {name}")
        ]
    if isinstance(native, list) and native and isinstance(native[0], dict):
        return [line for pair in zip(native, imported, strict=True) for line in outside(*pair, where)]
    (low, high), (least, most) = (each if isinstance(each, list) else (each, each) for each in (native, imported))
    within = least <= low and (most is None or (high is not None and high <= most))
    return [] if within else [f"{where}: {native} not in {imported}"]
