# SPDX-License-Identifier: Apache-2.0
"""The root policy as a recording's own rows show it: who holds references on a root, and who zaps it.

A kernel built with a change undone may have the types of one policy and the behaviour of another, which only rows show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from traces.kernels.policies import POLICIES

COLUMNS: Final = ("kind", "tid", "root", "role", "refs")
_NAMES: Final = {
    (False, "inline"): "sync",
    (False, "worker"): "async",
    (True, "worker"): "preserve-worker",
    (True, "invalidator"): "preserve",
}
KINDS: Final = ("root_get", "root_put", "zap_root_begin", "zap_invalidated_begin", "zap_invalidated_end", "zap_all")


class PolicyRow(NamedTuple):
    """The columns of an event that show the root policy."""

    kind: str
    tid: int
    root: int
    role: int
    refs: int


@dataclass
class Watch:
    """Follows the rows of a recording of the TDP MMU to see whether it has the policy that the recorder found.

    `known` are the roots that may have existed before the recording began.
    """

    found: str  # the recorder's policy
    invalid_bit: int  # the role word's bit `invalid`
    known: set[int] = field(default_factory=set)
    own_reference: bool | None = None
    teardown: str = ""
    _last_put: dict[int, int] = field(default_factory=dict)  # root -> thread of the put after which nobody held it
    _invalidating: set[int] = field(default_factory=set)  # threads in kvm_tdp_mmu_zap_invalidated_roots
    _emptying: set[int] = field(default_factory=set)  # threads that end with the VM's process

    @property
    def policy(self) -> str:
        """The policy that the rows show; empty as long as they do not determine one."""
        return "" if self.own_reference is None else _NAMES.get((self.own_reference, self.teardown), "")

    @property
    def settled(self) -> bool:
        """Whether more rows would show nothing new: the policy is known, or it is one that rows cannot show."""
        return self.found not in POLICIES or POLICIES[self.found].mmu == "shadow" or bool(self.policy)

    @property
    def other(self) -> str:
        """The policy that the rows show if it is not the recorder's; else empty."""
        return self.policy if self.found in POLICIES and self.policy != self.found else ""

    @property
    def bears_out(self) -> bool:
        """Whether the rows agree with the recorder's policy, as far as they show any policy."""
        return (
            self.own_reference is not None
            and self.found in POLICIES
            and POLICIES[self.found].own_reference == self.own_reference
            and self.policy in ("", self.found)
        )

    def see(self, rows: Iterable[PolicyRow]) -> None:
        """Take rows, in order of recording, until the policy is settled."""
        for row in rows:
            if row.kind in KINDS:
                self.take(row)
                if self.settled:
                    return

    def take(self, row: PolicyRow) -> None:
        """Take one row."""
        if row.kind == "zap_invalidated_begin":
            self._invalidating.add(row.tid)
        elif row.kind == "zap_invalidated_end":
            self._invalidating.discard(row.tid)
        elif row.kind == "zap_all":
            self._emptying.add(row.tid)
        elif not row.root:
            return
        elif row.kind == "root_get":
            if row.root not in self.known and self.own_reference is None and row.refs in (1, 2):
                self.own_reference = row.refs == 2  # the slot's alone, or the VM's as well
            self.known.add(row.root)
        elif row.kind == "root_put":
            if row.refs == 1:
                self._last_put[row.root] = row.tid
        elif row.kind == "zap_root_begin" and self.own_reference is not None:
            if self.own_reference:
                # Where the VM's process ends, every root is emptied, those that a vCPU still holds included.
                if row.role & self.invalid_bit and row.tid in self._invalidating:
                    self.teardown = "invalidator"
                elif row.role & self.invalid_bit and row.tid not in self._emptying:
                    self.teardown = "worker"
            elif row.root in self._last_put:
                self.teardown = "inline" if self._last_put[row.root] == row.tid else "worker"
