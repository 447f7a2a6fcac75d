# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled engine: `reference` at the speed of C, bit for bit. Cython in pure-Python mode, so it runs as it is too.

Each role word has one radix tree that is never taken down. A table of it exists if its generation is the word's, so
that a tree is zapped by giving the word a new generation, and a table whose generation is right has live ancestors all
the way up. A table is 512 pairs of bits, (present, ever), in eight pairs of 64-bit words: "ever" outlives the table,
and tells a re-fault. Tables above level 1 are also nodes: 512 children, which are nodes, or tables of level 1.

A block is done 64 operations at a time. A first pass walks the trees for each touch and leaves a guess at the table;
the second takes it if the table's generation is that of the vCPU's current root, and sets the bits without a branch.
All else (controls, missing tables, huge pages, prefetch) goes the slow way, which trusts nothing but the slots.

Nothing here allocates: `run` stops before an operation that may not find room, and `engine` makes some. In C, pools are
pointers; as plain Python, memoryviews and arrays of ctypes structures over the same numpy memory.

`Timer` runs a Core's operations in virtual time, as `timing.reference_clock` does, to the ns.
"""

from __future__ import annotations

import cython

COMPILED: bool = cython.compiled

NONE = cython.declare(cython.longlong, -1)  # no generation, no vCPU
ALL = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
PAIRS = cython.declare(cython.ulonglong, 0x5555555555555555)
NIBBLES = cython.declare(cython.ulonglong, 0x3333333333333333)
BYTES = cython.declare(cython.ulonglong, 0x0F0F0F0F0F0F0F0F)

# operations.Op, operations.Cause, reference.Happened and what `error` says; test_engine compares the first three.
FIX = cython.declare(cython.longlong, 1)
ENTER = cython.declare(cython.longlong, 2)
UNLOAD = cython.declare(cython.longlong, 3)
ROLE = cython.declare(cython.longlong, 4)
SWITCH = cython.declare(cython.longlong, 5)
INVALIDATE = cython.declare(cython.longlong, 6)
ZAP = cython.declare(cython.longlong, 7)
ZAP_ALL = cython.declare(cython.longlong, 8)
SPLIT = cython.declare(cython.longlong, 9)
COLLAPSE = cython.declare(cython.longlong, 10)
END = cython.declare(cython.longlong, 11)

EXIT = cython.declare(cython.longlong, 9)
MEMSLOT = cython.declare(cython.longlong, 10)
VM_END = cython.declare(cython.longlong, 11)
OTHER = cython.declare(cython.longlong, 12)

CREATED = cython.declare(cython.longlong, 0)
FOUND = cython.declare(cython.longlong, 1)
FREED = cython.declare(cython.longlong, 2)
INVALIDATED = cython.declare(cython.longlong, 3)
EMPTIED = cython.declare(cython.longlong, 4)

FINAL_PUT = cython.declare(cython.longlong, 1)
LEFT_AT_END = cython.declare(cython.longlong, 2)

# simulate.timed_operations, timing.reference_clock.TimeCategory and SAMPLE; test_clock compares them.
WAS_FOUND = cython.declare(cython.longlong, 1)
WAS_CREATED = cython.declare(cython.longlong, 2)
LAST = cython.declare(cython.longlong, -2)
NEVER = cython.declare(cython.longlong, 0x4000000000000000)
SAMPLE = cython.declare(cython.longlong, 1000000)

ON_GUEST = cython.declare(cython.longlong, 0)
ON_FAULT = cython.declare(cython.longlong, 1)
ON_LOAD = cython.declare(cython.longlong, 2)
ON_UNLOAD = cython.declare(cython.longlong, 3)
ON_WAIT = cython.declare(cython.longlong, 4)
ON_OTHER = cython.declare(cython.longlong, 5)
ON_SWITCH = cython.declare(cython.longlong, 6)
ON_IDLE = cython.declare(cython.longlong, 7)

# The rows of the pools; `engine` has the same as numpy types.
Vcpu = cython.struct(  # 64 bytes: all that a touch reads and writes of its vCPU
    gen=cython.longlong,  # of the current root's tree; NONE: no root, or a pending request, or stuck
    top=cython.longlong,  # where the first pass begins: a guess
    deep=cython.longlong,  # whether that is a node of level 5
    word=cython.longlong,  # index of the current root's word
    faults=cython.longlong,
    refaults=cython.longlong,
    hits=cython.longlong,
    stuck=cython.longlong,
)
Slots = cython.struct(
    slot=cython.longlong[4],  # indices of roots, 0 for none: one current, three previous
    word=cython.longlong,
    cause=cython.longlong,
    request=cython.longlong,
    loads=cython.longlong,
    creations=cython.longlong,
    reuses=cython.longlong,
    fixes=cython.longlong,
)
Word = cython.struct(
    gen=cython.longlong,
    leaves=cython.longlong,  # of the valid root, or of the remembered tree
    tables=cython.longlong,
    root=cython.longlong,  # the valid root with this word, 0 for none
    remembered=cython.longlong,  # the tree is only remembered, for `assume_refault`
    top=cython.longlong,  # node of the root table
    level=cython.longlong,
    as_id=cython.longlong,
)
Root = cython.struct(
    id=cython.longlong,
    word=cython.longlong,
    refs=cython.longlong,
    valid=cython.longlong,
    cause=cython.longlong,
    before=cython.longlong,  # the list of roots alive, in order of creation; row 0 is its head
    after=cython.longlong,
)
Row = cython.struct(
    at=cython.longlong,
    event=cython.longlong,
    vcpu=cython.longlong,
    root=cython.longlong,
    word=cython.longlong,
    cause=cython.longlong,
    leaves=cython.longlong,
    tables=cython.longlong,
    roots_alive=cython.longlong,
    tables_alive=cython.longlong,
)

# The rows of a timer's pools; `timed_engine` has the same as numpy types.
Todo = cython.struct(  # 72 bytes: an operation until it is done, in the order of the stream
    gfn=cython.longlong,
    lead=cython.longlong,
    guest=cython.longlong,
    idle=cython.longlong,
    cost=cython.longlong,
    wall=cython.longlong,
    at=cython.longlong,
    op=cython.uint,
    was=cython.uint,
    next=cython.uint,  # how many rows on is the next one of its queue; 0: not yet there
    guess=cython.uint,  # a touch's table, perhaps
)
Pace = cython.struct(
    clock=cython.longlong,
    lead=cython.longlong,  # what is left of the next operation's; NONE: as the operation says
    guest=cython.longlong,
    idle=cython.longlong,
    inside=cython.longlong,
    sampled=cython.longlong,
    guessed=cython.longlong,  # rows of the program that have their guess
    weight=cython.longlong,  # its part of what a worker takes where CPUs are short, of all vCPUs' weights
    spent=cython.longlong[10],
)
Queue = cython.struct(head=cython.longlong, tail=cython.longlong)  # rows; NONE: it is empty
Turn = cython.struct(due=cython.longlong, queue=cython.longlong)  # of a winner tree: what is due first below this node
Sample = cython.struct(vcpu=cython.longlong, clock=cython.longlong, cause=cython.longlong, spent=cython.longlong[10])
Zapped = cython.struct(leaves=cython.longlong, tables=cython.longlong)


@cython.cfunc
@cython.nogil
@cython.inline
@cython.exceptval(check=False)
def ones(x: cython.ulonglong) -> cython.longlong:
    """How many bits are set."""
    x = x - (x >> 1 & PAIRS)
    x = (x & NIBBLES) + (x >> 2 & NIBBLES)
    x = x + (x >> 4) & BYTES
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return cython.cast(cython.longlong, x & 127)


@cython.final
@cython.cclass
class Core:
    """One VM's state: pointers into pools, and what there is once. `engine.Engine` sets it up and reads it."""

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
    page_room = cython.declare(cython.longlong, visibility="public")
    node_room = cython.declare(cython.longlong, visibility="public")
    log_room = cython.declare(cython.longlong, visibility="public")
    pages = cython.declare(cython.longlong, visibility="public")
    nodes = cython.declare(cython.longlong, visibility="public")
    rows = cython.declare(cython.longlong, visibility="public")
    vcpus = cython.declare(cython.longlong, visibility="public")
    words = cython.declare(cython.longlong, visibility="public")

    # PolicyParameters
    own_reference = cython.declare(cython.longlong, visibility="public")
    empties = cython.declare(cython.longlong, visibility="public")
    reloads = cython.declare(cython.longlong, visibility="public")
    flush_per_table = cython.declare(cython.longlong, visibility="public")
    zap_tables = cython.declare(cython.longlong, visibility="public")
    split_in_place = cython.declare(cython.longlong, visibility="public")
    recovers = cython.declare(cython.longlong, visibility="public")
    prefetch = cython.declare(cython.longlong, visibility="public")
    assume_refault = cython.declare(cython.longlong, visibility="public")
    logging = cython.declare(cython.longlong, visibility="public")

    # State
    at = cython.declare(cython.longlong, visibility="public")
    last_gen = cython.declare(cython.longlong, visibility="public")
    ids = cython.declare(cython.longlong, visibility="public")
    alive = cython.declare(cython.longlong, visibility="public")
    free_root = cython.declare(cython.longlong, visibility="public")
    frees = cython.declare(cython.longlong, visibility="public")
    prefetched = cython.declare(cython.longlong, visibility="public")
    tables = cython.declare(cython.longlong, visibility="public")
    tables_freed = cython.declare(cython.longlong, visibility="public")
    zapped = cython.declare(cython.longlong, visibility="public")
    flushes = cython.declare(cython.longlong, visibility="public")
    error = cython.declare(cython.longlong, visibility="public")
    error_root = cython.declare(cython.longlong, visibility="public")
    error_tables = cython.declare(cython.longlong, visibility="public")
    gone_leaves: cython.longlong  # what `drop` and `clear` took away
    gone_tables: cython.longlong

    # What a timer asks of one operation
    assumed_leaves = cython.declare(cython.longlong, visibility="public")
    assumed_tables = cython.declare(cython.longlong, visibility="public")
    put: cython.pointer[Zapped]  # trees zapped with a root's last put
    put_room = cython.declare(cython.longlong, visibility="public")  # 0: nobody asks
    puts = cython.declare(cython.longlong, visibility="public")

    def attach_trees(
        self,
        bits: cython.ulonglong[::1],
        gen: cython.longlong[::1],
        child: cython.uint[::1],
        page_of: cython.uint[::1],
    ) -> None:
        """Use these pools, which hold what the last ones held."""
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
        """Use these pools of structures, given as bytes (as plain Python: as arrays of ctypes structures)."""
        if cython.compiled:
            self.vcpu = cython.cast(cython.pointer[Vcpu], cython.address(vcpu[0]))
            self.slots = cython.cast(cython.pointer[Slots], cython.address(slots[0]))
            self.word = cython.cast(cython.pointer[Word], cython.address(word[0]))
            self.root = cython.cast(cython.pointer[Root], cython.address(root[0]))
        else:
            self.vcpu, self.slots, self.word, self.root = vcpu, slots, word, root

    def attach_log(self, log: cython.uchar[::1], room: cython.longlong) -> None:
        """Write the root log here, from row `rows` on."""
        if cython.compiled:
            self.log = cython.cast(cython.pointer[Row], cython.address(log[0]))
        else:
            self.log = log
        self.log_room = room

    def check(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.ulonglong][::1],
        last_gfn: cython.const[cython.ulonglong][::1],
        vcpus: cython.const[cython.longlong][::1],
        levels: cython.const[cython.longlong][::1],
    ) -> cython.longlong:
        """The first operation that is beyond what its kind allows, or how many there are."""
        n: cython.longlong = op.shape[0]
        i: cython.longlong = 0
        j: cython.longlong
        end: cython.longlong
        o: cython.uint
        some: cython.uint
        good: cython.uint
        beyond: cython.int
        last_vcpu: cython.int = cython.cast(cython.int, vcpus[0]) - 1
        frames: cython.ulonglong
        kind: cython.uint
        touches: cython.bint  # all that are touches may be
        with cython.nogil:
            while i < n:
                end = i + 256 if n - i > 256 else n
                # What is true of a run of touches, without a branch, as most operations are touches.
                some = 0
                good = 16
                beyond = 0
                frames = 0
                for j in range(i, end):
                    o = op[j]
                    some |= o
                    good &= o | o >> 1 | (o & 15) + 15  # bit 4: of level 1, 2 or 3, or no touch
                    beyond |= last_vcpu - cython.cast(cython.int, o >> 16)
                    frames |= gfn[j]
                touches = frames <= last_gfn[0] and beyond >= 0 and some & 64 == 0 and good != 0
                if touches and some & 15 == 0:
                    i = end
                    continue
                while i < end:
                    if touches and i + 4 <= end and (op[i] | op[i + 1] | op[i + 2] | op[i + 3]) & 15 == 0:
                        i += 4
                        continue
                    o = op[i]
                    kind = o & 15
                    if gfn[i] > last_gfn[kind] or o >> 16 >= vcpus[kind] or not levels[kind] >> (o >> 4 & 7) & 1:
                        end = n = i
                        break
                    i += 1
        return n

    def run(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        ranges: cython.const[cython.longlong][::1],
        start: cython.longlong,
        first: cython.longlong,
    ) -> cython.longlong:
        """Do the operations from `start` on: the index of the first that is not done, for want of room or in error."""
        n: cython.longlong = op.shape[0]
        if cython.compiled:
            self.ranges = cython.cast(cython.pointer[cython.longlong], cython.address(ranges[0]))
            with cython.nogil:
                start = self._run(cython.address(op[0]), cython.address(gfn[0]), n, start, first)
        else:
            self.ranges = memoryview(ranges)
            start = self._run(memoryview(op), memoryview(gfn), n, start, first)
        return start

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _run(
        self,
        op: cython.pointer[cython.const[cython.uint]],
        gfn: cython.pointer[cython.const[cython.longlong]],
        n: cython.longlong,
        i: cython.longlong,
        first: cython.longlong,
    ) -> cython.longlong:
        bits: cython.pointer[cython.ulonglong] = self.bits
        gen: cython.pointer[cython.longlong] = self.gen
        child: cython.pointer[cython.uint] = self.child
        page_of: cython.pointer[cython.uint] = self.page_of
        vcpu: cython.pointer[Vcpu] = self.vcpu
        word: cython.pointer[Word] = self.word
        guess: cython.uint[64]
        if not cython.compiled:
            guess = [0] * 64
        # Faults on huge pages, with a reset, or with prefetch are not the second pass's.
        special: cython.longlong = 0x2070 if self.prefetch else 0x2060
        end: cython.longlong
        j: cython.longlong
        o: cython.longlong
        g: cython.longlong
        v: cython.longlong
        level: cython.longlong
        node: cython.longlong
        low: cython.longlong
        page: cython.longlong
        k: cython.longlong
        bit: cython.longlong
        fault: cython.longlong
        present: cython.ulonglong
        ever: cython.ulonglong
        one: cython.ulonglong = 1

        while i < n:
            end = i + 64 if n - i > 64 else n
            for j in range(end - i):
                o = op[i + j]
                if o & 15 == 0:  # TOUCH
                    g = gfn[i + j]
                    v = o >> 16
                    node = vcpu[v].top
                    if vcpu[v].deep:
                        node = child[node * 512 + (g >> 36 & 511)]
                    node = child[node * 512 + (g >> 27 & 511)]
                    low = child[node * 512 + (g >> 18 & 511)]
                    page = child[low * 512 + (g >> 9 & 511)]
                    level = o >> 4 & 7
                    if level != 1:
                        page = page_of[low if level == 2 else node]
                    guess[j] = page
                elif o & 14 == 4:  # ROLE, SWITCH: most likely the root of the touches that follow
                    vcpu[o >> 16].top = word[gfn[i + j]].top
                    vcpu[o >> 16].deep = word[gfn[i + j]].level == 5
            for j in range(end - i):
                o = op[i]
                g = gfn[i]
                if o & 15 == 0:
                    v = o >> 16
                    page = guess[j]
                    if gen[page] == vcpu[v].gen:
                        level = o >> 4 & 7
                        k = g >> (level - 1) * 9 & 511
                        bit = k & 63
                        k = page * 16 + (k >> 6) * 2
                        present = bits[k]
                        fault = present >> bit & 1 ^ 1
                        if o & special & -fault == 0:
                            ever = bits[k + 1]
                            bits[k] = present | one << bit
                            bits[k + 1] = ever | one << bit
                            vcpu[v].faults += fault
                            vcpu[v].refaults += ever >> bit & fault
                            vcpu[v].hits += fault ^ 1
                            word[vcpu[v].word].leaves += fault
                            i += 1
                            continue
                if not self._room():
                    return i
                self.at = first + i
                if self._do(o, g):
                    return i
                i += 1
        return i

    def run_each(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        ranges: cython.const[cython.longlong][::1],
        start: cython.longlong,
        first: cython.longlong,
        changes: cython.longlong[:, ::1],
    ) -> cython.longlong:
        """As `run`, the slow way; a row of `changes` is what its operation added to the counts (`engine.CHANGES`)."""
        n: cython.longlong = op.shape[0]
        i: cython.longlong = start
        v: cython.longlong
        stops: cython.bint
        if cython.compiled:
            self.ranges = cython.cast(cython.pointer[cython.longlong], cython.address(ranges[0]))
        else:
            self.ranges = memoryview(ranges)
        while i < n and self._room():
            v = op[i] >> 16 if op[i] & 15 <= SWITCH else 0
            self._tell(v, changes, i, -1)
            self.at = first + i
            stops = self._do(op[i], gfn[i])
            self._tell(v, changes, i, 1)
            if stops:
                break
            i += 1
        return i

    @cython.cfunc
    @cython.exceptval(check=False)
    def _tell(
        self, v: cython.longlong, changes: cython.longlong[:, ::1], i: cython.longlong, sign: cython.longlong
    ) -> cython.void:
        changes[i, 0] += sign * self.slots[v].creations
        changes[i, 1] += sign * self.slots[v].reuses
        changes[i, 2] += sign * self.frees
        changes[i, 3] += sign * self.tables
        changes[i, 4] += sign * self.tables_freed
        changes[i, 5] += sign * (self.vcpu[v].faults + self.prefetched)
        changes[i, 6] += sign * self.slots[v].fixes
        changes[i, 7] += sign * self.zapped

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _room(self) -> cython.bint:
        """Whether any one operation finds room. SPLIT asks again for each leaf, and can be begun anew."""
        return (
            self.pages + 8 <= self.page_room
            and self.nodes + 8 <= self.node_room
            and self.rows + 2 * self.alive + 24 <= self.log_room
        )

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _do(self, o: cython.longlong, g: cython.longlong) -> cython.bint:
        """One operation, the slow way; True: it could not be finished."""
        kind: cython.longlong = o & 15
        v: cython.longlong = o >> 16
        level: cython.longlong = o >> 4 & 7
        if kind <= SWITCH:
            if self.vcpu[v].stuck >= 0:
                return False
            if kind == 0:
                self._touch(v, g, level, o >> 7 & 7, o >> 10 & 7, o >> 13 & 1)
            elif kind == ENTER:
                self._enter(v)
            elif kind == FIX:
                self._fix(v, g, level, o >> 13 & 1)
            elif kind == UNLOAD:
                self._unload(v, g)
            elif kind == ROLE:
                self.slots[v].word = g
            else:
                self._switch(v, g)
        elif kind == INVALIDATE:
            self._invalidate()
        elif kind == ZAP:
            self._zap(level, self.ranges[g * 2], self.ranges[g * 2 + 1])
        elif kind == ZAP_ALL:
            self._zap_all()
        elif kind == SPLIT:
            return self._split(level, self.ranges[g * 2], self.ranges[g * 2 + 1])
        elif kind == COLLAPSE:
            self._collapse(v, level, g, o >> 7 & 1)
        elif kind == END:
            self._end()
        return self.error != 0

    # What a vCPU does

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _touch(
        self,
        v: cython.longlong,
        g: cython.longlong,
        level: cython.longlong,
        first: cython.longlong,
        last: cython.longlong,
        resets: cython.longlong,
    ) -> cython.void:
        self._enter(v)
        if self._leaf(self.vcpu[v].word, g) >= level:
            self.vcpu[v].hits += 1
            return
        self._fault(v, g, level, first, last)
        if resets:
            self._reset(v, g, level)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fix(
        self, v: cython.longlong, g: cython.longlong, level: cython.longlong, resets: cython.longlong
    ) -> cython.void:
        at: cython.longlong
        self._enter(v)
        at = self._leaf(self.vcpu[v].word, g)
        if at > level and self.split_in_place:
            self._descend(self.vcpu[v].word, g, level)
            self.slots[v].fixes += 1
        elif at == level:
            self.slots[v].fixes += 1
        else:
            self._fault(v, g, level, g & 7, g & 7)
        if resets:
            self._reset(v, g, level)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _reset(self, v: cython.longlong, g: cython.longlong, level: cython.longlong) -> cython.void:
        built: cython.longlong = self.slots[v].creations
        self._unload(v, EXIT)
        self._enter(v)
        if self.slots[v].creations > built or self._leaf(self.vcpu[v].word, g) < level:
            self.vcpu[v].stuck = self.at
            self.vcpu[v].gen = NONE

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _enter(self, v: cython.longlong) -> cython.void:
        if self.vcpu[v].gen == NONE:
            if self.slots[v].request:
                self.slots[v].request = 0
                self._empty(v, MEMSLOT, not self.reloads)
            if self.slots[v].slot[0] == 0:
                self._load(v)
        self._refresh(v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _refresh(self, v: cython.longlong) -> cython.void:
        """Bring what the fast way reads of a vCPU in line with its slots. Without a root the guess stays."""
        r: cython.longlong = self.slots[v].slot[0]
        w: cython.longlong = self.root[r].word
        self.vcpu[v].gen = NONE
        if r:
            self.vcpu[v].word = w
            self.vcpu[v].top = self.word[w].top
            self.vcpu[v].deep = self.word[w].level == 5
            if not self.slots[v].request and self.vcpu[v].stuck < 0:
                self.vcpu[v].gen = self.word[w].gen

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _unload(self, v: cython.longlong, cause: cython.longlong) -> cython.void:
        self.slots[v].request = 0
        self._empty(v, cause, False)
        self._refresh(v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _switch(self, v: cython.longlong, w: cython.longlong) -> cython.void:
        self.slots[v].word = w
        self._search(v, w)
        self._refresh(v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _search(self, v: cython.longlong, w: cython.longlong) -> cython.void:
        i: cython.longlong
        r: cython.longlong = self.slots[v].slot[0]
        good: cython.longlong = self.word[w].root  # the only one that is valid and has this word
        if r and r == good:
            return
        if r == 0:
            for i in range(1, 4):
                r = self.slots[v].slot[i]
                if r and r == good:
                    self.slots[v].slot[0] = r
                    while i < 3:  # the later ones move up
                        self.slots[v].slot[i] = self.slots[v].slot[i + 1]
                        i += 1
                    self.slots[v].slot[3] = 0
                    return
            return
        for i in range(1, 4):
            r = self.slots[v].slot[i]
            self.slots[v].slot[i] = self.slots[v].slot[0]
            self.slots[v].slot[0] = r
            if r and r == good:
                return
        r = self.slots[v].slot[0]
        self.slots[v].slot[0] = 0
        if r:
            self._put(r, OTHER, v)

    # What happens to the VM

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _invalidate(self) -> cython.void:
        r: cython.longlong = self.root[0].after
        after: cython.longlong
        v: cython.longlong
        flush: cython.longlong = 0
        self._forget()
        while r:
            after = self.root[r].after
            if self.root[r].valid:
                flush = 1
                if self.empties:
                    self._zap_tree(self.root[r].word)
                    self._note(EMPTIED, r, MEMSLOT, NONE, 0, 0)
                else:
                    self._invalidate_root(r, MEMSLOT)
            r = after
        for v in range(self.vcpus):
            self.slots[v].request = 1
            self.vcpu[v].gen = NONE
        self.flushes += flush

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap(self, as_id: cython.longlong, start: cython.longlong, end: cython.longlong) -> cython.void:
        w: cython.longlong
        removed: cython.longlong = 0
        for w in range(self.words):
            if self.word[w].as_id == as_id and (self.word[w].root or self.word[w].remembered):
                self.gone_leaves = self.gone_tables = 0
                self._zap_range(w, self.word[w].top, self.word[w].level, 0, start, end)
                self.word[w].leaves -= self.gone_leaves
                self.word[w].tables -= self.gone_tables
                if not self.word[w].remembered:
                    removed += self.gone_leaves
                    self.zapped += self.gone_leaves
                    self.tables_freed += self.gone_tables
        self.flushes += removed > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap_all(self) -> cython.void:
        r: cython.longlong = self.root[0].after
        w: cython.longlong
        v: cython.longlong
        removed: cython.longlong = 0
        self._forget()
        while r:
            w = self.root[r].word
            if self.root[r].valid and (self.word[w].leaves or self.word[w].tables):
                removed += self.word[w].leaves
                self._zap_tree(w)
                self._note(EMPTIED, r, VM_END, NONE, 0, 0)
            r = self.root[r].after
        for v in range(self.vcpus):
            self._refresh(v)
        self.flushes += removed > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split(self, as_id: cython.longlong, start: cython.longlong, end: cython.longlong) -> cython.bint:
        w: cython.longlong
        before: cython.longlong
        short: cython.bint = False
        for w in range(self.words):
            if self.word[w].as_id == as_id and (self.word[w].root or self.word[w].remembered):
                before = self.word[w].tables
                short = self._split_range(w, self.word[w].top, self.word[w].level, 0, start, end)
                if not self.word[w].remembered:
                    self.tables += self.word[w].tables - before
                if short:
                    break
        return short

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _collapse(
        self, as_id: cython.longlong, level: cython.longlong, g: cython.longlong, for_good: cython.longlong
    ) -> cython.void:
        w: cython.longlong
        node: cython.longlong
        below: cython.longlong
        at: cython.longlong
        k: cython.longlong
        one: cython.ulonglong = 1
        removed: cython.longlong = 0
        for w in range(self.words):
            if self.word[w].as_id == as_id and (self.word[w].root or self.word[w].remembered):
                at = self.word[w].level
                node = self.word[w].top
                while at > level:
                    node = self._below(w, node, at, g >> (at - 1) * 9 & 511)
                    at -= 1
                    if node == 0:
                        break
                below = self._below(w, node, at, g >> (at - 1) * 9 & 511) if node and level > 1 else 0
                if below:
                    self.gone_leaves = self.gone_tables = 0
                    self._drop(w, below, level - 1)
                    self.word[w].leaves -= self.gone_leaves
                    self.word[w].tables -= self.gone_tables
                    if self.recovers and not for_good:
                        at = g >> (level - 1) * 9 & 511
                        k = self.page_of[node] * 16 + (at >> 6) * 2
                        self.bits[k] |= one << (at & 63)
                        self.bits[k + 1] |= one << (at & 63)
                        self.word[w].leaves += 1
                    if not self.word[w].remembered:
                        removed += 1
                        self.zapped += self.gone_leaves
                        self.tables_freed += self.gone_tables
        self.flushes += removed > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _end(self) -> cython.void:
        v: cython.longlong
        r: cython.longlong
        after: cython.longlong
        self._forget()
        for v in range(self.vcpus):
            self.slots[v].request = 0
            self._empty(v, VM_END, False)
            self._refresh(v)
        r = self.root[0].after
        while r:
            after = self.root[r].after
            if self.root[r].valid:
                self._invalidate_root(r, VM_END)
            r = after
        if self.error == 0 and (self.alive or self._tables_alive()):
            self.error = LEFT_AT_END
            self.error_tables = self._tables_alive()

    # Roots

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _load(self, v: cython.longlong) -> cython.void:
        w: cython.longlong = self.slots[v].word
        r: cython.longlong = self.word[w].root
        last: cython.longlong
        self.slots[v].loads += 1
        self.flushes += 1
        if r:
            self.root[r].refs += 1
            self.slots[v].slot[0] = r
            self.slots[v].reuses += 1
            self._note(FOUND, r, self.slots[v].cause, v, self.word[w].leaves, self.word[w].tables)
            return
        r = self.free_root
        self.free_root = self.root[r].after
        last = self.root[0].before
        self.root[r].id = self.ids
        self.root[r].word = w
        self.root[r].refs = 2 if self.own_reference else 1
        self.root[r].valid = 1
        self.root[r].cause = OTHER
        self.root[r].before = last
        self.root[r].after = 0
        self.root[last].after = r
        self.root[0].before = r
        self.ids += 1
        self.alive += 1
        self.word[w].root = r
        self.slots[v].slot[0] = r
        self.slots[v].creations += 1
        if self.word[w].remembered:
            self.word[w].remembered = 0
            self.vcpu[v].faults += self.word[w].leaves
            self.vcpu[v].refaults += self.word[w].leaves
            self.tables += self.word[w].tables
            self.assumed_leaves += self.word[w].leaves
            self.assumed_tables += self.word[w].tables
        self._note(CREATED, r, self.slots[v].cause, v, self.word[w].leaves, self.word[w].tables)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _empty(self, v: cython.longlong, cause: cython.longlong, only_invalid: cython.bint) -> cython.void:
        i: cython.longlong
        r: cython.longlong
        for i in range(1, 5):
            r = self.slots[v].slot[i & 3]
            if r and not (only_invalid and self.root[r].valid):
                self.slots[v].slot[i & 3] = 0
                self.slots[v].cause = cause
                self._put(r, cause, v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put(self, r: cython.longlong, cause: cython.longlong, v: cython.longlong) -> cython.void:
        self.root[r].refs -= 1
        if self.root[r].refs:
            return
        if not self.root[r].valid:
            self._free(r, self.root[r].cause, v)
        elif not self.own_reference:
            self._free(r, cause, v)
        elif self.error == 0:
            self.error = FINAL_PUT
            self.error_root = self.root[r].id

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _invalidate_root(self, r: cython.longlong, cause: cython.longlong) -> cython.void:
        w: cython.longlong = self.root[r].word
        self._zap_tree(w)
        self.root[r].valid = 0
        self.root[r].cause = cause
        self.word[w].root = 0
        self._note(INVALIDATED, r, cause, NONE, 0, 0)
        if self.own_reference:
            self.root[r].refs -= 1
        if self.root[r].refs == 0:
            self._free(r, cause, NONE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _free(self, r: cython.longlong, cause: cython.longlong, v: cython.longlong) -> cython.void:
        w: cython.longlong = self.root[r].word
        leaves: cython.longlong = 0
        tables: cython.longlong = 0
        if self.root[r].valid:  # an invalid root is empty, and the tree another root's
            leaves = self.word[w].leaves
            tables = self.word[w].tables
            self.word[w].root = 0
            if self.assume_refault and (leaves or tables):
                self.word[w].remembered = 1
                self.zapped += leaves
                self.tables_freed += tables
            else:
                self._zap_tree(w)
        if self.flush_per_table:
            self.flushes += tables
        if tables and self.puts < self.put_room:
            self.put[self.puts].leaves = leaves
            self.put[self.puts].tables = tables
            self.puts += 1
        self.root[self.root[r].before].after = self.root[r].after
        self.root[self.root[r].after].before = self.root[r].before
        self.root[r].after = self.free_root
        self.free_root = r
        self.alive -= 1
        self.frees += 1
        self._note(FREED, r, cause, v, leaves, tables)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _forget(self) -> cython.void:
        """No remembered tree can be taken up any more."""
        w: cython.longlong
        for w in range(self.words):
            if self.word[w].remembered:
                self.word[w].remembered = 0
                self._raze(w)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _tables_alive(self) -> cython.longlong:
        w: cython.longlong
        tables: cython.longlong = 0
        for w in range(self.words):
            if self.word[w].root:
                tables += self.word[w].tables
        return tables

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _note(
        self,
        event: cython.longlong,
        r: cython.longlong,
        cause: cython.longlong,
        v: cython.longlong,
        leaves: cython.longlong,
        tables: cython.longlong,
    ) -> cython.void:
        i: cython.longlong = self.rows
        if self.logging:
            self.log[i].at = self.at
            self.log[i].event = event
            self.log[i].vcpu = v
            self.log[i].root = self.root[r].id
            self.log[i].word = self.root[r].word
            self.log[i].cause = cause
            self.log[i].leaves = leaves
            self.log[i].tables = tables
            self.log[i].roots_alive = self.alive
            self.log[i].tables_alive = self._tables_alive()
            self.rows = i + 1

    # Trees. A child is a table of level 1, or a node with a table of its own; 0 for neither.

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _below(
        self, w: cython.longlong, node: cython.longlong, level: cython.longlong, at: cython.longlong
    ) -> cython.longlong:
        """The child at an entry of a node of `level`, if it is alive."""
        c: cython.longlong = self.child[node * 512 + at]
        return c if self.gen[c if level == 2 else self.page_of[c]] == self.word[w].gen else 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _leaf(self, w: cython.longlong, g: cython.longlong) -> cython.longlong:
        """The level of the leaf that covers a frame, 0 for none."""
        level: cython.longlong = self.word[w].level
        c: cython.longlong = self.word[w].top
        page: cython.longlong
        at: cython.longlong
        while c:
            at = g >> (level - 1) * 9 & 511
            page = c if level == 1 else self.page_of[c]
            if self.bits[page * 16 + (at >> 6) * 2] >> (at & 63) & 1:
                return level
            if level == 1:
                return 0
            c = self._below(w, c, level, at)
            level -= 1
        return 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fault(
        self,
        v: cython.longlong,
        g: cython.longlong,
        level: cython.longlong,
        first: cython.longlong,
        last: cython.longlong,
    ) -> cython.void:
        w: cython.longlong = self.vcpu[v].word
        c: cython.longlong = self._descend(w, g, level)
        at: cython.longlong = g >> (level - 1) * 9 & 511
        page: cython.longlong = c if level == 1 else self.page_of[c]
        k: cython.longlong = page * 16 + (at >> 6) * 2
        below: cython.longlong
        mask: cython.ulonglong = 1
        self.vcpu[v].faults += 1
        if level > 1:
            below = self._below(w, c, level, at)
            if below:
                self.gone_leaves = self.gone_tables = 0
                self._drop(w, below, level - 1)
                self.word[w].leaves -= self.gone_leaves
                self.word[w].tables -= self.gone_tables
                self.zapped += self.gone_leaves
                self.tables_freed += self.gone_tables
        self.vcpu[v].refaults += self.bits[k + 1] >> (at & 63) & 1
        mask = mask << (at & 63)
        self.word[w].leaves += ones(mask & ~self.bits[k])
        self.bits[k] |= mask
        self.bits[k + 1] |= mask
        if level == 1 and self.prefetch and first <= last:
            mask = (2 << last) - (1 << first)
            mask = mask << (at & 56) & ~self.bits[k]
            self.word[w].leaves += ones(mask)
            self.prefetched += ones(mask)
            self.bits[k] |= mask
            self.bits[k + 1] |= mask

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _descend(self, w: cython.longlong, g: cython.longlong, goal: cython.longlong) -> cython.longlong:
        """The table of level `goal` for a frame (a node, above level 1), made if it is not there."""
        level: cython.longlong = self.word[w].level
        node: cython.longlong = self.word[w].top
        below: cython.longlong
        at: cython.longlong
        k: cython.longlong
        while level > goal:
            at = g >> (level - 1) * 9 & 511
            below = self._below(w, node, level, at)
            if below == 0:
                k = self.page_of[node] * 16 + (at >> 6) * 2
                if not self.bits[k] >> (at & 63) & 1:
                    below = self._table(w, node, level, at)
                elif self.split_in_place:
                    below = self._split_leaf(w, node, level, at)
                else:
                    self._clear(self.page_of[node], at, at)
                    self.word[w].leaves -= 1
                    self.zapped += 1
                    below = self._table(w, node, level, at)
                self.tables += 1
            node = below
            level -= 1
        return node

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _table(
        self, w: cython.longlong, node: cython.longlong, level: cython.longlong, at: cython.longlong
    ) -> cython.longlong:
        """An empty table at an entry of a node of `level`: a new one, or the one that was there once."""
        c: cython.longlong = self.child[node * 512 + at]
        page: cython.longlong
        i: cython.longlong
        if c == 0:
            page = c = self.pages
            self.pages += 1
            if level > 2:
                c = self.nodes
                self.nodes += 1
                self.page_of[c] = cython.cast(cython.uint, page)
            self.child[node * 512 + at] = cython.cast(cython.uint, c)
        else:
            page = c if level == 2 else self.page_of[c]
            for i in range(8):
                self.bits[page * 16 + i * 2] = 0
        self.gen[page] = self.word[w].gen
        self.word[w].tables += 1
        return c

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split_leaf(
        self, w: cython.longlong, node: cython.longlong, level: cython.longlong, at: cython.longlong
    ) -> cython.longlong:
        """A table full of leaves where a leaf of `level` was."""
        c: cython.longlong = self._table(w, node, level, at)
        page: cython.longlong = c if level == 2 else self.page_of[c]
        i: cython.longlong
        for i in range(16):
            self.bits[page * 16 + i] = ALL
        self._clear(self.page_of[node], at, at)
        self.word[w].leaves += 511
        return c

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _clear(self, page: cython.longlong, first: cython.longlong, last: cython.longlong) -> cython.longlong:
        """Remove the leaves at entries `first` to `last`; how many there were."""
        i: cython.longlong
        leaves: cython.longlong = 0
        mask: cython.ulonglong
        if first > last:
            return 0
        for i in range(first >> 6, (last >> 6) + 1):
            mask = ALL
            if i == first >> 6:
                mask = mask >> (first & 63) << (first & 63)
            if i == last >> 6:
                mask = mask & ALL >> (63 - (last & 63))
            leaves += ones(self.bits[page * 16 + i * 2] & mask)
            self.bits[page * 16 + i * 2] &= ~mask
        return leaves

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _drop(self, w: cython.longlong, c: cython.longlong, level: cython.longlong) -> cython.void:
        """Remove a table of `level` with all that is below it."""
        page: cython.longlong = c if level == 1 else self.page_of[c]
        at: cython.longlong
        below: cython.longlong
        self.gone_tables += 1
        for at in range(8):
            self.gone_leaves += ones(self.bits[page * 16 + at * 2])
        if level > 1:
            for at in range(512):
                below = self._below(w, c, level, at)
                if below:
                    self._drop(w, below, level - 1)
        self.gen[page] = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap_tree(self, w: cython.longlong) -> cython.void:
        self.zapped += self.word[w].leaves
        self.tables_freed += self.word[w].tables
        self._raze(w)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _raze(self, w: cython.longlong) -> cython.void:
        """A new generation, in which the tree has no tables. No leaf is without one."""
        if self.word[w].tables:
            self.last_gen += 1
            self.word[w].gen = self.last_gen
            self.word[w].leaves = 0
            self.word[w].tables = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap_range(
        self,
        w: cython.longlong,
        node: cython.longlong,
        level: cython.longlong,
        base: cython.longlong,
        start: cython.longlong,
        end: cython.longlong,
    ) -> cython.void:
        """Remove leaves in [start, end) below a node of `level` that begins at frame `base`."""
        shift: cython.longlong = (level - 1) * 9
        size: cython.longlong = 1
        first: cython.longlong = (start - base) >> shift
        last: cython.longlong = (end - 1 - base) >> shift
        at: cython.longlong
        below: cython.longlong
        low: cython.longlong
        size = size << shift
        first = max(first, 0)
        last = min(last, 511)
        self.gone_leaves += self._clear(self.page_of[node], first, last)
        for at in range(first, last + 1):
            below = self._below(w, node, level, at)
            if below:
                low = base + at * size
                if self.zap_tables and start <= low and low + size <= end:
                    self._drop(w, below, level - 1)
                elif level > 2:
                    self._zap_range(w, below, level - 1, low, start, end)
                else:
                    self.gone_leaves += self._clear(below, max(start - low, 0), min(end - 1 - low, 511))

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split_range(
        self,
        w: cython.longlong,
        node: cython.longlong,
        level: cython.longlong,
        base: cython.longlong,
        start: cython.longlong,
        end: cython.longlong,
    ) -> cython.bint:
        """Split huge leaves inside [start, end) below a node down to level 1; True: for want of room, not all."""
        shift: cython.longlong = (level - 1) * 9
        size: cython.longlong = 1
        first: cython.longlong = (start - base) >> shift
        last: cython.longlong = (end - 1 - base) >> shift
        page: cython.longlong = self.page_of[node]
        at: cython.longlong
        below: cython.longlong
        low: cython.longlong
        size = size << shift
        first = max(first, 0)
        last = min(last, 511)
        for at in range(first, last + 1):
            low = base + at * size
            if self.bits[page * 16 + (at >> 6) * 2] >> (at & 63) & 1 and start <= low and low + size <= end:
                if not self._room():
                    return True
                self._split_leaf(w, node, level, at)
            below = self._below(w, node, level, at) if level > 2 else 0
            if below and self._split_range(w, below, level - 1, low, start, end):
                return True
        return False


@cython.final
@cython.cclass
class Timer:
    """Virtual time of a Core. `timed_engine.TimedEngine` sets it up and reads it."""

    core: Core

    # Pools
    todo: cython.pointer[Todo]
    queue: cython.pointer[Queue]
    turn: cython.pointer[Turn]
    pace: cython.pointer[Pace]
    sample: cython.pointer[Sample]
    todo_room = cython.declare(cython.longlong, visibility="public")
    sample_room = cython.declare(cython.longlong, visibility="public")
    todos = cython.declare(cython.longlong, visibility="public")
    samples = cython.declare(cython.longlong, visibility="public")

    # Costs, ns, and parameters; `inline` and `by_worker` say who zaps a root that dies
    switch = cython.declare(cython.longlong, visibility="public")
    fault = cython.declare(cython.longlong, visibility="public")
    table = cython.declare(cython.longlong, visibility="public")
    found = cython.declare(cython.longlong, visibility="public")
    created = cython.declare(cython.longlong, visibility="public")
    unload = cython.declare(cython.longlong, visibility="public")
    zap_leaf = cython.declare(cython.longlong, visibility="public")
    zap_table = cython.declare(cython.longlong, visibility="public")
    job = cython.declare(cython.longlong, visibility="public")
    chunk = cython.declare(cython.longlong, visibility="public")
    refill = cython.declare(cython.longlong, visibility="public")
    cpus = cython.declare(cython.longlong, visibility="public")
    hold = cython.declare(cython.longlong, visibility="public")
    prefetch = cython.declare(cython.longlong, visibility="public")
    faults_share = cython.declare(cython.longlong, visibility="public")
    loads_share = cython.declare(cython.longlong, visibility="public")
    inline = cython.declare(cython.longlong, visibility="public")
    by_worker = cython.declare(cython.longlong, visibility="public")
    weights = cython.declare(cython.longlong, visibility="public")

    # State
    begun = cython.declare(cython.longlong, visibility="public")
    worker = cython.declare(cython.longlong, visibility="public")
    locked = cython.declare(cython.longlong, visibility="public")
    shared = cython.declare(cython.longlong, visibility="public")
    worked = cython.declare(cython.longlong, visibility="public")
    jobs = cython.declare(cython.longlong, visibility="public")
    leaves = cython.declare(cython.longlong, visibility="public")  # of the winner tree
    moved: cython.bint  # other vCPUs than the one whose turn it was

    def attach(
        self,
        core: Core,
        queue: cython.uchar[::1],
        turn: cython.uchar[::1],
        pace: cython.uchar[::1],
        put: cython.uchar[::1],
        room: cython.longlong,
    ) -> None:
        """Time this core, with these pools. `put` has room for all roots that one operation can free.

        `turn`: two rows for each of `leaves`, a power of two; those that are no queue's are due NEVER.
        """
        self.core = core
        core.put_room = room
        if cython.compiled:
            self.queue = cython.cast(cython.pointer[Queue], cython.address(queue[0]))
            self.turn = cython.cast(cython.pointer[Turn], cython.address(turn[0]))
            self.pace = cython.cast(cython.pointer[Pace], cython.address(pace[0]))
            core.put = cython.cast(cython.pointer[Zapped], cython.address(put[0]))
        else:
            self.queue, self.turn, self.pace, core.put = queue, turn, pace, put

    def attach_todo(self, todo: cython.uchar[::1], room: cython.longlong) -> None:
        """Keep operations here, which holds what the last pool held."""
        if cython.compiled:
            self.todo = cython.cast(cython.pointer[Todo], cython.address(todo[0]))
        else:
            self.todo = todo
        self.todo_room = room

    def attach_samples(self, sample: cython.uchar[::1], room: cython.longlong) -> None:
        """Write samples here, from row `samples` on."""
        if cython.compiled:
            self.sample = cython.cast(cython.pointer[Sample], cython.address(sample[0]))
        else:
            self.sample = sample
        self.sample_room = room

    def check(
        self,
        op: cython.const[cython.uint][::1],
        queue: cython.const[cython.int][::1],
        lead: cython.const[cython.longlong][::1],
        guest: cython.const[cython.longlong][::1],
        idle: cython.const[cython.longlong][::1],
        cost: cython.const[cython.longlong][::1],
    ) -> cython.longlong:
        """The first operation in a queue that is not its own, or with a time that cannot be; or how many there are."""
        i: cython.longlong
        q: cython.longlong
        vcpus: cython.longlong = self.core.vcpus
        for i in range(op.shape[0]):
            q = queue[i]
            if q < 0 or q > 2 * vcpus or guest[i] < 0 or idle[i] < 0 or cost[i] < 0:
                return i
            if lead[i] < guest[i] or lead[i] - guest[i] < idle[i]:
                return i
            if op[i] & 15 <= SWITCH and op[i] >> 16 != (q - vcpus if q >= vcpus else q):
                return i
        return op.shape[0]

    def take(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        queue: cython.const[cython.int][::1],
        lead: cython.const[cython.longlong][::1],
        guest: cython.const[cython.longlong][::1],
        idle: cython.const[cython.longlong][::1],
        cost: cython.const[cython.longlong][::1],
        was: cython.const[cython.uchar][::1],
        wall: cython.const[cython.longlong][::1],
        first: cython.longlong,
        ranges: cython.longlong,
    ) -> None:
        """Put operations, which have been checked, into their queues. Their ranges begin with number `ranges`."""
        i: cython.longlong
        at: cython.longlong = self.todos
        tail: cython.longlong
        kind: cython.longlong
        for i in range(op.shape[0]):
            kind = op[i] & 15
            self.todo[at].op = op[i]
            self.todo[at].gfn = gfn[i] + ranges if kind in (ZAP, SPLIT) else gfn[i]
            self.todo[at].lead = lead[i]
            self.todo[at].guest = guest[i]
            self.todo[at].idle = idle[i]
            self.todo[at].cost = cost[i]
            self.todo[at].was = was[i]
            self.todo[at].wall = wall[i]
            self.todo[at].at = first + i
            self.todo[at].next = 0
            tail = self.queue[queue[i]].tail
            if tail == NONE:
                self.queue[queue[i]].head = at
            else:
                self.todo[tail].next = cython.cast(cython.uint, at - tail)
            self.queue[queue[i]].tail = at
            at += 1
        self.todos = at

    def run(
        self, ranges: cython.const[cython.longlong][::1], until: cython.longlong, final: cython.bint
    ) -> cython.bint:
        """Do what is due before `until` and can be determined; True: it needs room, or the core is in error."""
        if cython.compiled:
            self.core.ranges = cython.cast(cython.pointer[cython.longlong], cython.address(ranges[0]))
            with cython.nogil:
                final = self._run(until, final)
        else:
            self.core.ranges = memoryview(ranges)
            final = self._run(until, final)
        return final

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _run(self, until: cython.longlong, final: cython.bint) -> cython.bint:
        """The next is what is due first: of what is due at once the VM's, then the wall clock's, then programs'.

        The queues are the leaves of a winner tree, in that order, so that a turn costs the logarithm of the vCPUs.
        """
        vcpus: cython.longlong = self.core.vcpus
        v: cython.longlong
        which: cython.longlong
        due: cython.longlong
        programs: cython.longlong = 0  # that have operations
        stopped: cython.bint
        for v in range(vcpus):
            if not final and self._lacks(v):
                return False
            programs += self.queue[v].head != NONE
        self._place_all()
        while programs or not final:
            due = self.turn[1].due
            which = self.turn[1].queue
            if due >= until:
                return False
            stopped = self._program(which, self._bound(which, until)) if which < vcpus else self._event(which, due)
            if stopped:
                return True
            if self.moved:
                self._place_all()
            elif which == 2 * vcpus:
                self._place(which)
            else:
                v = which if which < vcpus else which - vcpus
                self._place(v)
                self._place(vcpus + v)
            if which < vcpus and self.queue[which].head == NONE:
                programs -= 1
            if which < 2 * vcpus and not final and self._lacks(which if which < vcpus else which - vcpus):
                return False
        return False

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _lacks(self, v: cython.longlong) -> cython.bint:
        """What this vCPU does next is not known yet."""
        return self.queue[v].head == NONE or (self.pace[v].inside != 0 and self.queue[self.core.vcpus + v].head == NONE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _due(self, q: cython.longlong) -> cython.longlong:
        """When the first of a queue is due."""
        vcpus: cython.longlong = self.core.vcpus
        i: cython.longlong = self.queue[q].head
        v: cython.longlong = q - vcpus if q >= vcpus else q
        when: cython.longlong = NEVER
        if i == NONE or (q < vcpus and self.pace[v].inside):
            return NEVER
        if q < vcpus:
            when = self.pace[v].clock + (self.todo[i].lead if self.pace[v].lead < 0 else self.pace[v].lead)
        elif q == 2 * vcpus:
            when = max(self.todo[i].wall, 0)
        elif self.todo[i].wall < 0:
            when = self.pace[v].clock + self.todo[i].lead
        else:
            when = max(self.todo[i].wall, self.pace[v].clock)
        return when

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _leaf(self, q: cython.longlong) -> cython.longlong:
        """The VM's is the leftmost, then the wall clock's, then programs'."""
        vcpus: cython.longlong = self.core.vcpus
        return self.leaves + (0 if q == 2 * vcpus else q - vcpus + 1 if q >= vcpus else q + vcpus + 1)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(self, q: cython.longlong) -> cython.void:
        """Put a queue where it is due now."""
        node: cython.longlong = self._leaf(q)
        due: cython.longlong = self._due(q)
        if self.turn[node].due != due:
            self.turn[node].due = due
            while node > 1:
                node >>= 1
                self._win(node)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place_all(self) -> cython.void:
        q: cython.longlong
        node: cython.longlong
        for q in range(2 * self.core.vcpus + 1):
            node = self._leaf(q)
            self.turn[node].due = self._due(q)
            self.turn[node].queue = q
        for node in range(self.leaves - 1, 0, -1):
            self._win(node)
        self.moved = False

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _win(self, node: cython.longlong) -> cython.void:
        """Of what is due at once the left one goes first."""
        best: cython.longlong = 2 * node
        if self.turn[best + 1].due < self.turn[best].due:
            best += 1
        self.turn[node].due = self.turn[best].due
        self.turn[node].queue = self.turn[best].queue

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _bound(self, q: cython.longlong, until: cython.longlong) -> cython.longlong:
        """Up to where the queue that goes first may run: then it is another one's turn."""
        bound: cython.longlong = until
        node: cython.longlong = self._leaf(q)
        while node > 1:
            bound = min(bound, self.turn[node - 1].due) if node & 1 else min(bound, self.turn[node + 1].due + 1)
            node >>= 1
        return bound

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _program(self, v: cython.longlong, bound: cython.longlong) -> cython.bint:
        """A vCPU's own operations that are due before `bound`; True: one of them could not be finished."""
        bits: cython.pointer[cython.ulonglong] = self.core.bits
        gen: cython.pointer[cython.longlong] = self.core.gen
        vcpu: cython.pointer[Vcpu] = self.core.vcpu
        word: cython.pointer[Word] = self.core.word
        todo: cython.pointer[Todo] = self.todo
        pace: cython.pointer[Pace] = self.pace
        special: cython.longlong = 0x2070 if self.core.prefetch else 0x2060
        i: cython.longlong = self.queue[v].head
        o: cython.longlong
        level: cython.longlong
        page: cython.longlong
        k: cython.longlong
        bit: cython.longlong
        fault: cython.longlong
        lead: cython.longlong
        guest: cython.longlong
        idle: cython.longlong
        time: cython.longlong
        since: cython.longlong
        was: cython.longlong
        present: cython.ulonglong
        ever: cython.ulonglong
        one: cython.ulonglong = 1

        while i != NONE:
            lead = todo[i].lead
            guest = todo[i].guest
            idle = todo[i].idle
            if pace[v].lead >= 0:
                lead = pace[v].lead
                guest = pace[v].guest
                idle = pace[v].idle
            if pace[v].clock + lead >= bound:
                break
            if self.samples == self.sample_room:
                return True
            if pace[v].guessed == 0:
                self._guess(v, i)
            o = todo[i].op
            page = todo[i].guess
            fault = NONE
            if o & 15 == 0 and gen[page] == vcpu[v].gen:
                # As in Core._run.
                level = o >> 4 & 7
                k = todo[i].gfn >> (level - 1) * 9 & 511
                bit = k & 63
                k = page * 16 + (k >> 6) * 2
                present = bits[k]
                fault = present >> bit & 1 ^ 1
                if o & special & -fault:
                    fault = NONE
            if fault == NONE:
                if not self.core._room():
                    return True
                self._pass(v, lead, guest, idle)
                if self._step(v, i, guest):
                    todo[i].lead = todo[i].guest = todo[i].idle = 0
                    pace[v].lead = NONE
                    return True
            else:
                self._pass(v, lead, guest, idle)
                ever = bits[k + 1]
                bits[k] = present | one << bit
                bits[k + 1] = ever | one << bit
                vcpu[v].faults += fault
                vcpu[v].refaults += ever >> bit & fault
                vcpu[v].hits += fault ^ 1
                word[vcpu[v].word].leaves += fault
                was = todo[i].was
                if fault:
                    if self.core.vcpus > 1:
                        self._wait(v, not self.faults_share)
                    since = pace[v].clock
                    time = todo[i].cost if was else self.fault
                    if was > 1:
                        time = max(time - (was - 1) * self.table, 0)
                    self._spend(v, ON_FAULT, time)
                    self._switch(v, was, guest)
                    if self.core.vcpus > 1:
                        self._take(v, not self.faults_share, since)
                elif was:
                    self._spend(v, ON_GUEST, -min(self.switch, guest))
            pace[v].lead = NONE
            pace[v].guessed -= 1
            self._pop(v, i)
            self._sample(v)
            i = self.queue[v].head
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _guess(self, v: cython.longlong, i: cython.longlong) -> cython.void:
        """The first pass of Core._run, over the next operations of a program."""
        child: cython.pointer[cython.uint] = self.core.child
        vcpu: cython.pointer[Vcpu] = self.core.vcpu
        todo: cython.pointer[Todo] = self.todo
        g: cython.longlong
        o: cython.longlong
        level: cython.longlong
        node: cython.longlong
        low: cython.longlong
        page: cython.longlong
        guessed: cython.longlong = 0
        while guessed < 64:
            guessed += 1
            o = todo[i].op
            g = todo[i].gfn
            if o & 15 == 0:
                node = vcpu[v].top
                if vcpu[v].deep:
                    node = child[node * 512 + (g >> 36 & 511)]
                node = child[node * 512 + (g >> 27 & 511)]
                low = child[node * 512 + (g >> 18 & 511)]
                page = child[low * 512 + (g >> 9 & 511)]
                level = o >> 4 & 7
                if level != 1:
                    page = self.core.page_of[low if level == 2 else node]
                todo[i].guess = cython.cast(cython.uint, page)
            elif o & 14 == 4:
                vcpu[v].top = self.core.word[g].top
                vcpu[v].deep = self.core.word[g].level == 5
            if todo[i].next == 0:
                break
            i += todo[i].next
        self.pace[v].guessed = guessed

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _event(self, q: cython.longlong, when: cython.longlong) -> cython.bint:
        """One operation of a wall-clock queue; True: it could not be finished."""
        v: cython.longlong = q - self.core.vcpus
        i: cython.longlong = self.queue[q].head
        guest: cython.longlong = 0
        if self.samples == self.sample_room or not self.core._room():
            return True
        if v == self.core.vcpus:
            self.core.at = self.todo[i].at
            if self.core._do(self.todo[i].op, self.todo[i].gfn):
                return True
            self._pop(q, i)
            return False
        if self.todo[i].wall >= 0:
            self._interrupt(v, when)
        else:
            guest = self.todo[i].guest
            self._pass(v, self.todo[i].lead, guest, self.todo[i].idle)
        if self._step(v, i, guest):
            self.todo[i].lead = self.todo[i].guest = self.todo[i].idle = 0
            return True
        self.pace[v].inside = self.todo[i].wall != LAST
        self._pop(q, i)
        self._sample(v)
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _interrupt(self, v: cython.longlong, when: cython.longlong) -> cython.void:
        i: cython.longlong = self.queue[v].head
        passed: cython.longlong = when - self.pace[v].clock
        ran: cython.longlong
        halted: cython.longlong
        if i == NONE:
            self._pass(v, passed, 0, 0)
            return
        if self.pace[v].lead < 0:
            self.pace[v].lead = self.todo[i].lead
            self.pace[v].guest = self.todo[i].guest
            self.pace[v].idle = self.todo[i].idle
        ran = min(passed, self.pace[v].guest)
        halted = min(passed - ran, self.pace[v].idle)
        self._pass(v, passed, ran, halted)
        self.pace[v].lead -= passed
        self.pace[v].guest -= ran
        self.pace[v].idle -= halted

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _step(self, v: cython.longlong, i: cython.longlong, guest: cython.longlong) -> cython.bint:
        """An operation of a vCPU, the slow way, and what it takes; True: it could not be finished."""
        o: cython.longlong = self.todo[i].op
        was: cython.longlong = self.todo[i].was
        kind: cython.longlong = o & 15
        faults: cython.longlong = self.core.vcpu[v].faults
        hits: cython.longlong = self.core.vcpu[v].hits
        tables: cython.longlong = self.core.tables
        prefetched: cython.longlong = self.core.prefetched
        held: cython.bint = (
            self.core.slots[v].slot[0] | self.core.slots[v].slot[1] | self.core.slots[v].slot[2]
            | self.core.slots[v].slot[3]
        ) != 0  # fmt: skip
        fixes: cython.longlong = self.core.slots[v].fixes
        created: cython.longlong = self.core.slots[v].creations
        found: cython.longlong = self.core.slots[v].reuses
        leaves: cython.longlong
        time: cython.longlong
        since: cython.longlong
        put: cython.longlong
        loads: cython.bint
        exclusive: cython.bint
        self.core.assumed_leaves = self.core.assumed_tables = self.core.puts = 0
        self.core.at = self.todo[i].at
        if self.core._do(o, self.todo[i].gfn):
            return True
        leaves = self.core.assumed_leaves
        faults = self.core.vcpu[v].faults - faults - leaves
        tables = self.core.tables - tables - self.core.assumed_tables
        created = self.core.slots[v].creations - created
        found = self.core.slots[v].reuses - found

        loads = created or found or kind == UNLOAD
        exclusive = (loads and not self.loads_share) or (faults > 0 and not self.faults_share)
        if loads or faults:
            self._wait(v, exclusive)
        since = self.pace[v].clock
        if leaves or self.core.assumed_tables:
            time = (leaves * self.fault + self.core.assumed_tables * self.table) * self.refill // 1000
            self._spend(v, ON_FAULT, time)
            self._spend(v, ON_SWITCH, leaves * self.switch * self.refill // 1000)
        if kind <= FIX:
            if self.core.vcpu[v].hits > hits:
                if was:
                    self._spend(v, ON_GUEST, -min(self.switch, guest))
            elif faults or self.core.slots[v].fixes > fixes:
                time = self.todo[i].cost if was else self.fault
                if faults:
                    time += (tables - max(was - 1, 0)) * self.table
                self._spend(v, ON_FAULT, max(time, 0) + (self.core.prefetched - prefetched) * self.prefetch)
                self._switch(v, was, guest)
        elif kind == UNLOAD:
            if was:
                self._spend(v, ON_UNLOAD, self.todo[i].cost)
            elif held:
                self._spend(v, ON_UNLOAD, self.unload)
        if created or found:
            time = self.created if created else self.found
            if kind == ENTER and was:
                if was == (WAS_CREATED if created else WAS_FOUND):
                    time = self.todo[i].cost
                else:
                    time += self.todo[i].cost - (self.created if was == WAS_CREATED else self.found)
            self._spend(v, ON_LOAD, max(time, 0))
        if loads or faults:
            self._take(v, exclusive, since)
        for put in range(self.core.puts):
            time = self.core.put[put].leaves * self.zap_leaf + self.core.put[put].tables * self.zap_table
            if self.inline:
                self._spend(v, ON_UNLOAD, time)
                self.locked = max(self.locked, self.pace[v].clock)
            elif self.by_worker:
                self._queue_zap(self.pace[v].clock, time)
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _wait(self, v: cython.longlong, exclusive: cython.bint) -> cython.void:
        until: cython.longlong = max(self.locked, self.shared) if exclusive else self.locked
        left: cython.longlong = self.worker - self.pace[v].clock
        if exclusive and left > 0 and self.begun <= self.pace[v].clock:
            if self.chunk:
                left = min(left, self.chunk)
            until = max(until, self.pace[v].clock + left)
        if until > self.pace[v].clock:
            self._spend(v, ON_WAIT, until - self.pace[v].clock)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _take(self, v: cython.longlong, exclusive: cython.bint, since: cython.longlong) -> cython.void:
        until: cython.longlong = min(since + (self.hold if self.core.vcpus > 1 else 0), self.pace[v].clock)
        if until > since:
            if exclusive:
                self.locked = max(self.locked, until)
            else:
                self.shared = max(self.shared, until)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _queue_zap(self, now: cython.longlong, work: cython.longlong) -> cython.void:
        vcpus: cython.longlong = self.core.vcpus
        v: cython.longlong
        if now + self.job > self.worker:
            self.begun = self.worker = now + self.job
        self.worker += work
        self.worked += work
        self.jobs += 1
        if 0 < self.cpus < vcpus + 1:
            self.moved = True
            for v in range(vcpus):
                self._spend(v, ON_WAIT, work * (vcpus + 1 - self.cpus) * self.pace[v].weight // self.weights)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _pass(
        self, v: cython.longlong, lead: cython.longlong, guest: cython.longlong, idle: cython.longlong
    ) -> cython.void:
        self.pace[v].clock += lead
        self.pace[v].spent[ON_GUEST] += guest
        self.pace[v].spent[ON_IDLE] += idle
        self.pace[v].spent[ON_OTHER] += lead - guest - idle

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _switch(self, v: cython.longlong, was: cython.longlong, guest: cython.longlong) -> cython.void:
        within: cython.longlong
        if was:
            within = min(self.switch, guest)
            self.pace[v].spent[ON_GUEST] -= within
            self.pace[v].spent[ON_SWITCH] += within
        else:
            self._spend(v, ON_SWITCH, self.switch)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _spend(self, v: cython.longlong, on: cython.longlong, ns: cython.longlong) -> cython.void:
        self.pace[v].clock += ns
        self.pace[v].spent[on] += ns

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _pop(self, q: cython.longlong, i: cython.longlong) -> cython.void:
        if self.todo[i].next:
            self.queue[q].head = i + self.todo[i].next
        else:
            self.queue[q].head = self.queue[q].tail = NONE

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _sample(self, v: cython.longlong) -> cython.void:
        i: cython.longlong = self.samples
        on: cython.longlong
        if self.pace[v].clock - self.pace[v].sampled >= SAMPLE:
            self.pace[v].sampled = self.pace[v].clock
            self.sample[i].vcpu = v
            self.sample[i].clock = self.pace[v].clock
            self.sample[i].cause = self.core.slots[v].cause
            for on in range(8):
                self.sample[i].spent[on] = self.pace[v].spent[on]
            self.samples = i + 1
