# SPDX-License-Identifier: Apache-2.0
"""Make the golden files of the current version: `python -m tests.golden.make`. Those of released versions stay.

A golden file holds one event of every kind, of two VMs, with a manifest as a recorder gives it; next to it, as JSON,
what a reader must make of it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import streams
from tests.traces.making import KVM_A, KVM_B, event, stream
from traces.reader import Trace
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter
from traces.schema import FORMAT_MAJOR, FORMAT_MINOR, KINDS

HERE = Path(__file__).parent

MANIFEST: dict[str, Any] = {
    "recorder": "1.0.0",
    "preset": "all",
    "command": ["vmm"],
    "host": {
        "kernel": "6.1.0",
        "build": "#1",
        "machine": "x86_64",
        "cpus": 2,
        "vendor": "AuthenticAMD",
        "model": "any",
    },
    "policy": {"name": "async", "why": "6.1"},
    "clock": {"name": "boottime", "samples": [{"boot": 0, "mono": 0, "real": 1_700_000_000_000_000_000}]},
    "layout": {"role": {"level": [0, 4], "smm": [24, 8]}},
    "probes": [{"kind": "kvm_entry", "point": "kvm:kvm_entry", "how": "raw", "why": ""}],
    "threads": {"101": {"tgid": 100, "comm": "vcpu 0"}, "100": {"tgid": 100, "comm": "vmm"}},
    "snapshot": {
        "vms": [
            {
                "kvm": KVM_A,
                "tgid": 100,
                "comm": "vmm",
                "vcpus": [{"id": 0, "tid": 101}],
                "slots": [{"slot": 0, "as_id": 0, "gfn": 0, "pages": 256, "hva": 1 << 46, "flags": 0}],
                "roots": [{"table": 77, "role": 0x3784}],
            }
        ]
    },
}


def records() -> np.ndarray[Any, Any]:
    """One event of every kind in turn for two VMs, words large and small, and one of a kind nobody knows."""
    events = []
    for number, kind in enumerate(KINDS):
        words = {"w0": number, "w1": 500 + number % 3, "w2": 0xFFFFFFFF81000000 + number, "w3": 1 << (number % 64)}
        place = {"kvm": KVM_B, "tgid": 200, "tid": 201, "vcpu": -1} if number % 4 == 3 else {}
        vcpu = {"kvm": KVM_A, "tgid": 100, "tid": 101, "vcpu": 0}
        small = {"role": 0x3784, "level": 1 + number % 4, "as_id": number % 2, "flags": number % 4, "n": number - 30}
        root = {"root": 77 if number % 5 else 0, "cpu": number % 2}
        events.append(event(kind.name, **{**words, **(place or vcpu), **small, **root}))
    stranger = event("kvm_entry", w0=1, w1=2, w2=3, w3=4, n=-5, tgid=9)
    stranger["kind"] = 200
    return stream([*events, stranger])


def content(path: Path) -> dict[str, Any]:
    """What the reader makes of a trace; row groups' places and sums are the file's own affair."""
    opened = Trace.open(path)
    rows = sorted((row for batch in opened.batches() for row in batch.to_pylist()), key=lambda row: int(row["seq"]))
    metadata = {key: value for key, value in opened.metadata.raw.items() if key != "row_groups"}
    return {"metadata": metadata, "roots": opened.roots().to_dicts(), "rows": rows}


def main() -> None:
    path = HERE / f"trace-{FORMAT_MAJOR}.{FORMAT_MINOR}.parquet"
    if path.exists():
        raise SystemExit(f"{path} exists: a golden file is never made again; raise the format's version")
    with tempfile.TemporaryDirectory() as scratch:
        writer = SegmentWriter(Path(scratch) / "a.kvmt", MANIFEST)
        writer.write(records())
        writer.close({"loss": streams.loss_table(records())})
        compact(writer.directory, path)
    path.with_suffix(".json").write_text(json.dumps(content(path), indent=1) + "\n")


if __name__ == "__main__":
    main()
