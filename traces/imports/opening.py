# SPDX-License-Identifier: Apache-2.0
"""A file, or standard input, as pieces of text: unpacked, and what mailers did to it undone. One piece is held."""

from __future__ import annotations

import binascii
import bz2
import gzip
import io
import lzma
import re
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa

from traces import foreign
from traces.errors import Problem
from traces.imports.mail_parts import mail_texts
from traces.imports.source_bytes import SourceBytes

STANDARD_INPUT: Final = Path("-")
_PIECE: Final = 1 << 20
_HEAD: Final = 1 << 16
_NESTED: Final = 3  # compressed in compressed
_DAMAGED: Final = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException, ValueError)

# What quoted-printable says of itself, or an equals sign or a blank as it has them, or two full lines with soft breaks;
# and what it never has.
_QUOTED: Final = re.compile(
    rb"^content-transfer-encoding: *quoted-printable|=3D|=20\r?\n|(?:^.{72,75}=\r?\n.{0,80}){2}", re.I | re.M
)
_NOT_QUOTED: Final = re.compile(rb"=(?![0-9A-F]{2}|\r?\n)")
_LINES: Final = re.compile(rb"^[\x20-\x7e\t]{20,}\r?\n", re.M)
# A mail whose text is in parts, or not readable as it is: quoted-printable alone is undone without taking it apart.
_MAIL: Final = re.compile(
    rb"\A(?:[!-9;-~]{1,60}:? .{0,999}\n(?:[ \t].{0,999}\n){0,99}){0,200}?"
    rb"content-(?:type: *multipart/|transfer-encoding: *base64)",
    re.I,
)
_HTML: Final = re.compile(rb"&(?:gt|lt|amp|nbsp|quot|#\d+);")
_ENTITIES: Final = (
    (b"&gt;", b">"), (b"&lt;", b"<"), (b"&nbsp;", b" "), (b"&quot;", b'"'), (b"&#39;", b"'"), (b"&#160;", b" "),
    (b"&#62;", b">"), (b"&#60;", b"<"), (b"<br>", b"\n"), (b"<br/>", b"\n"), (b"<br />", b"\n"), (b"<pre>", b"\n"),
    (b"</pre>", b"\n"), (b"&amp;", b"&"),
)  # fmt: skip


