"""Results of `kvmtrace fleet replay` in local files, read in batches of the columns that are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from replay.fleet.fleet_schema import FORMAT, KEY, RESULTS
from traces.errors import Problem
from traces.foreign import check_whole_parquet

BATCH_ROWS: Final = 1 << 17
_ERRORS: Final = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, OverflowError)
_TEXTS: Final = [field.name for field in RESULTS if pa.types.is_string(field.type)]


def batches(where: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of every file, in order of their names; texts as dictionaries. A Problem names the file that is odd."""
    files = sorted(where.rglob("*.parquet")) if where.is_dir() else [where]
    if not files:
        raise Problem(f"{where}: no results in it: `kvmtrace fleet replay -o` makes some")
    for path in files:
        yield from _of_file(path, columns)


def _of_file(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    check_whole_parquet(path, "not results of `kvmtrace fleet replay`")
    try:
        file = pq.ParquetFile(path, read_dictionary=[name for name in columns if name in _TEXTS])
        _check(path, file, columns)
        yield from file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=True)
    except _ERRORS as error:
        raise Problem(
            f"{path}: damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None


def _check(path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> None:
    pairs = file.metadata.metadata or {}
    if KEY not in pairs:
        raise Problem(f"{path}: not results of `kvmtrace fleet replay`")
    major = json.loads(pairs[KEY])["format"]["major"]
    if major != FORMAT["major"]:
        raise Problem(f"{path}: results of format {major}, and this version reads {FORMAT['major']}")
    for name in columns:
        if name not in file.schema_arrow.names:
            raise Problem(f"{path}: damaged: there is no column {name}")
