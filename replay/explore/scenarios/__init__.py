# SPDX-License-Identifier: Apache-2.0
"""The scenarios that kvmtrace ships, one module for each family.

They are abstractions of kernel paths, not kernel code.
"""

from __future__ import annotations

from typing import Final

from replay.explore.scenario import Scenario
from replay.explore.scenarios import accounting, apicv, invalidate, last_put, mmu_seq, rmap, vm_destroy

SCENARIOS: Final[tuple[Scenario, ...]] = (
    vm_destroy.SCENARIO,
    last_put.SCENARIO,
    invalidate.SCENARIO,
    apicv.SCENARIO,
    rmap.SCENARIO,
    accounting.SCENARIO,
    mmu_seq.SCENARIO,
)
