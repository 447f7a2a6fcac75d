# SPDX-License-Identifier: Apache-2.0
"""The sources of an analysis: recordings, and results of replays, which are checked when they are opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis import rows
from analysis.recorded_time import RecordedTime, recorded_times
from replay.bounds import bounds_text
from replay.own_policy import Agreement, told
from replay.result import KEY, SCHEMA
from replay.timing.diagnosis import Diagnosis
from traces import metadata
from traces.errors import Problem
from traces.foreign import check_whole_parquet, of_parquet
from traces.lazy_rows import lazy_rows
from traces.reader import Trace
from traces.selection import ALL, Selection
from traces.text import printable, some, vms_text

if TYPE_CHECKING:
    from traces.imports.guest_switches import GuestTasks

BATCH_ROWS: Final = 1 << 14
_MAJOR: Final = 1
_NEITHER: Final = "neither a trace nor the result of a replay"
# What reading a hostile file can raise in pyarrow.
_ERRORS: Final = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, OverflowError)
_TEXTS: Final = tuple(field.name for field in SCHEMA if pa.types.is_dictionary(field.type))


# Kinds that only a guest's entry leads to: a kernel that shows no entries (KVM in software, PVM) shows none of them.
_OF_GUESTS: Final = (
    "kvm_entry", "kvm_exit", "kvm_page_fault", "fast_page_fault", "kvm_mmu_set_spte", "kvm_mmu_spte_requested",
    "mmu_load", "root_get", "kvm_smm_transition", "kvm_cr", "kvm_mmio", "kvm_pio", "kvm_emulate_insn",
    "kvm_inj_exception",
)  # fmt: skip


@dataclass(frozen=True)
class GuestOfVm:
    """What was recorded inside the guest of one VM."""

    vm: int
    tasks: GuestTasks


class Recording:
    """A trace, with the kinds of event that it could have seen.

    `kinds` are those that were watched. `hidden` are those that were watched and could not be seen of these guests:
    that there is no such row does not mean that there was no such event.
    """

    def __init__(self, trace: Trace, window: rows.Window = rows.ALL) -> None:
        """`window` selects the rows of the trace that questions are asked of."""
        self.trace = trace
        self.window = window
        self.path = trace.path
        meta = trace.metadata
        watched = {str(probe.get("kind")) for probe in meta.probes if probe.get("how") != "none"}
        self.hidden = _hidden(trace, watched)
        self.kinds = frozenset(watched | {kind for kind, count in meta.kinds.items() if count}) - self.hidden
        self.guest: GuestOfVm | None = None  # what was recorded inside a guest
        self.symbol: Callable[[int], str] | None = None  # the name of a guest's address
        self.notes: list[str] = []  # what queries could not answer
        self.diagnosed: dict[tuple[bool, int], list[Diagnosis]] = {}  # keys: whether it was replayed, `exits`
        self._answers: dict[str, pl.DataFrame] = {}

    @classmethod
    def open(cls, path: Path | str, recorded_policy: str = "", selection: Selection = ALL) -> Recording:
        """Open a trace, or what is selected of it. Raises Problem if it is not a valid trace.

        For `recorded_policy` see `Trace.open`.
        """
        trace = Trace.open(path, recorded_policy)
        trace.check_span()
        since, _ = selection.window(trace)
        return cls(selection.of(trace), rows.Window(since, frozenset(selection.vcpus)))

    @cached_property
    def span(self) -> tuple[int, int]:
        """Boot ns of the first and the last row in the window; 0 where there is none."""
        first, last = self.metadata.span
        return max(first, self.window.since or first), last

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """Boot ns of each VM's first and last row in the window."""
        since = self.window.since
        return {
            vm: (max(first, since or first), last)
            for vm, (first, last) in self.metadata.spans.items()
            if since is None or last >= since
        }

    @cached_property
    def whole(self) -> Recording:
        """This recording from its first row on, wherever the window begins."""
        return self if self.window.since is None else Recording(self.trace, rows.Window(vcpus=self.window.vcpus))

    @property
    def replayed(self) -> bool:
        """Whether a replay has filled `times`."""
        return "times" in vars(self)

    @cached_property
    def times(self) -> list[RecordedTime]:
        """The time of each VM; the recording is read for it, unless its replay has set it."""
        return recorded_times(self.trace)

    @property
    def metadata(self) -> metadata.Metadata:
        return self.trace.metadata

    def scan(self) -> pl.LazyFrame:
        """Return the rows in the window; each row group is checked before it is read."""
        found = self.trace.scan()
        if self.window.since is not None:
            found = found.filter(pl.col("time") >= self.window.since)
        return found.filter(pl.col("vcpu").is_in(list(self.window.vcpus))) if self.window.vcpus else found

    def ask(self, *questions: rows.Question) -> list[pl.DataFrame]:
        """Return the answers to questions about the rows, with one pass for those that were not asked before.

        Raises Problem where the trace is damaged.
        """
        if any(question.name not in self._answers for question in questions):
            self.take(self.asking(*questions))
        return [self._answers[question.name] for question in questions]

    def asking(self, *questions: rows.Question) -> rows.Asking:
        """Return the questions that were not asked before, to be fed by who reads the rows; see `take`."""
        new = {question.name: question for question in questions if question.name not in self._answers}
        return rows.Asking(self.trace, list(new.values()), self.window)

    def take(self, asking: rows.Asking) -> None:
        """Keep the answers; rows that `asking` was not given are read now. Raises Problem as `ask` does."""
        self._answers |= asking.answers()

    def note(self, *lines: str) -> None:
        """Note, once each, what a query could not answer."""
        self.notes += [line for line in dict.fromkeys(lines) if line not in self.notes]

    def need(self, kinds: Iterable[str], what: str) -> None:
        """Raise Problem unless these kinds of event were watched."""
        lacking = [kind for kind in kinds if kind not in self.kinds]
        if lacking:
            if not self.hidden.isdisjoint(lacking):
                raise Problem(f"{self.path}: {what}: {', '.join(lacking)} not observable: {HIDDEN}")
            raise Problem(f"{self.path}: {what}: {', '.join(lacking)} not recorded ({self.why_not(lacking[0])})")

    def why_not(self, kind: str) -> str:
        """Return why a kind was not recorded."""
        whys = {str(probe.get("kind")): str(probe.get("why", "")) for probe in self.metadata.probes}
        return whys.get(kind) or "the preset did not ask for it: --events mmu has most, all has every kind"


