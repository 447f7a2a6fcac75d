# SPDX-License-Identifier: Apache-2.0
"""Reading a trace: nothing in the file is trusted before it was checked.

Every byte is under a CRC: the footer is checked before Arrow parses it, each row group before Arrow decodes it, and
every decoded batch is validated fully. Decoding is done by Arrow, not by polars, which aborts the process on some
hostile files (traces/lazy_rows.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from traces import kernels
from traces.columns import SCHEMA
from traces.errors import Problem
from traces.frame import NO_TRACE, check_footer, check_row_groups, check_schema, crc_of
from traces.kernels.policies import POLICIES
from traces.kernels.policy_rows import COLUMNS, KINDS, PolicyRow, Watch
from traces.metadata import BY_RELEASE, BY_ROWS, BY_TYPES, BY_USER, KEY, Metadata, RowGroup, parse
from traces.row_values import values_of
from traces.schema import BY_NAME
from traces.text import printable, some, vms_text
from traces.untrusted import object_at

if TYPE_CHECKING:
    import polars as pl

BATCH_ROWS: Final = 1 << 16
UNKNOWN_CODE: Final = 255
_POLICY_ROWS: Final = 1 << 14  # rows in a batch that is examined for the policy
_POLICY_BATCHES: Final = 8
_TELLING: Final = [BY_NAME[kind].code for kind in KINDS]
_BY: Final = {"rows": BY_ROWS, "types": BY_TYPES, "release": BY_RELEASE}
_KNOWN: Final = frozenset(SCHEMA.names)
# What decoding a hostile file can raise in pyarrow; MemoryError where a length lies.
_DECODE_ERRORS: Final = (
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    MemoryError,
    OverflowError,
)


class Trace:
    """One trace file, checked: `open` it; `metadata` says what it is; `batches` and `scan` give its rows."""

    def __init__(self, path: Path, file: pq.ParquetFile, metadata: Metadata) -> None:
        self.path = path
        self.metadata = metadata
        self.schema: pa.Schema = file.schema_arrow
        self._file = file
        self._verified: set[int] = set()
        self._fetch: Callable[[RowGroup], None] | None = None
        self._row_groups = metadata.row_groups  # all of the file's, whatever is selected
        self._chosen = list(range(len(metadata.row_groups)))
        self._until: int | None = None
        self._groups = self._by_vm()

    def check_span(self) -> None:
        """Raise a Problem where rows are further apart than a difference of times in ns, of 64 bits, can be."""
        first, last = self.metadata.span
        if last - first >= 1 << 63:
            raise Problem(f"{self.path}: damaged: its rows' times are more than 292 years apart")

    @classmethod
    def open(
        cls, path: Path | str, recorded_policy: str = "", fetch: Callable[[RowGroup], None] | None = None
    ) -> Trace:
        """Open and check the file; raises Problem (one line, with the path) if it is not a sound trace of format 1.

        `recorded_policy` is the root policy that the recorded kernel had, whatever the trace says. `fetch` is called
        with each row group before its bytes are first read, for a file that does not have all of them yet
        (stores/remote_trace.py).
        """
        path = Path(path)
        if recorded_policy and recorded_policy not in POLICIES:
            raise Problem(f"--recorded-policy {printable(recorded_policy)}: give one of {', '.join(POLICIES)}")
        rows_end = check_footer(path)
        try:
            file = pq.ParquetFile(path, read_dictionary=["kind"], pre_buffer=False)
            pairs = file.metadata.metadata or {}
        except _DECODE_ERRORS as error:
            raise _damaged(path, "footer", error) from None
        text = pairs.get(KEY)
        if text is None:
            raise Problem(f"{path}: {NO_TRACE} (a Parquet file without `{KEY.decode()}` metadata)")
        metadata = parse(text, str(path))
        check_schema(path, file.schema_arrow)
        check_row_groups(path, file.metadata, metadata, rows_end)
        opened = cls(path, file, metadata)
        opened._fetch = fetch
        opened.metadata = opened._with_policy_of_rows()
        if recorded_policy:
            opened.metadata = replace(opened.metadata, seen_policy=recorded_policy, policy_by=BY_USER)
        return opened

    def _with_policy_of_rows(self) -> Metadata:
        """Return the metadata with the root policy that rows show, where they show one.

        For traces of format 1.0 the rows were never examined; those of early recorders may contradict the types.
        """
        metadata = self.metadata
        by = object_at(metadata.raw, "policy").get("by")
        if by in _BY:
            return replace(metadata, policy_by=_BY[by])
        if not metadata.kinds.get("root_get"):
            return metadata
        try:
            watch = Watch(metadata.policy, kernels.recorded(metadata).layout.invalid)
            watch.known |= {int(root["id"]) for root in metadata.uncreated_roots if not self._created(root["vm"])}
            for number, batch in enumerate(self.batches(COLUMNS, size=_POLICY_ROWS)):
                # Who zaps a root that the VM itself holds is seen when it is invalidated: mostly at the end.
                kept = watch.bears_out and watch.own_reference
                if watch.settled or kept or number == _POLICY_BATCHES:
                    break
                telling = batch.take(pa.array(np.flatnonzero(np.isin(kind_codes(batch), _TELLING))))
                watch.see(map(PolicyRow._make, zip(*map(values_of, telling.columns), strict=True)))
        except Problem:
            return metadata  # reading these rows reports it
        other = "" if "kernel" in metadata.raw else watch.other
        return replace(metadata, seen_policy=other, policy_by=BY_ROWS if other or watch.bears_out else BY_TYPES)

    def _created(self, vm: int | None) -> bool:
        """Return whether the VM was created during the recording, so that all its roots were."""
        return any(each["id"] == vm and each["origin"] == "created" for each in self.metadata.vms)

    def _by_vm(self) -> dict[int | None, list[int]]:
        groups: dict[int | None, list[int]] = {}  # None: of no VM
        for index in self._chosen:
            groups.setdefault(self._row_groups[index].vm, []).append(index)
        return groups

    @property
    def partial(self) -> bool:
        """Whether only some VMs, or rows up to a moment, are selected; `metadata.root_count` still counts all roots."""
        return self._until is not None or len(self._chosen) < len(self._row_groups)

    def selected(self, vms: Collection[int] | None = None, until: int | None = None) -> Trace:
        """Return the trace with these VMs only (None: all), and with the rows before `until` (boot ns; None: all).

        Row groups of other VMs, and those that begin later, are not read. `metadata` is that of the rows that are left,
        except for losses and gaps, which may concern any VM. Raises Problem where nothing is left.
        """
        if vms is None and until is None:
            return self
        end = until
        other = copy(self)
        unknown = sorted(set(vms or ()) - {int(vm["id"]) for vm in self.metadata.vms})
        if unknown:
            known = some([vm["id"] for vm in self.metadata.vms]) or "none"
            raise Problem(f"{self.path}: no {vms_text(unknown)} in it; there are {known}")
        other._chosen = [
            index
            for index in self._chosen
            if (vms is None or self._row_groups[index].vm in vms)
            and (end is None or self._row_groups[index].first_time < end)
        ]
        other._until = until
        other._groups = other._by_vm()
        kinds: Counter[str] = Counter()
        for batch in other.batches(["kind"]):
            for each in batch.column("kind").cast(pa.string()).value_counts().to_pylist():
                kinds[each["values"]] += each["counts"]
        groups = [self._row_groups[index] for index in other._chosen]
        other.metadata = replace(
            self.metadata,
            vms=tuple(
                {**vm, "until": None if end is not None and (vm["until"] or 0) >= end else vm["until"]}
                for vm in self.metadata.vms
                if (vms is None or vm["id"] in vms) and (end is None or int(vm["id"]) in other._groups)
            ),
            row_groups=tuple(
                group if end is None else replace(group, last_time=min(group.last_time, end - 1)) for group in groups
            ),
            kinds=dict(kinds),
            events=kinds.total(),
        )
        if not kinds:
            begun = min((first for vm, (first, _) in self.metadata.spans.items() if not vms or vm in vms), default=0)
            after = (begun - self.metadata.span[0]) / 1e9
            raise Problem(f"{self.path}: what is selected has its first row {after:.6f} s after the recording's begin")
        return other

    def reopened(self) -> Trace:
        """Return the trace with a file of its own, so that another thread can read it at the same time."""
        footer = self._file.metadata
        other = copy(self)
        other._file = pq.ParquetFile(self.path, metadata=footer, read_dictionary=["kind"], pre_buffer=False)
        return other

    @property
    def rows(self) -> int:
        """The number of rows in the whole file, whatever part of it is selected."""
        return sum(group.rows for group in self._row_groups)

    def counts(self) -> dict[str, int]:
        """Return the number of stored rows by kind name."""
        return dict(self.metadata.kinds)

    def groups(self, vm: int) -> list[RowGroup]:
        """Return the row groups of a VM."""
        return [self._row_groups[index] for index in self._groups.get(vm, ())]

    def batches(
        self,
        columns: Sequence[str] | None = None,
        vm: int | None = None,
        size: int = BATCH_ROWS,
        since: int | None = None,
        seqs: tuple[int, int] | None = None,
        but: Collection[int] = (),
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows as validated record batches of at most `size` rows, on one thread, in file order.

        Within one VM, file order is ring order (ascending `seq`). With `vm`, only that VM's rows; rows of no known VM,
        and `gap` rows, are not among them (gaps are in `metadata.gaps`). `columns` are in the order given; default:
        all. Row groups that end before `since` (boot ns) are not read; the others are whole. `seqs`: only row groups
        that have a row between these two numbers, both included. `but`: without the rows of these VMs.
        """
        there = self.schema.names
        names = list(there if columns is None else columns)
        unknown = [name for name in names if name not in there]
        if unknown:
            raise Problem(f"{self.path}: no column `{unknown[0]}` in this trace")
        fields = self._fields(names)
        with_time = fields if self._until is None else self._fields(list(dict.fromkeys((*names, "time"))))
        for index in self._chosen if vm is None else self._groups.get(vm, ()):
            group = self._row_groups[index]
            if group.vm in but or (since is not None and group.last_time < since):
                continue
            if seqs is not None and (group.last_seq < seqs[0] or group.first_seq > seqs[1]):
                continue
            if self._until is None or group.last_time < self._until:
                yield from self._decode(index, fields, size)
                continue
            import pyarrow.compute as pc  # takes 0.1 s, and few commands cut a row group

            for batch in self._decode(index, with_time, size):
                kept = batch.filter(pc.less(batch.column("time"), self._until))
                if kept.num_rows:
                    yield kept.select(names)

    def _fields(self, names: list[str]) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in names])

    def scan(self) -> pl.LazyFrame:
        """Return the whole trace as a polars LazyFrame, decoded and checked by this reader whenever it is collected.

        Nested columns, which a later version may have, are not in it.
        """
        import polars as pl  # takes 0.2 s, and a replay needs none

        from traces.lazy_rows import lazy_rows

        flat = [field.name for field in self.schema if not pa.types.is_nested(field.type)]
        none = pl.DataFrame(pl.from_arrow(self.schema.empty_table().select(flat)))
        return lazy_rows(
            none.schema, lambda asked: self.batches([name for name in flat if asked is None or name in asked])
        )

    def roots(self) -> pl.DataFrame:
        """Return every root: `root`, `vm`, `table`, `role`, `first_seq`, `first_time`, `created`; times null if unused.

        `first_time` is in ns. `created` says that its creation was recorded; if not, `table` and `role` are what the
        snapshot or its first use said.
        """
        import polars as pl

        first = [pl.col(name).first() for name in ("vm", "table", "role")]
        times = [pl.col("seq").first().alias("first_seq"), pl.col("time").first().alias("first_time")]
        used = self.scan().filter(pl.col("root") != 0).group_by("root").agg(*first, *times).collect()
        kept = ("vm", "table", "role")
        known = pl.DataFrame(
            [{"root": root["id"], **{name: root[name] for name in kept}} for root in self.metadata.uncreated_roots],
            schema={"root": pl.Int32, **{name: used.schema[name] for name in kept}},
        )
        uncreated = known.join(used.drop(kept), on="root", how="left").with_columns(created=False)
        created = used.join(known, on="root", how="anti").with_columns(created=True)
        return pl.concat([created, uncreated.select(created.columns)]).sort("root")

    def verify(self) -> None:
        """Check every row group's bytes against their CRC; a Problem names the first that does not fit."""
        for index in self._chosen:
            self._verify(index)

    def _decode(self, index: int, fields: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
        self._verify(index)
        group = self._row_groups[index]
        rows, names = 0, fields.names
        try:
            constants = _Constants(fields, group, min(size, group.rows))
            stored = [name for name in names if name not in constants] or ["time"]
            foreign = [name for name in stored if name not in _KNOWN]
            for batch in self._file.iter_batches(size, [index], stored, use_threads=False):
                _validate(batch, foreign)
                columns = dict(zip(stored, batch.columns, strict=True)) | constants.columns(rows, batch.num_rows)
                rows += batch.num_rows
                batch = pa.RecordBatch.from_arrays([columns[name] for name in names], schema=fields)
                del columns
                yield batch
                del batch  # else it is held while the next one is decoded
        except _DECODE_ERRORS as error:
            raise _damaged(self.path, f"row group {index}", error) from None
        if rows != group.rows:
            raise Problem(f"{self.path}: damaged: row group {index} has not the rows that its metadata says")

    def _verify(self, index: int) -> None:
        if index not in self._verified:
            group = self._row_groups[index]
            if self._fetch is not None:
                self._fetch(group)
            if crc_of(self.path, group.offset, group.size) != group.crc32:
                raise Problem(f"{self.path}: damaged: row group {index} does not fit its checksum")
            self._verified.add(index)


class _Constants:
    """The columns of a row group that need no decoding: one value in all rows, or row numbers without a gap."""

    def __init__(self, fields: pa.Schema, group: RowGroup, size: int) -> None:
        self._size = size
        self._first_seq = group.first_seq
        self._dense_seq = fields.get_field_index("seq") >= 0 and group.last_seq - group.first_seq == group.rows - 1
        self._arrays = {
            field.name: _repeat(group.constants[field.name], field, size)
            for field in fields
            if field.name in group.constants
        }

    def __contains__(self, name: str) -> bool:
        return name in self._arrays or (name == "seq" and self._dense_seq)

    def columns(self, start: int, count: int) -> dict[str, pa.Array]:
        """Return the values of `count` rows from row `start` of the group on."""
        whole = count == self._size
        arrays = self._arrays if whole else {name: array.slice(0, count) for name, array in self._arrays.items()}
        if not self._dense_seq:
            return arrays
        first = self._first_seq + start
        return arrays | {"seq": pa.array(np.arange(first, first + count))}


def _repeat(value: int | None, field: pa.Field, size: int) -> pa.Array:
    if not pa.types.is_integer(field.type) or (value is None and not field.nullable):
        raise ValueError(f"{value} is no constant for `{field.name}`")
    if value is None:
        return pa.nulls(size, field.type)
    return pa.array(np.full(size, value, field.type.to_pandas_dtype()))


def kind_codes(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    """Return the `kind` column as kind codes of this version's schema; 255 for a kind that it does not know."""
    kind = batch.column("kind")
    codes: NDArray[np.uint8] = codes_of(kind.dictionary.to_pylist()).take(kind.indices.to_numpy())
    return codes


def codes_of(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return the codes of kinds by name; 255 for a kind that this version does not know."""
    return np.array([BY_NAME[name].code if name in BY_NAME else UNKNOWN_CODE for name in names], np.uint8)


def _validate(batch: pa.RecordBatch, foreign: Sequence[str]) -> None:
    """Check what `batch.validate(full=True)` does, at a tenth of its cost.

    `foreign` are columns unknown to this version. Fixed-width values need no further check, and of `kind` only the
    indices do.
    """
    batch.validate()
    for name in foreign:
        batch.column(name).validate(full=True)
    if "kind" in batch.schema.names and batch.num_rows:
        kind = batch.column("kind")
        kind.dictionary.validate(full=True)
        if kind.null_count or int(kind.indices.to_numpy().view(np.uint32).max()) >= len(kind.dictionary):
            raise ValueError("a kind is not in its dictionary")


def _damaged(path: Path, what: str, error: BaseException) -> Problem:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return Problem(f"{path}: damaged: {what}: {printable(why[:200])}")
