# SPDX-License-Identifier: Apache-2.0
"""The columns of a fleet's catalogue and of its results: `kvmtrace fleet` writes them, and reports read them."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from traces.outputs import FLEET_KEY

# The metadata key in the files of both: a JSON object with `format`, and with `what` as "catalogue" or "results".
KEY: Final = FLEET_KEY
FORMAT: Final = {"major": 1, "minor": 0}  # format of the catalogue
# The format of the results. Version 1 had the tasks of an object as a list of texts, and reading that took most of the
# time of a report.
RESULTS_FORMAT: Final = {"major": 2, "minor": 0}

# The counts of a policy's outcome. Each has the columns NAME_low and NAME_high, which differ where the trace leaves the
# count undetermined; NAME_high is null where there is no upper bound.
COUNTS: Final = (
    "loads", "creations", "reuses", "faults", "refaults", "fixes", "frees", "zapped", "tables_built",
)  # fmt: skip
SPENT: Final = tuple(
    f"{name}_ns" for name in ("guest", "fault", "load", "unload", "wait", "idle", "steal", "paused", "other", "switch")
)
STALLS: Final = ("stalls", "stalled_ns", "longest_stall_ns")
_TIME: Final = pa.timestamp("ns", tz="UTC")

_HOST: Final = (
    pa.field("host", pa.string()),  # `host=NAME` in the key, else the name in the recording; empty: unknown
    pa.field("kernel", pa.string()),
    pa.field("vendor", pa.string()),
    pa.field("preset", pa.string()),
)
_VM: Final = (
    pa.field("start", _TIME),  # time of the VM's first row; null where the recording has no wall clock
    pa.field("duration_ns", pa.int64()),  # from the VM's first row to its last
    pa.field("vm", pa.int64()),  # the VM's id in the trace
    pa.field("vm_name", pa.string()),
)


def ends(name: str) -> tuple[str, str]:
    """Return the column names of the low and the high bound of a count or time.

    The unit stays at the end of the name.
    """
    stem, unit = (name[: -len("_ns")], "_ns") if name.endswith("_ns") else (name, "")
    return f"{stem}_low{unit}", f"{stem}_high{unit}"


# The catalogue has one row for each trace and VM. An object that is no trace, or is broken, has one row with `reason`.
CATALOGUE: Final = pa.schema([
    pa.field("trace", pa.string(), nullable=False),  # the key below the catalogue's root
    pa.field("etag", pa.string()),
    pa.field("size", pa.int64(), nullable=False),  # bytes of the object
    *_HOST,
    *_VM,
    pa.field("vcpus", pa.int32()),
    pa.field("policy", pa.string()),  # the recorded root policy, as the footer has it
    pa.field("events", pa.int64()),  # number of rows of the VM
    pa.field("lost", pa.int64()),  # events of the trace that did not fit into a ring
    pa.field("complete", pa.bool_()),
    pa.field("bytes", pa.int64()),  # bytes of the VM's row groups, as they are stored
    pa.field("decoded", pa.int64()),  # bytes that a replay of the VM holds in memory, approximately
    # Numbers of rows in the whole trace that may point to a problem, worth a look before anything is replayed.
    pa.field("trigger", pa.string()),  # what made a flight recorder write this dump; empty: not a dump
    pa.field("roots", pa.int64()),
    pa.field("page_faults", pa.int64()),
    pa.field("smis", pa.int64()),
    pa.field("memslot_changes", pa.int64()),
    pa.field("invalidations", pa.int64()),  # kvm_mmu_zap_all_fast
    pa.field("reason", pa.string(), nullable=False),  # why the VM or object cannot be replayed; empty: it can
])  # fmt: skip

# The results have one row for each trace, VM and policy (`row` is "vm"), and one for each of the VM's vCPUs ("vcpu"):
# do not add up rows of both kinds. A task that failed leaves one row "failed". Times are those at the policy's low
# bound; the columns NAME_low and NAME_high cover both bounds. A "vm" row has the sums over its vCPUs, except that its
# longest stall is the longest of any vCPU.
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
    pa.field("own_policy", pa.string()),  # the own policy's replay compared with the rows: agrees, differs or open
    *(pa.field(end, pa.int64()) for name in COUNTS for end in ends(name)),
    pa.field("recorded_ns", pa.int64()),
    *(pa.field(name, pa.int64()) for name in ("wall_ns", "wall_low_ns", "wall_high_ns")),
    *(pa.field(name, pa.int64()) for name in SPENT),
    *(pa.field(end, pa.int64()) for name in STALLS for end in ends(name)),
    pa.field("no_times", pa.string()),  # why there are no times; empty if there are
    pa.field("reason", pa.string()),  # why the task failed, in "failed" rows
])  # fmt: skip
