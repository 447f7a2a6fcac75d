# SPDX-License-Identifier: Apache-2.0
"""Matches the VMs of two recordings or results: as asked for, else by name, else in order of their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from analysis.reading.sources import Recording
from traces.untrusted import text_at
from traces.vm_names import VmNames

_SHOWN: Final = 8


@dataclass(frozen=True)
class VmsOfSide:
    """The VMs of one side of a comparison; `chosen` are those that were asked for, in that order."""

    ids: Sequence[int]
    chosen: Sequence[int] = ()
    recording: Recording | None = None

    def named(self) -> Mapping[str, int]:
        """Return VMs by the names that their owners gave them; a name that occurs twice is left out."""
        vms = self.recording.metadata.vms if self.recording is not None else ()
        names = {int(vm["id"]): text_at(vm, "name") for vm in vms if int(vm["id"]) in set(self.ids)}
        twice = Counter(names.values())
        return {name: vm for vm, name in names.items() if name and twice[name] == 1}

    def name(self, vm: int) -> str:
        """Return how a VM is called, such as `VM 5 (qemu-system-x86 4242)`, or as much of it as is known."""
        return VmNames(self.recording.metadata).vm(vm) if self.recording is not None else f"VM {vm}"


@dataclass(frozen=True)
class MatchedVms:
    """The matched VMs of two sides: `pairs` of VM ids of base and new; other VMs are on one side only."""

    base: VmsOfSide
    new: VmsOfSide
    pairs: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, base: VmsOfSide, new: VmsOfSide) -> MatchedVms:
        if base.chosen and new.chosen:
            return cls(base, new, list(zip(base.chosen, new.chosen, strict=True)))
        mine, theirs = base.named(), new.named()
        pairs = [(vm, theirs[name]) for name, vm in mine.items() if name in theirs]
        left, right = ([vm for vm in sorted(ids) if vm not in taken] for ids, taken in (
            (base.ids, {one for one, _ in pairs}), (new.ids, {other for _, other in pairs})
        ))  # fmt: skip
        return cls(base, new, sorted([*pairs, *zip(left, right, strict=False)]))

    def numbers(self, side: VmsOfSide) -> dict[int, int]:
        """Return for each VM id of a side the id under which it is compared, which is that of the first side."""
        return {(pair[0] if side is self.base else pair[1]): pair[0] for pair in self.pairs}

    def process(self, vm: int) -> str:
        """Return the process that owns a pair, from the first recording that is at hand; empty without any."""
        for side, number in zip((self.base, self.new), self._pair(vm), strict=True):
            if side.recording is not None:
                return VmNames(side.recording.metadata).process(number)
        return ""

    def vcpu(self, vm: int, vcpu: int) -> str:
        """Return how a vCPU is called, with its VM and the VM's process."""
        process = self.process(vm)
        return f"vCPU {vcpu} of VM {vm}" + (f" ({process})" if process else "")

    def lines(self) -> Iterator[str]:
        """Yield how VMs were matched, where that is not obvious, and which VMs were not."""
        unlike = [(one, other) for one, other in self.pairs if one != other or self.base.named() != self.new.named()]
        shown = [f"{self.base.name(one)} with {self.new.name(other)}" for one, other in unlike]
        if len(self.pairs) > 1 or any(one != other for one, other in self.pairs):
            yield from shown[:_SHOWN]
            if len(shown) > _SHOWN:
                yield f"{len(shown) - _SHOWN:,} more VMs"
        for side, where, have in ((self.base, "first", 0), (self.new, "second", 1)):
            yield from _alone(side, where, {pair[have] for pair in self.pairs})

    def _pair(self, vm: int) -> tuple[int, int]:
        return next((pair for pair in self.pairs if pair[0] == vm), (vm, vm))


def _alone(side: VmsOfSide, where: str, paired: Collection[int]) -> Iterator[str]:
    alone = [vm for vm in sorted(side.ids) if vm not in paired]
    if alone:
        names = ", ".join(side.name(vm) for vm in alone[:_SHOWN])
        more = f", and {len(alone) - _SHOWN:,} more" if len(alone) > _SHOWN else ""
        yield f"only in the {where}, so in the counts alone: {names}{more}"