HIDDEN: Final = "this kernel shows none of these guests, which did run"


def _hidden(trace: Trace, watched: Collection[str]) -> frozenset[str]:
    """Return watched kinds without a row although a guest ran, as a KVM_RUN that returned without error shows."""
    counts = trace.metadata.kinds
    if counts.get("kvm_entry") or counts.get("kvm_exit") or not counts.get("kvm_userspace_exit"):
        return frozenset()
    with suppress(Problem):  # where the file is damaged, each query reports that itself
        for batch in trace.batches(["kind", "ret"]):
            rows = pl.DataFrame(pl.from_arrow(batch))
            if ((rows["kind"] == "kvm_userspace_exit") & (rows["ret"] >= 0)).any():
                return frozenset(kind for kind in _OF_GUESTS if kind in watched and not counts.get(kind))
    return frozenset()


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
        file = _opened(path)
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
        file = _opened(self.path)
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


def open_source(path: Path | str, recorded_policy: str = "", selection: Selection = ALL) -> Recording | Result:
    """Open a trace or a result, whichever the file is, or what is selected of it. Raises Problem for other files.

    For `recorded_policy` see `Trace.open`; a result has its own.
    """
    path = Path(path)
    pairs = _opened(path).metadata.metadata or {}
    if KEY in pairs:
        if recorded_policy:
            raise Problem(f"{path}: a result is of a policy already: --recorded-policy is for traces")
        if selection.vcpus or selection.since or selection.until:
            raise Problem(f"{path}: a result is of whole VMs: --vcpu, --from and --to are for traces")
        return Result.open(path).selected(selection.vms)
    if metadata.KEY in pairs:
        return Recording.open(path, recorded_policy, selection)
    raise Problem(f"{path}: {_NEITHER}, but {of_parquet(path)}")


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


def _opened(path: Path) -> pq.ParquetFile:
    check_whole_parquet(path, _NEITHER)
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
