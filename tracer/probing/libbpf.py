# SPDX-License-Identifier: Apache-2.0
"""The distribution's libbpf through ctypes: maps, programs and how they are attached, without a compiler.

bcc itself loads programs through it, and it is all that a host needs to run programs compiled elsewhere: libbcc would
bring clang and LLVM along. libbpf has no call for perf events, to which tracepoints and kprobes are attached: these are
opened by the system call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.errors import ENVIRONMENT, Problem

INSTALL: Final = "apt-get install libbpf1"
ARRAY_OF_MAPS: Final = 12
KPROBE, TRACEPOINT, RAW_TRACEPOINT, TRACING = 2, 5, 17, 26  # enum bpf_prog_type
FENTRY, FEXIT, ITERATOR = 24, 25, 28  # enum bpf_attach_type
PERF_OF_KPROBES: Final = Path("/sys/bus/event_source/devices/kprobe")

_LICENSE: Final = b"GPL"
_LOG_SIZE: Final = 1 << 20
_PROG_INFO_SIZE: Final = 224  # struct bpf_prog_info
_MAP_INFO: Final = struct.Struct("=6I")  # struct bpf_map_info: type, id, key and value size, entries, flags
_SYS_PERF_EVENT_OPEN: Final = 298
_PERF_TRACEPOINT, _PERF_CLOEXEC = 2, 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408
_ATTR: Final = struct.Struct("=IIQQQQQIIQQ")  # struct perf_event_attr up to config2 (PERF_ATTR_SIZE_VER1)


class BtfType(ctypes.Structure):
    """The kernel's struct btf_type."""

    _fields_ = (("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size_or_type", ctypes.c_uint32))

    @property
    def kind(self) -> int:
        return (int(self.info) >> 24) & 0x1F

    @property
    def count(self) -> int:
        return int(self.info) & 0xFFFF

    @property
    def bitfields(self) -> bool:
        return bool(self.info >> 31)


class _MapOptions(ctypes.Structure):
    """libbpf's struct bpf_map_create_opts, as far as it is set here."""

    _fields_ = (
        ("sz", ctypes.c_size_t), ("btf_fd", ctypes.c_uint32), ("key_type", ctypes.c_uint32),
        ("value_type", ctypes.c_uint32), ("vmlinux_value_type", ctypes.c_uint32), ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    )  # fmt: skip


class _ProgramOptions(ctypes.Structure):
    """libbpf's struct bpf_prog_load_opts, up to the verifier's log."""

    _fields_ = (
        ("sz", ctypes.c_size_t), ("attempts", ctypes.c_int), ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32), ("prog_flags", ctypes.c_uint32), ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32), ("attach_btf_id", ctypes.c_uint32), ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32), ("fd_array", ctypes.c_void_p), ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32), ("func_info_rec_size", ctypes.c_uint32), ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32), ("line_info_rec_size", ctypes.c_uint32), ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32), ("log_buf", ctypes.c_char_p),
    )  # fmt: skip


@lru_cache(maxsize=1)
def libbpf() -> ctypes.CDLL:
    """Return libbpf 1.0 or newer, its prototypes set. Raises Problem where it is not installed."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise Problem(f"libbpf.so.1 not found, it reads BTF and loads BPF programs: {INSTALL}", ENVIRONMENT) from None
    integer, word, text, pointer = ctypes.c_int, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_void_p
    prototypes: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "btf__parse_split": (pointer, (text, pointer)),
        "btf__type_by_id": (ctypes.POINTER(BtfType), (pointer, word)),
        "btf__name_by_offset": (text, (pointer, word)),
        "btf__find_by_name_kind": (integer, (pointer, text, word)),
        "libbpf_get_error": (ctypes.c_long, (pointer,)),
        "libbpf_set_print": (pointer, (pointer,)),
        "bpf_map_create": (integer, (integer, text, word, word, word, pointer)),
        "bpf_prog_load": (integer, (integer, text, text, pointer, ctypes.c_size_t, pointer)),
        "bpf_obj_get_info_by_fd": (integer, (integer, pointer, pointer)),
        "bpf_map_lookup_elem": (integer, (integer, pointer, pointer)),
        "bpf_map_update_elem": (integer, (integer, pointer, pointer, ctypes.c_uint64)),
        "bpf_map_delete_elem": (integer, (integer, pointer)),
        "bpf_map_get_next_key": (integer, (integer, pointer, pointer)),
        "bpf_link_create": (integer, (integer, integer, integer, pointer)),
        "bpf_iter_create": (integer, (integer,)),
        "bpf_raw_tracepoint_open": (integer, (text, integer)),
        "bpf_enable_stats": (integer, (integer,)),
        "libbpf_num_possible_cpus": (integer, ()),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.libbpf_set_print(None)  # errors are reported by this program
    return library


def _refused() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def map_info(fd: int) -> tuple[int, int, int, int, int]:
    """Return (type, key size, value size, entries, flags) of a map, by its descriptor. Raises OSError."""
    raw, size = ctypes.create_string_buffer(_MAP_INFO.size), ctypes.c_uint32(_MAP_INFO.size)
    if libbpf().bpf_obj_get_info_by_fd(fd, raw, ctypes.byref(size)):
        raise _refused()
    type_, _, key, value, entries, flags = _MAP_INFO.unpack(raw.raw)
    return type_, key, value, entries, flags


def program_info(fd: int) -> bytes:
    """Return a loaded program's struct bpf_prog_info as far as this kernel fills it; empty where it refuses."""
    raw, size = ctypes.create_string_buffer(_PROG_INFO_SIZE), ctypes.c_uint32(_PROG_INFO_SIZE)
    return b"" if libbpf().bpf_obj_get_info_by_fd(fd, raw, ctypes.byref(size)) else raw.raw


