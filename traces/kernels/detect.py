# SPDX-License-Identifier: Apache-2.0
"""Which root policy a running kernel has: its own types and functions decide wherever they can, else its version.

So a distribution's back-port is recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from traces.kernels.vendors import OFF, VENDORS


class Types(Protocol):
    """What is needed of a kernel's BTF."""

    def has_function(self, name: str, /) -> bool: ...

    def member(self, struct: str, path: str, /) -> object | None: ...


@dataclass(frozen=True)
class RunningKernel:
    """A running kernel: its version, its BTF, and KVM's module parameters as {module: {parameter: value}}."""

    version: tuple[int, int]
    types: Types
    parameters: Mapping[str, Mapping[str, str]]

    def off(self, module: str, name: str) -> bool:
        return self.parameters.get(module, {}).get(name) in OFF


# (policy, why, holds): the first that holds is the kernel's.
_RULES: tuple[tuple[str, str, Callable[[RunningKernel], bool]], ...] = (
    (
        "shadow",
        "nested paging is off (npt or ept): every root is a shadow root",
        lambda host: any(host.off(vendor.module, vendor.paging) for vendor in VENDORS),
    ),
    (
        "shadow",
        "kvm.tdp_mmu is off: the shadow MMU keeps unused roots in its hash",
        lambda host: host.off("kvm", "tdp_mmu"),
    ),
    (
        "sync",  # faf72962bc4e and before: kvm_tdp_mmu_free_root under the spinlock
        "before 5.12 the last put zaps and frees the root inline",
        lambda host: host.version < (5, 12),
    ),
    (
        # A worker is asked for before the newer field: a kernel with the worker put back may keep that field as well.
        "preserve-worker",  # edbdb43fc96b on top of the 5.18 worker
        "6.4 to 6.5, tdp_mmu_zap_root_work: roots stay until invalidated, a worker zaps them",
        lambda host: host.types.has_function("tdp_mmu_zap_root_work") and host.version >= (6, 4),
    ),
    (
        "async",  # 22b94c4b63eb; 6.2.y and 6.3.2+ took edbdb43fc96b back and cannot be distinguished by their types
        "tdp_mmu_zap_root_work before 6.4: the last put queues the root for a worker (late 6.2.y and 6.3.2+ preserve)",
        lambda host: host.types.has_function("tdp_mmu_zap_root_work"),
    ),
    (
        "preserve",  # 6.6, taken back into 6.1.y in August 2023
        "kvm_mmu_page.tdp_mmu_scheduled_root_to_zap: roots stay until invalidated, the invalidating task zaps them",
        lambda host: host.types.member("kvm_mmu_page", "tdp_mmu_scheduled_root_to_zap") is not None,
    ),
    (
        "sync",
        "5.12 to 5.17: the last put zaps and frees the root inline",
        lambda host: host.version < (5, 18),
    ),
)


def root_policy(host: RunningKernel) -> dict[str, str]:
    """Return {name, why}: the name is one of `policies.POLICIES`, or unknown."""
    for name, why, holds in _RULES:
        if holds(host):
            return {"name": name, "why": why}
    return {"name": "unknown", "why": f"kernel {host.version[0]}.{host.version[1]} is not in the policy table"}
