# SPDX-License-Identifier: Apache-2.0
"""The Python side of the compiled engine: it owns and enlarges the memory that `compiled` works on, checks the
operations that go in, and reads the results.

The memory needed depends on the model's state and not on the length of the stream: 136 bytes for each table that ever
existed (0.27 bytes a page where tables are full) and 2 KiB more for a table above level 1, with up to as much again for
growth. The root log is the exception: whoever feeds a long stream empties it block by block (`take_log`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.model_state import SLOTS, Counters, Violation
from replay.simulate.operations import MAX_VCPUS, PREFETCH, Block, Cause, Op, Ranges, Word
from replay.simulate.pools import as_bytes, as_structures, grown, make_pool, row_type
from traces.errors import ENVIRONMENT, Problem
from traces.kernels.policies import PolicyParameters

try:
    from replay.simulate.compiled.core import COMPILED, Core
except ModuleNotFoundError as missing:  # uncompiled, the module needs the package Cython at run time
    raise Problem(f"the replay engine is not compiled ({missing}): scripts/setup", ENVIRONMENT) from None

GFN_LIMIT: Final = 1 << 40
_ANY: Final = (1 << 64) - 1
# The columns that `Engine.feed_each` returns; `installs` counts the leaves installed by faults and by prefetch.
CHANGES: Final = ("creations", "reuses", "frees", "tables", "tables_freed", "installs", "fixes", "zapped")
_FOR_TIMERS: Final = ("assumed_leaves", "assumed_tables", "put_room", "puts")

# By kind of operation: the largest value of `gfn`, where it is the same for all VMs, and a bit for each allowed level.
_LAST_GFN: Final = np.full(16, _ANY, np.uint64)
_LAST_GFN[[Op.TOUCH, Op.FIX, Op.COLLAPSE]] = GFN_LIMIT - 1
_LAST_GFN[Op.UNLOAD] = max(Cause)
_LEVELS: Final = np.zeros(16, np.int64)
_LEVELS[list(Op)] = 0xFF
_LEVELS[[Op.TOUCH, Op.FIX, Op.COLLAPSE]] = 0b1110

_VCPU: Final = row_type("gen", "top", "deep", "word", "faults", "refaults", "hits", "stuck")
_SLOTS: Final = np.dtype(
    [("slot", np.int64, SLOTS)]
    + [(name, np.int64) for name in ("word", "cause", "request", "loads", "creations", "reuses", "fixes")]
)
_WORD: Final = row_type("gen", "leaves", "tables", "root", "remembered", "top", "level", "as_id")
_ROOT: Final = row_type("id", "word", "refs", "valid", "cause", "before", "after")


@dataclass(frozen=True)
class RootLog:
    """The root log as columns, a row for each event (`model_state.Logged`), in order. `vcpu` is -1 if no vCPU acted."""

    at: NDArray[np.int64]
    event: NDArray[np.uint8]
    vcpu: NDArray[np.int32]
    root: NDArray[np.int64]
    word: NDArray[np.int32]
    cause: NDArray[np.uint8]
    leaves: NDArray[np.int64]
    tables: NDArray[np.int64]
    roots_alive: NDArray[np.int64]
    tables_alive: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.at)


_LOG_COLUMNS: Final = tuple(field.name for field in fields(RootLog))
_LOG: Final = row_type(*_LOG_COLUMNS)
_NARROW: Final = {"event": np.uint8, "vcpu": np.int32, "word": np.int32, "cause": np.uint8}


@dataclass(frozen=True)
class Vcpus:
    """The counts of vCPUs: each array has one value per vCPU.

    `stuck` is the operation at which the vCPU stopped, or -1.
    """

    loads: NDArray[np.int64]
    creations: NDArray[np.int64]
    reuses: NDArray[np.int64]
    faults: NDArray[np.int64]
    refaults: NDArray[np.int64]
    hits: NDArray[np.int64]
    fixes: NDArray[np.int64]
    stuck: NDArray[np.int64]


_COUNTED: Final = tuple((field.name, field.name in (_VCPU.names or ())) for field in fields(Vcpus))
_COUNTERS: Final = tuple(field.name for field in fields(Counters))


@dataclass(frozen=True)
class RootState:
    """The state of a root that is alive; `word` is an index into the VM's role words."""

    id: int
    word: int
    refs: int
    valid: bool
    leaves: int
    tables: int


