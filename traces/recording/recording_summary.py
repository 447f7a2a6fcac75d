# SPDX-License-Identifier: Apache-2.0
"""A summary of a recording, as a trace or as the segments that a trace is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from traces.recording.segment_writer import MANIFEST


@dataclass(frozen=True)
class Summary:
    """How many events a recording has and lost, its size in bytes, and why it is not complete, if so.

    `complete` is None where nobody has checked that yet.
    """

    path: Path
    events: int
    lost: int
    size: int
    complete: bool | None
    discrepancies: tuple[str, ...]


def of_segments(directory: Path) -> Summary:
    """Return what a recorder that has ended says of its segments; only `compact` finds whether they are intact."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    lost = sum(sum(kind["lost"].values()) for kind in manifest["loss"].values())
    size = sum(path.stat().st_size for path in directory.iterdir())
    return Summary(directory, manifest["closed"]["rows"], lost, size, None, ())
