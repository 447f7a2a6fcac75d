# SPDX-License-Identifier: Apache-2.0
"""The loaded BPF programs: how they are attached, read and detached."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tracer.probing import kept, libbpf, snapshot, tracefs
from tracer.probing.attachments import (
    IOCTL_PROGRAMS,
    SCHED_PROGRAMS,
    choices,
    kernel_bases,
    plan,
    svm_vmcb,
    this_layout,
)
from tracer.probing.btf import kernel_btf
from tracer.probing.libbpf import BpfMap
from tracer.probing.program import COUNTERS, SETTINGS, THREAD, Chosen
from tracer.ring import MAX_RINGS
from traces.errors import ENVIRONMENT, Problem
from traces.schema import BY_CODE, BY_NAME

# Offsets in struct bpf_prog_info; the latter is zero on kernels that do not count them.
_RUN_TIME, _RECURSION_MISSES = 192, 208
_PROGRAM_TYPES = {
    "tp": libbpf.TRACEPOINT, "raw": libbpf.RAW_TRACEPOINT, "kprobe": libbpf.KPROBE, "kretprobe": libbpf.KPROBE,
    "fentry": libbpf.TRACING, "fexit": libbpf.TRACING,
}  # fmt: skip
_ATTACH_TYPES = {"fentry": libbpf.FENTRY, "fexit": libbpf.FEXIT}
_KEYS = {"born": "u8", "wanted": "u8"}
_VALUES = {"threads": THREAD, "counters": COUNTERS, "settings": SETTINGS, "wanted": "u1", "born": "u8"}


class Probes:
    """The loaded BPF programs: `attach`, then `detach`; in between, ring.py and the recorder read the maps."""

    def __init__(self, kinds: frozenset[str], rings: int, ring_bytes: int, filter_tgid: int | None = None) -> None:
        """Load the programs that are kept for this kernel, or compile them.

        `rings` is the number of ring buffers, each of `ring_bytes`; `filter_tgid` is the only process to record. Raises
        Problem where bcc, headers, privileges or tracefs are lacking.
        """
        if tracefs.tracefs() is None:
            raise Problem(f"tracefs is not mounted or not readable: {tracefs.MOUNT_COMMAND}", ENVIRONMENT)
        self.layout = this_layout()
        if unknown := self.layout.unknown():
            raise Problem(unknown, ENVIRONMENT)
        available = choices()
        self.plan = plan(kinds, available)
        self._compiled = kept.get(available.text(kernel_btf(), self.layout))
        self._functions: dict[str, int] = {}
        self._links: list[int] = []
        self._apart: dict[str, int] = {}  # links that `observe` closes and opens again, by function
        self._setting = threading.Lock()
        self._maps: dict[str, BpfMap] = {}
        self._rings: list[BpfMap] = []
        try:
            self._make_maps(rings, ring_bytes)
            bases = kernel_bases()
            settings = np.zeros(1, SETTINGS)
            settings["kinds"] = kind_mask(kinds)
            settings["filter_tgid"] = filter_tgid or 0
            settings["page_offset_at"] = bases.get("PAGE_OFFSET_BASE", 0)
            settings["vmemmap_at"] = bases.get("VMEMMAP_BASE", 0)
            settings["svm_vmcb"] = svm_vmcb()
            self._maps["settings"].update(0, settings)
            self._missed_before: dict[str, int] = {}
            iterated = kernel_btf().function_id(snapshot.TARGET)
            self._iterator = self._load(snapshot.FUNCTION, libbpf.TRACING, libbpf.ITERATOR, iterated)
        except OSError as error:
            self.close()
            raise _not_allowed(error) from None

    def _make_maps(self, rings: int, ring_bytes: int) -> None:
        ring = self._compiled.maps["ring"]
        for name, shape in self._compiled.maps.items():
            inner = self._maps["ring"].fd if shape[0] == libbpf.ARRAY_OF_MAPS else 0
            self._maps[name] = BpfMap(name, shape, _KEYS.get(name, "u4"), _VALUES.get(name, "u4"), inner)
        for _ in range(rings):
            self._rings.append(BpfMap("ring", (*ring[:3], ring_bytes, ring[4])))
        for i in range(MAX_RINGS):
            self._maps["rings"].update(i, np.array([self._rings[i % rings].fd], "u4"))

    @property
    def ring_fds(self) -> list[int]:
        """The descriptors of the ring buffers."""
        return [ring.fd for ring in self._rings]

    def _load(self, name: str, type_: int, attach_type: int = 0, btf_id: int = 0) -> int:
        """Return a program's descriptor; the program is loaded at the first call. Raises OSError."""
        if name not in self._functions:
            code = self._compiled.with_maps(name, {each: made.fd for each, made in self._maps.items()})
            self._functions[name] = libbpf.load(name, type_, code, attach_type, btf_id)
        return self._functions[name]

    def attach(self) -> None:
        """Attach all probes and hooks; one that the kernel refuses is noted as absent, with the reason."""
        try:
            if self.plan.ioctls:
                for where, function in IOCTL_PROGRAMS:
                    self._links.append(self._attach_tracepoint(function, where))
            if self.plan.scheduler:
                for where, function in SCHED_PROGRAMS:
                    self._links.append(libbpf.attach_traced(self._load(function, libbpf.RAW_TRACEPOINT), where))
        except OSError as error:
            raise _not_allowed(error) from None
        for chosen in self.plan.chosen:
            try:
                link = self._attach(chosen)
            except OSError as error:
                self.plan.refused(chosen, error.strerror or str(error))
                continue
            if chosen.only_tells:
                self._apart[chosen.function] = link
            else:
                self._links.append(link)

    def observe(self, kinds: frozenset[str]) -> frozenset[str]:
        """Of the kinds loaded, take events of only these from now on, while attached; return those observed.

        Probes that only write rows of other kinds are detached, and cost nothing. Those that also tell the programs
        what a thread is working on stay attached.
        """
        refused = set()
        for chosen in self.plan.chosen:
            kind = chosen.kind
            if chosen.only_tells and kind in kinds and chosen.function not in self._apart and kind in self.plan.shown:
                try:
                    self._apart[chosen.function] = self._attach(chosen)
                except OSError:
                    refused.add(kind)
        kinds -= refused
        self._set(kinds=kind_mask(kinds))
        for chosen in self.plan.chosen:
            if chosen.function in self._apart and chosen.kind not in kinds:
                os.close(self._apart.pop(chosen.function))
        return kinds

    def run_time(self) -> int:
        """Return the ns for which the loaded programs ran, attached or not, while statistics were on."""
        infos = [libbpf.program_info(fd) for fd in self._functions.values()]
        return sum(int.from_bytes(info[_RUN_TIME:][:8], sys.byteorder) for info in infos)

    def _attach(self, chosen: Chosen) -> int:
        name, how, where = chosen.function, chosen.how, chosen.point.where
        if how == "tp":
            return self._attach_tracepoint(name, where)
        target = kernel_btf().function_id(where) if how in _ATTACH_TYPES else 0
        program = self._load(name, _PROGRAM_TYPES[how], _ATTACH_TYPES.get(how, 0), target)
        if how == "raw":
            return libbpf.attach_traced(program, where.split(":")[1])
        if how in _ATTACH_TYPES:
            return libbpf.attach_traced(program)
        return libbpf.attach_kprobe(program, where, returns=how == "kretprobe")

    def _attach_tracepoint(self, name: str, where: str) -> int:
        return libbpf.attach_tracepoint(self._load(name, libbpf.TRACEPOINT), tracefs.event_id(where))

    def detach(self) -> None:
        """Detach every probe; the maps stay readable."""
        while self._links:
            os.close(self._links.pop())
        while self._apart:
            os.close(self._apart.popitem()[1])

    def close(self) -> None:
        self.detach()
        for fd in self._functions.values():
            os.close(fd)
        for made in (*self._maps.values(), *self._rings):
            made.close()
        self._functions, self._maps, self._rings = {}, {}, []

    def function(self, name: str) -> int:
        """Return the descriptor of a loaded program."""
        return self._functions[name]

    def reset(self) -> None:
        """Forget the counts and threads of an earlier recording; nothing may be attached."""
        self._missed_before = self._misses()
        self._maps["counters"].update(0, np.zeros(libbpf.possible_cpus(), COUNTERS))
        for name in ("threads", "wanted", "born"):
            self._maps[name].clear()

    def forget_dead(self, crowded: int) -> None:
        """If more than `crowded` threads are known, forget those that ended: their table must not get full.

        In a pid namespace it does nothing, because other threads cannot be seen to end from there.
        """
        threads = self._maps["threads"]
        known = threads.items()[0]
        if len(known) <= crowded or self.pid_namespace_level():
            return
        for tid in known.tolist():
            if not Path(f"/proc/{tid}").exists():
                threads.delete(tid)

    def snapshot(self) -> dict[str, Any]:
        """Return the VMs that are alive now, and enter their vCPUs into the probes' thread table; see snapshot.py."""

        def ask(first_fd: int, vm: int, part: int) -> None:
            self._set(first_fd=first_fd, look_at=vm, part=part)

        try:
            return snapshot.take(self._iterator, ask)
        finally:
            ask(0, 0, 0)

    def _set(self, **values: int) -> None:
        """Change some of the programs' settings; a snapshot and `observe` may do so at the same time."""
        with self._setting:
            settings = self._maps["settings"].lookup()
            for name, value in values.items():
                settings[name] = value
            self._maps["settings"].update(0, settings)

    def born(self) -> set[int]:
        """Return the addresses of struct kvm of the VMs whose creation the probes saw."""
        return {int(kvm) for kvm in self._maps["born"].items()[0]}

    def pid_namespace_level(self) -> int:
        """Return how many pid namespaces this process is below the initial one; known after the first snapshot."""
        return int(self._maps["settings"].lookup()["pid_ns_level"][0])

    def missed(self) -> dict[str, int]:
        """Return, by probe, runs that the kernel skipped while another BPF program ran on that CPU (5.12+)."""
        before = self._missed_before
        return {name: more for name, misses in self._misses().items() if (more := misses - before.get(name, 0))}

    def _misses(self) -> dict[str, int]:
        infos = {name: libbpf.program_info(fd) for name, fd in self._functions.items()}
        return {
            name: int.from_bytes(info[_RECURSION_MISSES:][:8], sys.byteorder) for name, info in infos.items() if info
        }

    def counters(self) -> np.ndarray[Any, Any]:
        """Return the counters of each possible CPU: emitted and lost by kind code, and the gap still open."""
        return self._maps["counters"].lookup(0, libbpf.possible_cpus())

    def threads(self) -> dict[int, dict[str, Any]]:
        """Return the threads that the probes met: {tid: {tgid, comm}}."""
        return {
            int(t["tid"]): {"tgid": int(t["tgid"]), "comm": bytes(t["comm"]).split(b"\0")[0].decode(errors="replace")}
            for t in self._maps["threads"].items()[1]
        }


