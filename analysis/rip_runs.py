"""vCPUs that do not get past an instruction: their longest runs of exits at one RIP, asked of a recording's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from replay.decode.same_rip import RipRuns
from replay.decode.vm_inputs import dense_numbers, vcpu_ids
from replay.timing.stuck_rip import RipRun, longest_runs
from traces.reader import UNKNOWN_CODE, Trace
from traces.schema import BY_NAME

_NO_KIND: Final = 255
_NAMES: Final = tuple(field.name for field in fields(RipRun))
SCHEMA: Final = {"vm": pl.Int64, **dict.fromkeys(_NAMES, pl.Int64), "rip": pl.UInt64}


@dataclass(frozen=True, eq=False)
class RipQuestion:
    """Each vCPU's longest run: columns `vm` and the fields of `RipRun`."""

    trace: Trace
    name: str = "runs of exits at one RIP"
    columns: frozenset[str] = frozenset({"seq", "time", "vcpu", "kind", "rip", "addr"})

    def begin(self) -> _Following:
        return _Following(self.trace)


class _Following:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._vms: dict[int, Mapping[str, Any]] = {int(vm["id"]): vm for vm in trace.metadata.vms}
        self._runs: dict[int, tuple[RipRuns, NDArray[np.int32]]] = {}

    def feed(self, rows: pl.DataFrame, one_vm: bool) -> None:
        for part in [rows] if one_vm else rows.partition_by("vm", maintain_order=True):
            vm = part["vm"][0] if len(part) else None
            if vm in self._vms:
                self._feed(vm, part)

    def _feed(self, vm: int, rows: pl.DataFrame) -> None:
        if vm not in self._runs:
            numbers = dense_numbers(self._trace.path, self._vms[vm])
            self._runs[vm] = RipRuns(len(vcpu_ids(self._vms[vm]))), numbers
        runs, numbers = self._runs[vm]
        columns = {name: rows[name].to_numpy() for name in ("seq", "time", "rip", "addr")}
        kind = _codes(rows.schema["kind"]).take(rows["kind"].to_physical().fill_null(_NO_KIND).to_numpy())
        vcpu = numbers.take(rows["vcpu"].fill_null(-1).to_numpy())
        runs.feed(SimpleNamespace(vcpu=vcpu, kind=kind, **columns))

    def answer(self) -> pl.DataFrame:
        found = []
        for vm, (runs, _) in self._runs.items():
            runs.finish()
            found += [{"vm": vm, **asdict(run)} for run in longest_runs(runs, vcpu_ids(self._vms[vm]))]
        return pl.DataFrame(found, schema=SCHEMA)


def kind_codes(kind: pl.Series) -> NDArray[np.uint8]:
    """The code of each row's kind."""
    numbers = kind.to_physical()
    codes: NDArray[np.uint8] = _codes(kind.dtype)[
        (numbers.fill_null(_NO_KIND) if numbers.null_count() else numbers).to_numpy()
    ]
    return codes


@cache
def _codes(kinds: pl.DataType) -> NDArray[np.uint8]:
    """The code of each kind by its place in the column's type, which is that of the trace's own version."""
    names = kinds.categories.to_list() if isinstance(kinds, pl.Enum) else []
    codes = np.full(_NO_KIND + 1, UNKNOWN_CODE, np.uint8)
    codes[: len(names)] = [BY_NAME[name].code if name in BY_NAME else UNKNOWN_CODE for name in names]
    return codes


def runs_of(answer: pl.DataFrame) -> list[tuple[int, RipRun]]:
    """Runs with their VM, from an answer."""
    return [(row["vm"], RipRun(**{name: row[name] for name in _NAMES})) for row in answer.to_dicts()]
