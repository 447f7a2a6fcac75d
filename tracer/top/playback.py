# SPDX-License-Identifier: Apache-2.0
"""A recording's rows as the recorder saw them, second by second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from tracer.flight.vcpu_time import Rows, idle_codes
from tracer.top.meter import KINDS, Meters, VcpuSecond
from traces.reader import Trace
from traces.record import RECORD
from traces.schema import BY_NAME
from traces.untrusted import object_at, text_at
from traces.vm_names import VmNames

SECOND = 10**9
_COLUMNS = ("time", "vm", "vcpu", "tid", "kind", "root", "table", "addr", "code", "value", "ret", "flags")
_BY_ADDRESS = ("sched_in", "kvm_page_fault")  # kinds whose first word is an address, not a code


def to_records(frame: pl.DataFrame) -> Rows:
    """Return rows of KINDS as records, as far as meters need them; a VM's id stands for its address."""
    made = np.zeros(len(frame), RECORD)
    kinds = frame["kind"].cast(pl.String)
    codes = {name: BY_NAME[name].code for name in KINDS}
    made["kind"] = kinds.replace_strict(codes, default=0, return_dtype=pl.UInt8).to_numpy()
    for field, column in (("time", "time"), ("tid", "tid"), ("n", "ret"), ("flags", "flags"), ("w1", "value")):
        made[field] = frame[column].to_numpy()
    made["kvm"] = frame["vm"].fill_null(0).to_numpy()
    made["vcpu"] = frame["vcpu"].fill_null(-1).to_numpy()
    made["w0"] = np.where(kinds.is_in(_BY_ADDRESS).to_numpy(), frame["addr"].to_numpy(), frame["code"].to_numpy())
    made["w2"] = frame["code"].to_numpy()
    page = made["kind"] == codes["kvm_mmu_get_page"]
    root = page & (frame["root"].to_numpy() != 0)
    made["w1"][page] = frame["table"].to_numpy()[page]
    made["root"][root] = made["w1"][root]
    return made


def seconds(path: Path) -> Iterator[tuple[int, list[VcpuSecond]]]:
    """Yield (ns since its beginning, lines) for each second of a recording."""
    trace = Trace.open(path)
    meta = trace.metadata
    frame = trace.scan().select(_COLUMNS).filter(pl.col("kind").cast(pl.String).is_in(KINDS)).sort("time").collect()
    rows = to_records(frame)
    names, pids = VmNames(meta), {int(vm["id"]): int(vm["pid"]) for vm in meta.vms}
    rows["tgid"] = [pids.get(vm, 0) for vm in rows["kvm"].tolist()] if len(pids) > 1 else next(iter(pids.values()), 0)
    meters = Meters(idle_codes({"vendor": text_at(object_at(meta.raw, "host"), "vendor")}))
    meters.names = {vm: names.vm(vm) for vm in pids}
    if not len(rows):
        return
    first, last = int(rows["time"][0]), int(rows["time"][-1])
    meters.second(first)
    for begin in range(first, last + 1, SECOND):
        at, until = np.searchsorted(rows["time"], [np.uint64(begin), np.uint64(begin + SECOND)])
        meters.see(rows[at:until])
        end = min(begin + SECOND, max(last, begin + 1))  # the last one may be shorter
        yield end - first, meters.second(end)


class Played:
    """A recording that is played at its own speed."""

    def __init__(self, path: Path) -> None:
        """Raises Problem where the file is no recording."""
        self._seconds = list(seconds(path))
        self._over = threading.Event()

    def start(self, show: Callable[[list[VcpuSecond]], None]) -> None:
        """Begin: `show` is called with each second's lines, from a thread."""
        threading.Thread(target=self._run, args=(show,), name="top", daemon=True).start()

    def close(self) -> None:
        """Stop playing."""
        self._over.set()

    def _run(self, show: Callable[[list[VcpuSecond]], None]) -> None:
        for _, lines in self._seconds:
            show(lines)
            if self._over.wait(1):
                return