class Engine:
    """Simulates one VM under one policy exactly as `reference` does, at about 150 million operations a second.

    A stream is fed in blocks of any size. An invalid operation raises Problem, and nothing of its block is then run.
    The engine raises `model_state.Violation` where the reference model does, after which it must not be used any more.
    """

    said = False  # whether the notice was printed that the engine runs uncompiled

    def __init__(
        self,
        parameters: PolicyParameters,
        words: list[Word],
        vcpus: int,
        log: bool = True,
        core: type[Any] = Core,
        rows: tuple[int, int, int] = (256, 32, 256),
    ) -> None:
        """Create the VM with `vcpus` vCPUs and the role words `words`.

        `log` says whether to keep a root log. `rows` are the numbers of tables, nodes and log rows to allocate at
        first. Raises Problem if an argument is invalid.
        """
        if not 0 < vcpus <= MAX_VCPUS:
            raise Problem(f"a VM has 1 to {MAX_VCPUS} vCPUs, not {vcpus}")
        if bad := [word for word in words if word.level not in (4, 5)] or not words:
            raise Problem(f"a VM's roots are of level 4 or 5, and at least one role word is needed: {bad or words}")
        if parameters.prefetch not in (1, PREFETCH):
            raise Problem(f"{parameters.name}: prefetch is 1 or {PREFETCH}, not {parameters.prefetch}")
        if core is Core and not COMPILED and not Engine.said:
            Engine.said = True
            print("kvmtrace: the replay engine runs uncompiled, some 500 times slower: scripts/setup", file=sys.stderr)
        self.parameters = parameters
        self.words = words
        self.core = core()
        self._vcpu = make_pool(vcpus, _VCPU)
        self._vcpu["gen"] = self._vcpu["stuck"] = -1
        self._slots = make_pool(vcpus, _SLOTS)
        self._slots["cause"] = Cause.FIRST
        self._begin_words(words)
        self._begin_roots(len(words) + SLOTS * vcpus + 2)
        self._begin_core(log)
        self._attach_rows()
        tables, nodes, log_rows = rows
        self._bits = make_pool(16 * tables, np.uint64)
        self._gen = make_pool(tables, np.int64)
        self._child = make_pool(512 * nodes, np.uint32)
        self._page_of = make_pool(nodes, np.uint32)
        self._log = make_pool(log_rows, _LOG)
        self.grow()
        self._page_of[1 : len(words) + 1] = np.arange(1, len(words) + 1)
        self._ranges: Ranges | None = None
        self.bounds = np.zeros(2, np.int64)
        self._limits(vcpus)

    def feed(self, block: Block, ranges: Ranges, first: int = 0) -> None:
        """Run a block's operations; `first` is the position of the block's first operation in the whole stream."""
        op, gfn = self.check(block, ranges, first)
        done = 0
        while (done := self.core.run(op, gfn, self.bounds, done, first)) < len(op):
            self.go_on()

    def feed_each(self, block: Block, ranges: Ranges, first: int = 0) -> NDArray[np.int64]:
        """Run a block as `feed` does, some ten times slower, and return by how much each operation changed each count.

        The array has one row per operation and one column for each name in CHANGES.
        """
        op, gfn = self.check(block, ranges, first)
        changes = np.zeros((len(op), len(CHANGES)), np.int64)
        done = 0
        while (done := self.core.run_each(op, gfn, self.bounds, done, first, changes)) < len(op):
            self.go_on()
        return changes

    def check(self, block: Block, ranges: Ranges, first: int = 0) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return a block's columns `op` and `gfn` as the core takes them. Raises Problem if an operation is invalid."""
        self._read_ranges(ranges)
        op, gfn = np.ascontiguousarray(block.op), np.ascontiguousarray(block.gfn)
        if op.dtype != np.uint32 or gfn.dtype != np.int64 or op.shape != gfn.shape or op.ndim != 1:
            raise Problem(f"a block is uint32 and int64 columns of one length, not {op.dtype} and {gfn.dtype}")
        at = self.core.check(op, gfn.view(np.uint64), self._last_gfn, self._vcpu_limit, self._levels)
        if at < len(op):
            raise Problem(self._what_is_wrong(int(op[at]), int(gfn[at]), first + at))
        return op, gfn

    def go_on(self) -> None:
        """Give the core more memory, after it stopped for lack of it.

        Raises Violation if it stopped for an invariant instead.
        """
        if self.core.error:
            raise self._violation()
        self.grow()

    # Results

    @property
    def vcpus(self) -> Vcpus:
        """The counts of vCPUs so far."""
        return Vcpus(**{name: (self._vcpu if of_vcpu else self._slots)[name].copy() for name, of_vcpu in _COUNTED})

    @property
    def causes(self) -> NDArray[np.int64]:
        """The Cause of each vCPU's last unload, by vCPU."""
        causes: NDArray[np.int64] = self._slots["cause"].copy()
        return causes

    @property
    def counters(self) -> Counters:
        """The counts of the VM so far."""
        return Counters(**{name: getattr(self.core, name) for name in _COUNTERS})

    @property
    def roots(self) -> list[RootState]:
        """The roots that are alive, oldest first: valid ones, and invalid ones that a vCPU's slot still holds."""
        states = []
        at = int(self._root[0]["after"])
        while at:
            root = self._root[at]
            word = self._word[root["word"]]
            leaves, tables = (int(word["leaves"]), int(word["tables"])) if root["valid"] else (0, 0)
            index = int(root["word"])
            states.append(RootState(int(root["id"]), index, int(root["refs"]), bool(root["valid"]), leaves, tables))
            at = int(root["after"])
        return states

    @property
    def slots(self) -> NDArray[np.int64]:
        """The root ids in each vCPU's slots, one row per vCPU, the current slot first; -1 is an empty slot."""
        held = self._slots["slot"]
        return np.where(held > 0, self._root["id"][held], -1)

    def mapped(self, word: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the level and the gfn of each leaf in the valid root with this role word, sorted by gfn.

        Empty without a root.
        """
        row = self._word[word]
        found: list[tuple[NDArray[np.int64], int]] = []
        if row["root"]:
            self._leaves(int(row["top"]), int(row["level"]), 0, int(row["gen"]), found)
        levels = np.concatenate([np.full(len(gfns), level) for gfns, level in found] or [np.empty(0, np.int64)])
        gfns = np.concatenate([gfns for gfns, _ in found] or [np.empty(0, np.int64)])
        order = np.argsort(gfns)
        return levels[order], gfns[order]

    @property
    def bytes_used(self) -> int:
        """The memory that the trees use, in bytes, without the spare room for growth."""
        return int(self.core.pages) * 136 + int(self.core.nodes) * 2052

    def take_log(self) -> RootLog:
        """Return the rows of the root log since the last call, and empty the log."""
        rows = self._log[: self.core.rows]
        self.core.rows = 0
        return RootLog(**{name: rows[name].astype(_NARROW.get(name, np.int64)) for name in _LOG_COLUMNS})

    # Setting up the pools

    def _begin_words(self, words: list[Word]) -> None:
        """Set up the role words. The root table of word i is node and table number i + 1; number 0 stands for none."""
        self._word = make_pool(len(words), _WORD)
        self._word["gen"] = self._word["top"] = np.arange(1, len(words) + 1)
        self._word["level"] = [word.level for word in words]
        self._word["as_id"] = [word.as_id for word in words]

    def _begin_roots(self, rows: int) -> None:
        """Set up the pool of roots.

        There are never more than words and slots; row 0 is the list's head, the others are free.
        """
        self._root = make_pool(rows, _ROOT)
        self._root["after"][1:-1] = np.arange(2, rows)

    def _begin_core(self, log: bool) -> None:
        core, parameters, words = self.core, self.parameters, len(self.words)
        core.vcpus, core.words = len(self._vcpu), words
        core.own_reference = parameters.own_reference
        core.empties = parameters.zap_all_fast == "empty"
        core.reloads = parameters.request == "reload"
        core.flush_per_table = parameters.flush_per_table
        core.zap_tables = parameters.zap_tables
        core.split_in_place = parameters.split_in_place
        core.recovers = parameters.recovers
        core.prefetch = parameters.prefetch > 1
        core.assume_refault = parameters.assume_refault
        core.logging = log
        core.pages = core.nodes = words + 1
        core.last_gen = words
        core.free_root = 1
        for name in ("rows", "at", "ids", "alive", "error", "error_root", "error_tables", *_FOR_TIMERS, *_COUNTERS):
            setattr(core, name, 0)

    def _attach_rows(self) -> None:
        self.core.attach_rows(*map(self.rows_of, (self._vcpu, self._slots, self._word, self._root)))

    def rows_of(self, pool: NDArray[Any]) -> Any:
        """Return a pool in the form that the core takes: bytes if the core is compiled, else ctypes structures."""
        return as_bytes(pool) if COMPILED and isinstance(self.core, Core) else as_structures(pool)

    def grow(self) -> None:
        """Double each pool that has become too small to satisfy
        `compiled.core.Core._room`, and attach the pools to the core.
        """
        core = self.core
        tables, nodes, rows = len(self._gen), len(self._page_of), len(self._log)
        while core.pages + 8 > tables:
            tables *= 2
        while core.nodes + 8 > nodes:
            nodes *= 2
        while core.rows + 2 * core.alive + 24 > rows:
            rows *= 2
        if tables > len(self._gen):
            self._bits, self._gen = grown(self._bits, 16 * tables), grown(self._gen, tables)
        if nodes > len(self._page_of):
            self._child, self._page_of = grown(self._child, 512 * nodes), grown(self._page_of, nodes)
        if rows > len(self._log):
            self._log = grown(self._log, rows)
        core.attach_trees(self._bits, self._gen, self._child, self._page_of)
        core.attach_log(self.rows_of(self._log), rows)

    # Checking operations

    def _limits(self, vcpus: int) -> None:
        """Set the limits that depend on the VM, by kind of operation: the largest `gfn`, and the number of vCPUs."""
        self._last_gfn = _LAST_GFN.copy()
        self._last_gfn[Op.ROLE] = self._last_gfn[Op.SWITCH] = len(self.words) - 1
        self._vcpu_limit = np.full(16, MAX_VCPUS, np.int64)
        self._vcpu_limit[: Op.SWITCH + 1] = vcpus
        self._levels = _LEVELS

    def _what_is_wrong(self, op: int, gfn: int, at: int) -> str:
        kind, level, vcpu = op & 15, op >> 4 & 7, op >> 16
        where = f"operation {at}"
        if kind not in list(Op):
            return f"{where}: there is no operation {kind}"
        where += f" ({Op(kind).name})"
        if kind in (Op.ZAP, Op.SPLIT):
            return f"{where}: range {gfn} of {len(self.bounds) // 2}"
        if vcpu >= self._vcpu_limit[kind]:
            return f"{where}: vCPU {vcpu} of a VM that has {len(self._vcpu)}"
        if not self._levels[kind] >> level & 1:
            return f"{where}: a leaf of level {level}; there are 1, 2 and 3"
        if kind in (Op.ROLE, Op.SWITCH):
            return f"{where}: word {gfn} of a VM that has {len(self.words)}"
        if kind == Op.UNLOAD:
            return f"{where}: cause {gfn} is none of the {len(Cause)} that there are"
        return f"{where}: frame {gfn:#x} is not within the {GFN_LIMIT:#x} of a guest's memory"

    def _read_ranges(self, ranges: Ranges) -> None:
        """Copy ranges that are new, cut at GFN_LIMIT: no table lies beyond it."""
        known = len(self.bounds) // 2 if ranges is self._ranges else 0
        rows = ranges.rows[known:]
        if ranges is self._ranges and not rows:
            return
        cut = [min(max(bound, 0), GFN_LIMIT) for row in rows for bound in row]
        self.bounds = np.concatenate([self.bounds[: 2 * known], np.array(cut, np.int64)])
        self._ranges = ranges
        # The limit of the index cannot be below 0. Without any range, a vCPU limit of 0 rejects every ZAP and SPLIT.
        self._last_gfn[Op.ZAP] = self._last_gfn[Op.SPLIT] = max(len(ranges.rows) - 1, 0)
        self._vcpu_limit[Op.ZAP] = self._vcpu_limit[Op.SPLIT] = MAX_VCPUS if ranges.rows else 0

    def _violation(self) -> Violation:
        core = self.core
        if core.error == 1:
            root = int(core.error_root)
            return Violation(f"final put of the valid root {root} (KVM_BUG_ON)", int(core.at), root)
        return Violation(f"VM end: {core.alive} roots and {core.error_tables} tables are left", int(core.at))

    # The trees

    def _leaves(self, node: int, level: int, base: int, gen: int, found: list[tuple[NDArray[np.int64], int]]) -> None:
        page = int(self._page_of[node]) if level > 1 else node
        words = self._bits[page * 16 : page * 16 + 16 : 2].copy()
        at = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        size = 1 << 9 * (level - 1)
        found.append((base + at * size, level))
        if level > 1:
            children = self._child[node * 512 : node * 512 + 512]
            pages = children if level == 2 else self._page_of[children]
            for i in np.flatnonzero(self._gen[pages] == gen):
                self._leaves(int(children[i]), level - 1, base + int(i) * size, gen, found)
