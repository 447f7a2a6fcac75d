# SPDX-License-Identifier: Apache-2.0
"""Write and read the result of a replay, a Parquet file; RESULT.md in this directory specifies it for readers."""

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
from replay.simulate.model_state import Counters, Happened
from replay.simulate.operations import Block, Cause, Word
from traces.errors import Problem
from traces.outputs import RESULT, RESULT_KEY, Output

KEY: Final = RESULT_KEY
FORMAT: Final = {"major": 1, "minor": 4}
# A row group ends after about this many rows or writes: opening a row group costs a query as much as reading some
# thousand rows.
GROUP_ROWS: Final = 1 << 15
GROUP_WRITES: Final = 1 << 9
_NAMES: Final = pa.dictionary(pa.int8(), pa.string())
_LABELS: Final = pa.dictionary(pa.int16(), pa.string())
_CODED: Final = {
    "event": pa.array([event.name.lower() for event in Happened]),
    "cause": pa.array([cause.name.lower() for cause in Cause]),
}

# Columns with counts: those of a vCPU, which a VM's row has as sums, and those of a VM only.
OF_VCPU: Final = tuple(field.name for field in fields(Vcpus) if field.name != "stuck")
OF_VM: Final = tuple({"tables": "tables_built"}.get(field.name, field.name) for field in fields(Counters))
_LOGGED: Final = ("root", "leaves", "tables", "roots_alive", "tables_alive")
# Columns with virtual time, in ns, by what the time was spent on.
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
    """Return a VM's counters under their names in the result: `tables` is called `tables_built` there."""
    return {{"tables": "tables_built"}.get(name, name): int(value) for name, value in vars(counters).items()}


@dataclass(frozen=True)
class _Rows:
    """`count` rows of one kind (`row`), of one VM and one policy.

    `columns` has an array per column; events and causes are given as numbers. Masked values become null, and so does
    every column of the schema that is absent from `columns`.
    """

    row: str
    policy: int
    bound: str
    vm: int
    count: int
    columns: Mapping[str, Any]


class ResultWriter:
    """Writes a result file.

    Rows are gathered into large row groups, and the file appears at its path only once it is complete.
    """

    def __init__(self, path: Path, policies: list[str], inputs: Sequence[Path] = (), *, force: bool = False) -> None:
        """Begin a result with the policies named `policies`.

        `inputs` are the files that the result is made from, which `path` must not be; `force` is explained in
        `traces.outputs`.
        """
        self._policies = policies
        self._waiting: list[_Rows] = []
        self._rows = 0  # number of rows in `_waiting`
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
        """Return a writer for the rows of one VM.

        If `held`, its rows wait for `VmWriter.release`, so that VMs stay in order.
        """
        return VmWriter(vm, self._write, held)

    def _write(self, rows: _Rows) -> None:
        self._waiting.append(rows)
        self._rows += rows.count
        if self._rows >= GROUP_ROWS or len(self._waiting) >= GROUP_WRITES:
            self._flush()

    def close(self, metadata: dict[str, Any]) -> None:
        """Write the file's metadata and finish it."""
        self._flush()
        self._file.add_key_value_metadata({KEY: json.dumps({"format": FORMAT, **metadata}).encode()})
        self._file.close()
        self._output.commit()

    def _flush(self) -> None:
        """Write the waiting rows as one row group.

        Each column is made once for all of them, since making one costs as much as a row.
        """
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
    """Return a dictionary column in which names[i] is repeated counts[i] times."""
    known = {name: code for code, name in enumerate(dict.fromkeys(names))}
    codes = np.array([known[name] for name in names], dtype.index_type.to_pandas_dtype())
    return pa.DictionaryArray.from_arrays(np.repeat(codes, counts), list(known))


def _column(field: pa.Field, there: list[tuple[int, int, Any]], count: int) -> pa.Array:
    """Return a column of `count` rows from its pieces, each given as (begin, end, values).

    Rows without a piece are null.
    """
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
    """Writes the rows of one VM."""

    def __init__(self, vm: int, write: Callable[[_Rows], None], held: bool) -> None:
        self._vm = vm
        self._write_out = write
        self._logs: dict[tuple[int, str], list[dict[str, Any]]] = {}
        self._logged = 0
        self._held: list[_Rows] | None = [] if held else None

    def release(self) -> None:
        """Write the rows that were held back, and hold back no more."""
        for rows in self._held or ():
            self._write_out(rows)
        self._held = None

    def log(
        self, policy: int, bound: str, words: list[Word], ids: list[int], log: RootLog, block: Block, first: int
    ) -> None:
        """Write rows of kind `root`: the root log of one block.

        `ids` are the recorded vCPU ids, `first` the block's first operation.
        """
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
        """Write the rows of kind `root` that were gathered from many blocks, since each write has a high fixed cost."""
        for (policy, bound), parts in self._logs.items():
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            acted = columns.pop("acted")
            columns["vcpu"] = np.ma.masked_array(columns["vcpu"], ~acted)
            self._write("root", policy, bound, len(acted), columns)
        self._logs, self._logged = {}, 0

    def moments(self, row: str, policy: int, bound: str, vcpu: int, columns: Mapping[str, Any]) -> None:
        """Write rows of kind `progress` or `stall` for one vCPU; the column `cause` holds numbers of `Cause`."""
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
        """Write one row of kind `vcpu` for each vCPU, and one row of kind `vm`.

        `whole` has the VM's counts, `stuck` the trace row (seq) where each vCPU stopped or None, and `timed` the
        columns of times, one value per vCPU.
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
    """Return the metadata of a result file. Raises Problem if the file is not a result."""
    try:
        pairs = pq.read_metadata(path).metadata or {}
        document: dict[str, Any] = json.loads(pairs[KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError):
        raise Problem(f"{path}: not the result of a replay") from None
    return document
