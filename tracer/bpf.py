"""bcc, kept in one place: importing it, choosing each probe's point for this kernel, loading, attaching, detaching."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tracer import snapshot, tracefs
from tracer.btf import Btf, kernel_btf, libbpf
from tracer.headers import headers
from tracer.host import kernel_symbols, kernel_version
from tracer.offsets import Layout, kernel_layout
from tracer.probes import HOOKS, IOCTL_KINDS, PROBES, SCHED_KINDS, SCHED_PREV_STATE, Hook, Point, Probe
from tracer.program import KIND_SLOTS, Chosen, program, ring_names
from traces.errors import ENVIRONMENT, Problem
from traces.schema import BY_CODE

DIST_PACKAGES = "/usr/lib/python3/dist-packages"
INSTALL_BCC = "apt-get install python3-bpfcc"
_SYSCALLS = (("syscalls:sys_enter_ioctl", "ioctl_enter"), ("syscalls:sys_exit_ioctl", "ioctl_leave"))
_SCHED = (("sched_switch", "sched_switched"), ("sched_wakeup", "sched_woken"))
_COUNTERS = np.dtype([("emitted", "u8", KIND_SLOTS), ("lost", "u8", KIND_SLOTS), ("gap_count", "u8"),
                      ("gap_kinds", "u8"), ("gap_since", "u8")])  # fmt: skip
# struct bpf_prog_info of the bpf(2) interface: recursion_misses, which older kernels leave zero
_PROG_INFO_SIZE, _RECURSION_MISSES = 224, 208


def import_bcc() -> Any:
    """The distribution's bcc module. It lives outside a virtual environment, so its directory goes LAST on sys.path."""
    if os.environ.get("KVMTRACE_WITHOUT_BCC"):  # how `doctor` is tested for a machine without it
        raise Problem(f"bcc is not installed: {INSTALL_BCC}", ENVIRONMENT)
    if DIST_PACKAGES not in sys.path:
        sys.path.append(DIST_PACKAGES)
    try:
        import bcc
    except ImportError as error:
        raise Problem(f"bcc is not usable ({error}): {INSTALL_BCC}", ENVIRONMENT) from None
    if not hasattr(bcc, "BPF"):
        raise Problem(f"the `bcc` of PyPI is not iovisor's bcc: pip uninstall bcc, then {INSTALL_BCC}", ENVIRONMENT)
    return bcc


@dataclass(frozen=True)
class Attachment:
    """What became of one probe: `how` is the attachment, or "none" with the reason in `why`; a hook has no kind."""

    kind: str
    point: str
    how: str
    why: str = ""

    def metadata(self) -> dict[str, str]:
        return {"kind": self.kind, "point": self.point, "how": self.how, "why": self.why}


@dataclass
class ProbePlan:
    """Which probes this kernel allows, and how; made without root as far as that goes."""

    chosen: list[Chosen] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    hooks: list[Attachment] = field(default_factory=list)
    prev_state: str = ""  # how a sched_switch tells the state of the task that leaves, where it is recorded


def kprobes_available() -> bool:
    return Path("/sys/bus/event_source/devices/kprobe/type").exists()


def kvm_built_in() -> bool:
    return not Path("/proc/modules").exists() or "kvm " not in Path("/proc/modules").read_text()


def fentry_refused(bcc: Any) -> str:
    """Why bcc cannot use fentry on KVM's functions here, or "" where it can."""
    if not kvm_built_in():
        return f"bcc {bcc.__version__} finds fentry targets in vmlinux only, and kvm is a module"
    try:
        with quiet() as said, headers():
            bcc.BPF(text="KFUNC_PROBE(kvm_mmu_load) { return 0; }", cflags=["-w"]).cleanup()
    except Exception:
        reason = _last_line(said).rpartition(": ")[2]
        return "fentry refused by this kernel" + (f" ({reason})" if reason else "")
    return ""


