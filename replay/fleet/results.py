# SPDX-License-Identifier: Apache-2.0
"""The results of a fleet's replay: how they are written so that none is lost or doubled, and how they are read back.

A place has `job.json`, which policies and version its results are of; `tasks/ID.parquet`, one object for each task that
is done, created once; `failed/ID.parquet`, one row for each that cannot be done; and `merged/`, the results of many
tasks in one object, which says in its footer of which. A task that is in a merged object is nowhere else, whatever
objects are left of it; one that is done has not failed.

An object's footer has its tasks as `footer_of` packs them: there may be millions, and a report looks at all of them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from replay.fleet.fleet_schema import KEY, RESULTS, RESULTS_FORMAT
from traces.errors import Problem
from traces.lazy_rows import lazy_rows
from traces.stores.location import Location, location
from traces.stores.object_store import Objects, StoredObject
from traces.text import printable

JOB: Final = "job.json"
TASKS, FAILED, MERGED = "tasks", "failed", "merged"
MERGE: Final = 256  # up to this many objects of single tasks stay as they are
MERGE_BYTES: Final = 16 << 20  # of a merged object, about: some are in memory at a time
MERGE_TASKS: Final = 1 << 14
DELETES: Final = 1000  # in one request
_GROUP_ROWS: Final = 1 << 17
_NAME: Final = re.compile(rf"({TASKS}|{FAILED})/[0-9a-f]{{32}}\.parquet|{MERGED}/[^/]+\.parquet")
_AHEAD: Final = 8  # objects that are read while others are looked at
_TAIL: Final = 1 << 20
_TEXTS: Final = [field.name for field in RESULTS if pa.types.is_string(field.type)]
_DAMAGED: Final = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError)
Digests = NDArray[np.bytes_]
_DIGEST: Final = "S16"  # a task's name, which is hexadecimal
_ROWS: Final = "<u4"
Item = TypeVar("Item")
Found = TypeVar("Found")


class ResultFolder:
    """A place that results go to."""

    def __init__(self, place: Location, *, make: bool = False) -> None:
        """`make`: a folder that is not there is made."""
        if make and place.folder is not None:
            try:
                place.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Problem(f"{printable(place.text)}: cannot be made: {error.strerror}") from None
        self.place = place
        self.objects = Objects(place)

    def claim(self, job: Mapping[str, Any]) -> None:
        """Have it hold the results of this job, and of no other. Raises Problem where it holds another's."""
        document = {"what": "results", "format": RESULTS_FORMAT, **job}
        if self.objects.create(JOB, json.dumps(document, indent=2).encode()):
            return
        there = self.job()
        other = [name for name in document if there.get(name) != document[name]]
        if other:
            raise Problem(
                f"{printable(self.place.text)}: holds results of other {' and '.join(other)} "
                f"({printable(json.dumps(there.get(other[0])))}): choose another place with -o"
            )

    def job(self) -> dict[str, Any]:
        """What its results are of. Raises Problem where there is none."""
        if not self.objects.has(JOB):
            where = printable(self.place.text)
            raise Problem(f"{where}: no results of a fleet: `kvmtrace fleet replay -o` writes them")
        try:
            document = json.loads(self.objects.read_all(JOB))
            if document["what"] != "results":
                raise ValueError
            major = document["format"]["major"]
            if major > RESULTS_FORMAT["major"]:
                raise Problem(f"{printable(self.place.text)}: results of a newer kvmtrace: upgrade this one")
            if major < RESULTS_FORMAT["major"]:
                raise Problem(
                    f"{printable(self.place.text)}: results of an earlier kvmtrace, in a form that is not read any "
                    "more: replay again, with another place for -o"
                )
        except (ValueError, KeyError, TypeError):
            raise Problem(f"{printable(self.place.text)}: its {JOB} is damaged: no results of a fleet") from None
        return dict(document)

    def has(self, task: str) -> bool:
        """Whether a task's own object is there; it may also be in a merged one."""
        return self.objects.has(f"{TASKS}/{task}.parquet")

    def put(self, task: str, table: pa.Table) -> None:
        """A task's result, unless it is there."""
        self.objects.create(f"{TASKS}/{task}.parquet", _written([(task, table)]))

    def put_failed(self, task: str, facts: Mapping[str, Any]) -> None:
        """Why a task cannot be done: columns of RESULTS, `reason` among them."""
        table = pa.Table.from_pylist([{"row": "failed", **facts}], RESULTS)
        self.objects.replace(f"{FAILED}/{task}.parquet", _written([(task, table)]))

    def state(self) -> ResultState:
        """What is there."""
        found: dict[str, list[StoredObject]] = {TASKS: [], FAILED: [], MERGED: []}
        for folder, objects in found.items():
            objects += (each for each in self.objects.list(folder) if _NAME.fullmatch(each.key))
        for objects in found.values():
            objects.sort(key=lambda each: each.key)
        inside = [names for names, _ in in_order(self._contents, found[MERGED])]
        every = np.sort(np.concatenate([_digests([]), *inside]))  # np.unique would hash them, ten times as slow
        first = np.ones(len(every), bool)
        first[1:] = every[1:] != every[:-1]
        return ResultState(found[TASKS], found[FAILED], found[MERGED], every[first], not bool(first.all()))

    def _contents(self, found: StoredObject) -> tuple[Digests, NDArray[np.uint32]]:
        return _tasks_in(self.objects, found)

    def merge(self, least: int = 0) -> int:
        """Put the objects of single tasks together, where there are so many (0: MERGE); how many. It may be killed.

        A merged object is complete before the first of its parts is deleted.
        """
        least = least or MERGE
        state = self.state()
        loose = state.loose
        kept = {each.key for each in loose}
        left = [each for each in state.tasks if each.key not in kept]
        if len(loose) >= least:
            for part in _parts(loose):
                read = in_order(lambda each: self.objects.read_all(each.key, each.etag), part)
                tables = [
                    (task_of(each), _table(self.place, each.key, data)) for each, data in zip(part, read, strict=True)
                ]
                name = hashlib.sha256("".join(task for task, _ in tables).encode()).hexdigest()[:32]
                self.objects.create(f"{MERGED}/{name}.parquet", _written(tables))
                left += part
        open_ = {each.key for each in state.failures}
        left += [each for each in state.failed if each.key not in open_]
        for at in range(0, len(left), DELETES):
            self.objects.delete([each.key for each in left[at : at + DELETES]])
        return len(loose) if len(loose) >= least else 0


