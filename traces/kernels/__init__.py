# SPDX-License-Identifier: Apache-2.0
"""What each kernel's KVM MMU does with roots, and how that shows: one dated description, for every part of kvmtrace.

`changes` is the list of what changed, with commits and first versions; `fold` applies it to a version and to what was
detected, which gives one frozen `Kernel`. docs/kvm-mmu.md explains them.
"""

from traces.kernels.fold import Facts, at, described, newer_than_known, recorded
from traces.kernels.kernel import Kernel

__all__ = ["Facts", "Kernel", "at", "described", "newer_than_known", "recorded"]
