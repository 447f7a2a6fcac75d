# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven over a pipe by its DevTools protocol: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--remote-debugging-pipe", "--hide-scrollbars",
)  # fmt: skip
_SECONDS = 600  # a browser that says nothing for so long hangs, however busy the machine


def chromium() -> str | None:
    """Where it is installed."""
    return shutil.which("chromium")


class Browser:
    """One page of a fresh profile. `events` is all that the browser has reported of it."""

    def __init__(self) -> None:
        program = chromium()
        assert program, "chromium is not installed: scripts/setup does that"
        self._profile = tempfile.TemporaryDirectory(prefix="kvmtrace-chromium-", ignore_cleanup_errors=True)
        down, self._down = os.pipe()
        self._up, up = os.pipe()

        def pipes() -> None:  # the browser reads file 3 and writes file 4
            os.dup2(down, 103)
            os.dup2(up, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        self._process = subprocess.Popen(
            [program, *_ARGUMENTS, f"--user-data-dir={self._profile.name}", "about:blank"],
            preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down)
        os.close(up)
        self._number = 0
        self._buffer = b""
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._down)  # the browser ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._up)
        self._profile.cleanup()

    def send(self, method: str, **params: Any) -> Any:
        """Call a method and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def show(self, page: Path, width: int, scheme: str, height: int = 900) -> None:
        """Open a file and wait until it says that its charts are drawn."""
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.until("document.readyState === 'complete' && document.documentElement.dataset.drawn")

    def until(self, expression: str) -> None:
        """Wait until this holds."""
        until = time.monotonic() + _SECONDS
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < until, f"never happened: {expression}; {self.complaints()}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[Any]:
        """Whatever was said on the console, thrown, or logged by the browser."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """What was asked for, the page itself left out."""
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked if each.get("type") != "Document"]

    def picture(self, out: Path, whole: bool = True) -> None:
        """A screenshot, PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._area(whole))
        out.write_bytes(base64.b64decode(data["data"]))

    def _area(self, whole: bool) -> dict[str, Any]:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "scale": 1}} if whole else {}

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            assert select.select([self._up], [], [], max(until - time.monotonic(), 0))[0], "the browser does not answer"
            data = os.read(self._up, 1 << 16)
            assert data, f"the browser is gone, exit code {self._process.wait(10)}"
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        return message
