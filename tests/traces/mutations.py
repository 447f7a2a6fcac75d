# SPDX-License-Identifier: Apache-2.0
"""The outcome of importing a mutated file: one line, or a trace that reads, and in time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from traces.errors import Problem
from traces.imports.importing import import_file
from traces.imports.told import ToldOfText
from traces.reader import Trace

SECONDS = 60


def outcome(data: bytes, directory: Path, told: ToldOfText, seed: int) -> str:
    """The line that its import ends with; empty where it made a trace, which is read whole and goes."""
    source, out = directory / "source", directory / "out.parquet"
    source.write_bytes(data)
    try:
        with limited():
            import_file(source, out, told)
    except Problem as problem:
        assert not out.exists(), seed
        return str(problem)
    trace = Trace.open(out)
    trace.verify()
    assert sum(batch.num_rows for batch in trace.batches()) == trace.metadata.events, seed
    out.unlink()
    return ""


@contextmanager
def limited() -> Iterator[None]:
    """A TimeoutError where it takes too long: of the processor's time, whatever else the machine does."""

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
