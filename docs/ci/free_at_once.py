# SPDX-License-Identifier: Apache-2.0
"""A root policy made worse on purpose: the gate of the example has to see it."""

from __future__ import annotations

from replay.simulate.operations import Cause
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Root, Vcpu, Vm


class FreeAtOnce(Policy):
    """A root goes with its last reference, as before 6.4."""

    name = "free-at-once"

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        vm.free(root, Cause.POLICY, vcpu)
