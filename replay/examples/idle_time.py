# SPDX-License-Identifier: Apache-2.0
"""Free a root that no vCPU has used for some time. Time passes as recorded; roots are looked at when a vCPU unloads."""

from __future__ import annotations

from replay.simulate.operations import Cause
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Root, Vcpu, Vm

IDLE_NS = 10_000_000


class IdleTime(Policy):
    """What a kernel thread that reclaims idle roots would change."""

    name = "idle-time"

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        """Leave it: `on_unload` sees it again."""

    def on_unload(self, vm: Vm, vcpu: Vcpu) -> None:
        for root in vm.roots.copy():
            if root.valid and not root.refs and vm.now - root.idle_since >= IDLE_NS:
                vm.free(root, Cause.POLICY, vcpu)
