# SPDX-License-Identifier: Apache-2.0
"""Checks of a trace file before any of its rows is decoded: magics, CRCs, sizes, schema, row groups."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from traces import foreign
from traces.columns import SCHEMA
from traces.encoding import MAGIC, PARQUET_MAGIC, SEAL_SIZE
from traces.errors import Problem
from traces.metadata import MAX_BYTES, Metadata, RowGroup
from traces.text import printable

NO_TRACE: Final = "not a kvmtrace trace"
MAX_ROW_GROUP_ROWS: Final = 1 << 22
MAX_FOOTER: Final = MAX_BYTES + (64 << 20)
TAIL_SIZE: Final = 8  # the footer's length, Parquet's magic
_CHUNK: Final = 1 << 18


def check_footer(path: Path) -> int:
    """Check the magics and the footer's CRC; return where the row groups end. Raises Problem."""
    foreign.check_whole_parquet(path, NO_TRACE)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(size - TAIL_SIZE, 0))
            length = int.from_bytes(file.read(TAIL_SIZE)[:4], "little")
            footer = size - TAIL_SIZE - length
            if length > MAX_FOOTER or footer < len(PARQUET_MAGIC) + SEAL_SIZE:
                raise Problem(f"{path}: damaged: no room for the footer that its end speaks of")
            file.seek(footer - SEAL_SIZE)
            seal = file.read(SEAL_SIZE)
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    if seal[: len(MAGIC)] != MAGIC:
        raise Problem(f"{path}: {NO_TRACE}, but {foreign.of_parquet(path)}")
    if crc_of(path, footer, size - footer) != int.from_bytes(seal[len(MAGIC) :], "little"):
        raise Problem(f"{path}: damaged: its footer does not fit its checksum")
    return footer - SEAL_SIZE


def crc_of(path: Path, offset: int, size: int) -> int | None:
    """Return the CRC-32 of `size` bytes at `offset`; None where the file ends before."""
    crc = 0
    buffer = memoryview(bytearray(min(size, _CHUNK)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while size:
                count = file.readinto(buffer[: min(size, _CHUNK)])
                if not count:
                    return None
                crc = zlib.crc32(buffer[:count], crc)
                size -= count
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    return crc


def check_schema(path: Path, schema: pa.Schema) -> None:
    """Raise Problem unless each column of this version is there with its type; other columns are ignored."""
    for field in SCHEMA:
        positions = schema.get_all_field_indices(field.name)
        if len(positions) != 1:
            raise Problem(f"{path}: damaged: column `{field.name}` is {'missing' if not positions else 'there twice'}")
        found = schema.field(positions[0])
        if field.name == "kind":
            fits = pa.types.is_dictionary(found.type) and found.type.value_type == pa.string()
        else:
            fits = found.type == field.type
        if not fits:
            raise Problem(f"{path}: damaged: column `{field.name}` is {printable(found.type)}, not {field.type}")


def check_row_groups(path: Path, footer: Any, metadata: Metadata, rows_end: int) -> None:
    """Raise Problem unless Parquet's footer and our own index agree, with possible sizes, on every byte.

    Single columns are not examined here: where a forged footer makes Arrow throw, pyarrow's view of a column ends the
    process (26.0: `RowGroupMetaData.column` declares no exception), while decoding raises.
    """
    groups = metadata.row_groups
    fits = footer.num_row_groups == len(groups) and footer.num_rows == metadata.events
    fits = fits and sum(group.rows for group in groups) == sum(metadata.kinds.values()) == metadata.events
    end = len(PARQUET_MAGIC)
    for index, group in enumerate(groups):
        fits = fits and group.offset == end and _row_group_fits(footer.row_group(index), group)
        end = group.offset + group.size
    if not fits or end != rows_end:
        raise Problem(f"{path}: damaged: its row groups are not what its metadata says")


def _row_group_fits(footer: Any, group: RowGroup) -> bool:
    if not 0 < group.rows <= MAX_ROW_GROUP_ROWS or footer.num_rows != group.rows:
        return False
    # No encoding of a number, nor the names of kinds, takes more.
    return bool(0 <= footer.total_byte_size <= footer.num_columns * ((1 << 20) + 24 * group.rows))
