# SPDX-License-Identifier: Apache-2.0
"""Measures the replay engine against C, the reference model, libCacheSim, decoding, and itself on two threads.

    python -m benchmarks.replay [--rounds 5] [--touches 1000000] [--trace TRACE] [--json]

All of them take turns in one run on one core; figures are medians (and ranges) over the rounds, ratios are of the same
round. Times are CPU seconds; for two threads against one there is also the wall clock, which other work on the machine
distorts.

C: `replay_baseline.c`, the engine's algorithm written by hand (gcc -O3), which checks nothing, while the engine's time
includes its checks of the input. Both get the stream in pieces of 65,536 operations, just written, as a reader hands
them over. Counts are compared in every run; a difference ends the benchmark. Streams: `replay_streams`. Reference: the
first operations of the mixed VMs. libCacheSim: its LRU (`.venv/bin/pip install --no-deps libcachesim`; without it the
rows say so) on the same keys as the engine: zipf 1.0 over a million frames with a cache of 100,000, and the mixed VMs'
own (VM, frame) with a cache of 500,000. Virtual time: SMI storms with times on each operation. The benchmark ends if an
operation takes more than 100 ns. Decoding and end to end: one trace, by default a synthetic SMI storm made at the
start, read from Parquet with every check; end to end is `kvmtrace replay`'s work in this process, decoding and
specialization included. Both find their memory mapped.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import replay_streams
from benchmarks.record import machine, say, spread, table
from benchmarks.replay_peers import Baseline, Lru, run_engine, run_reference, run_timed, zipf
from benchmarks.replay_streams import NORMAL, Stream
from replay.simulate.engine import Engine
from replay.simulate.operations import Block, Op, Ranges, pack
from traces.errors import VERDICT_FAILED, Problem
from traces.kernels.policies import ASYNC, PRESERVE, PolicyParameters

REFERENCE_TOUCHES = 100_000  # operations of each mixed VM that the reference model gets
TIMED_NS = 100  # the longest that an operation may take in virtual time: 10 million a second
KEYS = 2_000_000
ZIPF_OBJECTS, ZIPF_CACHE, OWN_CACHE = 1_000_000, 100_000, 500_000
DENSE_PAGES = 1 << 20  # 4 GiB
SYNTHETIC_EVENTS = 400_000
THREAD_REPEATS = 10  # so that the scheduler has time to use both cores
POLICIES = (PRESERVE, ASYNC)


@dataclass
class Line:
    """One comparison: for each round, ns per operation (or event) of the engine and of the other, and their ratio."""

    name: str
    wanted: float  # the least ratio that passes; 0 if any does
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    why: str = ""  # why there are no figures; empty if there are

    def add(self, ours: float, theirs: float, ratio: float | None = None) -> None:
        """Add the times of a round, both in the same unit; the ratio is theirs divided by ours if it is not given."""
        self.ours.append(ours)
        self.theirs.append(theirs)
        self.ratios.append(theirs / ours if ratio is None else ratio)

    @property
    def failed(self) -> bool:
        return bool(self.ratios) and statistics.median(self.ratios) < self.wanted

    def row(self) -> list[str]:
        if self.why:
            return [self.name, self.why, "", "", ""]
        wanted = f"{self.wanted:g}" if self.wanted else ""
        form = ".2f" if statistics.median(self.ratios) < 10 else ".0f"
        return [self.name, spread(self.ours), spread(self.theirs), spread(self.ratios, form), wanted]


Turn = Callable[[], None]


def count(streams: Sequence[Stream]) -> int:
    return sum(len(stream.block) for stream in streams)


def against(
    name: str, streams: list[Stream], parameters: PolicyParameters, other: Callable[..., Any], wanted: float
) -> tuple[Line, Turn]:
    """Return the comparison of the engine with another implementation, and the function that runs one round.

    The function raises Problem where their counts differ.
    """
    line = Line(f"{name}, {parameters.name}", wanted)

    def turn() -> None:
        ours = theirs = 0.0
        for stream in streams:
            one, counts, _ = run_engine(stream, parameters)
            two, expected = other(stream, parameters)
            if counts != expected:
                raise Problem(f"{line.name}: the counts differ on {stream.name}", VERDICT_FAILED)
            ours, theirs = ours + one, theirs + two
        line.add(ours * 1e9 / count(streams), theirs * 1e9 / count(streams))

    return line, turn


def against_lru(name: str, streams: list[Stream], capacity: int, wanted: float) -> tuple[Line, Turn]:
    """Return the comparison of the engine with libCacheSim, which gets the keys that the streams touch.

    In ns per touch.
    """
    line = Line(f"libCacheSim LRU, {name}", wanted)
    try:
        import libcachesim  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as missing:
        line.why = f"{missing}: .venv/bin/pip install --no-deps libcachesim"
        return line, lambda: None
    touched = [
        stream.block.gfn[stream.block.op & 15 == Op.TOUCH] | number << 40 for number, stream in enumerate(streams)
    ]
    keys = np.concatenate(touched)
    lru = Lru(keys, capacity)

    def turn() -> None:
        ours = sum(run_engine(stream, PRESERVE)[0] for stream in streams)
        line.add(ours * 1e9 / len(keys), lru.run() * 1e9 / len(keys))

    return line, turn


def in_virtual_time(stream: Stream, parameters: PolicyParameters) -> tuple[Line, Turn]:
    """Return the comparison of the engine in virtual time with the engine that only counts, on one stream.

    The function for a round raises Problem if an operation takes more than TIMED_NS.
    """
    line = Line(f"virtual time / counting alone, {stream.name}, {parameters.name}", 0)

    def turn() -> None:
        ours, theirs = run_timed(stream, parameters), run_engine(stream, parameters)[0]
        each = ours * 1e9 / len(stream.block)
        if each > TIMED_NS:
            raise Problem(f"{line.name}: {each:.0f} ns an operation, at most {TIMED_NS} are wanted", VERDICT_FAILED)
        line.add(each, theirs * 1e9 / len(stream.block))

    return line, turn


def two_threads(streams: list[Stream]) -> list[tuple[Line, Turn]]:
    """Return comparisons of two equal sets of VMs replayed one after the other, and on two threads at once."""
    wall = Line("two VMs on two threads, wall clock", 1.8)
    cpu = Line("two VMs on two threads, CPU time as if on idle cores", 0)

    def replay(times: int, taken: list[float]) -> None:
        began = time.thread_time()
        for stream in streams * times * THREAD_REPEATS:
            made = Engine(PRESERVE, stream.words, stream.vcpus, log=False)
            block = stream.block
            for at in range(0, len(block), replay_streams.BATCH):
                rows = slice(at, at + replay_streams.BATCH)
                made.feed(Block(block.op[rows], block.gfn[rows], block.time[rows], block.seq[rows]), stream.ranges, at)
        taken.append(time.thread_time() - began)

    def run(threads: int) -> tuple[float, float]:
        """Return the wall clock time and the mean CPU time of a thread for all the work done by this many threads.

        Both are in ns per operation.
        """
        taken: list[float] = []
        began = time.perf_counter()
        each = [threading.Thread(target=replay, args=(2 // threads, taken)) for _ in range(threads)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
        scale = 1e9 / (2 * THREAD_REPEATS * count(streams))
        return (time.perf_counter() - began) * scale, statistics.mean(taken) * scale

    def turn() -> None:
        one, two = run(1), run(2)
        wall.add(two[0], one[0])
        cpu.add(two[1], one[1])

    return [(wall, turn), (cpu, lambda: None)]


def from_parquet(path: Path) -> list[tuple[Line, Turn]]:
    """Return comparisons of decoding a trace with replaying it from its file, in ns per event."""
    from replay import plan, run
    from replay.decode.batch import COLUMNS
    from replay.decode.capabilities import Capabilities
    from traces.reader import Trace

    trace = Trace.open(path)
    events = trace.metadata.events

    def decode() -> float:
        began = time.process_time()
        for vm in trace.metadata.vms:
            for _ in trace.batches(COLUMNS, vm=vm["id"]):
                pass
        return (time.process_time() - began) * 1e9 / events

    def replay(names: list[str]) -> float:
        began = time.process_time()
        run.replay(plan.make(Capabilities(trace), names))
        return (time.process_time() - began) * 1e9 / events

    def take(line: Line, names: list[str]) -> None:
        replay(names)  # not timed: it maps the memory that the timed runs use
        line.add(replay(names), decode())

    found: list[tuple[Line, Turn]] = []
    for names, wanted in ((["async"], 0.5), (["preserve", "async"], 0.0)):
        line = Line(f"decoding alone / end to end, {' and '.join(names)}", wanted)

        found.append((line, functools.partial(take, line, names)))
    return found


def dense() -> float:
    """Return the bytes of the engine's trees per mapped page, after every page of 4 GiB was touched once."""
    gfn = np.arange(DENSE_PAGES, dtype=np.int64)
    op = np.full(DENSE_PAGES, pack(Op.TOUCH, level=1), np.uint32)
    return run_engine(Stream("dense", [NORMAL], 1, Block(op, gfn, gfn, gfn), Ranges()), PRESERVE)[2] / DENSE_PAGES