def _utf_16(head: bytes) -> str:
    """The name of the codec that a text is in two bytes a character by, empty where it is not."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    least = len(head) * 9 // 20
    if len(head) < 40 or head.count(0) < least:
        return ""
    return "utf-16-le" if head[1::2].count(0) >= least else "utf-16-be" if head[::2].count(0) >= least else ""


class Opened:
    """What is read: iterate `pieces` once. `cut` says afterwards why it ended early, if so; `how` what was undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = ""
        self.how: list[str] = []
        self._file: Any = _open(path)
        for _ in range(_NESTED):
            self.head = self._peek()
            unpacked = self._unpack()
            if unpacked is None:
                break
            self._file = unpacked
        else:
            raise Problem(f"{path}: compressed more than {_NESTED - 1} times: unpack it")
        magic = {
            b"\x17\x08D": "trace.dat",
            b"PERFILE2": "perf.data",
            b"2ELIFREP": "perf.data",
            b"PERFFILE": "perf.data",
        }
        # What the file is, if it is no text.
        self.binary = next((what for begin, what in magic.items() if self.head.startswith(begin)), "")

    def whole(self) -> SourceBytes:
        """The file, unpacked, to be read anywhere. Raises Problem where it is damaged as packed."""
        if not self.how and self.path != STANDARD_INPUT:
            self._file.close()
            self._file = self.path.open("rb")
            return SourceBytes(self._file)
        unpacked = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115 (closed by `close`)
        for piece in self.raw():
            unpacked.write(piece)
        self._file.close()
        self._file = unpacked
        return SourceBytes(unpacked)

    def check_text(self) -> None:
        """Raise a Problem where it is plainly no text."""
        damage = self.head.count(0)  # blocks of a log that were never written
        if not self.head or (
            damage and not _utf_16(self.head) and (damage == len(self.head) or not _LINES.search(self.head))
        ):
            raise Problem(f"{self.path}: nothing to import, but {foreign.named(self.path, self.head)}")

    def pieces(self) -> Iterator[bytes]:
        """The text. Pieces end anywhere."""
        if codec := _utf_16(self.head):
            self.how.append("UTF-16")
            return self._decoded(codec)
        if _MAIL.search(self.head):
            self.how.append("mail")
            return self._plain(mail_texts(b"".join(self.raw())))
        if _QUOTED.search(self.head) and not _NOT_QUOTED.search(self.head):
            self.how.append("quoted-printable")
            return self._unquoted()
        if _HTML.search(self.head):
            self.how.append("HTML")
            return self._plain(self._lines())
        return self._plain(self.raw())

    def raw(self) -> Iterator[bytes]:
        """What is in the file, unpacked."""
        try:
            while piece := self._file.read(_PIECE):
                yield piece
        except _DAMAGED as error:
            self.cut = f"it ends in the middle: {(str(error).splitlines() or [type(error).__name__])[0]}"

    def close(self) -> None:
        """Done with it."""
        if self.path != STANDARD_INPUT or self.binary:
            self._file.close()

    def _peek(self) -> bytes:
        try:
            head = bytes(self._file.read(_HEAD))
        except _DAMAGED as error:
            raise Problem(f"{self.path}: damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
        self._file = _Rest(head, self._file)
        return head

    def _unpack(self) -> Any:
        rest: Any = self._file
        if self.head.startswith(b"\x1f\x8b"):
            self.how.append("gzip")
            return gzip.GzipFile(fileobj=rest, mode="rb")
        if self.head.startswith(b"\xfd7zXZ\0"):
            self.how.append("xz")
            return lzma.LZMAFile(rest)
        if self.head.startswith(b"\x28\xb5\x2f\xfd"):
            self.how.append("zstd")
            return pa.CompressedInputStream(pa.PythonFile(rest, mode="r"), "zstd")
        if re.match(rb"BZh[1-9]", self.head):
            self.how.append("bzip2")
            return bz2.BZ2File(rest)
        return None

    def _lines(self) -> Iterator[bytes]:
        """Pieces that end with a line's end."""
        left = b""
        for piece in self.raw():
            whole, end, left_over = (left + piece).rpartition(b"\n")
            left = left_over
            if end:
                yield whole + end
            elif len(left) > _PIECE:
                yield left
                left = b""
        yield left

    def _unquoted(self) -> Iterator[bytes]:
        held = b""
        for piece in self._lines():
            held += piece
            if held.endswith((b"=\n", b"=\r\n")) and len(held) < 4 * _PIECE:
                continue  # a soft break: the line goes on
            yield from self._plain([binascii.a2b_qp(held)])
            held = b""
        yield from self._plain([binascii.a2b_qp(held)])

    def _plain(self, pieces: Any) -> Iterator[bytes]:
        html = bool(_HTML.search(self.head))
        if html and "HTML" not in self.how:
            self.how.append("HTML")
        for piece in pieces:
            if html:
                for entity, plain in _ENTITIES:
                    piece = piece.replace(entity, plain)
            if piece.find(0xC2) >= 0:  # one byte is found at the speed of memory
                piece = piece.replace(b"\xc2\xa0", b" ")
            if piece.find(0) >= 0:
                piece = piece.replace(b"\0", b"")
            yield piece

    def _decoded(self, codec: str) -> Iterator[bytes]:
        import codecs

        decoder = codecs.getincrementaldecoder(codec)("replace")
        for piece in self.raw():
            yield decoder.decode(piece).encode()


class _Rest(io.RawIOBase):
    """What was looked at, and then the rest."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._head:
            taken = self._head if size < 0 else self._head[:size]
            self._head = self._head[len(taken) :]
            return taken if size >= 0 else taken + self._file.read()
        return self._file.read(size) or b""

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and self._file is not sys.stdin.buffer:
            self._file.close()
        super().close()


def _open(path: Path) -> IO[bytes]:
    if path == STANDARD_INPUT:
        return sys.stdin.buffer
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise Problem(f"{path}: nothing to import, but a directory: give a file")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise Problem(f"{path}: nothing to import (not a file): give - and send it to standard input")
        return path.open("rb")
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
