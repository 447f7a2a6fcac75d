# SPDX-License-Identifier: Apache-2.0
"""The columns of a fleet's catalogue and of its results: what `kvmtrace fleet` writes, and what reports read."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from traces.outputs import FLEET_KEY

KEY: Final = FLEET_KEY  # of the metadata of both: a JSON object with `format`, and `what`: "catalogue" or "results"
FORMAT: Final = {"major": 1, "minor": 0}  # of the catalogue
# Of the results. Version 1 had the tasks of an object as a list of texts, which took most of a report's time to read.
RESULTS_FORMAT: Final = {"major": 2, "minor": 0}

# Counts of a policy's outcome: what a trace leaves undetermined is from NAME_low to NAME_high. They are equal where the
# outcome is exact; NAME_high is null where there is no upper end.
COUNTS: Final = (
    "loads", "creations", "reuses", "faults", "refaults", "fixes", "frees", "zapped", "tables_built",
)  # fmt: skip
SPENT: Final = tuple(
    f"{name}_ns" for name in ("guest", "fault", "load", "unload", "wait", "idle", "steal", "paused", "other", "switch")
)
STALLS: Final = ("stalls", "stalled_ns", "longest_stall_ns")
_TIME: Final = pa.timestamp("ns", tz="UTC")

_HOST: Final = (
    pa.field("host", pa.string()),  # `host=NAME` of the key, or the recorder's name of it; empty: neither is there
    pa.field("kernel", pa.string()),
    pa.field("vendor", pa.string()),
    pa.field("preset", pa.string()),
)
_VM: Final = (
    pa.field("start", _TIME),  # of the VM's first row; null where the recording has no wall clock
    pa.field("duration_ns", pa.int64()),  # from the VM's first row to its last
    pa.field("vm", pa.int64()),  # id in the trace
    pa.field("vm_name", pa.string()),
)


def ends(name: str) -> tuple[str, str]:
    """The two ends of an interval: the unit stays last."""
    stem, unit = (name[: -len("_ns")], "_ns") if name.endswith("_ns") else (name, "")
    return f"{stem}_low{unit}", f"{stem}_high{unit}"


# One row for each trace and VM. An object that is no trace, or a broken one, has one row with `reason`.
CATALOGUE: Final = pa.schema([
    pa.field("trace", pa.string(), nullable=False),  # the key below the catalogue's root
    pa.field("etag", pa.string()),
    pa.field("size", pa.int64(), nullable=False),  # bytes of the object
    *_HOST,
    *_VM,
    pa.field("vcpus", pa.int32()),
    pa.field("policy", pa.string()),  # the recorded one, as the footer has it
    pa.field("events", pa.int64()),  # rows of the VM
    pa.field("lost", pa.int64()),  # events of the trace that the rings refused
    pa.field("complete", pa.bool_()),
    pa.field("bytes", pa.int64()),  # of the VM's row groups, as they are stored
    pa.field("decoded", pa.int64()),  # about what a replay of the VM holds in memory, bytes
    # Suspect figures of the whole trace, by rows: what is worth a look before anything is replayed.
    pa.field("trigger", pa.string()),  # what made a flight recorder dump it; empty: no dump
    pa.field("roots", pa.int64()),
    pa.field("page_faults", pa.int64()),
    pa.field("smis", pa.int64()),
    pa.field("memslot_changes", pa.int64()),
    pa.field("invalidations", pa.int64()),  # kvm_mmu_zap_all_fast
    pa.field("reason", pa.string(), nullable=False),  # why it cannot be replayed; empty: nothing is known against it
])  # fmt: skip

# One row for each trace, VM and policy (`row` is "vm"), and one for each of their vCPUs ("vcpu"): never add both up.
# A task that failed leaves one row "failed". Times are those of the policy's low end, and their bounds those of both;
# of a "vm" row they are those of its vCPUs added up (the longest stall: the longest of any).
RESULTS: Final = pa.schema([
    pa.field("row", pa.string(), nullable=False),
    pa.field("trace", pa.string(), nullable=False),
    pa.field("etag", pa.string()),
    *_HOST,
    *_VM,
    pa.field("vcpu", pa.int32()),
    pa.field("vcpus", pa.int32()),
    pa.field("recorded_policy", pa.string()),
    pa.field("policy", pa.string()),
    pa.field("events", pa.int64()),
    pa.field("lost", pa.int64()),
    pa.field("own_policy", pa.string()),  # "agrees", "differs" or "open": its replay compared with the rows
    *(pa.field(end, pa.int64()) for name in COUNTS for end in ends(name)),
    pa.field("recorded_ns", pa.int64()),
    *(pa.field(name, pa.int64()) for name in ("wall_ns", "wall_low_ns", "wall_high_ns")),
    *(pa.field(name, pa.int64()) for name in SPENT),
    *(pa.field(end, pa.int64()) for name in STALLS for end in ends(name)),
    pa.field("no_times", pa.string()),  # why there are none; empty otherwise
    pa.field("reason", pa.string()),  # of "failed" rows
])  # fmt: skip
