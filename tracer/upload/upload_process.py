# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.upload.upload_process PARENT SPOOL PLACE`: upload what waits, until standard input ends.

In a process of its own, without any capability and with the lowest priority: whatever a network does to it, the
recorder goes on. A line on standard input says that there is more; each line on standard output is one JSON object, of
what was uploaded or why not.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import re
import select
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tracer.upload.privileges import drop_all
from tracer.upload.upload_spool import UploadSpool, Waiting
from traces.errors import ENVIRONMENT, Problem

FIRST_DELAY: Final = 1.0  # seconds until the second try; each time twice as long
LAST_DELAY: Final = 300.0
_LOWEST: Final = 19
_SET_PARENT_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG
_NAME: Final = re.compile(r"[^A-Za-z0-9._-]+")
_DIGEST: Final = 8


class NeverUploaded(Problem):
    """A recording that no store will take, however often it is tried."""


def object_name(waiting: Waiting, digest: str) -> str:
    """Return the key of a recording in a store, by day, host, begin, boot and content. Raises NeverUploaded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from traces.metadata import KEY, parse
    from traces.untrusted import object_at, text_at
    from traces.wall_clock import wall_ns

    try:
        text = (pq.read_metadata(waiting.path).metadata or {})[KEY]
    except (pa.ArrowException, OSError, ValueError, KeyError):
        raise NeverUploaded(f"{waiting.path}: no recording, or a damaged one") from None
    try:
        meta = parse(text, str(waiting.path))
    except Problem as problem:
        raise NeverUploaded(str(problem)) from None
    begin = wall_ns(meta, meta.span[0]) or 0
    moment = datetime.fromtimestamp(begin // 10**9, UTC)
    host = _NAME.sub("-", text_at(object_at(meta.raw, "host"), "name")).strip(".-") or "unknown"
    name = f"{moment:%Y%m%dT%H%M%S}.{begin // 10**6 % 1000:03}Z-{_NAME.sub('-', waiting.boot)}-{digest[:_DIGEST]}"
    return f"traces/v=1/dt={moment:%Y-%m-%d}/host={host}/{name}.parquet"


def upload(waiting: Waiting, create: Callable[[str, Any], bool]) -> dict[str, Any]:
    """Upload a recording by `create` (see `traces.stores.object_store.Objects`); return the event to report."""
    with waiting.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        key = object_name(waiting, hashlib.sha256(data).hexdigest())
        made = create(key, data)
    waiting.path.unlink(missing_ok=True)
    return {"uploaded": waiting.path.name, "key": key, "bytes": waiting.size, "there": not made}


class Uploader:
    """Uploads what waits in a spool, the oldest first, again and again."""

    def __init__(self, spool: UploadSpool, place: str, tell: Callable[[dict[str, Any]], None]) -> None:
        self._spool, self._place, self._tell = spool, place, tell
        self._create: Callable[[str, Any], bool] | None = None
        self._odd: set[Path] = set()  # recordings that will never be uploaded
        self.failures = 0  # in succession

    def once(self) -> bool:
        """Upload all that waits, up to the first failure; return whether there was none."""
        for waiting in self._spool.waiting():
            if waiting.path in self._odd:
                continue
            try:
                self._tell(upload(waiting, self._opened()))
                self.failures = 0
            except FileNotFoundError:
                continue  # it was dropped for newer ones
            except NeverUploaded as problem:
                self._odd.add(waiting.path)
                self._tell({"odd": waiting.path.name, "why": str(problem)})
            except Problem as problem:
                self._tell({"failed": waiting.path.name, "why": str(problem)})
                self.failures += 1
                return False
        return True

    @property
    def delay(self) -> float:
        """Seconds until the next try, with a random part."""
        whole: float = min(FIRST_DELAY * 2 ** (self.failures - 1), LAST_DELAY)
        return whole * (0.5 + random.random() / 2)

    def _opened(self) -> Callable[[str, Any], bool]:
        if self._create is None:
            from traces.stores.location import location
            from traces.stores.object_store import Objects

            self._create = Objects(location(self._place)).create
        return self._create


def main(parent: int, spool: Path, place: str) -> int:
    """Upload for the recorder with process id `parent`; return the exit code."""
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return ENVIRONMENT
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the recorder
    drop_all()
    uploader = Uploader(UploadSpool(spool, 0), place, lambda event: print(json.dumps(event), flush=True))
    while True:
        whole = uploader.once()
        readable, _, _ = select.select([0], [], [], None if whole else uploader.delay)
        if readable and not os.read(0, 1 << 12):
            return 0 if uploader.once() else ENVIRONMENT


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
