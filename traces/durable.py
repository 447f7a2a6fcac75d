# SPDX-License-Identifier: Apache-2.0
"""Files that survive a crash: write whole buffers, fsync, replace by rename.

Every write, fsync and rename of a trace goes through these functions, which is also where tests make the n-th one fail.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traces.command_line import interrupts


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`; raises OSError, after which the file may hold a part of it."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def create_beside(path: Path) -> tuple[Path, int]:
    """Create a file with an unused name next to `path`, to be renamed to it; return its path and descriptor.

    ^C may come before the caller has either: what is not renamed then is removed when the command ends.
    """
    while True:
        temporary = path.with_name(f".kvmtrace-{secrets.token_hex(4)}.tmp")  # short: `path` may be as long as names get
        name = os.fspath(temporary)
        interrupts.unfinished.add(name)
        try:
            return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            interrupts.unfinished.discard(name)  # another's, or none
            if not isinstance(error, FileExistsError):
                raise


def sync(fd: int) -> None:
    """Make the contents of the open file durable; raises OSError."""
    os.fsync(fd)


def sync_directory(directory: Path) -> None:
    """Make names created in or renamed into `directory` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def replace(temporary: Path, final: Path) -> None:
    """Give a synced temporary file its final name, durably; a reader finds the old file or the whole new one."""
    temporary.replace(final)
    interrupts.unfinished.discard(os.fspath(temporary))
    sync_directory(final.parent)


def remove(temporary: Path) -> None:
    """Remove a temporary file that is not to have a name; harmless if it has got one."""
    temporary.unlink(missing_ok=True)
    interrupts.unfinished.discard(os.fspath(temporary))


def write_json(path: Path, value: Mapping[str, Any]) -> int:
    """Replace `path` by `value` as JSON, durably; return the size in bytes."""
    data = json.dumps(value, indent=1).encode()
    write_file(path, data)
    return len(data)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by these bytes, durably; if that fails (OSError), the old file stays."""
    temporary, fd = create_beside(path)
    try:
        try:
            write_all(fd, data)
            sync(fd)
        finally:
            os.close(fd)
        replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
