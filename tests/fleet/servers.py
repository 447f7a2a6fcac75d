# SPDX-License-Identifier: Apache-2.0
"""An S3 on loopback (moto), and a proxy before it that fails as stores and networks do."""

from __future__ import annotations

import base64
import contextlib
import hmac
import http.client
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

BUCKET = "fleet-bucket"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

# (method, path with query, how many requests of this method and path there were before) -> what goes wrong, or "".
# "403", "503": the store says so; "reset": no answer, the connection ends; "torn": it is reset (RST), as when a server
# ends it with bytes unread; "lost": it is done, and no answer; "torn after": and reset; "cut": half of the body;
# "stall": half of it, then silence; "silence": no answer, and no end; "kill": the process that asks dies; "kill after":
# when what it asked for is done.
Fault = Callable[[str, str, int], str]


def environment(port: int) -> dict[str, str]:
    """What clients of this server need in their environment."""
    return {
        "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none-secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip


@contextmanager
def s3() -> Iterator[int]:
    """moto's server with an empty bucket; its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                status, _ = request(port, "PUT", f"/{BUCKET}")
                assert status == 200, status
                break
            except OSError:
                assert server.poll() is None, "moto.server has ended"
                time.sleep(0.1)
        else:
            raise AssertionError("moto.server does not answer within a minute")
        yield port
    finally:
        server.kill()
        server.wait()


def azure_environment(port: int) -> dict[str, str]:
    """What clients of Azurite need in their environment. The key is everyone's: the emulator's documentation has it."""
    return {
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY, "AZURE_ALLOW_HTTP": "true",
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}",
    }  # fmt: skip


@contextmanager
def azure() -> Iterator[int]:
    """Azurite, Microsoft's emulator of Azure's blobs, with an empty container; its port."""
    program = shutil.which("azurite-blob")
    assert program, "azurite-blob is not on the PATH: `npm install azurite`, as `make nightly` does"
    port = free_port()
    words = [
        "--inMemoryPersistence",
        "--silent",
        "--skipApiVersionCheck",
        "--disableTelemetry",
        "--blobPort",
        str(port),
    ]
    server = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                assert _make_container(port) == 201
                break
            except OSError:
                assert server.poll() is None, "azurite-blob has ended"
                time.sleep(0.1)
        else:
            raise AssertionError("azurite-blob does not answer within a minute")
        yield port
    finally:
        server.kill()
        server.wait()


def _make_container(port: int) -> int:
    """Azure's library is not needed for this one request, which obstore has not."""
    now, version = formatdate(usegmt=True), "2021-08-06"
    path = f"/{AZURE_ACCOUNT}/{BUCKET}"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{now}\nx-ms-version:{version}\n/{AZURE_ACCOUNT}{path}\nrestype:container"
    digest = hmac.digest(base64.b64decode(AZURE_KEY), signed.encode(), "sha256")
    headers = {
        "x-ms-date": now, "x-ms-version": version, "Content-Length": "0",
        "Authorization": f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("PUT", f"{path}?restype=container", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request as S3 has them, unsigned: moto does not look."""
    headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=none/20261126/us-east-1/s3/aws4_request"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Proxy:
    """Between clients and a server; `fault` decides of each request. `seen` counts what was asked for."""

    def __init__(self, upstream: int, fault: Fault) -> None:
        self.fault = fault
        self.seen: dict[tuple[str, str], int] = {}
        self.done: dict[str, int] = {}  # faults by what they were
        self.killed: list[int] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                outer.forward(self, upstream)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # else connections of many at once time out before they are taken

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def forward(self, client: BaseHTTPRequestHandler, upstream: int) -> None:
        """Answer one request, well or not."""
        method, path = client.command, client.path
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        with self._lock:
            before = self.seen.get((method, path), 0)
            self.seen[method, path] = before + 1
            what = self.fault(method, path, before)
            if what:
                self.done[what] = self.done.get(what, 0) + 1
        if what == "kill":
            self._kill(client.client_address[1])
        if what == "silence":
            self._ended.wait(60)
        if what in ("kill", "reset", "torn", "silence"):
            self._end(client, torn=what == "torn")
            return
        if what == "403":
            self._send(client, 403, [("Content-Type", "application/xml")], _DENIED, len(_DENIED))
            return
        if what == "503":
            self._send(client, 503, [("Content-Type", "application/xml")], _SLOW_DOWN, len(_SLOW_DOWN))
            return
        connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
        try:
            connection.request(method, path, body, dict(client.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if what == "kill after":
            self._kill(client.client_address[1])
        if what in ("kill after", "lost", "torn after"):
            self._end(client, torn=what == "torn after")
            return
        hop = ("transfer-encoding", "connection", "content-length", "date", "server")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop]
        length = int(answer.getheader("Content-Length") or len(data)) if method == "HEAD" else len(data)
        part = data[: len(data) // 2] if what in ("cut", "stall") else data
        self._send(client, answer.status, headers, part, length)
        if what == "stall":
            self._ended.wait(60)
        if what in ("cut", "stall"):
            client.close_connection = True

    def _kill(self, port: int) -> None:
        """Kill the child of this process whose end of a connection this is."""
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(each.laddr.port == port for each in child.net_connections("tcp") if each.raddr):
                    child.kill()  # and wait for nothing: whoever started it is told only once that it ended
                    self.killed.append(child.pid)
                    return
        raise AssertionError(f"the owner of port {port} cannot be determined")

    @staticmethod
    def _end(client: BaseHTTPRequestHandler, *, torn: bool) -> None:
        client.close_connection = True
        if torn:
            client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(client.connection.detach())  # not by shutdown(), which ends it in order

    @staticmethod
    def _send(
        client: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], data: bytes, length: int
    ) -> None:
        client.send_response(status)
        for name, value in headers:
            client.send_header(name, value)
        client.send_header("Content-Length", str(length))
        client.end_headers()
        client.wfile.write(data)
        client.wfile.flush()
