# SPDX-License-Identifier: Apache-2.0
"""What the replay engine is measured against: a C program of its algorithm, the reference model, libCacheSim's LRU."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.replay_streams import Stream
from replay.simulate import dispatch
from replay.simulate.engine import Engine
from replay.simulate.operations import VCPU_SHIFT
from replay.simulate.reference import Vm
from replay.simulate.timed_operations import MORE, Timed
from replay.timing.costs import DEFAULT
from replay.timing.timed_engine import TimedEngine
from traces.errors import ENVIRONMENT, VERDICT_FAILED, Problem
from traces.kernels.policies import PolicyParameters

SOURCE = Path(__file__).with_name("replay_baseline.c")
BY_VCPU = ("loads", "creations", "reuses", "faults", "refaults", "hits")
OF_VM = ("frees", "tables", "tables_freed", "zapped", "flushes")

Counts = list[int]


def counts_of(vcpus: Iterable[Any], counters: Any) -> Counts:
    """Return all counts that every implementation has, as one list: those of each vCPU, then those of the VM."""
    return [getattr(v, name) for v in vcpus for name in BY_VCPU] + [getattr(counters, name) for name in OF_VM]


def engine_counts(made: Engine) -> Counts:
    counted = made.vcpus
    table = np.array([getattr(counted, name) for name in BY_VCPU]).T
    return [*table.reshape(-1).tolist(), *(getattr(made.counters, name) for name in OF_VM)]


def run_engine(stream: Stream, parameters: PolicyParameters) -> tuple[float, Counts, int]:
    """Run the engine on a stream; return its CPU seconds, its counts, and the bytes of its trees."""
    began = time.thread_time()
    made = Engine(parameters, stream.words, stream.vcpus, log=False)
    taken = time.thread_time() - began
    at = 0
    for block in stream.batches():
        began = time.thread_time()
        made.feed(block, stream.ranges, at)
        taken += time.thread_time() - began
        at += len(block)
    return taken, engine_counts(made), made.bytes_used


def run_timed(stream: Stream, parameters: PolicyParameters, seed: int = 1) -> float:
    """Return the CPU seconds of the engine in virtual time.

    Operations are a few us apart, and half of them had a recorded fault.
    """
    rng = np.random.default_rng(seed)
    made = TimedEngine(parameters, stream.words, stream.vcpus, DEFAULT, log=False)
    taken, at = 0.0, 0
    for block in stream.batches():
        lead, cost = (rng.integers(500, 5000, len(block)) for _ in range(2))
        was = rng.integers(0, 2, len(block)).astype(np.uint8)
        queue = (block.op >> VCPU_SHIFT).astype(np.int32)
        idle = np.zeros_like(lead)
        timed = Timed(block, queue, lead, lead // 2, idle, cost, was, np.full(len(block), MORE))
        began = time.thread_time()
        made.feed(timed, stream.ranges, at)
        taken += time.thread_time() - began
        at += len(block)
    began = time.thread_time()
    made.finish()
    return taken + time.thread_time() - began


def run_reference(stream: Stream, parameters: PolicyParameters) -> tuple[float, Counts]:
    began = time.thread_time()
    vm: Vm = dispatch.begin(parameters, stream.words, stream.vcpus)
    dispatch.feed(vm, stream.block, stream.ranges)
    return time.thread_time() - began, counts_of(vm.vcpus, vm.counters)


class Baseline:
    """The engine's algorithm in C (replay_baseline.c), compiled when this is constructed.

    Raises Problem where it does not compile.
    """

    def __init__(self, compiler: str = "gcc") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kvmtrace-bench-")
        library = Path(self._directory.name) / "baseline.so"
        command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            raise Problem(
                f"{SOURCE.name} does not compile: {said}: apt-get install gcc libc6-dev", ENVIRONMENT
            ) from None
        self._c = ctypes.CDLL(str(library))
        self._c.begin.restype = ctypes.c_void_p
        self._c.begin.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self._c.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._c.counts.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._c.end.argtypes = [ctypes.c_void_p]

    def run(self, stream: Stream, parameters: PolicyParameters) -> tuple[float, Counts]:
        words = np.array([(word.level, word.as_id) for word in stream.words], np.int64).T.copy()
        ranges = np.array(stream.ranges.rows or [(0, 0)], np.int64)
        out = np.zeros(len(BY_VCPU) * stream.vcpus + len(OF_VM), np.int64)
        began = time.thread_time()
        vm = self._c.begin(words.shape[1], *(row.ctypes.data for row in words), stream.vcpus, parameters.own_reference)
        taken = time.thread_time() - began
        for block in stream.batches():
            began = time.thread_time()
            self._c.run(vm, block.op.ctypes.data, block.gfn.ctypes.data, len(block), ranges.ctypes.data)
            taken += time.thread_time() - began
        self._c.counts(vm, out.ctypes.data)
        self._c.end(vm)
        return taken, out.tolist()


_ORACLE = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])  # libCacheSim's 24-byte record


class Lru:
    """libCacheSim's LRU over a file of keys, which is written when this is constructed and not timed."""

    def __init__(self, keys: NDArray[np.int64], capacity: int) -> None:
        import libcachesim  # type: ignore[import-not-found]

        self._lib = libcachesim
        self._capacity = capacity
        self._directory = tempfile.TemporaryDirectory(prefix="kvmtrace-bench-")
        self._path = Path(self._directory.name) / "keys.oracleGeneral.bin"
        records = np.zeros(len(keys), _ORACLE)
        records["time"] = np.arange(len(keys)) >> 10
        records["id"] = keys + 1
        records["size"] = 1
        records["next"] = -2
        records.tofile(self._path)

    def run(self) -> float:
        """Return the CPU seconds for all keys, in a cache that is empty at first."""
        reader = self._lib.TraceReader(
            trace=str(self._path),
            trace_type=self._lib.TraceType.ORACLE_GENERAL_TRACE,
            reader_init_params=self._lib.ReaderInitParam(ignore_obj_size=True),
        )
        cache = self._lib.LRU(self._capacity)
        began = time.thread_time()
        missed, _ = cache.process_trace(reader)
        taken = time.thread_time() - began
        if not 0 < missed <= 1:
            raise Problem(f"libCacheSim missed {missed:.0%} of the keys: it did not read them", VERDICT_FAILED)
        return taken


def zipf(count: int, objects: int, seed: int = 1) -> NDArray[np.int64]:
    """Return `count` keys below `objects`, of which the k-th is drawn with a probability proportional to 1/k."""
    rng = np.random.default_rng(seed)
    share = np.cumsum(1.0 / np.arange(1, objects + 1))
    keys: NDArray[np.int64] = np.searchsorted(share, rng.random(count) * share[-1]).astype(np.int64)
    return keys
