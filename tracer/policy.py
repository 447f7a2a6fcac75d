"""What this kernel does with a root that its last vCPU puts: the dated table of root policies. Dated 2026-11.

The kernel's own types and functions decide wherever they can, so that a distribution's back-port is seen for what it
is; the version decides only the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tracer.btf import Btf
from tracer.probes import Version


@dataclass(frozen=True)
class Facts:
    """What the table asks about: version, BTF, and the module parameters as host.module_parameters gives them."""

    version: Version
    btf: Btf
    parameters: Mapping[str, Mapping[str, str]]

    def off(self, module: str, name: str) -> bool:
        return self.parameters.get(module, {}).get(name) in ("N", "0")


# (policy, why, holds): the first that holds is the kernel's.
_TABLE: tuple[tuple[str, str, Callable[[Facts], bool]], ...] = (
    (
        "shadow",
        "nested paging is off (npt or ept): every root is a shadow root",
        lambda f: f.off("kvm_amd", "npt") or f.off("kvm_intel", "ept"),
    ),
    (
        "shadow",
        "kvm.tdp_mmu is off: the shadow MMU keeps unused roots in its hash",
        lambda f: f.off("kvm", "tdp_mmu"),
    ),
    (
        "sync",  # faf72962bc4e and before: kvm_tdp_mmu_free_root under the spinlock
        "before 5.12 the last put zaps and frees the root inline",
        lambda f: f.version < (5, 12),
    ),
    (
        # A worker is asked for before the newer field: a kernel with the worker put back may keep that field beside it.
        "preserve-worker",  # edbdb43fc96b on top of the 5.18 worker
        "6.4 to 6.5, tdp_mmu_zap_root_work: roots stay until invalidated, a worker zaps them",
        lambda f: f.btf.has_function("tdp_mmu_zap_root_work") and f.version >= (6, 4),
    ),
    (
        "async",  # 22b94c4b63eb; 6.2.y and 6.3.2+ took edbdb43fc96b back and cannot be told apart by their types
        "tdp_mmu_zap_root_work before 6.4: the last put queues the root for a worker (late 6.2.y and 6.3.2+ preserve)",
        lambda f: f.btf.has_function("tdp_mmu_zap_root_work"),
    ),
    (
        "preserve-inline",  # 6.6, taken back into 6.1.y in August 2023
        "kvm_mmu_page.tdp_mmu_scheduled_root_to_zap: roots stay until invalidated, the invalidating task zaps them",
        lambda f: f.btf.member("kvm_mmu_page", "tdp_mmu_scheduled_root_to_zap") is not None,
    ),
    (
        "sync",
        "5.12 to 5.17: the last put zaps and frees the root inline",
        lambda f: f.version < (5, 18),
    ),
)


def root_policy(facts: Facts) -> dict[str, str]:
    """{name, why}: sync, async, preserve-worker, preserve-inline, shadow, or unknown."""
    for name, why, holds in _TABLE:
        if holds(facts):
            return {"name": name, "why": why}
    return {"name": "unknown", "why": f"kernel {facts.version[0]}.{facts.version[1]} is not in the policy table"}