def _choose(
    probe: Probe | Hook, btf: Btf, root: Path | None, layout: Layout, fentry: str, kprobe: bool
) -> Chosen | str:
    """The first of the probe's points that holds on this kernel, or why none does."""
    version, symbols, why = kernel_version(), kernel_symbols(), []
    for point in probe.points:
        if not point.since <= version < point.until:
            continue
        if point.how in ("tp", "raw"):
            fields = tracefs.tracepoint(root, point.where) if root else None
            if fields is None:
                why.append(f"no tracepoint {point.where}" if root else f"tracefs not readable: {tracefs.MOUNT_COMMAND}")
            elif point.how == "raw" and not _raw_matches(point, btf, layout):
                why.append(f"raw arguments of {point.where} unknown here")
            else:
                return Chosen(probe, point, point.how, fields)
            continue
        if "NOTIFIED" in point.before and "KVM_NOTIFIER" not in layout.offsets:
            why.append("the place of a VM's struct mmu_notifier is not known")
        elif fentry and not kprobe:
            why.append(f"{fentry}; no kprobes (CONFIG_KPROBES off)")
        elif point.where not in symbols:
            why.append(f"no function {point.where}")
        elif (signature := btf.signature(point.where)) and signature[: len(point.signature)] != point.signature:
            why.append(f"{point.where} has other arguments: {', '.join(signature)}")
        elif not fentry:
            return Chosen(probe, point, "fentry" if point.how == "entry" else "fexit", {})
        else:
            return Chosen(probe, point, "kprobe" if point.how == "entry" else "kretprobe", {})
    return "; ".join(dict.fromkeys(why)) or f"not in kernel {version[0]}.{version[1]}"


def _raw_matches(point: Point, btf: Btf, layout: Layout) -> bool:
    """Whether the raw arguments are the ones the table means. Without module BTF only leading pointers are trusted."""
    # Members that the probe would read: without them it would store 0, where the tracepoint has the value (7.3).
    for macro, member in (("SP_", "SP_ROLE"), ("KVM_USED", "KVM_USED_PAGES")):
        if member not in layout.offsets and any(macro in text for text in point.fill.values()):
            return False
    signature = btf.signature("__traceiter_" + point.where.split(":")[1])
    if signature is None:
        return len(point.signature) == 1
    return signature[1 : 1 + len(point.signature)] == point.signature


def kernel_bases() -> dict[str, int]:
    """Addresses of the variables holding the direct map's and the page array's start; empty where symbols hide them."""
    symbols = kernel_symbols()
    wanted = {"PAGE_OFFSET_BASE": "page_offset_base", "VMEMMAP_BASE": "vmemmap_base"}
    return {macro: symbols[name] for macro, name in wanted.items() if symbols.get(name)}


def this_layout() -> Layout:
    return kernel_layout(kernel_btf(), kernel_version(), kernel_bases())


def plan(kinds: frozenset[str], bcc: Any) -> ProbePlan:
    """How each of `kinds` can be observed here."""
    btf, layout, root = kernel_btf(), this_layout(), tracefs.tracefs()
    fentry, kprobe = fentry_refused(bcc), kprobes_available()
    made = ProbePlan()
    for probe in PROBES:
        if probe.kind not in kinds:
            continue
        choice = _choose(probe, btf, root, layout, fentry, kprobe)
        if isinstance(choice, str):
            made.attachments.append(Attachment(probe.kind, probe.points[0].where, "none", choice))
        else:
            made.chosen.append(choice)
            skipped = probe.points[: probe.points.index(choice.point)]
            why = f"instead of {skipped[0].how} {skipped[0].where}" if skipped else ""
            made.attachments.append(Attachment(probe.kind, choice.point.where, choice.how, why))
    taken = {(chosen.how, chosen.point.where) for chosen in made.chosen}
    for hook in HOOKS:
        if kinds.isdisjoint(hook.serves):
            continue
        choice = _choose(hook, btf, root, layout, fentry, kprobe)
        if isinstance(choice, str):
            made.hooks.append(Attachment("", hook.points[0].where, "none", choice))
        elif (choice.how, choice.point.where) not in taken:  # else the probe there does the same
            made.chosen.append(choice)
            made.hooks.append(Attachment("", choice.point.where, choice.how))
    for kind in SCHED_KINDS:
        if kind in kinds:
            signature = btf.signature("__traceiter_sched_switch") or ()
            made.prev_state = SCHED_PREV_STATE.get(signature[1:], "")
            where = ", ".join(f"sched:{name}" for name, _ in _SCHED)
            why = "" if made.prev_state else "raw arguments of sched:sched_switch unknown here"
            made.attachments.append(Attachment(kind, where, "none" if why else "raw", why))
    for kind in IOCTL_KINDS:
        if kind in kinds:
            made.attachments.append(
                Attachment(kind, "syscalls:sys_enter_ioctl, sys_exit_ioctl", "tp" if root else "none")
            )
    return made


