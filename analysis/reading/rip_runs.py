# SPDX-License-Identifier: Apache-2.0
"""The question which vCPUs are stuck: their longest runs of exits at one RIP, and their last exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.reading.rows import KIND, DecodedRows
from replay.decode.dense import vcpus_of
from replay.decode.same_rip import RipRuns
from replay.decode.vm_inputs import dense_numbers, vcpu_ids
from replay.timing.stuck_rip import RipEnd, RipRun, last_exits, longest_runs
from traces.kernels.kernel import Kernel
from traces.reader import Trace

_RUN: Final = tuple(field.name for field in fields(RipRun))
_END: Final = tuple(field.name for field in fields(RipEnd))
_UNSIGNED: Final = dict.fromkeys(("rip", "addr", "at"), pl.UInt64)
# A row of an answer is a run, or a last exit, whose `exits` is null.
SCHEMA: Final = {"vm": pl.Int64, **dict.fromkeys((*_RUN, *_END), pl.Int64), **_UNSIGNED}
_ALL_VALID: Final = np.zeros(0, np.uint8)


@dataclass(frozen=True, eq=False)
class RipQuestion:
    """Finds each vCPU's longest runs and last exit; the answer has `vm` and the fields of `RipRun` or `RipEnd`."""

    trace: Trace
    kernel: Kernel | None
    name: str = "runs of exits at one RIP"
    columns: frozenset[str] = frozenset({"seq", "time", "vcpu", KIND, "rip", "addr", "code", "ret"})

    def begin(self) -> _Following:
        return _Following(self.trace, self.kernel)


class _Following:
    def __init__(self, trace: Trace, kernel: Kernel | None) -> None:
        self._trace, self._kernel = trace, kernel
        self._vms: dict[int, Mapping[str, Any]] = {int(vm["id"]): vm for vm in trace.metadata.vms}
        self._runs: dict[int, tuple[RipRuns, NDArray[np.int32]]] = {}

    def feed(self, vm: int, rows: DecodedRows) -> None:
        if vm not in self._vms:
            return
        if vm not in self._runs:
            numbers = dense_numbers(self._trace.path, self._vms[vm])
            known = () if self._kernel is None else (self._kernel.vendor, self._kernel.ret_pf.fixed)
            runs = RipRuns(len(vcpu_ids(self._vms[vm])), *known)
            self._runs[vm] = runs, numbers
        runs, numbers = self._runs[vm]
        columns = {name: rows[name] for name in ("seq", "time", "rip", "addr", "code", "ret")}
        vcpu = vcpus_of(rows["vcpu"], _ALL_VALID, 0, numbers)
        runs.feed(SimpleNamespace(vcpu=vcpu, kind=rows[KIND], **columns))

    def answer(self) -> pl.DataFrame:
        found = []
        for vm, (runs, _) in self._runs.items():
            runs.finish()
            ids = vcpu_ids(self._vms[vm])
            # Not `asdict`, which copies each value and takes ten times as long.
            found += [{"vm": vm, **vars(run)} for run in longest_runs(runs, ids)]
            found += [{"vm": vm, **vars(end)} for end in last_exits(runs, ids)]
        return pl.DataFrame(found, schema=SCHEMA)


def by_vm(answer: pl.DataFrame) -> dict[int, tuple[list[RipRun], list[RipEnd]]]:
    """Return the runs and last exits in an answer, by VM; VMs without any are missing."""
    found: dict[int, tuple[list[RipRun], list[RipEnd]]] = {}
    for row in answer.iter_rows(named=True):
        runs, ends = found.setdefault(row["vm"], ([], []))
        if row["exits"] is None:
            ends.append(RipEnd(**{name: row[name] for name in _END}))
        else:
            runs.append(RipRun(**{name: row[name] for name in _RUN}))
    return found