@dataclass(frozen=True)
class ResultState:
    """The objects of a place. `inside` are the tasks of merged ones, sorted (16 bytes each: there may be millions).

    `doubled`: some of them are in two: runs at the same time may merge the same.
    """

    tasks: list[StoredObject]
    failed: list[StoredObject]
    merged: list[StoredObject]
    inside: Digests
    doubled: bool

    def done(self, tasks: Sequence[str]) -> set[str]:
        """Those of these tasks that have a result."""
        own = set(map(task_of, self.tasks))
        merged = _among(_digests(tasks), self.inside)
        return {task for task, there in zip(tasks, merged.tolist(), strict=True) if there or task in own}

    @property
    def loose(self) -> list[StoredObject]:
        """The objects of single tasks that are in no merged one."""
        there = _among(_digests(list(map(task_of, self.tasks))), self.inside)
        return [each for each, merged in zip(self.tasks, there.tolist(), strict=True) if not merged]

    @property
    def failures(self) -> list[StoredObject]:
        """Of tasks that have no result."""
        done = self.done(list(map(task_of, self.failed)))
        return [each for each in self.failed if task_of(each) not in done]


class Results:
    """Results as they are read: each task's once, however many objects there are of it."""

    def __init__(self, folder: ResultFolder) -> None:
        self._folder = folder
        self.metadata = folder.job()
        self._state = folder.state()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows, object after object in order of their names; a task's are next to each other. Raises Problem.

        Texts are dictionaries where they are stored as such, and each batch has its own.
        """
        names = list(RESULTS.names if columns is None else columns)
        state = self._state
        seen = _digests([]) if state.doubled else None
        read = [*state.failures, *state.merged, *state.loose]
        for found, source in zip(read, in_order(self._source, read), strict=True):
            try:
                file = pq.ParquetFile(source, read_dictionary=_TEXTS)
                batches = file.iter_batches(1 << 16, columns=names, use_threads=True)
                if seen is not None:
                    tasks, rows = _tasks_of(file.metadata)
                    batches = _filtered(batches, np.repeat(~_among(tasks, seen), rows))
                    seen = np.union1d(seen, tasks)
                for batch in batches:
                    yield batch.select(names)
            except _DAMAGED as error:
                raise _damaged(self._folder.place, found.key, error) from None

    def rows(self) -> pl.LazyFrame:
        """All of it, read anew for each `collect`."""
        none = pl.DataFrame(pl.from_arrow(RESULTS.empty_table()))

        def flat(asked: Collection[str] | None) -> Iterator[pa.RecordBatch]:
            names = [name for name in RESULTS.names if asked is None or name in asked]
            schema = pa.schema([RESULTS.field(name) for name in names])
            for batch in self.batches(names):
                yield batch.cast(schema)

        return lazy_rows(none.schema, flat)

    def _source(self, found: StoredObject) -> Any:
        """What Arrow reads an object from."""
        place = self._folder.place
        if place.folder is not None:
            return Path(place.folder) / found.key
        return pa.BufferReader(self._folder.objects.read_all(found.key, found.etag))


def open_results(where: str) -> Results:
    """The results in a place. Raises Problem where there are none."""
    return Results(ResultFolder(location(where)))


def task_of(found: StoredObject) -> str:
    """The task that an object is named by."""
    return found.key.rpartition("/")[2].removesuffix(".parquet")


def in_order(function: Callable[[Item], Found], items: Collection[Item]) -> Iterator[Found]:
    """What a function gives for each, some at a time, in their order; few that nobody has asked for yet are held."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[Future[Found]] = deque()
        try:
            for each in items:
                waiting.append(pool.submit(function, each))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _written(tables: Sequence[tuple[str, pa.Table]]) -> bytes:
    """Tables of tasks as one object: a task's rows are in one row group."""
    sink = io.BytesIO()
    # Arrow's own copy of the schema would have the tasks once more.
    with pq.ParquetWriter(sink, RESULTS, compression="zstd", store_schema=False) as writer:
        writer.add_key_value_metadata({KEY: footer_of([task for task, _ in tables], [len(rows) for _, rows in tables])})
        waiting: list[pa.Table] = []
        for _, table in tables:
            if sum(map(len, waiting)) + len(table) > _GROUP_ROWS and waiting:
                _write(writer, waiting)
                waiting = []
            waiting.append(table)
        _write(writer, waiting)
    return sink.getvalue()