class Probes:
    """The loaded program: `attach`, then `detach`; the maps that ring.py and the recorder read in between."""

    def __init__(self, kinds: frozenset[str], rings: int, ring_bytes: int, filter_tgid: int | None = None) -> None:
        """Compile and load for this kernel. Raises Problem where bcc, headers, privileges or tracefs are lacking."""
        self._bcc = import_bcc()
        if tracefs.tracefs() is None:
            raise Problem(f"tracefs is not mounted or not readable: {tracefs.MOUNT_COMMAND}", ENVIRONMENT)
        self.layout = this_layout()
        if unknown := self.layout.unknown():
            raise Problem(unknown, ENVIRONMENT)
        self.plan = plan(kinds, self._bcc)
        btf = kernel_btf()
        arguments = {c.point.where: len(btf.signature(c.point.where) or ()) for c in self.plan.chosen}
        text = program(
            self.plan.chosen, self.layout, kinds, rings, ring_bytes, filter_tgid, arguments, self.plan.prev_state
        )
        self._bpf = self._load(text)
        self.ring_fds = [int(self._bpf[name].map_fd) for name in ring_names(rings)]
        for i, fd in enumerate(self.ring_fds):
            self._bpf["rings"][ctypes.c_int(i)] = ctypes.c_int(fd)
        self._missed_before: dict[str, int] = {}
        self._iterator = self._function(snapshot.FUNCTION, self._bcc.BPF.TRACING)

    def _load(self, text: str) -> Any:
        said: list[str] = []
        try:
            with quiet() as said, headers():
                return self._bcc.BPF(text=text, cflags=["-w"])
        except Problem:
            raise
        except Exception as error:
            raise Problem(f"bcc could not load the probes: {_last_line(said) or error}", ENVIRONMENT) from None

    def _function(self, name: str, kind: int) -> Any:
        said: list[str] = []
        try:
            with quiet() as said:
                return self._bpf.load_func(name, kind)
        except Exception as error:
            if ctypes.get_errno() == errno.EPERM or "privileges" in str(error):
                raise Problem(
                    "BPF programs may not be loaded: run as root (CAP_BPF and CAP_PERFMON)", ENVIRONMENT
                ) from None
            raise Problem(f"the kernel refused {name}: {_last_line(said) or error}", ENVIRONMENT) from None

    def attach(self) -> None:
        """Attach everything; a probe that the kernel refuses is recorded as absent, with the reason."""
        bpf = self._bpf
        if any(attachment.kind in IOCTL_KINDS for attachment in self.plan.attachments):
            for where, function in _SYSCALLS:
                bpf.attach_tracepoint(tp=where, fn_name=function)
        if self.plan.prev_state:
            for where, function in _SCHED:
                bpf.attach_raw_tracepoint(tp=where, fn_name=function)
        for chosen in self.plan.chosen:
            name = chosen.function
            try:
                with quiet() as said:
                    if chosen.how == "tp":
                        bpf.attach_tracepoint(tp=chosen.point.where, fn_name=name)
                    elif chosen.how == "raw":
                        bpf.attach_raw_tracepoint(tp=chosen.point.where.split(":")[1], fn_name=name)
                    elif chosen.how == "kprobe":
                        bpf.attach_kprobe(event=chosen.point.where, fn_name=name)
                    elif chosen.how == "kretprobe":
                        bpf.attach_kretprobe(event=chosen.point.where, fn_name=name)
                    # fentry and fexit were attached as bcc loaded them, by their names
            except Exception as error:
                self._refused(chosen, _last_line(said) or str(error))

    def _refused(self, chosen: Chosen, why: str) -> None:
        hook = isinstance(chosen.probe, Hook)
        kind = "" if isinstance(chosen.probe, Hook) else chosen.probe.kind
        attachments = self.plan.hooks if hook else self.plan.attachments
        for i, attachment in enumerate(attachments):
            if attachment == Attachment(kind, chosen.point.where, chosen.how, attachment.why):
                attachments[i] = Attachment(kind, attachment.point, "none", why)

    def detach(self) -> None:
        """Detach every probe; the maps stay readable."""
        bpf = self._bpf
        with quiet():
            for table, remove in (
                (bpf.tracepoint_fds, bpf.detach_tracepoint),
                (bpf.raw_tracepoint_fds, bpf.detach_raw_tracepoint),
            ):
                for name in list(table):
                    remove(name)
            for name in list(bpf.kprobe_fds):
                bpf.detach_kprobe_event(name)
            for name in list(bpf.kfunc_entry_fds):
                bpf.detach_kfunc(fn_name=name)
            for name in list(bpf.kfunc_exit_fds):
                bpf.detach_kretfunc(fn_name=name)

    def close(self) -> None:
        self._bpf.cleanup()

    def function(self, name: str) -> int:
        """Descriptor of one of the loaded programs."""
        return int(self._bpf.funcs[name.encode()].fd)

    def reset(self) -> None:
        """Forget counts and threads of an earlier recording; nothing may be attached."""
        self._missed_before = self._misses()
        counters = self._bpf["counters"]
        counters[counters.Key(0)] = counters.Leaf()
        for name in ("threads", "wanted", "born"):
            self._bpf[name].clear()

    def snapshot(self) -> dict[str, Any]:
        """VMs alive now, and the probes' thread table primed with their vCPUs; see snapshot.py."""
        settings = self._bpf["settings"]

        def ask(first_fd: int, vm: int, part: int) -> None:
            values = settings[0]
            values.first_fd, values.look_at, values.part = first_fd, vm, part
            settings[0] = values

        try:
            return snapshot.take(self._bcc.lib, self._iterator.fd, ask)
        finally:
            ask(0, 0, 0)

    def born(self) -> set[int]:
        """Pointers of the VMs whose creation the probes saw."""
        return {int(kvm.value) for kvm in self._bpf["born"]}

    def pid_namespace_level(self) -> int:
        """How many pid namespaces this process is below the initial one; known after the first snapshot."""
        return int(self._bpf["settings"][0].pid_ns_level)

    def missed(self) -> dict[str, int]:
        """{probe: runs that the kernel skipped} because another BPF program was running on that CPU (from 5.12 on)."""
        before = self._missed_before
        return {name: more for name, misses in self._misses().items() if (more := misses - before.get(name, 0))}

    def _misses(self) -> dict[str, int]:
        found = {}
        for name, function in self._bpf.funcs.items():
            info, size = ctypes.create_string_buffer(_PROG_INFO_SIZE), ctypes.c_uint32(_PROG_INFO_SIZE)
            if libbpf().bpf_obj_get_info_by_fd(function.fd, info, ctypes.byref(size)) == 0:
                found[name.decode()] = int.from_bytes(info.raw[_RECURSION_MISSES:][:8], sys.byteorder)
        return found

    def counters(self) -> np.ndarray[Any, Any]:
        """Counters of each possible CPU: emitted and lost by kind code, and the gap still open."""
        table = self._bpf["counters"]
        key, leaf = ctypes.c_int(0), table.Leaf()
        self._bcc.lib.bpf_lookup_elem(table.map_fd, ctypes.byref(key), ctypes.byref(leaf))
        return np.frombuffer(bytes(leaf), dtype=_COUNTERS).copy()

    def threads(self) -> dict[int, dict[str, Any]]:
        """Threads the probes met: {tid: {tgid, comm}}."""
        return {
            int(t.tid): {"tgid": int(t.tgid), "comm": bytes(t.comm).split(b"\0")[0].decode(errors="replace")}
            for _, t in self._bpf["threads"].items()
        }


def loss_table(
    counters: np.ndarray[Any, Any], turned_away: Mapping[tuple[int, int], int]
) -> dict[str, dict[str, dict[str, int]]]:
    """{kind: {"emitted": {cpu: n}, "lost": {cpu: n}}} of the kinds that were seen at all.

    `turned_away` counts, by kind code and CPU, events from after the recording's end.
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


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Catch what bcc's and clang's C code writes to standard error; the lines are in the list afterwards."""
    lines: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            lines.extend(sink.read().decode(errors="replace").splitlines())
            if os.environ.get("KVMTRACE_DEBUG"):
                sys.stderr.write("\n".join(lines) + "\n")


def _last_line(lines: list[str]) -> str:
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if "error:" in line or "not permitted" in line or "Failed" in line]
    return (errors or said or [""])[0]
