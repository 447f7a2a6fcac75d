# SPDX-License-Identifier: Apache-2.0
"""The results of a fleet's replay: written so that none is lost or counted twice, and read back.

A place has `job.json`, which names the policies and the version of the results; `tasks/ID.parquet`, one object for each
finished task, created once; `failed/ID.parquet`, one row for each task that failed; and `merged/`, objects with the
results of many tasks each, whose footers name the tasks. A task in a merged object counts from there only, even while
its own object still exists, and a task with a result does not count as failed.

The footer of an object has its tasks in the packed form of `footer_of`: there may be millions, and a report reads them
all.
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
MERGE: Final = 256  # objects of single tasks are merged when there are at least this many
MERGE_BYTES: Final = 16 << 20  # approximate size of a merged object; several are in memory at a time
MERGE_TASKS: Final = 1 << 14  # the most tasks in a merged object
DELETES: Final = 1000  # objects deleted by one request
_GROUP_ROWS: Final = 1 << 17
_NAME: Final = re.compile(rf"({TASKS}|{FAILED})/[0-9a-f]{{32}}\.parquet|{MERGED}/[^/]+\.parquet")
_AHEAD: Final = 8  # objects that are read ahead
_TAIL: Final = 1 << 20  # bytes at the end of an object that are read at first, to find its footer
_TEXTS: Final = [field.name for field in RESULTS if pa.types.is_string(field.type)]
_DAMAGED: Final = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError)
Digests = NDArray[np.bytes_]
_DIGEST: Final = "S16"  # the 16 bytes that the hexadecimal name of a task stands for
_ROWS: Final = "<u4"  # the number of rows of a task
Item = TypeVar("Item")
Found = TypeVar("Found")


class ResultFolder:
    """A place in a file system or store that holds the results of one fleet replay."""

    def __init__(self, place: Location, *, make: bool = False) -> None:
        """With `make`, a folder that does not exist is created. Raises Problem if that fails."""
        if make and place.folder is not None:
            try:
                place.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Problem(f"{printable(place.text)}: cannot be made: {error.strerror}") from None
        self.place = place
        self.objects = Objects(place)

    def claim(self, job: Mapping[str, Any]) -> None:
        """Reserve the place for the results of this job. Raises Problem if it holds those of another job."""
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
        """Return the policies and the version of the place's results. Raises Problem if it holds no results."""
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
        """Return whether a task's own object exists; its result may also be in a merged object."""
        return self.objects.has(f"{TASKS}/{task}.parquet")

    def put(self, task: str, table: pa.Table) -> None:
        """Store a task's result, unless it exists."""
        self.objects.create(f"{TASKS}/{task}.parquet", _written([(task, table)]))

    def put_failed(self, task: str, facts: Mapping[str, Any]) -> None:
        """Store the row of a task that failed; `facts` are columns of RESULTS, including `reason`."""
        table = pa.Table.from_pylist([{"row": "failed", **facts}], RESULTS)
        self.objects.replace(f"{FAILED}/{task}.parquet", _written([(task, table)]))

    def state(self) -> ResultState:
        """Return the list of what is stored in the place."""
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
        """Merge the objects of single tasks if there are at least `least` (0: MERGE), and return how many were merged.

        It may be killed at any time: a merged object is complete before the first of its parts is deleted.
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
    """The objects in a place.

    `inside` are the tasks of merged objects, sorted (16 bytes each, since there may be millions).

    `doubled` says that some of them are in two merged objects, as when two runs merged at the same time.
    """

    tasks: list[StoredObject]
    failed: list[StoredObject]
    merged: list[StoredObject]
    inside: Digests
    doubled: bool

    def done(self, tasks: Sequence[str]) -> set[str]:
        """Return which of these tasks have a result."""
        own = set(map(task_of, self.tasks))
        merged = _among(_digests(tasks), self.inside)
        return {task for task, there in zip(tasks, merged.tolist(), strict=True) if there or task in own}

    @property
    def loose(self) -> list[StoredObject]:
        """The objects of single tasks that are in no merged object."""
        there = _among(_digests(list(map(task_of, self.tasks))), self.inside)
        return [each for each, merged in zip(self.tasks, there.tolist(), strict=True) if not merged]

    @property
    def failures(self) -> list[StoredObject]:
        """The objects of failed tasks that have no result."""
        done = self.done(list(map(task_of, self.failed)))
        return [each for each in self.failed if task_of(each) not in done]


class Results:
    """The results in a place, as they are read: each task once, however many objects contain it."""

    def __init__(self, folder: ResultFolder) -> None:
        self._folder = folder
        self.metadata = folder.job()
        self._state = folder.state()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows, object after object in order of their names; the rows of a task are adjacent. Raises Problem.

        Texts that are stored with a dictionary come as dictionary columns, and each batch has its own dictionary.
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
        """Return all rows as a lazy frame, which reads them anew at each `collect`."""
        none = pl.DataFrame(pl.from_arrow(RESULTS.empty_table()))

        def flat(asked: Collection[str] | None) -> Iterator[pa.RecordBatch]:
            names = [name for name in RESULTS.names if asked is None or name in asked]
            schema = pa.schema([RESULTS.field(name) for name in names])
            for batch in self.batches(names):
                yield batch.cast(schema)

        return lazy_rows(none.schema, flat)

    def _source(self, found: StoredObject) -> Any:
        """Return what Arrow reads an object from: a path, or a buffer with its bytes."""
        place = self._folder.place
        if place.folder is not None:
            return Path(place.folder) / found.key
        return pa.BufferReader(self._folder.objects.read_all(found.key, found.etag))


def open_results(where: str) -> Results:
    """Open the results in a place. Raises Problem if it holds none."""
    return Results(ResultFolder(location(where)))


def task_of(found: StoredObject) -> str:
    """Return the id of the task that an object is named after."""
    return found.key.rpartition("/")[2].removesuffix(".parquet")


def in_order(function: Callable[[Item], Found], items: Collection[Item]) -> Iterator[Found]:
    """Yield function(item) for each item, in order, computing up to _AHEAD of them in advance in threads."""
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
    """Return the tables of tasks as one Parquet object; the rows of a task are in one row group."""
    sink = io.BytesIO()
    # Arrow's own copy of the schema is left out: it would contain the list of tasks a second time.
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
    """Return the metadata for the footer of an object that holds rows[i] rows of tasks[i], one task after the other.

    The tasks (16 bytes each) and the numbers of rows (4 bytes each, little-endian) are in base 64.
    """
    packed = {"tasks": _digests(tasks).tobytes(), "rows": np.array(rows, _ROWS).tobytes()}
    texts = {name: base64.b64encode(data).decode() for name, data in packed.items()}
    return json.dumps({"what": "results", "format": RESULTS_FORMAT, **texts}).encode()


def _write(writer: pq.ParquetWriter, tables: list[pa.Table]) -> None:
    whole = pa.concat_tables([table.select(RESULTS.names).replace_schema_metadata(None) for table in tables])
    writer.write_table(whole, row_group_size=max(len(whole), 1))


def _parts(objects: list[StoredObject]) -> Iterator[list[StoredObject]]:
    """Split objects into groups, each of which becomes one merged object."""
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
    """Return the tasks of a merged object and the number of rows of each, read from its footer."""
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
    """Return for each element of `some` whether it is in the sorted array `of`."""
    if not len(of):
        return np.zeros(len(some), bool)
    at = np.searchsorted(of, some)
    return np.asarray(of[np.minimum(at, len(of) - 1)] == some)


def _digests(tasks: Sequence[str]) -> Digests:
    """Return the names of tasks as an array of 16 bytes each."""
    return np.frombuffer(bytes.fromhex("".join(tasks)), _DIGEST)


def _filtered(batches: Iterator[pa.RecordBatch], keep: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an object with only those rows for which `keep` is true."""
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
