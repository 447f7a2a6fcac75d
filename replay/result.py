# SPDX-License-Identifier: Apache-2.0
"""The result of a replay as a Parquet file of its own; RESULT.md next to this file says what a reader may rely on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from replay.simulate.engine import RootLog, Vcpus
from replay.simulate.operations import Block, Cause, Word
from replay.simulate.reference import Counters, Happened
from traces.errors import Problem
from traces.outputs import RESULT, RESULT_KEY, Output

KEY: Final = RESULT_KEY
FORMAT: Final = {"major": 1, "minor": 4}
# A row group ends at about this many rows, or writes: what a query pays for one, it pays for some thousand rows.
GROUP_ROWS: Final = 1 << 15
GROUP_WRITES: Final = 1 << 9
_NAMES: Final = pa.dictionary(pa.int8(), pa.string())
_LABELS: Final = pa.dictionary(pa.int16(), pa.string())
_CODED: Final = {
    "event": pa.array([event.name.lower() for event in Happened]),
    "cause": pa.array([cause.name.lower() for cause in Cause]),
}

# Columns that count: of a vCPU, and of a VM (where those of its vCPUs are summed).
OF_VCPU: Final = tuple(field.name for field in fields(Vcpus) if field.name != "stuck")
OF_VM: Final = tuple({"tables": "tables_built"}.get(field.name, field.name) for field in fields(Counters))
_LOGGED: Final = ("root", "leaves", "tables", "roots_alive", "tables_alive")
# Virtual time, ns.
SPENT: Final = tuple(
    f"{name}_ns" for name in ("guest", "fault", "load", "unload", "wait", "other", "switch", "idle", "steal", "paused")
)
_TIMED: Final = ("clock", "recorded_ns", "wall_ns", "wall_low_ns", "wall_high_ns", *SPENT)
_STALLED: Final = ("stalls", "stalled_ns", "longest_stall_ns")

SCHEMA: Final = pa.schema([
    pa.field("row", _NAMES, nullable=False),
    pa.field("policy", _LABELS, nullable=False),
    pa.field("bound", _NAMES, nullable=False),
    pa.field("vm", pa.int32(), nullable=False),
    pa.field("vcpu", pa.int16()),
    pa.field("seq", pa.int64()),
    pa.field("time", pa.int64()),
    pa.field("event", _NAMES),
    pa.field("cause", _NAMES),
    pa.field("role", pa.uint32()),
    *(pa.field(name, pa.int64()) for name in (*_LOGGED, *OF_VCPU, *OF_VM, "roots_peak", "tables_peak")),
    *(pa.field(name, pa.int64()) for name in (*_TIMED, *_STALLED)),
])  # fmt: skip


def vm_counts(counters: Counters) -> dict[str, int]:
    """A VM's counters by their names in the result."""
    return {{"tables": "tables_built"}.get(name, name): int(value) for name, value in vars(counters).items()}


@dataclass(frozen=True)
class _Rows:
    """Rows of one kind, of one VM and policy. `columns`: arrays; of events and causes their numbers.

    What a masked array masks is null, and so is every column that is not there.
    """

    row: str
    policy: int
    bound: str
    vm: int
    count: int
    columns: Mapping[str, Any]


class ResultWriter:
    """Writes a result, many writes to a row group; the file appears under its name when all of it is written."""

    def __init__(self, path: Path, policies: list[str], inputs: Sequence[Path] = (), *, force: bool = False) -> None:
        """`inputs`: the files that it is made of, which `path` may not be; `force`: see `traces.outputs`."""
        self._policies = policies
        self._waiting: list[_Rows] = []
        self._rows = 0  # in them
        self._output = Output(path, RESULT, inputs, force=force)
        self._file = pq.ParquetWriter(self._output, SCHEMA, compression="zstd")

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(pa.ArrowException, OSError, Problem):
            self._file.close()
        self._output.discard()

    def of_vm(self, vm: int, held: bool) -> VmWriter:
        """What writes the rows of one VM; `held`: they wait for its `release`, so that VMs stay in order."""
        return VmWriter(vm, self._write, held)

    def _write(self, rows: _Rows) -> None:
        self._waiting.append(rows)
        self._rows += rows.count
        if self._rows >= GROUP_ROWS or len(self._waiting) >= GROUP_WRITES:
            self._flush()

    def close(self, metadata: dict[str, Any]) -> None:
        """Finish the file, with its metadata."""
        self._flush()
        self._file.add_key_value_metadata({KEY: json.dumps({"format": FORMAT, **metadata}).encode()})
        self._file.close()
        self._output.commit()

    def _flush(self) -> None:
        """A row group of what waits: a column is made once for all of it, since making one costs as much as a row."""
        waiting = self._waiting
        if not waiting:
            return
        counts = np.array([rows.count for rows in waiting])
        ends = np.cumsum(counts).tolist()
        names = {
            "row": [rows.row for rows in waiting],
            "policy": [self._policies[rows.policy] for rows in waiting],
            "bound": [rows.bound for rows in waiting],
        }
        arrays = []
        for field in SCHEMA:
            if field.name in names:
                arrays.append(_named(names[field.name], counts, field.type))
            elif field.name == "vm":
                arrays.append(pa.array(np.repeat(np.array([rows.vm for rows in waiting], np.int32), counts)))
            else:
                there = [
                    (end - rows.count, end, rows.columns[field.name])
                    for rows, end in zip(waiting, ends, strict=True)
                    if field.name in rows.columns
                ]
                arrays.append(_column(field, there, self._rows))
        self._file.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
        self._waiting, self._rows = [], 0


