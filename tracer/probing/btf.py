# SPDX-License-Identifier: Apache-2.0
"""Struct offsets, bitfields and prototypes of the running kernel, from its BTF through libbpf.

Debian's kvm is a module with split BTF (`/sys/kernel/btf/kvm`, from 5.11); a kernel with KVM built in has everything in
vmlinux.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tracer.probing.libbpf import BtfType, libbpf
from traces.errors import ENVIRONMENT, Problem

BTF_DIRECTORY = Path("/sys/kernel/btf")

_PTR, _STRUCT, _UNION, _ENUM, _TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC = 2, 4, 5, 6, 8, 9, 10, 11, 12
_MODIFIERS = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT)


@dataclass(frozen=True)
class Member:
    """Where a struct member lies: `offset` in bytes, and for a bitfield its `shift` and `width` in bits from there."""

    offset: int
    type_id: int
    shift: int = 0
    width: int = 0


class Btf:
    """BTF of the running kernel, and on top of it that of a module (usually `kvm`), where the module has its own."""

    def __init__(self, directory: Path = BTF_DIRECTORY, module: str = "kvm") -> None:
        self._lib = libbpf()
        self._found: dict[tuple[str, int], int] = {}
        vmlinux = directory / "vmlinux"
        if not vmlinux.exists():
            raise Problem(
                f"no {vmlinux}: this kernel has no BTF; run a kernel with CONFIG_DEBUG_INFO_BTF=y", ENVIRONMENT
            )
        self._handle = self._parse(vmlinux, None)
        split = directory / module
        self.sources = [str(vmlinux)]
        if split.exists():
            self._handle = self._parse(split, self._handle)
            self.sources.append(str(split))

    def _parse(self, path: Path, base: int | None) -> int:
        handle = self._lib.btf__parse_split(str(path).encode(), base)
        if not handle or self._lib.libbpf_get_error(handle):
            raise Problem(f"cannot read BTF from {path}: damaged, or not readable by this user", ENVIRONMENT)
        return int(handle)

    def _type(self, type_id: int) -> BtfType:
        entry: BtfType = self._lib.btf__type_by_id(self._handle, type_id).contents
        return entry

    def _name(self, offset: int) -> str:
        return (self._lib.btf__name_by_offset(self._handle, offset) or b"").decode()

    def _find(self, name: str, kind: int) -> int:
        """Return a type's id, 0 where there is none. It is remembered, because libbpf compares name by name."""
        if (name, kind) not in self._found:
            found = int(self._lib.btf__find_by_name_kind(self._handle, name.encode(), kind))
            self._found[name, kind] = max(0, found)
        return self._found[name, kind]

    def _resolve(self, type_id: int) -> int:
        """Return the type behind typedefs and qualifiers."""
        while (entry := self._type(type_id)).kind in _MODIFIERS:
            type_id = entry.size_or_type
        return type_id

    def _members(self, type_id: int) -> list[tuple[str, int, int, int]]:
        """Return (name, type id, bit offset, bitfield width) of each member."""
        entry = self._type(type_id)
        base = ctypes.addressof(entry) + ctypes.sizeof(BtfType)
        words = (ctypes.c_uint32 * (3 * entry.count)).from_address(base)
        result = []
        for i in range(entry.count):
            name_off, member_type, offset = words[3 * i : 3 * i + 3]
            bits, width = (offset & 0xFFFFFF, offset >> 24) if entry.bitfields else (offset, 0)
            result.append((self._name(name_off), member_type, bits, width))
        return result

    def _locate(self, type_id: int, name: str) -> tuple[int, int, int] | None:
        """Return (bit offset, width, type id) of a member, looked for inside anonymous structs and unions too."""
        for member, member_type, bits, width in self._members(type_id):
            if member == name:
                return bits, width, member_type
            inner = self._resolve(member_type)
            if not member and self._type(inner).kind in (_STRUCT, _UNION):
                found = self._locate(inner, name)
                if found:
                    return bits + found[0], found[1], found[2]
        return None

    def member(self, struct: str, path: str) -> Member | None:
        """Return the member `path` (dotted through embedded structs) of a struct or union, None where it is missing."""
        type_id = self._find(struct, _STRUCT) or self._find(struct, _UNION)
        bits, width = 0, 0
        for name in path.split("."):
            if not type_id or self._type(type_id).kind not in (_STRUCT, _UNION):
                return None
            found = self._locate(type_id, name)
            if found is None:
                return None
            bits, width = bits + found[0], found[1]
            type_id = self._resolve(found[2])
        unit = bits & ~31 if width else bits
        return Member(unit // 8, type_id, bits - unit, width)

    def bitfields(self, name: str) -> dict[str, tuple[int, int]]:
        """Return {field: (shift, width)} of a union whose word is split into bitfields, such as kvm_mmu_page_role."""
        fields: dict[str, tuple[int, int]] = {}

        def collect(type_id: int, base: int) -> None:
            for member, member_type, bits, width in self._members(type_id):
                inner = self._resolve(member_type)
                if width and member:
                    fields[member] = (base + bits, width)
                elif not member and self._type(inner).kind in (_STRUCT, _UNION):
                    collect(inner, base + bits)

        type_id = self._find(name, _UNION) or self._find(name, _STRUCT)
        if type_id:
            collect(type_id, 0)
        return fields

    def size(self, struct: str) -> int:
        """Return the size of a struct in bytes, 0 if BTF does not have it."""
        type_id = self._find(struct, _STRUCT)
        return int(self._type(type_id).size_or_type) if type_id else 0

    def member_size(self, struct: str, path: str) -> int:
        """Return the size in bytes of a member that is a number, 0 if BTF does not have it."""
        found = self.member(struct, path)
        return int(self._type(found.type_id).size_or_type) if found else 0

    def enumerator(self, enum: str, name: str) -> int | None:
        """Return the value of a name of an enum, or None where it has no such name."""
        type_id = self._find(enum, _ENUM)
        if not type_id:
            return None
        entry = self._type(type_id)
        words = (ctypes.c_uint32 * (2 * entry.count)).from_address(ctypes.addressof(entry) + ctypes.sizeof(BtfType))
        return next((int(words[2 * i + 1]) for i in range(entry.count) if self._name(words[2 * i]) == name), None)

    def has_function(self, name: str) -> bool:
        return bool(self._find(name, _FUNC))

    def function_id(self, name: str) -> int:
        """Return the id of a function's type, 0 where it is not known."""
        return self._find(name, _FUNC)

    def digest(self) -> str:
        """Return a hash of the BTF as the kernel shows it, which differs between builds of a kernel."""
        digest = hashlib.blake2b(digest_size=32)
        for source in self.sources:
            digest.update(Path(source).read_bytes())
        return digest.hexdigest()

    def _describe(self, type_id: int) -> str:
        entry = self._type(type_id) if type_id else None
        if entry is None:
            return "void"
        if entry.kind == _PTR:
            return self._describe(self._resolve(entry.size_or_type)) + " *"
        if entry.kind in _MODIFIERS:
            return self._describe(self._resolve(type_id))
        return self._name(entry.name_off)

    def signature(self, function: str) -> tuple[str, ...] | None:
        """Return the types of a function's parameters, typedefs resolved, such as ("kvm_vcpu *", "unsigned int")."""
        type_id = self._find(function, _FUNC)
        if not type_id:
            return None
        proto = self._type(self._type(type_id).size_or_type)
        base = ctypes.addressof(proto) + ctypes.sizeof(BtfType)
        words = (ctypes.c_uint32 * (2 * proto.count)).from_address(base)
        return tuple(self._describe(words[2 * i + 1]) for i in range(proto.count))


@lru_cache(maxsize=1)
def kernel_btf() -> Btf:
    """Return the running kernel's BTF, which is parsed once."""
    return Btf()
