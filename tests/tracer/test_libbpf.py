# SPDX-License-Identifier: Apache-2.0
"""Reading maps: what the kernel writes, laid out as a C struct with holes, is what is read."""

from __future__ import annotations

import ctypes
import errno
from types import SimpleNamespace

import numpy as np
import pytest

from tracer.probing import libbpf
from tracer.probing.libbpf import BpfMap

# As C lays it out: a hole behind `flag`, and one at the end.
VALUE = np.dtype(
    {
        "names": ["flag", "tid", "since", "level"],
        "formats": ["u1", "u4", "u8", "u2"],
        "offsets": [0, 4, 8, 16],
        "itemsize": 24,
    }
)


def kernel_map(values: np.ndarray) -> SimpleNamespace:
    """What libbpf gives of a hash map whose keys are 0, 1, ...: addresses are written to as the kernel does."""

    def next_key(_fd: int, before: int | None, out: ctypes.Array[ctypes.c_char]) -> int:
        key = 0 if before is None else ctypes.c_uint32.from_address(before).value + 1
        if key == len(values):
            ctypes.set_errno(errno.ENOENT)
            return -1
        ctypes.memmove(out, np.uint32(key).tobytes(), 4)
        return 0

    def lookup(_fd: int, key: int, out: int) -> int:
        value = values[ctypes.c_uint32.from_address(key).value]
        ctypes.memmove(out, value.tobytes(), VALUE.itemsize)
        return 0

    return SimpleNamespace(bpf_map_get_next_key=next_key, bpf_map_lookup_elem=lookup)


# Room for 64 is made, then for 128: with 70 a wrong layout shows in the values, and nothing is overrun.
@pytest.mark.parametrize("entries", [0, 1, 64, 65, 70])
def test_a_map_of_structs_with_holes_is_read_as_the_kernel_wrote_it(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.arange(entries)
    values = np.zeros(entries, VALUE)
    for name, step in (("flag", 1), ("tid", 1_000_003), ("since", 10**12 + 7), ("level", 257)):
        values[name] = numbers * step
    given = kernel_map(values)
    monkeypatch.setattr(libbpf, "libbpf", lambda: given)
    read = BpfMap.__new__(BpfMap)
    read.fd, read.key, read.value = -1, np.dtype("u4"), VALUE
    keys, found = read.items()
    assert keys.tolist() == numbers.tolist()
    for name in VALUE.names or ():
        assert found[name].tolist() == values[name].tolist(), name
