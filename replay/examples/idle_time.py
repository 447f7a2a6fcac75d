# SPDX-License-Identifier: Apache-2.0
"""Free roots that no vCPU has used for some time (IDLE_NS).

Roots are examined whenever a vCPU unloads, in recorded time.
"""

from __future__ import annotations

from replay.simulate.operations import Cause
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Root, Vcpu, Vm

IDLE_NS = 10_000_000


class IdleTime(Policy):
    """A policy like that of a kernel thread that reclaims idle roots."""

    name = "idle-time"

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        """Keep the root for now: `on_unload` frees it once it has been idle long enough."""

    def on_unload(self, vm: Vm, vcpu: Vcpu) -> None:
        for root in vm.roots.copy():
            if root.valid and not root.refs and vm.now - root.idle_since >= IDLE_NS:
                vm.free(root, Cause.POLICY, vcpu)
