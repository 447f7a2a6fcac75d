# SPDX-License-Identifier: Apache-2.0
"""Compares two ways to read the BPF ring buffers: in bulk (tracer/ring.py) and by bcc's callback for each record.

Probes, rings and workload are the same. Both ways only count what they read, which favours the callback: the bulk drain
has copied its records out by then, ready for the disk, where a callback that keeps its record pays extra.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.recorders import CPUS, KINDS, RING_BYTES
from tracer.probing.bpf import Probes
from tracer.probing.compiled import import_bcc
from tracer.recorder import IDLE_SECONDS
from tracer.ring import Rings, ring_count
from tracer.writer import prefer_this_thread

SETTLE_SECONDS = 0.3  # to go on reading after the workload: RCU callbacks still free its page tables


@dataclass(frozen=True)
class Drained:
    """One run of one way to read the rings: `read` includes gap records.

    `cpu_seconds` are those of the reading thread.
    """

    way: str
    emitted: int
    read: int
    lost: int
    cpu_seconds: float

    @property
    def per_cpu_second(self) -> float:
        return self.read / self.cpu_seconds


def bulk(probes: Probes) -> Callable[[], int]:
    """Return a function that reads all that is in the rings once, and returns the number of records."""
    rings = Rings(probes.ring_fds, RING_BYTES)

    def drain() -> int:
        return sum(len(batch) for batch in rings.drain()[0])

    return drain


def callback(probes: Probes) -> Callable[[], int]:
    """Return a function that lets bcc call back for every record that waits, and returns the number of records."""
    read = 0

    def on_event(_context: object, _data: object, _size: int) -> int:
        nonlocal read
        read += 1
        return 0

    library = import_bcc().lib
    called = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)(on_event)
    first, *others = probes.ring_fds
    manager = library.bpf_new_ringbuf(first, called, None)
    for fd in others:
        library.bpf_add_ringbuf(manager, fd, called, None)

    def drain() -> int:
        before = read
        library.bpf_consume_ringbuf(manager)
        assert called  # C calls it: it must live as long as this function
        return read - before

    return drain


WAYS = {"bulk": bulk, "bcc callback": callback}


def _drain(way: str, workload: Sequence[str], timeout: float) -> Drained:
    probes = Probes(frozenset(KINDS), ring_count(CPUS), RING_BYTES)
    try:
        drain = WAYS[way](probes)
        probes.attach()
        used, started, ended = time.thread_time(), time.monotonic(), 0.0
        with subprocess.Popen(workload, stdout=subprocess.DEVNULL) as child:
            prefer_this_thread()  # not before: the workload would inherit it
            read = 0
            while not ended or time.monotonic() < ended + SETTLE_SECONDS:
                batch = drain()
                read += batch
                if batch < 1000:
                    time.sleep(IDLE_SECONDS)
                if not ended and child.poll() is not None:
                    ended = time.monotonic()
                if time.monotonic() > started + timeout:
                    child.kill()
                    raise subprocess.TimeoutExpired(workload, timeout)
        probes.detach()
        while batch := drain():
            read += batch
        used = time.thread_time() - used
        counters = probes.counters()
        return Drained(way, int(counters["emitted"].sum()), read, int(counters["lost"].sum()), used)
    finally:
        probes.close()


def run(way: str, workload: Sequence[str], timeout: float) -> Drained:
    """Read the rings by `way` while the workload runs, with the recorder's scheduling priority, and return the counts.

    This happens in a thread of its own, so that the priority ends with it. Raises subprocess.TimeoutExpired where the
    workload takes longer than `timeout` seconds.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_drain, way, workload, timeout).result()
