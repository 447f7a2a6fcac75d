# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""One VM's memory as the compiled engine sees it: pointers into the pools that `engine` owns, and the VM's scalars.

Nothing here allocates memory. In C the pools are pointers; in plain Python they are memoryviews and arrays of ctypes
structures over the same numpy memory. The classes of the engine extend one another: VmPools, Trees, RootSlots,
VmOperations, Core; so do those of its clock (`timed_queues`).
"""

from __future__ import annotations

import cython

from replay.simulate.operations import Op

SPLIT = cython.declare(cython.longlong, int(Op.SPLIT))


@cython.cclass
class VmPools:
    """Pointers into pools, and counters. `engine.Engine` sets them up and reads them."""

    # Pools
    bits: cython.pointer[cython.ulonglong]
    gen: cython.pointer[cython.longlong]
    child: cython.pointer[cython.uint]
    page_of: cython.pointer[cython.uint]
    vcpu: cython.pointer[Vcpu]
    slots: cython.pointer[Slots]
    word: cython.pointer[Word]
    root: cython.pointer[Root]
    log: cython.pointer[Row]
    ranges: cython.pointer[cython.longlong]
    page_room: cython.longlong
    node_room: cython.longlong
    log_room: cython.longlong
    pages: cython.longlong
    nodes: cython.longlong
    rows: cython.longlong
    vcpus: cython.longlong
    words: cython.longlong

    # PolicyParameters
    own_reference: cython.longlong
    empties: cython.longlong
    reloads: cython.longlong
    flush_per_table: cython.longlong
    zap_tables: cython.longlong
    split_in_place: cython.longlong
    recovers: cython.longlong
    prefetch: cython.longlong
    assume_refault: cython.longlong
    logging: cython.longlong

    # State
    at: cython.longlong
    last_gen: cython.longlong
    ids: cython.longlong
    alive: cython.longlong
    free_root: cython.longlong
    frees: cython.longlong
    prefetched: cython.longlong
    tables: cython.longlong
    tables_freed: cython.longlong
    zapped: cython.longlong
    flushes: cython.longlong
    error: cython.longlong
    error_root: cython.longlong
    error_tables: cython.longlong
    gone_leaves: cython.longlong  # leaves and tables that the current operation has removed from a tree
    gone_tables: cython.longlong

    # What a Timer needs to know about the last operation
    assumed_leaves: cython.longlong
    assumed_tables: cython.longlong
    put: cython.pointer[Zapped]  # leaves and tables of each root that was freed with them
    put_room: cython.longlong  # rows of `put`; 0 without a Timer
    puts: cython.longlong

    def attach_trees(
        self,
        bits: cython.ulonglong[::1],
        gen: cython.longlong[::1],
        child: cython.uint[::1],
        page_of: cython.uint[::1],
    ) -> None:
        """Use these pools for the trees; they hold what the previous pools held."""
        if cython.compiled:
            self.bits = cython.address(bits[0])
            self.gen = cython.address(gen[0])
            self.child = cython.address(child[0])
            self.page_of = cython.address(page_of[0])
        else:
            self.bits, self.gen = memoryview(bits), memoryview(gen)
            self.child, self.page_of = memoryview(child), memoryview(page_of)
        self.page_room = gen.shape[0]
        self.node_room = page_of.shape[0]

    def attach_rows(
        self, vcpu: cython.uchar[::1], slots: cython.uchar[::1], word: cython.uchar[::1], root: cython.uchar[::1]
    ) -> None:
        """Use these pools of structures, given as bytes (in plain Python, as arrays of ctypes structures)."""
        if cython.compiled:
            self.vcpu = cython.cast(cython.pointer[Vcpu], cython.address(vcpu[0]))
            self.slots = cython.cast(cython.pointer[Slots], cython.address(slots[0]))
            self.word = cython.cast(cython.pointer[Word], cython.address(word[0]))
            self.root = cython.cast(cython.pointer[Root], cython.address(root[0]))
        else:
            self.vcpu, self.slots, self.word, self.root = vcpu, slots, word, root

    def attach_log(self, log: cython.uchar[::1], room: cython.longlong) -> None:
        """Use this pool for the root log, which is written from row `rows` on."""
        if cython.compiled:
            self.log = cython.cast(cython.pointer[Row], cython.address(log[0]))
        else:
            self.log = log
        self.log_room = room

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _room(self) -> cython.bint:
        """Return whether there is room for any one operation.

        SPLIT asks again before each leaf, and can be restarted.
        """
        return (
            self.pages + 8 <= self.page_room
            and self.nodes + 8 <= self.node_room
            and self.rows + 2 * self.alive + 24 <= self.log_room
        )
