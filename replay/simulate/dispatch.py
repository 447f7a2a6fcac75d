# SPDX-License-Identifier: Apache-2.0
"""Run a stream of operations through the reference model, one at a time."""

from __future__ import annotations

from replay.simulate.model_state import Vcpu
from replay.simulate.operations import (
    FIRST_SHIFT,
    FOR_GOOD,
    LAST_SHIFT,
    LEVEL_SHIFT,
    RESETS,
    VCPU_SHIFT,
    Block,
    Cause,
    Op,
    Ranges,
    Word,
)
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Vm
from traces.kernels.policies import PolicyParameters


def begin(parameters: PolicyParameters, words: list[Word], vcpus: int, policy: Policy | None = None) -> Vm:
    """Return a VM before its first operation; without a `policy` of its own it is under the kernels' rules."""
    return Vm(parameters, words, vcpus, policy or Policy())


def feed(vm: Vm, block: Block, ranges: Ranges, first: int = 0) -> None:
    """Run a block's operations; `first` is the position of the block's first operation in the whole stream."""
    ops, gfns, times = block.op.tolist(), block.gfn.tolist(), block.time.tolist()
    for i in range(len(ops)):
        vm.at = first + i
        vm.now = times[i]
        perform(vm, ops[i], gfns[i], ranges)


def perform(vm: Vm, op: int, gfn: int, ranges: Ranges) -> None:
    """Run one operation, given by its two columns."""
    kind = Op(op & 15)
    level = op >> LEVEL_SHIFT & 7
    number = op >> VCPU_SHIFT
    if kind <= Op.SWITCH:
        vcpu = vm.vcpus[number]
        if vcpu.stuck >= 0:
            return  # the guest does not get past an instruction, so its later operations do not happen
        _of_vcpu(vm, vcpu, kind, op, level, gfn)
    elif kind == Op.INVALIDATE:
        vm.invalidate()
    elif kind == Op.ZAP:
        vm.zap(level, *ranges.rows[gfn])
    elif kind == Op.ZAP_ALL:
        vm.zap_all()
    elif kind == Op.SPLIT:
        vm.split(level, *ranges.rows[gfn])
    elif kind == Op.COLLAPSE:
        vm.collapse(number, level, gfn, bool(op & FOR_GOOD))
    elif kind == Op.END:
        vm.end()


def _of_vcpu(vm: Vm, vcpu: Vcpu, kind: Op, op: int, level: int, gfn: int) -> None:
    if kind == Op.TOUCH:
        vm.touch(vcpu, gfn, level, op >> FIRST_SHIFT & 7, op >> LAST_SHIFT & 7, bool(op & RESETS))
    elif kind == Op.FIX:
        vm.fix(vcpu, gfn, level, bool(op & RESETS))
    elif kind == Op.ENTER:
        vm.enter(vcpu)
    elif kind == Op.UNLOAD:
        vm.unload(vcpu, Cause(gfn))
    elif kind == Op.ROLE:
        vm.role(vcpu, gfn)
    else:
        vm.switch(vcpu, gfn)
