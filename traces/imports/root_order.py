# SPDX-License-Identifier: Apache-2.0
"""Which root each row is about, which no text names: roots follow from the tables made at their level, in order.

A vCPU outside SMM and one in SMM have a root each, and vCPUs of one VM share them. A new table at the level of a root,
direct, is a root that the vCPU makes as it loads; from then on it is the VM's root in that state. A load that finds a
root has no event, and gives the one that was made last. So a vCPU that still holds an older root is not seen.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from traces.imports.form_program import ROLE_FIELDS, TEXT_ROLE
from traces.imports.kept_roots import KeptRoots
from traces.kernels import Kernel
from traces.lives import Flags, Ints, fill_forward
from traces.record import Columns
from traces.schema import BY_NAME, KINDS

_GET_PAGE: Final = BY_NAME["kvm_mmu_get_page"].code
_SMM: Final = BY_NAME["kvm_smm_transition"].code
_FAST: Final = BY_NAME["fast_page_fault"].code
_TEXT_RET: Final = 1 << 30
_HAS_ROOT: Final = np.zeros(256, np.bool_)
_HAS_ROOT[[kind.code for kind in KINDS if "root" in kind.fixed]] = True
_ENTERING: Final = 1
_CREATED: Final = 1
_ENTRY: Final = BY_NAME["kvm_entry"].code


def level_of_roots(kernel: Kernel | None, level: int, kinds: Ints) -> int:
    """The level of tables that are roots; 0 where roots are unknown: there are none, or two roles before 5.13."""
    return 0 if kernel is not None and not kernel.root_get_page and kinds[_SMM] else level


class RootOrder:
    """Fills in roots, role words and return codes, batch after batch. `made` roots were found."""

    def __init__(self, kernel: Kernel | None, level: int) -> None:
        """`level`: of a root's table, as the text shows; 0: it shows none."""
        self.made = 0
        self.kept = KeptRoots()
        self._kernel, self._level = kernel, level
        self._in_smm: dict[int, bool] = {}  # by VM and vCPU
        self._current: dict[int, int] = {}  # by VM and state: the root made last

    def fill(self, columns: Columns, vm: Ints) -> None:
        """The batch's roots, in place; `vm` is each row's VM (0: none)."""
        kind, vcpu = columns["kind"], columns["vcpu"].astype(np.int64)
        key = vm << 16 | np.maximum(vcpu, 0)
        on_vcpu = (vm > 0) & (vcpu >= 0)
        smm = self._smm_of(key, on_vcpu, (kind == _SMM) & on_vcpu, columns["flags"])
        self._roles(columns, smm)
        self._returns(columns)
        if self._level:
            self._number(columns, vm, on_vcpu, smm)
        self._words(columns)

    def _number(self, columns: Columns, vm: Ints, on_vcpu: Flags, smm: Ints) -> None:
        kind = columns["kind"]
        direct = self._direct(columns["role"])
        created = (columns["flags"] & _CREATED) != 0
        born = on_vcpu & (kind == _GET_PAGE) & created & (columns["level"] == self._level) & direct
        self.kept.see(columns, vm, born, smm)
        loaded, made = born, born
        if self._kernel is not None and not self._kernel.root_get_page:
            entries = self._entries_before(born, vm << 16 | np.maximum(columns["vcpu"].astype(np.int64), 0), kind)
            for name in ("role", "level"):  # what the root is known to be
                columns[name][entries] = columns[name][born]
            loaded, made = np.isin(np.arange(len(born)), entries), np.zeros(len(born), np.bool_)
        numbers = self.made + np.cumsum(loaded)
        state = vm << 1 | smm
        root = self._latest(np.flatnonzero(on_vcpu), state, loaded, numbers)
        self.made += int(np.count_nonzero(loaded))
        rows = on_vcpu & _HAS_ROOT[kind] & ((kind != _GET_PAGE) | made)
        columns["root"] = np.where(rows, root, 0).astype(np.uint64)
        columns["w1"] = np.where(made, root.astype(np.uint64), columns["w1"])

    @staticmethod
    def _entries_before(born: Flags, key: Ints, kind: Ints) -> Ints:
        """The entries into the guest that came before, on the same vCPU; of each row that is born.

        Before 5.13 a root's creation is not traced, and the first table below it, which the first fault makes, is
        traced with the root's level: the vCPU had the root when it entered the guest, of which role is not shown.
        """
        order = np.argsort(key, kind="stable")
        entry = kind[order] == _ENTRY
        first = np.append(True, key[order][1:] != key[order][:-1])[: len(order)]
        last = fill_forward(np.arange(len(order)), entry | first)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        entries: Ints = order[last[place[np.flatnonzero(born)]]]
        return entries

    def _smm_of(self, key: Ints, on_vcpu: Flags, moves: Flags, flags: Any) -> Ints:
        """1 for rows of vCPUs that are in SMM."""
        smm = np.zeros(len(key), np.int64)
        if not moves.any() and not any(self._in_smm.values()):
            return smm
        rows = np.flatnonzero(on_vcpu)
        order = rows[np.argsort(key[rows], kind="stable")]
        keys = key[order]
        first = np.append(True, keys[1:] != keys[:-1])
        value = np.where(moves[order], (flags[order] & _ENTERING) != 0, False).astype(np.int64)
        before = np.array([self._in_smm.get(int(k), False) for k in keys[first]], np.int64)
        carried = np.where(moves[order], value, 0)
        carried[first & ~moves[order]] = before[(np.cumsum(first) - 1)[first & ~moves[order]]]
        filled = fill_forward(carried, moves[order] | first)
        smm[order] = filled
        last = np.append(first[1:], True)
        self._in_smm |= dict(zip(keys[last].tolist(), (filled[last] != 0).tolist(), strict=True))
        return smm

    def _latest(self, rows: Ints, state: Ints, born: Flags, numbers: Ints) -> Ints:
        """For each row the root that was made last in its VM and state."""
        root = np.zeros(len(state), np.int64)
        if not len(rows):
            return root
        order = rows[np.argsort(state[rows], kind="stable")]
        keys, fresh = state[order], born[order]
        first = np.append(True, keys[1:] != keys[:-1])
        value = np.where(fresh, numbers[order], 0)
        heads = first & ~fresh
        value[heads] = [self._current.get(int(k), 0) for k in keys[heads]]
        filled = fill_forward(value, fresh | first)
        root[order] = filled
        last = np.append(first[1:], True)
        self._current |= dict(zip(keys[last].tolist(), filled[last].tolist(), strict=True))
        return root

    def _direct(self, role: Any) -> Any:
        text = (role & TEXT_ROLE) != 0
        mask = self._kernel.layout.mask("direct") if self._kernel else 1 << 7  # the same bit in every kernel
        return np.where(text, (role >> ROLE_FIELDS["direct"][0]) & 1, role & mask) != 0

    def _roles(self, columns: Columns, smm: Ints) -> None:
        """Note SMM in the words that come from text."""
        role = columns["role"]
        text = (role & TEXT_ROLE) != 0
        columns["role"] = np.where(text, role | (smm << ROLE_FIELDS["smm"][0]).astype(np.uint32), role)

    def _words(self, columns: Columns) -> None:
        """Turn what a text says of roles into the kernel's words; into 0 where the kernel is not known."""
        role = columns["role"]
        text = (role & TEXT_ROLE) != 0
        if not text.any():
            return
        columns["role"] = np.where(text, self._word(role, columns["level"]), role).astype(np.uint32)

    def _word(self, role: Any, level: Any) -> Any:
        if self._kernel is None:
            return np.zeros(len(role), np.int64)
        layout = self._kernel.layout

        def value(name: str) -> Any:
            shift, mask = ROLE_FIELDS[name]
            return (role.astype(np.int64) >> shift) & mask

        def put(name: str, bits: Any) -> Any:
            return (bits << layout.shifts[name][0]) & layout.mask(name) if name in layout.shifts else 0

        direct = value("direct")
        word = (level.astype(np.int64) & 15) | put("quadrant", value("quadrant")) | put("direct", direct)
        word |= put("access", value("access")) | put("invalid", value("invalid"))
        word |= put("ad_disabled", value("ad_disabled")) | put("smm", value("smm"))
        word |= put("has_4_byte_gpte", value("gpte") == 4) | put(
            "gpte_is_8_bytes", (value("gpte") != 4) & (direct == 0)
        )
        word |= np.where(value("nx") != 0, layout.nx, 0)
        if not layout.guest_bits:
            word |= np.where(direct != 0, layout.wp | layout.nx, 0)
        return word

    def _returns(self, columns: Columns) -> None:
        """fast_page_fault's text says fixed or spurious, and no number: that depends on the kernel."""
        count = columns["n"]
        text = (columns["kind"] == _FAST) & ((count & _TEXT_RET) != 0)
        if not text.any():
            return
        said = count & 3
        if self._kernel is None:
            columns["n"] = np.where(text, 0, count).astype(np.int32)
            return
        codes = self._kernel.ret_pf
        number = np.where(said & 1, codes.fixed, np.where(said & 2, codes.spurious, codes.invalid))
        columns["n"] = np.where(text, number, count).astype(np.int32)