def enable_statistics() -> int:
    """Return a descriptor; while it is open the kernel measures programs' run time (5.8+). Raises OSError."""
    fd = int(libbpf().bpf_enable_stats(0))  # BPF_STATS_RUN_TIME
    if fd < 0:
        raise _refused()
    return fd


class BpfMap:
    """A BPF map. Keys and values are numpy scalars of the types given; a per-CPU map has a value for each CPU."""

    def __init__(
        self, name: str, shape: tuple[int, int, int, int, int], key: Any = "u4", value: Any = "u4", inner: int = 0
    ) -> None:
        """Create the map: `shape` as of `map_info`, `inner` a template of its elements. Raises OSError."""
        self.key, self.value = np.dtype(key), np.dtype(value)
        options = _MapOptions(sz=ctypes.sizeof(_MapOptions), inner_map_fd=inner, map_flags=shape[4])
        self.fd = int(libbpf().bpf_map_create(shape[0], name.encode(), *shape[1:4], ctypes.byref(options)))
        if self.fd < 0:
            raise _refused()

    def lookup(self, key: int = 0, each: int = 1) -> np.ndarray[Any, Any]:
        """Return the value of a key that exists, as an array of `each`: 1, or the number of possible CPUs."""
        asked, found = np.array([key], self.key), np.zeros(each, self.value)
        if libbpf().bpf_map_lookup_elem(self.fd, asked.ctypes.data, found.ctypes.data):
            raise _refused()
        return found

    def update(self, key: int, value: np.ndarray[Any, Any]) -> None:
        """Set the value of a key."""
        asked, given = np.array([key], self.key), np.ascontiguousarray(value, self.value)
        if libbpf().bpf_map_update_elem(self.fd, asked.ctypes.data, given.ctypes.data, 0):
            raise _refused()

    def items(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return all keys and values of a hash map; a deletion meanwhile may restart the walk and repeat keys.

        They are read one by one: for a whole batch, empty buckets included, the kernel runs no tracing program on this
        CPU (bpf_disable_instrumentation() in __htab_map_lookup_and_delete_batch()), and where it can be preempted in
        there (7.x), events of whatever runs on the CPU then are missed until this thread has it again.
        """
        library, keys, values, found = libbpf(), np.zeros(0, self.key), np.zeros(0, self.value), 0
        before, next_key = None, ctypes.create_string_buffer(self.key.itemsize)
        while not library.bpf_map_get_next_key(self.fd, before, next_key):
            if found == len(keys):
                # Not np.resize, which packs a struct that has holes: the kernel would write beyond its end.
                more_keys, more_values = (np.zeros(max(64, 2 * found), kind) for kind in (self.key, self.value))
                more_keys[:found], more_values[:found] = keys, values
                keys, values = more_keys, more_values
                key_at, value_at = keys.ctypes.data, values.ctypes.data
            before = key_at + found * self.key.itemsize
            ctypes.memmove(before, next_key, self.key.itemsize)
            found += not library.bpf_map_lookup_elem(self.fd, before, value_at + found * self.value.itemsize)
        if ctypes.get_errno() != errno.ENOENT:
            raise _refused()
        return keys[:found], values[:found]

    def delete(self, key: int) -> None:
        """Delete a key, if it is there."""
        asked = np.array([key], self.key)
        libbpf().bpf_map_delete_elem(self.fd, asked.ctypes.data)

    def clear(self) -> None:
        """Delete every key."""
        for key in self.items()[0]:
            self.delete(key)

    def close(self) -> None:
        os.close(self.fd)


def load(name: str, type_: int, instructions: bytes, attach_type: int = 0, btf_id: int = 0) -> int:
    """Have the kernel verify and load a program; return its descriptor.

    Raises OSError whose text is the last line of the verifier's log, where there is one.
    """
    options = _ProgramOptions(sz=ctypes.sizeof(_ProgramOptions), expected_attach_type=attach_type, attach_btf_id=btf_id)
    arguments = (type_, name[:15].encode(), _LICENSE, instructions, len(instructions) // 8, ctypes.byref(options))
    fd = int(libbpf().bpf_prog_load(*arguments))
    if fd >= 0:
        return fd
    error = _refused()
    if error.errno in (errno.EPERM, errno.ENOENT):  # then there is no log
        raise error
    log = ctypes.create_string_buffer(_LOG_SIZE)  # only now: verifying with a log takes three times as long
    options.log_level, options.log_size, options.log_buf = 1, _LOG_SIZE, ctypes.cast(log, ctypes.c_char_p)
    fd = int(libbpf().bpf_prog_load(*arguments))
    if fd >= 0:
        return fd
    said = [line for line in log.value.decode(errors="replace").splitlines() if line and "processed" not in line]
    raise OSError(error.errno, said[-1] if said else error.strerror)


def attach_traced(fd: int, tracepoint: str = "") -> int:
    """Attach a program to a raw tracepoint, or by fentry or fexit to its function; closing the link detaches."""
    link = int(libbpf().bpf_raw_tracepoint_open(tracepoint.encode() or None, fd))
    if link < 0:
        raise _refused()
    return link


def attach_iterator(fd: int) -> int:
    """Return a link to an iterator program, of which `iterate` makes streams. Raises OSError."""
    link = int(libbpf().bpf_link_create(fd, 0, ITERATOR, None))
    if link < 0:
        raise _refused()
    return link


def iterate(link: int) -> int:
    """Return the descriptor of one pass of an iterator. Raises OSError."""
    stream = int(libbpf().bpf_iter_create(link))
    if stream < 0:
        raise _refused()
    return stream


def attach_tracepoint(fd: int, event: int) -> int:
    """Attach to the tracepoint whose id tracefs gives as `event`; closing the descriptor detaches. Raises OSError."""
    return _perf_event(fd, _ATTR.pack(_PERF_TRACEPOINT, _ATTR.size, event, *bytes(8)))


def attach_kprobe(fd: int, function: str, returns: bool) -> int:
    """Attach to a function's entry or return; closing the descriptor detaches. Raises OSError."""
    name = ctypes.create_string_buffer(function.encode())
    kind = int((PERF_OF_KPROBES / "type").read_text())
    bit = int((PERF_OF_KPROBES / "format" / "retprobe").read_text().rpartition(":")[2])
    where = ctypes.addressof(name)
    return _perf_event(fd, _ATTR.pack(kind, _ATTR.size, int(returns) << bit, 0, 0, 0, 0, 0, 0, where, 0))


def _perf_event(fd: int, attributes: bytes) -> int:
    """Open a perf event that runs the program on every CPU, whichever CPU the event is opened for.

    It has no period: with one, the kernel would make a sample of each event on that CPU, which nobody reads.
    """
    system = ctypes.CDLL(None, use_errno=True)
    event = int(system.syscall(_SYS_PERF_EVENT_OPEN, attributes, -1, 0, -1, _PERF_CLOEXEC))
    if event < 0:
        raise _refused()
    for request, argument in ((_IOC_SET_BPF, fd), (_IOC_ENABLE, 0)):
        if system.ioctl(event, ctypes.c_ulong(request), argument):
            error = _refused()
            os.close(event)
            raise error
    return event


def possible_cpus() -> int:
    """Return the number of CPUs for which the kernel has per-CPU values."""
    return int(libbpf().libbpf_num_possible_cpus())