def kind_mask(kinds: Iterable[str]) -> int:
    """Return a mask with one bit for each kind, by its code."""
    return sum(1 << BY_NAME[kind].code for kind in kinds)


def _not_allowed(error: OSError) -> Problem:
    if error.errno in (errno.EPERM, errno.EACCES):
        return Problem("BPF programs may not be loaded: run as root (CAP_BPF and CAP_PERFMON)", ENVIRONMENT)
    return Problem(f"the kernel refused the probes: {error.strerror or error}", ENVIRONMENT)


def loss_table(
    counters: np.ndarray[Any, Any], turned_away: Mapping[tuple[int, int], int]
) -> dict[str, dict[str, dict[str, int]]]:
    """Return {kind: {"emitted": {cpu: n}, "lost": {cpu: n}}} of the kinds that were seen at all.

    `turned_away` counts, by kind code and CPU, events from after the recording's end; they are not counted as emitted.
    """
    table: dict[str, dict[str, dict[str, int]]] = {}
    counters = counters.copy()
    for (kind, cpu), count in turned_away.items():
        counters["emitted"][cpu, kind] -= count
    for code in np.flatnonzero(counters["emitted"].sum(axis=0)):
        table[BY_CODE[int(code)].name] = {
            column: {str(cpu): int(n) for cpu, n in enumerate(counters[column][:, code]) if n}
            for column in ("emitted", "lost")
        }
    return table
