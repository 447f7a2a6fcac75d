# SPDX-License-Identifier: Apache-2.0
"""Thrift's compact protocol as trees to be changed and written again: what Parquet's footer and page headers are.

A struct is a list of [field id, type, value]; a list is [element type, values]; numbers and bytes are themselves.
"""

from __future__ import annotations

from typing import Any, TypeAlias

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (I16, I32, I64)
Struct: TypeAlias = list[list[Any]]


def varint(number: int) -> bytes:
    number &= (1 << 70) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _zigzag(number: int) -> bytes:
    return varint(number << 1 ^ number >> 69)


class Reader:
    """Reads a struct from `data` at `at`, which then is behind it."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def struct(self) -> Struct:
        fields: Struct = []
        last = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            last = last + delta if delta else self._number()
            fields.append([last, kind, self._value(kind)])
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    def _number(self) -> int:
        number = self._varint()
        return number >> 1 ^ -(number & 1)

    def _bytes(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind == BYTE:
            return self._byte()
        if kind in INTEGERS:
            return self._number()
        if kind == DOUBLE:
            return self._bytes(8)
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind in (LIST, SET):
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._varint()
            return [head & 15, [self._value(head & 15) for _ in range(size)]]
        if kind == STRUCT:
            return self.struct()
        raise ValueError(f"type {kind}")


def written(fields: Struct) -> bytes:
    """A struct's bytes."""
    out = bytearray()
    last = 0
    for number, kind, value in fields:
        kind = (TRUE if value else FALSE) if kind in (TRUE, FALSE) else kind
        delta = number - last
        out += bytes([delta << 4 | kind]) if 0 < delta < 16 else bytes([kind]) + _zigzag(number)
        out += b"" if kind in (TRUE, FALSE) else _value(kind, value)
        last = number
    return bytes(out) + b"\0"


def _value(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return bytes([TRUE if value else FALSE])
    if kind == BYTE:
        return bytes([value & 0xFF])
    if kind in INTEGERS:
        return _zigzag(value)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind in (LIST, SET):
        element, values = value[:2]
        size = value[2] if len(value) > 2 else len(values)  # a third: a size that lies
        head = bytes([size << 4 | element]) if 0 <= size < 15 else bytes([0xF0 | element]) + varint(size)
        return head + b"".join(_value(element, each) for each in values)
    return written(value)


def at(fields: Struct, number: int) -> Any:
    """The value of a field; None where there is none."""
    return next((field[2] for field in fields if field[0] == number), None)


def put(fields: Struct, number: int, value: Any) -> None:
    """Set a field that is there."""
    for field in fields:
        if field[0] == number:
            field[2] = value
