# SPDX-License-Identifier: Apache-2.0
"""What compaction counts while the rows pass: kinds, loss, vCPUs, threads, gaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from traces.columns import kind_name
from traces.lives import Ints, dense
from traces.record import Columns
from traces.recording.identity import GAP, LEFT_OUT
from traces.schema import BY_NAME, OWN_KINDS
from traces.text import printable

MAX_ENTRIES: Final = 1 << 16  # threads, vCPUs, roots that the metadata lists; more are only counted
MAX_GAPS: Final = 1 << 14
_OWN: Final = tuple(BY_NAME[name].code for name in OWN_KINDS)

Loss = dict[str, dict[str, dict[str, int]]]


class Books:
    """Counts rows by kind and CPU, and lists the threads, vCPUs and gaps that occur."""

    def __init__(self) -> None:
        self.events = 0
        self.gaps: list[dict[str, Any]] = []
        self.gap_count = 0
        self.left_out: list[dict[str, Any]] = []
        self._counts = np.zeros((256, 1), np.int64)  # kind, CPU
        self._threads: dict[int, int] = {}
        self._vcpus: dict[tuple[int, int, int], None] = {}

    def add(self, columns: Columns, vm: Ints) -> None:
        kind, cpu = columns["kind"], columns["cpu"]
        self.events += len(kind)
        cpus = max(int(cpu.max()) + 1, self._counts.shape[1])
        if cpus > self._counts.shape[1]:
            self._counts = np.pad(self._counts, ((0, 0), (0, cpus - self._counts.shape[1])))
        cells = kind.astype(np.int64) * cpus + cpu
        self._counts += np.bincount(cells, minlength=256 * cpus).reshape(256, cpus)
        self._note_threads(columns, vm)
        for row in np.flatnonzero(kind == GAP).tolist():
            self.gap_count += 1
            if len(self.gaps) < MAX_GAPS:
                lost, mask, since = (int(columns[name][row]) for name in ("w0", "w1", "w2"))
                until = int(columns["time"][row])
                kinds = _kinds_of(mask)
                self.gaps.append({"cpu": int(cpu[row]), "lost": lost, "kinds": kinds, "since": since, "until": until})
        for row in np.flatnonzero(kind == LEFT_OUT).tolist():
            since, mask, level = (int(columns[name][row]) for name in ("w0", "w1", "w2"))
            if self.left_out and self.left_out[-1]["until"] is None:
                self.left_out[-1]["until"] = int(columns["time"][row])
            if mask and len(self.left_out) < MAX_GAPS:
                self.left_out.append({"kinds": _kinds_of(mask), "since": since, "until": None, "level": level})

    def _note_threads(self, columns: Columns, vm: Ints) -> None:
        tid, tgid, vcpu = columns["tid"], columns["tgid"], columns["vcpu"]
        _, pairs = dense((tid.astype(np.uint64) << np.uint64(32)) | tgid)
        for pair in pairs.tolist():
            if len(self._threads) < MAX_ENTRIES:
                self._threads.setdefault(pair >> 32, pair & 0xFFFFFFFF)
        rows = np.flatnonzero((vcpu >= 0) & (vm != 0))
        if len(rows):
            key = (vm[rows] << 47) | (vcpu[rows].astype(np.int64) << 32) | tid[rows]
            for value in dense(key)[1].tolist():
                if len(self._vcpus) < MAX_ENTRIES:
                    self._vcpus.setdefault((value >> 47, (value >> 32) & 0x7FFF, value & 0xFFFFFFFF))

    def kinds(self) -> dict[str, int]:
        """Return the number of stored rows by kind name, of the kinds that occur."""
        totals = self._counts.sum(axis=1)
        counts: dict[str, int] = {}
        for code in np.flatnonzero(totals).tolist():
            counts[kind_name(code)] = counts.get(kind_name(code), 0) + int(totals[code])
        return counts

    def threads(self, comms: Mapping[int, str]) -> list[dict[str, Any]]:
        return [{"tid": tid, "tgid": tgid, "comm": comms.get(tid, "")} for tid, tgid in sorted(self._threads.items())]

    def vcpus(self, vm: int) -> list[dict[str, int]]:
        return [{"id": vcpu, "tid": tid} for owner, vcpu, tid in sorted(self._vcpus) if owner == vm]

    def loss(self, reported: Any) -> tuple[Loss, list[str]]:
        """Return the loss table with what is stored, and a line for each kind with events that are unaccounted for."""
        if not isinstance(reported, dict):
            return {}, ["the recorder left no loss counts"]
        stored: dict[str, dict[str, int]] = {str(name): {} for name in reported}
        for code, cpu in np.argwhere(self._counts).tolist():
            if code not in _OWN:  # rows of the recorder's own kinds are not emitted by probes
                cpus = stored.setdefault(kind_name(code), {})
                cpus[str(cpu)] = cpus.get(str(cpu), 0) + int(self._counts[code, cpu])
        table: Loss = {}
        wrong: list[str] = []
        for name, cpus in stored.items():
            emitted, lost = (_cpu_counts(reported.get(name), field) for field in ("emitted", "lost"))
            table[name] = {"emitted": emitted, "lost": lost, "stored": cpus}
            sums = sum(emitted.values()), sum(cpus.values()), sum(lost.values())
            if sums[0] != sums[1] + sums[2]:
                wrong.append(f"{printable(name)}: {sums[0]:,} emitted, but {sums[1]:,} stored and {sums[2]:,} lost")
        return table, wrong


def _kinds_of(mask: int) -> list[str]:
    return [kind_name(code) for code in range(64) if mask >> code & 1]


def _cpu_counts(kind: Any, field: str) -> dict[str, int]:
    counts = kind.get(field) if isinstance(kind, dict) else None
    if not isinstance(counts, dict):
        return {}
    return {str(cpu): n for cpu, n in counts.items() if isinstance(n, int) and 0 < n < 1 << 62}
