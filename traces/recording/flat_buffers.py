# SPDX-License-Identifier: Apache-2.0
"""Flatbuffers, as far as Arrow's messages need them: https://flatbuffers.dev/internals.

A buffer is written once, from the front: what a table refers to follows it. Each number takes 8 bytes, which in
little-endian order serve for shorter ones as well.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# A number, a text, a vector of tables, a vector of structs of two numbers, or a table: its fields by their places.
Node: TypeAlias = "int | bytes | Sequence[Node] | NDArray[np.int64] | Mapping[int, Node]"


def flat_buffer(root: Node) -> bytes:
    """Return the bytes of a table and of all that it refers to, padded to a multiple of 8."""
    out = bytearray(8)
    struct.pack_into("<I", out, 0, _lay(out, root))
    return bytes(out) + bytes(-len(out) % 8)


def _lay(out: bytearray, node: Node) -> int:
    """Append a node that is not a number, and return where it begins."""
    out += bytes(-len(out) % 8)
    at = len(out)
    if isinstance(node, bytes):
        out += struct.pack("<I", len(node)) + node + b"\0"
        return at
    if isinstance(node, np.ndarray):
        out += struct.pack("<II", 0, len(node)) + node.tobytes()  # the count right before structs that begin at an 8
        return at + 4
    if isinstance(node, Mapping):
        return _lay_table(out, node)
    assert not isinstance(node, int)
    out += struct.pack("<I", len(node)) + bytes(4 * len(node))
    for index, each in enumerate(node):
        _refer(out, at + 4 + 4 * index, each)
    return at


def _lay_table(out: bytearray, fields: Mapping[int, Node]) -> int:
    vtable = len(out)
    offsets = {place: 8 + 8 * index for index, place in enumerate(fields)}
    places = range(max(fields) + 1)
    sizes = (4 + 2 * len(places), 8 + 8 * len(fields))
    out += struct.pack(f"<{2 + len(places)}H", *sizes, *(offsets.get(place, 0) for place in places))
    out += bytes(-len(out) % 8)
    at = len(out)
    out += struct.pack("<ii", at - vtable, 0) + bytes(8 * len(fields))
    for place, value in fields.items():
        where = at + offsets[place]
        if isinstance(value, int):
            struct.pack_into("<q", out, where, value)
        else:
            _refer(out, where, value)
    return at


def _refer(out: bytearray, where: int, node: Node) -> None:
    struct.pack_into("<I", out, where, _lay(out, node) - where)
