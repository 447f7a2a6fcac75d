# SPDX-License-Identifier: Apache-2.0
"""Where a flight's metrics go: a page that Prometheus reads, or a file that node_exporter passes on."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from tracer.flight.metrics import BUCKETS, FAMILIES, Sample
from traces.command_line.extras import need
from traces.errors import ENVIRONMENT, Problem

need("prometheus_client", "--metrics")
import prometheus_client  # noqa: E402
from prometheus_client import core  # noqa: E402

SUFFIX: Final = ".prom"
_EVERY: Final = 15.0  # seconds between two writes of the file
_ADDRESS: Final = re.compile(r"(?:(\[[0-9a-fA-F:]+\]|[\w.-]*)):(\d{1,5})")


def place(text: str) -> Path | tuple[str, int]:
    """Parse --metrics and return a file, or (address, port). Raises Problem."""
    if text.endswith(SUFFIX):
        path = Path(text).absolute()
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise Problem(f"--metrics {text}: cannot write into {path.parent}")
        return path
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise Problem(f"--metrics {text}: neither an address, such as :9417 or 127.0.0.1:9417, nor a file NAME{SUFFIX}")
    return match[1].strip("[]") or "0.0.0.0", int(match[2])


class _Collector:
    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples

    def describe(self) -> Iterator[Any]:
        """Return nothing: when the collector is registered there are no samples yet."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        found = list(self._samples())
        for family in FAMILIES:
            mine = [sample for sample in found if sample.family == family]
            if not mine:
                continue
            made = _KINDS[family.type](family.name, family.help, labels=family.labels)
            for sample in mine:
                if family.type == "histogram":
                    counts, total = sample.value
                    sums = [sum(counts[: at + 1]) for at in range(len(counts))]
                    edges = [*map(str, BUCKETS), "+Inf"]
                    made.add_metric(sample.labels, list(zip(edges, sums, strict=True)), total)
                else:
                    made.add_metric(sample.labels, sample.value)
            yield made


_KINDS: Final[dict[str, Any]] = {
    "counter": core.CounterMetricFamily,
    "gauge": core.GaugeMetricFamily,
    "histogram": core.HistogramMetricFamily,
}


class Exporter:
    """Publishes samples until it is closed."""

    def __init__(self, to: Path | tuple[str, int], samples: Callable[[], Iterable[Sample]]) -> None:
        """`samples` returns the current samples. Raises Problem where the address cannot be bound."""
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_Collector(samples))
        self._ended = threading.Event()
        self._server: Any = None
        self._thread: threading.Thread | None = None
        if isinstance(to, Path):
            self._path = to
            self._thread = threading.Thread(target=self._write_now_and_then, name="metrics", daemon=True)
            self._thread.start()
            return
        try:
            self._server, _ = prometheus_client.start_http_server(to[1], to[0], self._registry)
        except OSError as error:
            raise Problem(f"--metrics {to[0]}:{to[1]}: {error.strerror}", ENVIRONMENT) from None

    def close(self) -> None:
        """Stop publishing; a file is removed, so that nobody takes it for the present state."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                self._path.unlink()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _write_now_and_then(self) -> None:
        said = False
        while not self._ended.wait(1.0 if not self._path.exists() and not said else _EVERY):
            try:
                prometheus_client.write_to_textfile(str(self._path), self._registry)
                said = False
            except OSError as error:
                if not said:
                    print(f"kvmtrace: {self._path}: no metrics: {error.strerror}", file=sys.stderr)
                said = True
