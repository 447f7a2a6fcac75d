# SPDX-License-Identifier: Apache-2.0
"""Keep at most N roots that no vCPU uses; when there are more, the least recently used one is freed."""

from __future__ import annotations

from replay.simulate.operations import Cause
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Root, Vcpu, Vm

N = 2


class KeepN(Policy):
    """Half way between the old kernels (0) and `preserve` (every one)."""

    name = f"keep-{N}"

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        idle = [root for root in vm.roots if root.valid and not root.refs]
        for oldest in sorted(idle, key=lambda root: root.idle_since)[: max(len(idle) - N, 0)]:
            vm.free(oldest, Cause.POLICY, vcpu)