def _named(names: list[str], counts: NDArray[Any], dtype: pa.DictionaryType) -> pa.Array:
    """Names, each repeated the given number of times."""
    known = {name: code for code, name in enumerate(dict.fromkeys(names))}
    codes = np.array([known[name] for name in names], dtype.index_type.to_pandas_dtype())
    return pa.DictionaryArray.from_arrays(np.repeat(codes, counts), list(known))


def _column(field: pa.Field, there: list[tuple[int, int, Any]], count: int) -> pa.Array:
    """A column of this many rows from its pieces and their places; null where there is none."""
    if not there:
        return pa.nulls(count, field.type)
    coded = _CODED.get(field.name)
    values = np.zeros(count, np.int8 if coded is not None else field.type.to_pandas_dtype())
    null = np.ones(count, np.bool_)
    for begin, end, piece in there:
        values[begin:end] = np.ma.getdata(piece)
        null[begin:end] = np.ma.getmask(piece)
    column = pa.array(values, mask=null)
    return column if coded is None else pa.DictionaryArray.from_arrays(column, coded)


class VmWriter:
    """Makes the rows of one VM."""

    def __init__(self, vm: int, write: Callable[[_Rows], None], held: bool) -> None:
        self._vm = vm
        self._write_out = write
        self._logs: dict[tuple[int, str], list[dict[str, Any]]] = {}
        self._logged = 0
        self._held: list[_Rows] | None = [] if held else None

    def release(self) -> None:
        """Write what was held."""
        for rows in self._held or ():
            self._write_out(rows)
        self._held = None

    def log(
        self, policy: int, bound: str, words: list[Word], ids: list[int], log: RootLog, block: Block, first: int
    ) -> None:
        """Rows of kind `root`: a block's part of a root log. `ids` are the vCPUs' recorded ids."""
        if not len(log):
            return
        at = log.at - first
        vcpu = np.array([*ids, 0], np.int16)[log.vcpu]
        roles = np.array([word.word for word in words], np.uint32)
        self._logs.setdefault((policy, bound), []).append({
            "vcpu": vcpu,
            "acted": log.vcpu >= 0,
            "seq": block.seq[at],
            "time": block.time[at],
            "event": log.event,
            "cause": log.cause,
            "role": roles[log.word],
            **{name: getattr(log, name) for name in _LOGGED},
        })  # fmt: skip
        self._logged += len(log)
        if self._logged >= GROUP_ROWS:
            self._write_logs()

    def _write_logs(self) -> None:
        """Rows of kind `root` that were put together from many blocks: a write costs what some thousand rows do."""
        for (policy, bound), parts in self._logs.items():
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            acted = columns.pop("acted")
            columns["vcpu"] = np.ma.masked_array(columns["vcpu"], ~acted)
            self._write("root", policy, bound, len(acted), columns)
        self._logs, self._logged = {}, 0

    def moments(self, row: str, policy: int, bound: str, vcpu: int, columns: Mapping[str, Any]) -> None:
        """Rows of kind `progress` or `stall`: a vCPU's, with `cause` as a Cause."""
        if count := len(columns["clock"]):
            self._write(row, policy, bound, count, {**columns, "vcpu": np.full(count, vcpu, np.int16)})

    def counts(
        self,
        policy: int,
        bound: str,
        ids: list[int],
        vcpus: Vcpus,
        whole: dict[str, int],
        stuck: list[int | None],
        timed: Mapping[str, list[int]],
    ) -> None:
        """Rows of kind `vcpu`, one each, and one of kind `vm`. `stuck`: the rows (seq) where vCPUs stopped.

        `timed`: the columns of times of rows of vCPUs.
        """
        self._write_logs()
        own = {name: getattr(vcpus, name) for name in OF_VCPU}
        seq = np.ma.masked_array([at or 0 for at in stuck], [at is None for at in stuck])
        columns = {"vcpu": np.array(ids, np.int16), "seq": seq, **own, **timed}
        self._write("vcpu", policy, bound, len(ids), columns)
        sums = {name: np.array([values.sum()]) for name, values in own.items()}
        self._write("vm", policy, bound, 1, {**sums, **{name: np.array([n]) for name, n in whole.items()}})

    def _write(self, row: str, policy: int, bound: str, count: int, columns: Mapping[str, Any]) -> None:
        rows = _Rows(row, policy, bound, self._vm, count, columns)
        if self._held is None:
            self._write_out(rows)
        else:
            self._held.append(rows)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a result says of itself; a Problem if the file is none."""
    try:
        pairs = pq.read_metadata(path).metadata or {}
        document: dict[str, Any] = json.loads(pairs[KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError):
        raise Problem(f"{path}: not the result of a replay") from None
    return document