def footer_of(tasks: Sequence[str], rows: Sequence[int]) -> bytes:
    """The footer's metadata of an object with this many rows of each of these tasks, one after the other.

    In base 64: 16 bytes of each task's name, and of each its rows as a little-endian number of four bytes.
    """
    packed = {"tasks": _digests(tasks).tobytes(), "rows": np.array(rows, _ROWS).tobytes()}
    texts = {name: base64.b64encode(data).decode() for name, data in packed.items()}
    return json.dumps({"what": "results", "format": RESULTS_FORMAT, **texts}).encode()


def _write(writer: pq.ParquetWriter, tables: list[pa.Table]) -> None:
    whole = pa.concat_tables([table.select(RESULTS.names).replace_schema_metadata(None) for table in tables])
    writer.write_table(whole, row_group_size=max(len(whole), 1))


def _parts(objects: list[StoredObject]) -> Iterator[list[StoredObject]]:
    """Objects for one merged object each."""
    part: list[StoredObject] = []
    size = 0
    for each in objects:
        if part and (size + each.size > MERGE_BYTES or len(part) == MERGE_TASKS):
            yield part
            part, size = [], 0
        part.append(each)
        size += each.size
    yield part


def _table(place: Location, key: str, data: bytes) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(data)).select(RESULTS.names).cast(RESULTS)
    except _DAMAGED as error:
        raise _damaged(place, key, error) from None


def _tasks_in(objects: Objects, found: StoredObject) -> tuple[Digests, NDArray[np.uint32]]:
    """The tasks of a merged object and the rows of each, by its footer."""
    try:
        data = objects.read(found.key, max(found.size - _TAIL, 0), found.size, found.etag)
        length = int.from_bytes(data[-8:-4], "little") + 8
        if length > len(data):
            data = objects.read(found.key, max(found.size - length, 0), found.size, found.etag)
        return _tasks_of(pq.read_metadata(pa.BufferReader(data)))
    except _DAMAGED as error:
        raise _damaged(objects.place, found.key, error) from None


def _tasks_of(footer: Any) -> tuple[Digests, NDArray[np.uint32]]:
    document = json.loads(footer.metadata[KEY])
    names, counts = (base64.b64decode(document[name], validate=True) for name in ("tasks", "rows"))
    tasks, rows = np.frombuffer(names, _DIGEST), np.frombuffer(counts, _ROWS)
    if len(tasks) != len(rows) or int(rows.sum(dtype=np.int64)) != footer.num_rows:
        raise ValueError("it does not name the tasks of its rows")
    return tasks, rows


def _among(some: Digests, of: Digests) -> NDArray[np.bool_]:
    """Which of some are in a sorted array."""
    if not len(of):
        return np.zeros(len(some), bool)
    at = np.searchsorted(of, some)
    return np.asarray(of[np.minimum(at, len(of) - 1)] == some)


def _digests(tasks: Sequence[str]) -> Digests:
    """The names of tasks."""
    return np.frombuffer(bytes.fromhex("".join(tasks)), _DIGEST)


def _filtered(batches: Iterator[pa.RecordBatch], keep: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """The rows of an object that are to be kept."""
    mask = pa.array(keep)
    at = 0
    for batch in batches:
        yield batch.filter(mask.slice(at, len(batch)))
        at += len(batch)


def _damaged(place: Location, key: str, error: BaseException) -> Problem:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return Problem(
        f"{printable(place.text)}/{printable(key)}: damaged: {printable(why[:200])}: remove it, and replay again"
    )
