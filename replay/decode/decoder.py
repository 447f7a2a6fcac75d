"""From a trace to each VM's stimuli, a batch at a time: decoded once, whatever number of policies replay them.

Memory is a batch, a few numbers a vCPU and the memslot table; for recordings that show no removals (5.10), also what
the recorded roots have mapped. Rules by part: `touches`, `controls`, `registers`, `host`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode import inputs
from replay.decode.capabilities import Evidence
from replay.decode.controls import Controls
from replay.decode.inputs import TRIGGER, Out, Stimuli
from replay.decode.lookback import COLUMNS, Rows
from replay.decode.slots import Slots, logs_dirty
from replay.decode.touches import Touches
from replay.decode.vm_events import ONE_FUNCTION, Host
from replay.simulate.operations import RESETS, Op, Ranges
from traces.errors import Problem
from traces.reader import BATCH_ROWS

_ROOTS: Final = 1 << 24  # whose words are kept; beyond, touches count as outside of SMM
_IDS: Final = 1 << 15  # vCPU ids are int16 in a trace


class VmStimuli:
    """One VM of a trace. Iterate once; `vcpus` gives the recorded id of each of its dense numbers.

    `notes` counts, after the iteration, what had to be inferred or left open. `groups`: see `touches`.
    """

    def __init__(
        self,
        evidence: Evidence,
        vm: Mapping[str, Any],
        *,
        groups: bool = True,
        size: int = BATCH_ROWS,
        watch: Callable[[Rows], None] | None = None,
    ) -> None:
        """`watch` sees each batch's rows, all columns of them, before the stimuli that come of it."""
        self.id = int(vm["id"])
        self.vcpus = sorted({int(vcpu["id"]) for vcpu in vm["vcpus"]})
        if self.vcpus and self.vcpus[-1] >= _IDS:
            raise Problem(f"{evidence.trace.path}: VM {self.id} has a vCPU {self.vcpus[-1]}, which no row can name")
        self._evidence = evidence
        self._size = size
        self._watch = watch
        self._columns = list(COLUMNS) if watch else _columns(evidence, vm)
        # The last place is that of index -1: no vCPU.
        self._numbers = np.full(_IDS + 1, -1, np.int32)
        self._numbers[self.vcpus] = np.arange(len(self.vcpus))
        slots = Slots(vm["slots"])
        count = max(len(self.vcpus), 1)
        self._touches = Touches(evidence, count, slots, groups)
        self._controls = Controls(evidence, count)
        self._host = Host(evidence, slots)
        # Role words by root id; the last place stays empty, for ids beyond.
        self._roots = np.zeros(min(evidence.trace.metadata.root_count, _ROOTS) + 2, np.uint32)
        for root in evidence.trace.metadata.uncreated_roots:
            if root["id"] < len(self._roots) - 1:
                self._roots[root["id"]] = root["role"]
        self.nested = 0
        self.ended = False

    @property
    def notes(self) -> Counter[str]:
        """Counts by what they are of."""
        counts = Counter({f"trigger {trigger.name}": n for trigger, n in self._controls.counts.items()})
        counts.update({"inferred removals": self._touches.inferred, "prefetched rows": self._touches.hidden})
        counts.update({"nested entries": self.nested})
        return counts

    def __iter__(self) -> Iterator[Stimuli]:
        held: Stimuli | None = None
        for batch in self._evidence.trace.batches(self._columns, vm=self.id, size=self._size):
            if self.ended:
                return
            rows = Rows(batch, self._numbers)
            ends = rows.of("vm_destroy")
            if len(ends):
                rows = rows.cut(int(ends[0]) + 1)
                self.ended = True
            if self._watch is not None:
                self._watch(rows)
            fresh = self._decode(rows)
            whole = fresh if held is None else _joined(held, fresh)
            self._revise(whole)
            # What the next batch does not explain is explained by nothing, so that no more than one is held.
            since = None if self.ended else self._controls.pending(self._touches.last, int(rows.seq[0]))
            held = None
            if since is not None and (at := int(np.searchsorted(whole.seq, since))) < len(whole):
                whole, held = _parted(whole, at)
            if len(whole):
                yield whole
        if held is not None and len(held):
            yield held

    def _decode(self, rows: Rows) -> Stimuli:
        out = Out()
        self._name_roots(rows)
        touched, _ = self._touches.emit(rows, out, self._roots)
        self._controls.emit(rows, out, self._roots, touched, self._touches.last)
        self._host.emit(rows, out)
        self.nested += len(rows.of("kvm_nested_vmenter"))
        return out.build(rows)

    def _name_roots(self, rows: Rows) -> None:
        """Remember each root's role word."""
        for kind in ("kvm_mmu_get_page", "root_get", "mmu_load"):
            at = rows.of(kind)
            root = rows.root[at]
            at, root = at[root > 0], root[root > 0]
            fits = root < len(self._roots) - 1
            self._roots[root[fits]] = rows.role[at[fits]]

    def _revise(self, whole: Stimuli) -> None:
        """Mark touches whose exit reset, and tell apart resets for CR0, now that what followed is known."""
        _set_last(whole, self._controls.by_fault, whole.op & 15 <= Op.FIX, RESETS)
        at, trigger = self._controls.explained
        if len(at):
            row, found = _last_of(whole, at, whole.op & 15 == TRIGGER)
            whole.gfn[row] = whole.gfn[row] >> inputs.STATE_SHIFT << inputs.STATE_SHIFT | trigger[found]


