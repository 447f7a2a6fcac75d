# SPDX-License-Identifier: Apache-2.0
"""The result of a replay as a source of an analysis: its metadata and its rows, of which nothing is trusted."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from replay.bounds import bounds_text
from replay.own_policy import Agreement, told
from replay.result import KEY, SCHEMA
from replay.timing.diagnosis import Diagnosis
from traces.errors import Problem
from traces.foreign import check_whole_parquet
from traces.lazy_rows import lazy_rows
from traces.text import printable, some, vms_text

BATCH_ROWS: Final = 1 << 14
NEITHER: Final = "neither a trace nor the result of a replay"
_MAJOR: Final = 1
# What reading a hostile file can raise in pyarrow.
_ERRORS: Final = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, OverflowError)
_TEXTS: Final = tuple(field.name for field in SCHEMA if pa.types.is_dictionary(field.type))


@dataclass(frozen=True)
class ResultPolicy:
    """A policy of a result.

    `open` lists what the trace does not determine under it; `assumes` says what was assumed. `keeps` is whether the TDP
    MMU holds a reference of its own on roots, so that they stay until they are invalidated, and `at_least` whether
    counts and times have no upper end.
    """

    name: str
    kernel: str
    recorded: bool
    own: bool
    bounds: tuple[str, ...]
    open: tuple[str, ...]
    assumes: str
    keeps: bool
    at_least: bool

    def given(self, refault: str) -> str:
        """Return how undetermined counts are given, under the result's assumption `refault` (empty: none)."""
        return bounds_text(refault, at_least=self.at_least)


@dataclass(frozen=True)
class Cost:
    """The ns that an operation costs.

    `source` says whether that was measured; `error` is relative, None for an assumed cost.
    """

    name: str
    ns: int
    source: str
    error: float | None

    @property
    def measured(self) -> bool:
        return self.source.startswith("measured")


@dataclass(frozen=True)
class ResultTimes:
    """What a result's metadata says of one VM's times.

    `refused`: why there are none; empty if there are. `marked`: what makes them less certain than they seem; empty if
    nothing does. `stuck`: vCPUs that made no progress in the recording.
    """

    vm: int
    began: int
    refused: str
    marked: str
    costs: tuple[Cost, ...]
    stuck: tuple[Diagnosis, ...]


@dataclass(frozen=True)
class ResultAgreement:
    """Whether one VM's replay under the recording's own policy agrees with its rows: see `replay.own_policy`.

    `text` is empty where it does; `differences` counts what differs, decided or undecided.
    """

    vm: int
    agreement: Agreement
    text: str
    row: int | None
    differences: int


