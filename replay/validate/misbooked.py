# SPDX-License-Identifier: Apache-2.0
"""Explain divergences of VMs of one process by a recorder that attributed one VM's notifier to another VM.

One munmap notifies every VM of the process, each by an event of its own. A recorder that determined the VM from the
thread (before 26 November 2026) attributed all of them, and the zaps that follow, to one VM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from replay.validate.row_tuples import RowTuple

_NOTIFIER = "kvm_unmap_hva_range"


def notifiers_of_others(rows: Mapping[int, Iterable[RowTuple]]) -> list[str]:
    """Return lines that say which VM of a process has notifiers of which other one; `rows` has the VMs' rows by VM."""
    met = {
        vm: Counter((row.tid, row.addr, row.value) for row in of_vm if row.kind == _NOTIFIER)
        for vm, of_vm in rows.items()
    }
    said = []
    for vm, own in met.items():
        for other, others in met.items():
            twice = sum(count > 1 for which, count in own.items() if which not in others)
            if other != vm and twice:
                said.append(
                    f"VM {vm} has {twice:,} notifiers of its process more than once which VM {other} has not: rows of "
                    f"VM {other} are booked to VM {vm}, by a recorder of before 26 November 2026"
                )
    return said