def _columns(evidence: Evidence, vm: Mapping[str, Any]) -> list[str]:
    """The columns that say anything of this VM: reading the others takes as long as all the rest."""
    counts = evidence.trace.metadata.kinds
    logs = any(map(logs_dirty, vm["slots"]))
    fast = bool(counts.get("fast_page_fault"))
    wanted = {
        "rip": False,
        "addr": fast or bool(counts.get("kvm_unmap_hva_range")),
        "old": fast or logs,
        "new": fast or logs,
        "ret": fast or not counts.get("root_get"),
        "as_id": logs or bool(counts.get("zap_leafs")),
        "slot": logs,
        "tid": logs or evidence.kernel.since < ONE_FUNCTION,
    }
    return [name for name in COLUMNS if wanted.get(name, True)]


def _last_of(whole: Stimuli, seqs: NDArray[np.int64], which: NDArray[np.bool_]) -> tuple[Any, NDArray[np.bool_]]:
    """Rows of the last of these stimuli at each seq, and for which seqs there was one."""
    candidates = np.flatnonzero(which)
    at = np.searchsorted(whole.seq[candidates], seqs, "right") - 1
    found = at >= 0
    found[found] = whole.seq[candidates[at[found]]] == seqs[found]
    return candidates[at[found]], found


def _set_last(whole: Stimuli, seqs: NDArray[np.int64], which: NDArray[np.bool_], bit: int) -> None:
    if len(seqs):
        row, _ = _last_of(whole, seqs, which)
        whole.op[row] |= np.uint32(bit)


def _joined(first: Stimuli, second: Stimuli) -> Stimuli:
    """Two stretches as one."""
    gfn = second.gfn.copy()
    ranged = np.isin(second.op & 15, (int(Op.ZAP), int(Op.SPLIT)))
    gfn[ranged] += len(first.ranges.rows)
    return Stimuli(
        np.concatenate([first.op, second.op]),
        np.concatenate([first.gfn, gfn]),
        np.concatenate([first.time, second.time]),
        np.concatenate([first.seq, second.seq]),
        Ranges(first.ranges.rows + second.ranges.rows),
        first.plain and second.plain,
    )


def _parted(whole: Stimuli, at: int) -> tuple[Stimuli, Stimuli]:
    """What is before index `at`, and the rest."""
    first, second = (
        Stimuli(whole.op[part], whole.gfn[part], whole.time[part], whole.seq[part], whole.ranges, whole.plain)
        for part in (slice(None, at), slice(at, None))
    )
    # The rest takes only the ranges that it needs along, or they would pile up.
    ranged = np.flatnonzero(np.isin(second.op & 15, (int(Op.ZAP), int(Op.SPLIT))))
    second.gfn = second.gfn.copy()
    kept = [whole.ranges.rows[i] for i in second.gfn[ranged].tolist()]
    second.gfn[ranged] = np.arange(len(kept))
    second.ranges = Ranges(kept)
    return first, second
