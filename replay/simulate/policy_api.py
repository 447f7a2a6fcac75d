# SPDX-License-Identifier: Apache-2.0
"""What a root policy may decide, as the interface of the reference model; users write their own against it.

A policy of your own is one file with one subclass of `Policy` in it (`kvmtrace replay TRACE --policy ./mine.py`), or an
entry point of the group `kvmtrace.policies`. The VM is a `reference.Vm`: `vm.find(word)`, `vm.free(root, cause)`,
`vm.invalidate_root(root, cause)`, `vm.roots`, `vm.now` (ns of the recording's clock). `examples` has two that no kernel
has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from traces.kernels.policies import ASYNC, PolicyParameters

if TYPE_CHECKING:
    from replay.simulate.operations import Cause
    from replay.simulate.reference import Root, Vcpu, Vm


class Policy:
    """The kernels' own rules; override what should differ.

    `parameters` says of what kernel the rest is (`traces.kernels.policies`). With `own_reference` the last put never
    comes while a root is valid, so that a policy that keeps roots of its own accord leaves it False.
    """

    name: str = ""
    parameters: PolicyParameters = ASYNC

    def on_load(self, vm: Vm, word: int) -> Root | None:
        """The root for a vCPU whose role word has this index; None: build one."""
        return vm.find(word)

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        """The last slot gave up a valid root. Free it, or leave it for a later `on_load`."""
        vm.free(root, cause, vcpu)

    def on_unload(self, vm: Vm, vcpu: Vcpu) -> None:
        """A vCPU has emptied all its slots."""

    def on_invalidate(self, vm: Vm) -> None:
        """Every valid root has been invalidated and zapped; invalid roots still held are freed with their last slot."""

    def on_vm_end(self, vm: Vm) -> None:
        """Every root has been invalidated. What is left in `vm.roots` now counts as leaked."""