def zipf_stream() -> Stream:
    gfn = zipf(KEYS, ZIPF_OBJECTS)
    op = np.full(KEYS, pack(Op.TOUCH, level=1), np.uint32)
    return Stream("zipf", [NORMAL], 1, Block(op, gfn, gfn, gfn), Ranges())


def lines(touches: int, trace: Path) -> list[tuple[Line, Turn]]:
    """Return all comparisons, each with the function that runs one round of it."""
    mixed = replay_streams.mixed(touches)
    few = [stream.first(REFERENCE_TOUCHES) for stream in mixed]
    storms = [
        replay_streams.storm(2 * touches, size, every) for size, every in ((512, 64), (1 << 15, 64), (1 << 15, 1000))
    ]
    baseline = Baseline()
    found: list[tuple[Line, Turn]] = []
    for parameters in POLICIES:
        found.append(against("C, mixed", mixed, parameters, baseline.run, 0.9))
        found += [against(f"C, {storm.name}", [storm], parameters, baseline.run, 0.9) for storm in storms]
    found += [against("reference, mixed", few, parameters, run_reference, 150) for parameters in POLICIES]
    found += [in_virtual_time(storm, parameters) for parameters in POLICIES for storm in storms]
    found.append(against_lru("zipf 1.0", [zipf_stream()], ZIPF_CACHE, 0))
    found.append(against_lru("the mixed VMs' keys", mixed, OWN_CACHE, 10))
    return found + two_threads(mixed[:2]) + from_parquet(trace)


