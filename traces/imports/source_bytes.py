# SPDX-License-Identifier: Apache-2.0
"""A file of others' data that can be read anywhere: every access is checked against its size."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import IO, Any, Final

import pyarrow as pa

from traces.errors import Problem

_PIECE: Final = 1 << 20
_END_OF_FRAME: Final = b"\x01\0\0"  # a last block, of no bytes
_MOST: Final = 1 << 27  # bytes that one part of a file may unpack to


class Damaged(Exception):
    """The file does not hold what it says it does, or ends before; the text says where, in one line."""


class SourceBytes:
    """`size` bytes of an open file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)

    def read(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on; raises Damaged where they are not there."""
        if at < 0 or count < 0 or at + count > self.size:
            raise Damaged(f"it ends at byte {self.size:,}, and its data at {at + count:,}")
        self._file.seek(at)
        data = self._file.read(count)
        if len(data) != count:
            raise Damaged(f"byte {at + len(data):,} could not be read")
        return data

    def some(self, at: int, count: int) -> bytes:
        """At most `count` bytes from `at` on."""
        self._file.seek(min(at, self.size))
        return self._file.read(max(min(count, self.size - at), 0))


class SourceCursor:
    """Numbers and strings of a block, one after the other; raises Damaged beyond its end."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.at, self._what = data, 0, what

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise Damaged(f"{self._what} end in the middle")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, form: str) -> tuple[int, ...]:
        """Numbers by their `struct` letters: H, I, Q, q."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def string(self) -> str:
        """Up to the next NUL."""
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise Damaged(f"{self._what} end in the middle")
        text = self.data[self.at : end].decode(errors="replace")
        self.at = end + 1
        return text

    @property
    def left(self) -> int:
        return len(self.data) - self.at


def unpacked(codec: str, data: bytes, size: int) -> bytes:
    """A part that is compressed by itself (`codec`: zstd, zlib), of `size` bytes. Raises Damaged, Problem."""
    import zlib

    if size > _MOST:
        raise Damaged(f"a part of {size:,} bytes is more than there can be")
    try:
        if codec == "zstd":
            made: Any = pa.decompress(data, decompressed_size=size, codec="zstd", asbytes=True)
        elif codec == "zlib":
            made = zlib.decompressobj().decompress(data, size)
        else:
            raise Problem(f"its data are compressed by {codec[:20]!r}, which is not known here")
    except (pa.ArrowException, OSError, ValueError, zlib.error) as error:
        raise Damaged(f"a compressed part is damaged ({str(error).splitlines()[0][:60]})") from None
    if len(made) != size:
        raise Damaged("a compressed part is shorter than it says")
    return bytes(made)


class _Ended(io.RawIOBase):
    """A file, and behind it the end of a zstd frame."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, _END_OF_FRAME

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if data := self._file.read(size):
            return data
        data, self._end = self._end, b""
        return data


def unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """What a zstd stream unpacks to that was never ended, as perf leaves it. Raises Damaged."""
    file.seek(0)
    try:
        with pa.CompressedInputStream(pa.PythonFile(_Ended(file), mode="r"), "zstd") as stream:
            while piece := stream.read(_PIECE):
                yield piece
    except (pa.ArrowException, OSError, ValueError):
        raise Damaged("its compressed records are damaged") from None
