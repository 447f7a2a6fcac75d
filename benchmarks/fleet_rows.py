# SPDX-License-Identifier: Apache-2.0
"""Generates results of made-up fleets of any number of hosts, in the schema of `kvmtrace fleet replay`, from a seed.

The benchmark of the report and its tests use them. Hosts differ by kernel, and by the root policy of that kernel. Many
VMs stall under the old policies, which free their roots at SMIs, and only a few under `preserve`. Some counts have no
upper end, some VMs have no times, some tasks failed, and one host in fifty has many times the page faults of the
others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from replay.fleet.fleet_schema import COUNTS, KEY, RESULTS, SPENT
from replay.fleet.results import MERGE_TASKS, MERGED, ResultFolder, footer_of
from traces.stores.location import location

Array = NDArray[Any]
KERNELS: Final = ("5.15.0-107-generic", "6.1.0-21-amd64", "6.6.30", "6.12.9", "6.14.2")
RECORDED: Final = ("sync", "async", "preserve", "preserve", "preserve")  # the root policy of each of KERNELS
VENDORS: Final = ("GenuineIntel", "AuthenticAMD")
POLICIES: Final = ("preserve", "async", "sync")
AGREEMENTS: Final = ("agrees", "open", "differs")
FIRST_DAY: Final = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp()) * 10**9
_DAY: Final = 86_400 * 10**9
_SECOND: Final = 10**9


@dataclass(frozen=True)
class Fleet:
    """The size of a generated fleet; each host makes one recording a day, of all of its VMs.

    `vcpu_rows` says whether there are rows of vCPUs next to those of VMs.
    """

    hosts: int = 20
    days: int = 3
    vms: int = 4
    policies: tuple[str, ...] = POLICIES
    vcpu_rows: bool = True
    seed: int = 1


def parts(fleet: Fleet, hosts_a_part: int = 1000) -> Iterator[pa.Table]:
    """Yield the rows as tables, one for each day and for each `hosts_a_part` hosts."""
    for day in range(fleet.days):
        for first in range(0, fleet.hosts, hosts_a_part):
            hosts = np.arange(first, min(first + hosts_a_part, fleet.hosts))
            yield _part(fleet, day, hosts, np.random.default_rng((fleet.seed, day, first)))


def write(fleet: Fleet, directory: Path, hosts_a_part: int = 0) -> int:
    """Write the rows to a directory as merged results of a fleet's replay, and return how many rows there are."""
    ResultFolder(location(str(directory)), make=True).claim({"policies": fleet.policies, "made_by": "benchmarks"})
    (directory / MERGED).mkdir(exist_ok=True)
    count = 0
    for number, part in enumerate(parts(fleet, hosts_a_part or max(MERGE_TASKS // fleet.vms, 1))):
        with pq.ParquetWriter(
            directory / MERGED / f"part-{number:05d}.parquet", RESULTS, compression="zstd", store_schema=False
        ) as writer:
            writer.add_key_value_metadata(metadata(part))
            writer.write_table(part, row_group_size=1 << 17)
        count += len(part)
    return count


def _of_hosts(fleet: Fleet, hosts: Array) -> dict[str, Array]:
    """Return what stays the same on each day, by name: kernel, CPU vendor, and how busy each host is."""
    rng = np.random.default_rng((fleet.seed, 1 << 20))
    kernel, vendor = (rng.integers(0, n, fleet.hosts)[hosts] for n in (len(KERNELS), len(VENDORS)))
    busy = np.where(rng.random(fleet.hosts) < 0.02, 40.0, 1.0)[hosts]
    return {"kernel": kernel, "vendor": vendor, "busy": busy}


def _part(fleet: Fleet, day: int, hosts: Array, rng: np.random.Generator) -> pa.Table:
    vms = len(hosts) * fleet.vms
    host = np.repeat(hosts, fleet.vms)
    of = {name: np.repeat(values, fleet.vms) for name, values in _of_hosts(fleet, hosts).items()}
    vm = np.tile(np.arange(1, fleet.vms + 1), len(hosts))
    # Each task and policy has one row for the VM, followed by one for each of its vCPUs.
    names = np.array(fleet.policies)
    count = len(names)
    task = np.repeat(np.arange(vms), count)
    policy = np.tile(np.arange(count), vms)
    vcpus = rng.integers(1, 9, vms)
    failed = rng.random(vms) < 0.005
    keep = ~failed[task] | (policy == 0)
    task, policy = task[keep], policy[keep]
    each = np.where(failed[task], 1, vcpus[task] + 1) if fleet.vcpu_rows else np.ones(len(task), int)
    at = np.repeat(np.arange(len(task)), each)
    vcpu = np.arange(len(at)) - np.repeat(np.cumsum(each) - each, each) - 1
    drawn = _drawn(fleet, of, vcpus, task, policy, rng)

    duration = rng.integers(10, 60, vms) * _SECOND
    start = FIRST_DAY + day * _DAY + (host * 7919 % 86_400) * _SECOND
    columns: dict[str, Any] = {
        "row": pa.array(np.where(failed[task][at], "failed", np.where(vcpu < 0, "vm", "vcpu"))),
        "trace": _texts([_trace(day, h) for h in hosts], (host - hosts[0])[task][at]),
        "etag": _texts([f'"{day:x}-{h:x}"' for h in hosts], (host - hosts[0])[task][at]),
        "host": _texts([f"host-{h:05d}" for h in hosts], (host - hosts[0])[task][at]),
        "kernel": _texts(KERNELS, of["kernel"][task][at]),
        "vendor": _texts(VENDORS, of["vendor"][task][at]),
        "preset": pa.array(["mmu"] * len(at)),
        "start": pa.array(start[task][at], pa.timestamp("ns", tz="UTC")),
        "duration_ns": duration[task][at],
        "vm": vm[task][at],
        "vm_name": _texts([f"vm-{n}" for n in range(fleet.vms + 1)], vm[task][at]),
        "vcpu": pa.array(vcpu, pa.int32(), mask=vcpu < 0),
        "vcpus": vcpus[task][at],
        "recorded_policy": _texts(RECORDED, of["kernel"][task][at]),
        "policy": pa.array(names[policy][at], mask=failed[task][at]),
        "events": (duration // 1000)[task][at],
        "lost": np.repeat(np.where(rng.random(len(hosts)) < 0.05, 100, 0), fleet.vms)[task][at],
        "own_policy": _texts(AGREEMENTS, rng.choice(3, vms, p=(0.8, 0.17, 0.03))[task][at]),
        "no_times": _texts(("", "no entries and exits are recorded"), drawn["untimed"][at].astype(int)),
        "reason": _texts(("", "not a trace: the footer is cut off"), failed[task][at].astype(int)),
    }
    empty = failed[task][at]
    for name, (values, null) in drawn["numbers"].items():
        share = np.where(vcpu < 0, 1, vcpus[task][at])
        columns[name] = pa.array(values[at] // share, pa.int64(), mask=null[at] | empty)
    return pa.table({field.name: _cast(columns[field.name], field.type) for field in RESULTS}, schema=RESULTS)


def _drawn(
    fleet: Fleet, of: dict[str, Array], vcpus: Array, task: Array, policy: Array, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw the figures of each VM under each policy.

    Returns "untimed" (a bool for each task and policy) and "numbers" (by column: the values, and which of them are
    null).
    """
    vms, rows = len(vcpus), len(task)
    recorded = np.array([list(fleet.policies).index(RECORDED[k]) for k in range(len(KERNELS))])[of["kernel"]]
    own = recorded[task] == policy
    old = np.array([name != "preserve" for name in fleet.policies])[policy]
    untimed = (rng.random(vms) < 0.01)[task]
    hanging = np.where(old, (rng.random(vms) < 0.2)[task], (rng.random(vms) < 0.002)[task])
    stalls = np.where(hanging, 1 + (rng.exponential(5, vms)).astype(int)[task], 0)
    longest = np.where(hanging, (np.minimum(rng.lognormal(-1, 1.2, vms), 50) * _SECOND).astype(int)[task] + 10**8, 0)
    stalled = longest * (1 + stalls) // 2
    faults = (rng.lognormal(8, 0.4, vms) * of["busy"] * vcpus).astype(int)[task]
    faults = faults * np.where(old, 3, 1)
    wide = np.where(own, 0, rng.integers(0, 3, rows))
    endless = ~own & (rng.random(rows) < 0.02)
    never = np.zeros(rows, bool)
    numbers: dict[str, tuple[Array, Array]] = {}
    for number, name in enumerate(COUNTS):
        low = faults // (1 + number)
        numbers[f"{name}_low"] = (low, never)
        numbers[f"{name}_high"] = (low + low * wide // 4, endless)
    wall = np.full(rows, 30 * _SECOND) + stalled
    numbers |= {"recorded_ns": (wall, never), "wall_ns": (wall, untimed)}
    numbers |= {"wall_low_ns": (wall * 97 // 100, untimed), "wall_high_ns": (wall * 103 // 100, untimed)}
    for number, name in enumerate(SPENT):
        numbers[name] = (wall // (2 << number), untimed)
    for stem, unit, low in (("stalls", "", stalls), ("stalled", "_ns", stalled), ("longest_stall", "_ns", longest)):
        numbers[f"{stem}_low{unit}"] = (low, untimed)
        numbers[f"{stem}_high{unit}"] = (low + low * wide // 4, untimed | endless)
    return {"untimed": untimed, "numbers": numbers}


def _trace(day: int, host: int) -> str:
    date = datetime.fromtimestamp((FIRST_DAY + day * _DAY) / 1e9, UTC).strftime("%Y-%m-%d")
    return f"traces/v=1/dt={date}/host=host-{host:05d}/{FIRST_DAY // _SECOND + day * 86_400}-b007{host:08x}.parquet"


def _texts(names: Any, at: Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(at, pa.int32()), pa.array(list(names))).cast(pa.string())


def _cast(values: Any, wanted: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return array.cast(wanted)


def metadata(part: pa.Table) -> dict[bytes, bytes]:
    """Return the footer metadata of merged results, which lists their tasks and the number of rows of each."""
    tasks = part.group_by(["trace", "vm"], use_threads=False).aggregate([([], "count_all")])
    named = zip(tasks["trace"].to_pylist(), tasks["vm"].to_pylist(), strict=True)
    ids = [hashlib.sha256(f"{trace}-{vm}".encode()).hexdigest()[:32] for trace, vm in named]
    return {KEY: footer_of(ids, tasks["count_all"].to_pylist())}
