# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace record --upload`: uploads a recording to a store, along with what earlier ones left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracer.upload.uploads import UploadOutcome, Uploads
from traces.command_line.messages import say
from traces.command_line.progress import Progress

SPOOL: Final = "kvmtrace-upload"  # next to the recording


@dataclass
class UploadedRecording:
    """The outcome of an upload once it has ended; None where there was none."""

    outcome: UploadOutcome | None = None


@contextlib.contextmanager
def uploading(place: str, recording: Path, most: int) -> Iterator[UploadedRecording]:
    """Upload `recording` if the `with` block ends well, and meanwhile what earlier ones left. Raises Problem."""
    found = UploadedRecording()
    if not place:
        yield found
        return
    uploads = Uploads(place, recording.parent / SPOOL, recording.parent, most, say)
    try:
        uploads.announce(recording)
        yield found
        uploads.add(recording)
        with Progress("uploading"):
            found.outcome = uploads.close()
    finally:
        uploads.abandon()