class Result:
    """A result of `kvmtrace replay -o`.

    Every byte of it is untrusted: Arrow decodes it and every batch is validated. polars' own reader is not used for it,
    because it aborts the process on some hostile files.
    """

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path = path
        self.document = document
        self._only: frozenset[int] = frozenset()  # the VMs that are read; empty: all
        try:
            self.policies = tuple(_policy(each) for each in _list(document, "policies", dict))
            self.trace_path = Path(_text(_object(document, "trace"), "path"))
            self.trace_events = _count(_object(document, "trace"), "events")
            self.kernel = _text(_object(document, "trace"), "kernel")
            self.refault = _text(document, "refault")
            self.missing = tuple(_list(document, "missing", str))
            self.broken = tuple(_list(document, "broken", str))
            self.agreements = tuple(map(_agreement, _list(document.get("own_policy") or {"vms": []}, "vms", dict)))
            self.vms = tuple(_vm(each) for each in _list(document.get("time") or {"vms": []}, "vms", dict))
        except _Malformed as error:
            raise Problem(f"{path}: damaged: {error} of its metadata is not what the format says") from None
        names = [policy.name for policy in self.policies]
        if len(set(names)) != len(names):
            raise Problem(f"{path}: damaged: a policy is in its metadata twice")

    @classmethod
    def open(cls, path: Path | str) -> Result:
        """Open a result and decode all of it once. Raises Problem for what is no result that this version reads."""
        path = Path(path)
        file = open_parquet(path)
        pairs = file.metadata.metadata or {}
        if KEY not in pairs:
            raise Problem(f"{path}: not the result of a replay")
        document = metadata_of(pairs[KEY], path)
        result = cls(path, document)
        known = {(policy.name, bound) for policy in result.policies for bound in policy.bounds}
        for batch in result.batches():
            there = pl.DataFrame(pl.from_arrow(batch.select(["policy", "bound"]))).unique().rows()
            strange = [row for row in there if row not in known]
            if strange:
                what = printable(f"{strange[0][0]} ({strange[0][1]})")
                raise Problem(f"{path}: damaged: there are rows of {what}, of which its metadata says nothing")
        return result

    def selected(self, vms: Collection[int]) -> Result:
        """Return this result with these VMs only (all, if none is given). Raises Problem for one that it lacks."""
        if not vms:
            return self
        there = set(self.scan().select(pl.col("vm").unique()).collect()["vm"])
        if unknown := sorted(set(vms) - there):
            raise Problem(f"{self.path}: no {vms_text(unknown)} in it; there are {some(sorted(there)) or 'none'}")
        other = copy(self)
        other._only = frozenset(vms)
        other.vms = tuple(vm for vm in self.vms if vm.vm in other._only)
        return other

    @property
    def untrusted(self) -> list[str]:
        """Lines on VMs whose replay the recording's rows contradict, which are to be said before all else."""
        return told(
            [each.text for each in self.agreements if each.agreement is Agreement.DIFFERS], len(self.agreements)
        )

    @property
    def timed(self) -> bool:
        """Whether the result has times."""
        return self.document.get("time") is not None

    def scan(self) -> pl.LazyFrame:
        """Return the rows with all columns of this version; those that an older result does not have are null."""
        schema = {field.name: pl.String() if field.name in _TEXTS else _polars(field) for field in SCHEMA}
        return lazy_rows(pl.Schema(schema), self.batches)

    def batches(self, columns: Collection[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows as validated batches of these columns (default: all); dictionaries become text."""
        file = open_parquet(self.path)
        _check_types(self.path, file.schema_arrow)
        fields = [
            field.with_type(pa.large_string()) if field.name in _TEXTS else field
            for field in SCHEMA
            if columns is None or field.name in columns
        ]
        stored = [field.name for field in fields if field.name in file.schema_arrow.names]
        read = list(dict.fromkeys([*stored, *(["vm"] if self._only else [])]))
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=read, use_threads=False):
                batch.validate(full=True)
                arrays = [
                    batch.column(field.name).cast(field.type)
                    if field.name in stored
                    else pa.nulls(batch.num_rows, field.type)
                    for field in fields
                ]
                for field, array in zip(fields, arrays, strict=True):
                    if array.null_count and not field.nullable:
                        raise ValueError(f"`{field.name}` is null in a row")
                    if pa.types.is_signed_integer(field.type) and (pc.min(array).as_py() or 0) < 0:
                        raise ValueError(f"`{field.name}` is below 0 in a row")
                found = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
                if self._only:
                    found = found.filter(pc.is_in(batch.column("vm"), pa.array(sorted(self._only), pa.int32())))
                yield found
        except _ERRORS as error:
            raise _damaged(self.path, error) from None


def metadata_of(text: bytes, path: Path) -> Mapping[str, Any]:
    """Return the JSON metadata of a result. Raises Problem where it is damaged or of a newer format."""
    try:
        document: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise Problem(f"{path}: damaged: its metadata is not JSON") from None
    version = document.get("format") if isinstance(document, dict) else None
    if not isinstance(version, dict) or not isinstance(version.get("major"), int):
        raise Problem(f"{path}: damaged: its metadata has no format version")
    if version["major"] > _MAJOR:
        raise Problem(
            f"{path}: a result of format {version['major']}, newer than this kvmtrace reads: upgrade kvmtrace"
        )
    return document


class _Malformed(Exception):
    """Names the key of a result's metadata that is not what it should be."""


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file whose contents may be anything. Raises Problem for what is no Parquet file, or a damaged one."""
    check_whole_parquet(path, NEITHER)
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except pa.ArrowInvalid:
        raise Problem(f"{path}: damaged: its footer cannot be read") from None
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or 'damaged: its footer cannot be read'}") from None
    except _ERRORS as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> Problem:
    lines = str(error).splitlines()
    return Problem(f"{path}: damaged: {printable(lines[0]) if lines else type(error).__name__}")


def _check_types(path: Path, schema: pa.Schema) -> None:
    for field in SCHEMA:
        positions = schema.get_all_field_indices(field.name)
        if len(positions) > 1 or (not positions and not field.nullable):
            raise Problem(f"{path}: damaged: column `{field.name}` is {'there twice' if positions else 'missing'}")
        if positions:
            found = schema.field(positions[0]).type
            text = pa.types.is_dictionary(found) and found.value_type == pa.string()
            if not (text if field.name in _TEXTS else found == field.type):
                raise Problem(f"{path}: damaged: column `{field.name}` is of type {printable(found)}")


def _object(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise _Malformed(f"`{key}`")
    return value


def _list(document: Any, key: str, of: type) -> list[Any]:
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, list) or not all(isinstance(each, of) for each in value):
        raise _Malformed(f"`{key}`")
    return value


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise _Malformed(f"`{key}`")
    return value


def _count(document: Mapping[str, Any], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise _Malformed(f"`{key}`")
    return value


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key)
    if not isinstance(value, bool):
        raise _Malformed(f"`{key}`")
    return value


def _policy(document: Mapping[str, Any]) -> ResultPolicy:
    parameters = _object(document, "parameters" if "parameters" in document else "axes")  # the latter until 1.1
    return ResultPolicy(
        _text(document, "name"),
        _text(document, "kernel"),
        _flag(document, "recorded"),
        _flag(document, "own"),
        tuple(_list(document, "bounds", str)),
        tuple(_list(document, "open", str)),
        _text(document, "assumes"),
        _flag(parameters, "own_reference") and _text(parameters, "mmu") == "tdp",
        "at_least" in document and _flag(document, "at_least"),  # since 1.4
    )


def _vm(document: Mapping[str, Any]) -> ResultTimes:
    costs = _object(document, "costs")
    stuck = [_diagnosis(each, _count(document, "vm")) for each in _list(document, "stuck", dict)]
    return ResultTimes(
        _count(document, "vm"),
        _count(document, "began") if not document.get("refused") else 0,
        _text(document, "refused"),
        _text({"marked": "", **document}, "marked"),
        tuple(_cost(name, _object(costs, name)) for name in costs),
        tuple(stuck),
    )


def _agreement(document: Mapping[str, Any]) -> ResultAgreement:
    try:
        agreement = Agreement(_text(document, "agreement"))
    except ValueError:
        raise _Malformed("`agreement`") from None
    row = None if document.get("from_row") is None else _count(document, "from_row")
    differences = _count(document, "differences")
    return ResultAgreement(_count(document, "vm"), agreement, _text(document, "text"), row, differences)


def _diagnosis(document: Mapping[str, Any], vm: int) -> Diagnosis:
    counts = {name: _count(document, name) for name in ("vcpu", "rip", "exits", "since", "until", "seq")}
    rows = tuple(_list({"rows": [], **document}, "rows", str))  # results before 1.3 have neither these nor a kind
    return Diagnosis(
        vm=vm, kind=_text({"kind": "", **document}, "kind"), why=_text(document, "why"), rows=rows, **counts
    )


def _cost(name: str, document: Mapping[str, Any]) -> Cost:
    error = document.get("error")
    if error is not None and (not isinstance(error, int | float) or isinstance(error, bool)):
        raise _Malformed("`error`")
    return Cost(name, _count(document, "ns"), _text(document, "from"), None if error is None else float(error))


def _polars(field: pa.Field) -> pl.DataType:
    return pl.Series(pa.nulls(0, field.type)).dtype
