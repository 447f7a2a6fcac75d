# SPDX-License-Identifier: Apache-2.0
"""The interface of root policies in the reference model, against which users write their own.

A policy of your own is one file with one subclass of `Policy` in it (`kvmtrace replay TRACE --policy ./mine.py`), or an
entry point of the group `kvmtrace.policies`. The VM is a `reference.Vm`: `vm.find(word)`, `vm.free(root, cause)`,
`vm.invalidate_root(root, cause)`, `vm.roots`, `vm.now` (ns of the recording's clock). `replay/examples` has two
policies that no kernel has.
"""

from __future__ import annotations

from replay.simulate.model_state import Root, Vcpu
from replay.simulate.operations import Cause
from replay.simulate.reference import Vm
from traces.kernels.policies import ASYNC, PolicyParameters


class Policy:
    """The rules of the kernels themselves; override the hooks that should behave differently.

    `parameters` says how the kernel behaves in all other respects (`traces.kernels.policies`). With `own_reference` the
    VM holds a reference on each valid root, so that `on_put_to_zero` is never called for one; a policy that itself
    decides to keep roots leaves it False.
    """

    name: str = ""
    parameters: PolicyParameters = ASYNC

    def on_load(self, vm: Vm, word: int) -> Root | None:
        """Return the root to load for a vCPU whose role word has the index `word`, or None to have a new root built."""
        return vm.find(word)

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        """The last reference on a valid root was dropped: free the root, or keep it for a later `on_load`."""
        vm.free(root, cause, vcpu)

    def on_unload(self, vm: Vm, vcpu: Vcpu) -> None:
        """A vCPU has emptied all its slots."""

    def on_invalidate(self, vm: Vm) -> None:
        """Every valid root was invalidated and zapped.

        An invalid root that a vCPU still holds is freed with its last reference.
        """

    def on_vm_end(self, vm: Vm) -> None:
        """Every root was invalidated because the VM ends. Roots left in `vm.roots` after this call count as leaked."""
