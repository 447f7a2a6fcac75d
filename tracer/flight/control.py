# SPDX-License-Identifier: Apache-2.0
"""The socket by which a running flight recorder is asked for a dump, by root or also by members of a group.

One line of JSON each way: {"do": "dump", "reason": TEXT}, answered by {"path": PATH} or {"problem": LINE, "code": N}.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from traces.errors import BAD_INPUT, ENVIRONMENT, Problem
from traces.text import printable

NAME: Final = "flight.sock"
_LOCK: Final = ".flight.lock"
_MOST: Final = 16  # clients at a time
_LINE: Final = 4096
_REASON: Final = 200
_FAREWELL: Final = 2.0  # seconds for the answers that are under way at the end
_PATIENCE: Final = 5.0  # seconds for a client's line


class Control:
    """Listens in the dumps' directory; `dump` is called with each client's reason and returns a future path."""

    def __init__(self, directory: Path, group: str, dump: Callable[[str], Future[Path]]) -> None:
        """Raises Problem where another recorder uses the directory, or the group does not exist."""
        self._path, self._dump = directory / NAME, dump
        self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Problem(f"{directory}: another flight recorder keeps its dumps there: choose another -o") from None
        self._path.unlink(missing_ok=True)  # left by a killed recorder
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            with _reachable(directory) as place:
                self._listener.bind(place)
        finally:
            os.umask(before)
        if group:
            os.chown(self._path, -1, _group(group))
            self._path.chmod(0o660)
        self._clients = threading.BoundedSemaphore(_MOST)
        self._listener.listen(_MOST)
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def close(self) -> None:
        """Stop listening; clients that wait for a dump still get their answers, for at most two seconds."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        end = time.monotonic() + _FAREWELL
        for _ in range(_MOST):
            self._clients.acquire(timeout=max(end - time.monotonic(), 0))
        os.close(self._lock)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._clients.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError):
                client.settimeout(_PATIENCE)
                answer = self._answer_to(_line(client))
                client.sendall(json.dumps(answer).encode() + b"\n")
        finally:
            self._clients.release()

    def _answer_to(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            if not isinstance(asked, dict) or asked.get("do") != "dump":
                raise ValueError
        except (ValueError, RecursionError):
            return {"problem": "not a request that this recorder knows", "code": BAD_INPUT}
        try:
            return {"path": str(self._dump(printable(str(asked.get("reason", "")))[:_REASON]).result())}
        except Problem as problem:
            return {"problem": str(problem), "code": problem.code}


def ask(directory: Path, reason: str) -> Path:
    """Ask the recorder of `directory` for a dump and return the trace's path. Raises Problem where none is made."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _reachable(directory) as place:
                connection.connect(place)
            connection.sendall(json.dumps({"do": "dump", "reason": reason}).encode() + b"\n")
            line = _line(connection)
        except PermissionError:
            raise Problem(f"{directory}: its recorder takes requests of root, or of its --group: run it with sudo",
                          ENVIRONMENT) from None  # fmt: skip
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            raise Problem(f"{directory}: no flight recorder runs here: start one with record --flight") from None
        except OSError as error:
            raise Problem(f"{directory}: {error.strerror or error}", ENVIRONMENT) from None
    try:
        answer = json.loads(line)
    except ValueError:
        raise Problem(f"{directory}: its recorder ended before the dump was made", ENVIRONMENT) from None
    if "problem" in answer:
        raise Problem(str(answer["problem"]), int(answer["code"]))
    return Path(answer["path"])


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE and (more := connection.recv(_LINE)):
        line += more
    return line


@contextlib.contextmanager
def _reachable(directory: Path) -> Any:
    """Yield the socket's address through /proc: its own path may be longer than the 108 bytes of an address."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{NAME}"
    finally:
        os.close(fd)


def _group(name: str) -> int:
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise Problem(f"--group {name}: no such group") from None