def synthetic(path: Path) -> Path:
    from traces.synth import Parameters, synthesize

    say(f"making a trace of {SYNTHETIC_EVENTS:,} events")
    synthesize(path, Parameters(policy="async", vcpus=2, locality="mixed", memory=256 << 20, events=SYNTHETIC_EVENTS))
    return path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description="How fast the replay engine is.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--touches", type=int, default=1_000_000, help="of each of the mixed VMs; storms have twice that"
    )
    parser.add_argument("--trace", type=Path, help="to decode and replay, instead of a synthetic one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.touches < REFERENCE_TOUCHES:
        parser.error(f"--rounds from 1, --touches from {REFERENCE_TOUCHES}")
    return options


def benchmark(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as scratch:
        found = lines(options.touches, options.trace or synthetic(Path(scratch) / "synthetic.parquet"))
        for number in range(options.rounds):
            for line, turn in found:
                say(f"round {number + 1} of {options.rounds}: {line.name}")
                turn()
    size = dense()
    done = [line for line, _ in found]
    short = [line.name for line in done if line.failed]
    if options.json:
        rows = [{**vars(line), "failed": line.failed} for line in done]
        print(json.dumps({"schema": 1, **facts, "lines": rows, "bytes_per_dense_page": size}, indent=2))
    else:
        print(
            f"{facts['date']}, kernel {facts['kernel']}, {facts['cpu']}, {facts['cpus']} CPUs, load before "
            f"{facts['load']:.1f}; medians (and ranges) of {options.rounds} rounds\n"
        )
        print(table(["against", "engine, ns", "other, ns", "ratio", "wanted"], [line.row() for line in done]))
        print(f"\n{size:.2f} bytes of trees for each page of a dense 4 GiB (wanted: at most 1).")
        if short:
            print(f"Not reached: {'; '.join(short)}.")
    return VERDICT_FAILED if short or size > 1 else 0


def main() -> None:
    try:
        code = benchmark(sys.argv[1:])
    except Problem as problem:
        print(f"benchmarks.replay: {problem}", file=sys.stderr)
        code = problem.code
    raise SystemExit(code)


if __name__ == "__main__":
    main()
