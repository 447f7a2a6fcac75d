# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Lines of text to records: the loop over bytes that reads what ftrace, trace-cmd and perf print. See `program`.

A line is quoting, a task, a CPU, a time, an event's name and its text. Lines are taken one by one; one that is none
known may be the rest of the line before, which a mailer wrapped: the two are then read as one. Cython in pure-Python
mode; Python objects are made only for what is rare (a thread never seen, a name never seen, the first odd line).
"""

from __future__ import annotations

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.other_events import OTHER

COMPILED: bool = cython.compiled

_LITERAL = cython.declare(cython.int, p.LITERAL)
_HEX = cython.declare(cython.int, p.HEX)
_DEC = cython.declare(cython.int, p.DEC)
_NEGATIVE = cython.declare(cython.int, p.NEGATIVE)
_POINTER = cython.declare(cython.int, p.POINTER)
_WORD = cython.declare(cython.int, p.WORD)
_ONE_OF = cython.declare(cython.int, p.ONE_OF)
_EXIT = cython.declare(cython.int, p.EXIT)
_PFERR = cython.declare(cython.int, p.PFERR_BITS)
_PERM = cython.declare(cython.int, p.PERM)
_FAILED = cython.declare(cython.int, p.FAILED)
_COUNT = cython.declare(cython.int, p.COUNT)
_ROLE = cython.declare(cython.int, p.ROLE)
_LEVEL = cython.declare(cython.int, p.LEVEL)
_FLAGS = cython.declare(cython.int, p.FLAGS)
_SPACE = cython.declare(cython.int, p.SPACE)
_VCPU = cython.declare(cython.int, p.VCPU)
_VENDOR = cython.declare(cython.int, p.VENDOR)
_NOWHERE = cython.declare(cython.int, p.NOWHERE)
_PLACES = cython.declare(cython.int, p.PLACES)
_TEXT_ROLE = cython.declare(cython.ulonglong, p.TEXT_ROLE)
_FAST = cython.declare(cython.longlong, p.FAST_PAGE_FAULT)
_ENTRY = cython.declare(cython.longlong, p.RUNS_GUEST[0])  # only a vCPU's thread has these
_LEFT = cython.declare(cython.longlong, p.RUNS_GUEST[1])
_RETURN = cython.declare(cython.longlong, p.RUNS_GUEST[2])
_DECIMAL = cython.declare(cython.longlong, p.DECIMAL)
_BARE = cython.declare(cython.longlong, p.BARE)
_PREFIXED = cython.declare(cython.longlong, p.PREFIXED)
_NO_VCPU = cython.declare(cython.ulonglong, 0xFFFF)
_NO_KIND = cython.declare(cython.longlong, OTHER)
# Of literals above 31 bits compiled code would make Python's numbers, a hundred times slower.
_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
_SIGN32 = cython.declare(cython.ulonglong, 0x80000000)

# What a line is.
_JUNK = cython.declare(cython.int, 0)
_EVENT = cython.declare(cython.int, 1)
_KNOWN = cython.declare(cython.int, 2)  # a heading, a stack, an empty line
_OTHER = cython.declare(cython.int, 3)  # an event of no kind that a trace has
_LOSS = cython.declare(cython.int, 4)
_BEGUN = cython.declare(cython.int, 5)  # an event with its time, but without the end of its text

_LONGEST = cython.declare(cython.int, 4096)  # a line's bytes; longer ones are no events
_SHOWN = cython.declare(cython.int, 200)  # bytes of the first line that was not understood
_MOST_PARTS = cython.declare(cython.int, 6)  # lines that one event may be wrapped over
_THREAD_SLOTS = cython.declare(cython.int, 1 << 17)
_MOST_THREADS = cython.declare(cython.int, 1 << 16)
_NAME_SLOTS = cython.declare(cython.int, 1 << 12)
_CPUS = cython.declare(cython.int, 4096)

_FIELDS = (
    ("time", "u8"), ("w0", "u8"), ("w1", "u8"), ("w2", "u8"), ("w3", "u8"), ("tid", "u4"), ("tgid", "u4"),
    ("role", "u4"), ("n", "u4"), ("cpu", "u2"), ("vcpu", "u2"), ("kind", "u1"), ("level", "u1"), ("flags", "u1"),
    ("as_id", "u1"),
)  # fmt: skip
# What plain Python must see as C does: numbers that are no numpy's.
_VIEWS = (
    "_time", "_w0", "_w1", "_w2", "_w3", "_tid", "_tgid", "_role", "_n", "_cpu", "_vcpu", "_kind", "_level", "_flags",
    "_as_id", "_ops", "_names", "_form", "_events", "_event_table", "_exit_table", "_field_table", "_field_targets",
    "_last_form", "_form_count", "_vendor_count", "_out", "_thread_slot", "_thread_tid", "_fact", "_other_hash",
    "_other", "_seen_on", "_scratch",
)  # fmt: skip


@cython.final
@cython.cclass
class Scanner:
    """`take` reads lines until `room` rows are there; `rows` of them are in `columns`.

    `threads`: (tid, comm) of each, in order of appearance, `thread_facts` what is known of them (tgid + 1, vCPU + 1,
    whether it ran a guest, whether an event of KVM is its). `others`: events that a trace has no kind for, by name;
    `texts` are those of their rows. `forms` and `raw` count the rows by
    form, and those given as fields. `odd` lines were not understood, `first_odd` is the first of them.
    """

    columns = cython.declare(object, visibility="public")
    rows = cython.declare(cython.Py_ssize_t, visibility="public")
    threads = cython.declare(list, visibility="public")
    thread_facts = cython.declare(object, visibility="public")
    texts = cython.declare(list, visibility="public")
    other_names = cython.declare(list, visibility="public")
    other_counts = cython.declare(object, visibility="public")
    forms = cython.declare(object, visibility="public")
    raw = cython.declare(cython.longlong, visibility="public")
    bare = cython.declare(cython.longlong, visibility="public")
    odd = cython.declare(cython.longlong, visibility="public")
    first_odd = cython.declare(bytes, visibility="public")
    lines = cython.declare(cython.longlong, visibility="public")
    joined = cython.declare(cython.longlong, visibility="public")
    backwards = cython.declare(cython.longlong, visibility="public")
    ticks = cython.declare(cython.longlong, visibility="public")
    relative = cython.declare(cython.longlong, visibility="public")
    lost = cython.declare(cython.longlong, visibility="public")
    uncounted = cython.declare(cython.longlong, visibility="public")
    by_vendor = cython.declare(object, visibility="public")

    _room: cython.Py_ssize_t
    _time: cython.ulonglong[::1]
    _w0: cython.ulonglong[::1]
    _w1: cython.ulonglong[::1]
    _w2: cython.ulonglong[::1]
    _w3: cython.ulonglong[::1]
    _tid: cython.uint[::1]
    _tgid: cython.uint[::1]
    _role: cython.uint[::1]
    _n: cython.uint[::1]
    _cpu: cython.ushort[::1]
    _vcpu: cython.ushort[::1]
    _kind: cython.uchar[::1]
    _level: cython.uchar[::1]
    _flags: cython.uchar[::1]
    _as_id: cython.uchar[::1]

    _ops: cython.const[cython.longlong][:, ::1]
    _names: cython.const[cython.longlong][:, ::1]
    _form: cython.const[cython.longlong][:, ::1]
    _events: cython.const[cython.longlong][:, ::1]
    _event_table: cython.const[cython.longlong][:, ::1]
    _exit_table: cython.const[cython.longlong][:, ::1]
    _field_table: cython.const[cython.longlong][:, ::1]
    _field_targets: cython.const[cython.longlong][:, ::1]
    _blob: cython.const[cython.uchar][::1]
    _last_form: cython.longlong[::1]

    _form_count: cython.longlong[::1]
    _vendor_count: cython.longlong[::1]
    _out: cython.ulonglong[::1]
    _thread_slot: cython.longlong[::1]
    _thread_tid: cython.longlong[::1]
    _fact: cython.longlong[:, ::1]
    _other_hash: cython.longlong[::1]
    _other: cython.longlong[::1]
    _seen_on: cython.ulonglong[::1]

    # Of the line just read
    _l_time: cython.ulonglong
    _l_tid: cython.longlong
    _l_tgid: cython.longlong
    _l_cpu: cython.longlong
    _l_kind: cython.longlong
    _l_form: cython.longlong
    _l_end: cython.Py_ssize_t
    _l_comm: cython.Py_ssize_t
    _l_comm_end: cython.Py_ssize_t
    _l_name: cython.Py_ssize_t
    _l_name_end: cython.Py_ssize_t
    _l_how: cython.int  # 0: in seconds, 1: bare, 2: ticks, 3: milliseconds since the beginning
    _now: cython.ulonglong
    _last_emitted: cython.longlong
    _pferr: cython.ulonglong
    _digits_value: cython.ulonglong
    _in_decimal: cython.bint  # fields are all in decimal

    _data: cython.const[cython.uchar][::1]  # what was given
    _text: cython.const[cython.uchar][::1]  # where the line being read stands: that, or `_scratch`

    # The last line that may go on, as text
    _scratch: cython.uchar[::1]
    _held: cython.Py_ssize_t  # its length; 0: none
    _held_at: cython.Py_ssize_t  # where it stands in the text; -1: it is in _scratch
    _parts: cython.int
    _held_what: cython.int
    _goes_on_held: cython.bint  # the line was put behind the one that is held
    _held_used: cython.Py_ssize_t

    def __init__(self, room: int = 1 << 16) -> None:
        self.columns = {name: np.zeros(room, dtype) for name, dtype in _FIELDS}
        self._time, self._w0, self._w1 = self.columns["time"], self.columns["w0"], self.columns["w1"]
        self._w2, self._w3 = self.columns["w2"], self.columns["w3"]
        self._tid, self._tgid, self._role = self.columns["tid"], self.columns["tgid"], self.columns["role"]
        self._n, self._cpu, self._vcpu = self.columns["n"], self.columns["cpu"], self.columns["vcpu"]
        self._kind, self._level = self.columns["kind"], self.columns["level"]
        self._flags, self._as_id = self.columns["flags"], self.columns["as_id"]
        self._room = room
        made = p.arrays()
        self._ops, self._names, self._form, self._events = made["ops"], made["names"], made["forms"], made["events"]
        self._event_table, self._exit_table = made["event_table"], made["exit_table"]
        self._field_table, self._field_targets = made["field_table"], made["field_targets"]
        self._blob = made["blob"]
        self._last_form = np.full(len(made["events"]), -1, np.int64)
        self.forms = np.zeros(len(made["forms"]), np.int64)
        self._form_count = self.forms
        self.by_vendor = np.zeros(2, np.int64)
        self._vendor_count = self.by_vendor
        self._out = np.zeros(_PLACES, np.uint64)
        self.threads = []
        self._thread_slot = np.zeros(_THREAD_SLOTS, np.int64)
        self._thread_tid = np.zeros(_MOST_THREADS, np.int64)
        self.thread_facts = np.zeros((_MOST_THREADS, 4), np.int64)
        self._fact = self.thread_facts
        self.texts = []
        self.other_names = []
        self.other_counts = np.zeros(_NAME_SLOTS, np.int64)
        self._other = self.other_counts
        self._other_hash = np.zeros(_NAME_SLOTS, np.int64)
        self._seen_on = np.zeros(_CPUS, np.uint64)
        self._scratch = np.zeros(_LONGEST, np.uint8)
        self._held = 0
        self._held_at = -1
        self._parts = 0
        self._held_what = _JUNK
        self._goes_on_held = False
        self._held_used = 0
        self._now = 0
        self._in_decimal = False
        if not cython.compiled:
            for name in _VIEWS:
                setattr(self, name, memoryview(getattr(self, name)))
        self.rows = 0
        self.raw = self.bare = self.odd = self.lines = self.joined = self.backwards = self.ticks = self.relative = 0
        self.lost = self.uncounted = 0
        self.first_odd = b""

    def take(self, data: bytes, start: int, final: bool) -> int:
        """Read lines of `data` from `start` on; where the first line begins that was not read.

        `final`: there is nothing after `data`, so that its last line needs no end. The caller empties `rows`.
        """
        size: cython.Py_ssize_t = len(data)
        at: cython.Py_ssize_t = start
        end: cython.Py_ssize_t
        begin: cython.Py_ssize_t
        self._data = data
        while at < size and self.rows < self._room - 1:
            end = at
            while end < size and self._data[end] != 10:
                end += 1
            if end == size and not final:
                break
            begin = at
            at = end + 1
            while begin < end and (
                self._data[begin] == 62 or self._data[begin] == 32 or self._data[begin] == 9
            ):  # quoting
                begin += 1
            while end > begin and self._data[end - 1] <= 32:
                end -= 1
            self.lines += 1
            self._take_line(begin, end)
        self._keep()
        return min(at, size)

    @property
    def full(self) -> bool:
        """Whether the caller must empty `rows` before more is read; the next line may change the last one."""
        return self.rows >= self._room - 1

    def too_long(self, head: bytes) -> None:
        """Count what is no line."""
        if self.odd == 0:
            self.first_odd = head[:_SHOWN]
        self.odd += 1
        self._held = 0

    def others(self) -> dict[str, int]:
        """Events that no kind is for, by name, with how many there were."""
        return {name.decode(errors="replace"): int(self.other_counts[at]) for at, name in self.other_names}

    @cython.cfunc
    def _take_line(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        what: cython.int
        if begin == end:
            return
        if end - begin >= _LONGEST:
            self._count_odd(begin, end)
            self._held = 0
            return
        self._text = self._data
        what = self._read(begin, end)
        if (
            what in (_EVENT, _BEGUN)
            and self._l_tid == 0
            and self._held
            and ((self._l_how == 0 and self._held_what == _JUNK) or (self._l_how == 1 and self._held_what == _BEGUN))
        ):
            if self._with_task(begin, end):
                return
            self._text = self._data
            what = self._read(begin, end)
        if what == _EVENT:
            self._emit()
            self._hold(begin, end, _EVENT)
        elif what in (_KNOWN, _LOSS):
            # What looks like a frame of a stack may be a number that continues an event.
            if what == _LOSS or self._held == 0 or self._held_what != _BEGUN or not self._join(begin, end):
                self._held = 0
                self._goes_on_held = False
        elif what == _OTHER:
            self._count_other()
            self._held = 0
        elif what == _BEGUN or not self._held or self._held_what == _JUNK or not self._join(begin, end):
            self._count_odd(begin, end)
            if what == _BEGUN or not self._goes_on_held:
                self._hold(begin, end, what)
            self._goes_on_held = False

    @cython.cfunc
    def _hold(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, what: cython.int) -> cython.void:
        """Keep a line: the next may go on with it."""
        self._held_at = begin
        self._held = end - begin
        self._held_what = what
        self._held_used = self._l_end - begin if what == _EVENT else 0
        self._parts = 1

    @cython.cfunc
    def _keep(self) -> cython.void:
        """Copy the line that is held: where it stands is needed otherwise."""
        i: cython.Py_ssize_t
        if self._held and self._held_at >= 0:
            for i in range(self._held):
                self._scratch[i] = self._data[self._held_at + i]
            self._held_at = -1

    @cython.cfunc
    def _append(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Put the line behind the one that is held; how long both are, 0: too long, or in too many parts."""
        i: cython.Py_ssize_t
        length: cython.Py_ssize_t = self._held + 1 + end - begin
        if self._parts >= _MOST_PARTS or length >= _LONGEST:
            return 0
        self._keep()
        self._scratch[self._held] = 32
        for i in range(end - begin):
            self._scratch[self._held + 1 + i] = self._data[begin + i]
        return length

    @cython.cfunc
    def _with_task(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether the line before is this one's task, which a mailer cut off before or behind the time."""
        length: cython.Py_ssize_t = self._append(begin, end)
        what: cython.int
        if not length:
            return False
        what = self._read_scratch(length)
        if self._l_tid == 0 or (what != _EVENT and what != _BEGUN):
            return False
        if what == _EVENT:
            self._absorb(length)
        else:
            self._count_odd(begin, end)
            self._held = length
            self._held_what = _BEGUN
            self._parts += 1
        return True

    @cython.cfunc
    def _read_scratch(self, length: cython.Py_ssize_t) -> cython.int:
        self._text = self._scratch
        return self._read(0, length)

    @cython.cfunc
    def _absorb(self, length: cython.Py_ssize_t) -> cython.void:
        """What is held is the beginning of an event after all."""
        self.odd -= self._parts
        if self.odd == 0:
            self.first_odd = b""
        self._became(length)

    @cython.cfunc
    def _became(self, length: cython.Py_ssize_t) -> cython.void:
        self._emit()
        self.joined += 1
        self._held = length
        self._held_what = _EVENT
        self._held_used = self._l_end
        self._parts += 1

    @cython.cfunc
    def _join(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether the line is the rest of the one before, an event that had begun or one that seemed to be whole."""
        length: cython.Py_ssize_t = self._append(begin, end)
        what: cython.int
        if not length:
            return False
        what = self._read_scratch(length)
        if what == _EVENT and self._held_what == _BEGUN:
            self._absorb(length)
            return True
        if what == _EVENT and self._l_end > self._held_used + 1 and self.rows > 0:
            self.rows -= 1
            self._form_count[self._last_emitted] -= 1
            self._became(length)
            return True
        if self._held_what == _BEGUN:
            if what == _OTHER:
                self.odd -= self._parts
                if self.odd == 0:
                    self.first_odd = b""
                self._count_other()
                self._held = 0
                return True
            self._held = length
            self._parts += 1
            self._goes_on_held = True
        return False

    @cython.cfunc
    def _count_odd(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        if self.odd == 0:
            self.first_odd = bytes(self._data[begin : min(end, begin + _SHOWN)])
        self.odd += 1

    @cython.cfunc
    def _count_other(self) -> cython.void:
        """Count an event by its name; a name beyond the table's room with the last."""
        h: cython.longlong = cython.cast(cython.longlong, self._hash(self._l_name, self._l_name_end)) + 1
        at: cython.Py_ssize_t = h & (_NAME_SLOTS - 1)
        tries: cython.int = 0
        while self._other_hash[at] != 0 and self._other_hash[at] != h and tries < 64:
            at = (at + 1) & (_NAME_SLOTS - 1)
            tries += 1
        if self._other_hash[at] == 0:
            self._other_hash[at] = h
            self.other_names.append((at, bytes(self._text[self._l_name : min(self._l_name_end, self._l_name + 100)])))
        self._other[at] += 1
        self._l_kind = _NO_KIND
        self._clear()
        self._out[_VCPU] = _NO_VCPU
        self._emit()
        self.texts.append(bytes(self._text[self._l_name : self._l_end]))

    @cython.cfunc
    def _emit(self) -> cython.void:
        """Write the row of the line just read."""
        r: cython.Py_ssize_t = self.rows
        kind: cython.longlong = self._l_kind
        vcpu: cython.ulonglong = self._out[_VCPU]
        thread: cython.longlong
        if self._l_how == 0:
            if self._l_time < self._now:
                self.backwards += 1
            self._now = self._l_time
        elif self._l_how == 1:
            self.bare += 1
        elif self._l_how == 2:
            self.ticks += 1
            self._now = self._l_time
        else:
            self.relative += 1
            self._now = self._l_time
        self._time[r] = self._now
        self._w0[r] = self._out[0]
        self._w1[r] = self._out[1]
        self._w2[r] = self._out[2]
        self._w3[r] = self._out[3]
        self._n[r] = cython.cast(cython.uint, self._out[_COUNT] & _MASK32)
        self._role[r] = cython.cast(cython.uint, self._out[_ROLE] & _MASK32)
        self._level[r] = cython.cast(cython.uchar, self._out[_LEVEL] & 0xFF)
        self._flags[r] = cython.cast(cython.uchar, self._out[_FLAGS] & 0xFF)
        self._as_id[r] = cython.cast(cython.uchar, self._out[_SPACE] & 0xFF)
        self._kind[r] = cython.cast(cython.uchar, kind)
        self._tid[r] = cython.cast(cython.uint, self._l_tid & _MASK32)
        self._tgid[r] = cython.cast(cython.uint, self._l_tgid & _MASK32)
        self._cpu[r] = cython.cast(cython.ushort, self._l_cpu & 0xFFFF)
        self._vcpu[r] = cython.cast(cython.ushort, vcpu & 0xFFFF)
        if self._out[_VENDOR] > 0:
            self._vendor_count[1 if self._out[_VENDOR] > 1 else 0] += 1
        if kind == _NO_KIND:
            pass
        elif self._l_form >= 0:
            self._last_emitted = self._l_form
            self._form_count[self._l_form] += 1
        else:
            self._last_emitted = 0
            self._form_count[0] += 1
            self.raw += 1
        if kind == 0:  # what perf says it lost
            self._w1[r] = 0
            self._w2[r] = self._seen_on[self._l_cpu & (_CPUS - 1)]
            self._vcpu[r] = cython.cast(cython.ushort, _NO_VCPU)
            self.lost += cython.cast(cython.longlong, self._out[0] & _MASK32)
        self._seen_on[self._l_cpu & (_CPUS - 1)] = self._now
        if self._l_tid > 0:
            thread = self._thread()
            if thread >= 0:
                if self._l_tgid > 0:
                    self._fact[thread, 0] = self._l_tgid + 1
                if kind != _NO_KIND:
                    self._fact[thread, 3] = 1
                if vcpu != _NO_VCPU and kind != 0:
                    self._fact[thread, 1] = cython.cast(cython.longlong, vcpu) + 1
                    self._fact[thread, 2] = 1
                elif kind in (_ENTRY, _LEFT, _RETURN):
                    self._fact[thread, 2] = 1
        self.rows = r + 1

    @cython.cfunc
    def _thread(self) -> cython.longlong:
        """The number of the line's thread; -1: there are too many."""
        at: cython.Py_ssize_t = (self._l_tid * 40503) & (_THREAD_SLOTS - 1)
        while self._thread_slot[at] != 0:
            if self._thread_tid[self._thread_slot[at] - 1] == self._l_tid:
                return self._thread_slot[at] - 1
            at = (at + 1) & (_THREAD_SLOTS - 1)
        if len(self.threads) >= _MOST_THREADS:
            return -1
        self._thread_tid[len(self.threads)] = self._l_tid
        self.threads.append((int(self._l_tid), bytes(self._text[self._l_comm : self._l_comm_end])))
        self._thread_slot[at] = len(self.threads)
        return len(self.threads) - 1

    # A line

    @cython.cfunc
    @cython.exceptval(check=False)
    def _read(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """What the line is; of an event all that `_emit` needs."""
        at: cython.Py_ssize_t
        self._l_tid = self._l_tgid = self._l_cpu = 0
        self._l_comm = self._l_comm_end = begin
        self._l_how = 0
        at = self._find_time(begin, end)
        if at >= 0:
            return self._event(at, end)
        if (
            self._text[begin] == 35 or self._text[begin] == 61 or self._text[begin] == 60
        ):  # '#', '=> f', '<stack trace>'
            return self._heading(begin, end)
        if 48 <= self._text[begin] <= 57:
            at = self._relative(begin, end)
            if at >= 0:
                self._l_how = 3
                return self._event(at, end)
        if self._starts(begin, end):
            return self._loss(begin, end)
        at = self._bare(begin, end)
        if at >= 0:
            self._l_how = 1
            return self._event(at, end)
        return self._heading(begin, end)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _find_time(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Where the event begins behind `1234.567890: `, with task, CPU and time taken; -1: there is no time."""
        i: cython.Py_ssize_t
        first: cython.Py_ssize_t
        fraction: cython.Py_ssize_t
        k: cython.Py_ssize_t
        whole: cython.ulonglong
        part: cython.ulonglong
        digits: cython.Py_ssize_t
        for i in range(begin + 3, min(end, begin + 200)):
            if (
                self._text[i] != 58
                or not 48 <= self._text[i - 1] <= 57
                or (i + 1 < end and self._text[i + 1] != 32 and self._text[i + 1] != 9)
            ):
                continue
            first = i - 1
            while first > begin and 48 <= self._text[first - 1] <= 57:
                first -= 1
            fraction = 0
            if first > begin + 1 and self._text[first - 1] == 46 and 48 <= self._text[first - 2] <= 57:
                fraction = i - first
                first -= 2
                while first > begin and 48 <= self._text[first - 1] <= 57:
                    first -= 1
            if first > begin and self._text[first - 1] != 32 and self._text[first - 1] != 9:
                continue
            if (fraction != 6 and fraction != 9 and fraction != 0) or i - first > 20:
                continue
            if fraction == 0 and not self._after_cpu(begin, first):
                continue
            whole = part = 0
            digits = i - first - (fraction + 1 if fraction else 0)
            if digits > 18 or (fraction and digits > 9):
                continue
            for k in range(first, first + digits):
                whole = whole * 10 + (self._text[k] - 48)
            for k in range(i - fraction, i):
                part = part * 10 + (self._text[k] - 48)
            if fraction == 6:
                part *= 1000
            if fraction:
                self._l_time = whole * 1000000000 + part
            else:
                self._l_time = whole
                self._l_how = 2
            self._task(begin, first)
            return i + 1
        return -1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _after_cpu(self, begin: cython.Py_ssize_t, at: cython.Py_ssize_t) -> cython.bint:
        """Whether a CPU in brackets stands before, with nothing but flags between: a time without a point."""
        i: cython.Py_ssize_t = at
        while i > begin and self._text[i - 1] <= 32:
            i -= 1
        if i > begin and self._text[i - 1] != 93:
            while i > begin and self._text[i - 1] > 32:
                i -= 1
            while i > begin and self._text[i - 1] <= 32:
                i -= 1
        return i > begin and self._text[i - 1] == 93 and i - 2 >= begin and 48 <= self._text[i - 2] <= 57

    @cython.cfunc
    @cython.exceptval(check=False)
    def _task(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        """`CPU 3/KVM-5120 (51) [006] d....`, `fc_vcpu 2  417/418 [011]`: from the right, for names hold anything."""
        i: cython.Py_ssize_t = end
        first: cython.Py_ssize_t
        value: cython.longlong
        for _ in range(2):  # flags, then the CPU; or the CPU alone
            while i > begin and self._text[i - 1] <= 32:
                i -= 1
            first = i
            while first > begin and self._text[first - 1] > 32:
                first -= 1
            if i - first >= 3 and self._text[i - 1] == 93 and self._text[first] == 91:
                self._l_cpu = self._number(first + 1, i - 1)
                i = first
                break
            if not (3 <= i - first <= 10) or not self._are_flags(first, i):
                break
            i = first
            while self._text[first] >= 48 and self._text[first] <= 57:  # `trace-cmd report -l` has the CPU before them
                self._l_cpu = self._l_cpu * 10 + (self._text[first] - 48)
                first += 1
            if first > i:
                break
        while i > begin and self._text[i - 1] <= 32:
            i -= 1
        if i > begin and self._text[i - 1] == 41:  # (tgid), perhaps (-----)
            first = i - 1
            while first > begin and self._text[first - 1] != 40:
                first -= 1
            value = self._number(first, i - 1)
            if first > begin and (value >= 0 or self._text[i - 2] == 45):
                self._l_tgid = max(value, 0)
                i = first - 1
                while i > begin and self._text[i - 1] <= 32:
                    i -= 1
        first = i
        while first > begin and 48 <= self._text[first - 1] <= 57:
            first -= 1
        if first in (i, begin):
            return
        value = self._number(first, i)
        if value > 1 << 30:
            return
        self._l_tid = value
        i = first - 1
        if self._text[i] == 47:  # pid/tid
            first = i
            while first > begin and 48 <= self._text[first - 1] <= 57:
                first -= 1
            value = self._number(first, i)
            if first < i and first > begin and self._text[first - 1] <= 32 and value <= 1 << 30:
                self._l_tgid = value
                i = first - 1
        while i > begin and self._text[i - 1] <= 32:
            i -= 1
        self._l_comm_end = max(min(i, begin + 64), begin)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _are_flags(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """`d..1.`, `dNh2`, `-....`, `...2 102`: letters, digits and dots; a dot or a letter among them."""
        i: cython.Py_ssize_t
        other: cython.int = 0
        for i in range(begin, end):
            if (
                self._text[i] == 46
                or self._text[i] == 35
                or self._text[i] == 61
                or 65 <= self._text[i] <= 90
                or 97 <= self._text[i] <= 122
            ):
                other += 1
            elif not 48 <= self._text[i] <= 57 and self._text[i] != 45:
                return False
        return other > 0 and self._text[end - 1] != 45

    @cython.cfunc
    @cython.exceptval(check=False)
    def _number(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.longlong:
        """A decimal number with blanks around it; -1: it is none."""
        value: cython.longlong = 0
        while begin < end and self._text[begin] == 32:
            begin += 1
        while end > begin and self._text[end - 1] == 32:
            end -= 1
        if begin == end or end - begin > 18:
            return -1
        for i in range(begin, end):
            if not 48 <= self._text[i] <= 57:
                return -1
            value = value * 10 + (self._text[i] - 48)
        return value

    @cython.cfunc
    @cython.exceptval(check=False)
    def _relative(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """perf trace's `731.042 ( 0.004 ms): qemu/2700 kvm:kvm_entry(`: where the event begins; -1: it is none."""
        i: cython.Py_ssize_t = begin
        k: cython.Py_ssize_t
        whole: cython.ulonglong = 0
        part: cython.ulonglong = 0
        while i < end and 48 <= self._text[i] <= 57 and i - begin < 15:
            whole = whole * 10 + (self._text[i] - 48)
            i += 1
        if i + 4 >= end or self._text[i] != 46 or self._text[i + 4] != 32:
            return -1
        for k in range(i + 1, i + 4):
            if not 48 <= self._text[k] <= 57:
                return -1
            part = part * 10 + (self._text[k] - 48)
        self._l_time = whole * 1000000 + part * 1000
        i += 5
        while i < end and self._text[i] == 32:
            i += 1
        if i < end and self._text[i] == 40:
            while i < end and self._text[i] != 41:
                i += 1
            i += 1
            if i < end and self._text[i] == 58:
                i += 1
        while i < end and self._text[i] == 32:
            i += 1
        # The task ends where ` system:event` begins.
        for k in range(i, min(end - 3, i + 80)):
            if (
                self._text[k] == 32
                and 48 <= self._text[k - 1] <= 57
                and self._text[k + 1] == 107
                and self._text[k + 2] == 118
                and self._text[k + 3] == 109
            ):
                self._l_comm = i
                self._l_comm_end = i
                self._task(i, k)
                if self._l_tgid == 0 or self._l_tid > 0:
                    return k + 1
        return -1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _bare(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Where a line begins with the name of an event that is known; -1: with none."""
        i: cython.Py_ssize_t = begin
        system: cython.Py_ssize_t = begin
        while i < end and (self._text[i] == 95 or 48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 122):
            i += 1
        if i < end - 1 and self._text[i] == 58 and self._text[i + 1] != 32 and i - begin <= 6:
            i += 1
            system = i
            while i < end and (self._text[i] == 95 or 48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 122):
                i += 1
        if i == system or i >= end or (self._text[i] != 58 and self._text[i] != 40):
            return -1
        return begin if self._find(self._event_table, 256, system, i) >= 0 else -1

    @cython.cfunc
    @cython.exceptval(check=False)
    def _starts(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether a line is `CPU:2 [LOST 771 EVENTS]`, or `CPU:2 [EVENTS DROPPED]`."""
        return (
            end - begin > 12
            and self._text[begin] == 67
            and self._text[begin + 1] == 80
            and self._text[begin + 2] == 85
            and (self._text[begin + 3] == 58 and self._text[end - 1] == 93)
        )

    @cython.cfunc
    def _loss(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """A gap row, as far as the line says how much was lost."""
        i: cython.Py_ssize_t = begin + 4
        cpu: cython.longlong = 0
        count: cython.longlong = 0
        r: cython.Py_ssize_t = self.rows
        while i < end and 48 <= self._text[i] <= 57 and cpu < 100000:
            cpu = cpu * 10 + (self._text[i] - 48)
            i += 1
        while i < end and not 48 <= self._text[i] <= 57:
            i += 1
        while i < end and 48 <= self._text[i] <= 57 and count < 1 << 50:
            count = count * 10 + (self._text[i] - 48)
            i += 1
        for name in self.columns:
            self.columns[name][r] = 0
        self._time[r] = self._now
        self._w0[r] = cython.cast(cython.ulonglong, count)
        self._w2[r] = self._seen_on[cpu & (_CPUS - 1)]
        self._cpu[r] = cython.cast(cython.ushort, cpu & (_CPUS - 1))
        self._vcpu[r] = cython.cast(cython.ushort, _NO_VCPU)
        self.lost += count
        if count == 0:
            self.uncounted += 1
        self.rows = r + 1
        return _LOSS

    @cython.cfunc
    @cython.exceptval(check=False)
    def _heading(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """Headings, stacks and what separates: nothing to wonder at. All else is junk."""
        i: cython.Py_ssize_t = begin
        if self._text[begin] == 35 or (self._text[begin] == 45 and end - begin == 2 and self._text[begin + 1] == 45):
            return _KNOWN
        if end - begin > 2 and self._text[begin] == 61 and self._text[begin + 1] == 62:
            return _KNOWN
        if self._text[begin] == 60 and self._text[end - 1] == 62 and end - begin < 40:  # <stack trace>, <idle>
            return _KNOWN
        if self._prefixed(begin, end, b"cpus=") or self._prefixed(begin, end, b"version = "):
            return _KNOWN
        if self._prefixed(begin, end, b"CPU ") and self._text[end - 1] == 121:  # is empty
            return _KNOWN
        # A frame of perf's call chains: an address, a blank, a symbol.
        while i < end and (48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 102):
            i += 1
        if i - begin >= 6 and i < end - 1 and self._text[i] == 32 and (self._text[end - 1] == 41 or i - begin >= 12):
            return _KNOWN
        return _JUNK

    @cython.cfunc
    @cython.exceptval(check=False)
    def _prefixed(
        self,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        prefix: bytes,
    ) -> cython.bint:
        i: cython.Py_ssize_t
        if end - begin < len(prefix):
            return False
        for i in range(len(prefix)):  # noqa: SIM110 (C has no generators)
            if self._text[begin + i] != cython.cast(cython.uchar, prefix[i]):
                return False
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def _event(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """`kvm:kvm_exit: reason ...`, perhaps with perf's period before it."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        event: cython.longlong
        form: cython.longlong
        tried: cython.longlong
        while i < end and self._text[i] <= 32:
            i += 1
        first = i
        while i < end and 48 <= self._text[i] <= 57:
            i += 1
        if i > first and i < end and self._text[i] == 32:
            while i < end and self._text[i] == 32:
                i += 1
        else:
            i = first
        first = i
        while i < end and self._of_name(self._text[i]):
            i += 1
        if i + 1 < end and self._text[i] == 58 and self._of_name(self._text[i + 1]) and i - first < 40:
            event = self._find(self._event_table, 256, first, i)
            if event < 0:  # the system was named: else a text begins right behind the colon
                i += 1
                first = i
                while i < end and self._of_name(self._text[i]):
                    i += 1
        self._l_name = first
        self._l_name_end = i
        if i == first:
            return _BEGUN if i >= end else _JUNK
        if i >= end:
            return _BEGUN
        event = self._find(self._event_table, 256, first, i)
        # The function tracer's lines have no colon, nor has perf's own word on losses.
        if event < 0 or (self._text[i] != 58 and self._text[i] != 40 and self._form[self._events[event, 0], 0] != 0):
            self._l_end = end
            return _OTHER
        i += 1
        tried = self._last_form[event]
        if tried >= 0 and self._matches(tried, i, end) and self._l_end >= end:
            return self._matched(event, tried)
        for form in range(self._events[event, 0], self._events[event, 1]):
            if self._matches(form, i, end):
                self._last_form[event] = form
                return self._matched(event, form)
        if self._fields(event, i, end):
            self._l_form = -1
            self._l_kind = self._form[self._events[event, 0], 0]
            return _EVENT
        return _BEGUN

    @cython.cfunc
    @cython.exceptval(check=False)
    def _matched(self, event: cython.longlong, form: cython.longlong) -> cython.int:
        self._l_form = form
        self._l_kind = self._form[form, 0]
        if self._out[_ROLE] != 0:
            self._out[_ROLE] |= _TEXT_ROLE
        if self._l_kind == _FAST:
            self._out[_COUNT] |= 1 << 30
        return _EVENT

    @cython.cfunc
    @cython.inline
    @cython.exceptval(check=False)
    def _of_name(self, c: cython.int) -> cython.bint:
        return c == 95 or 48 <= c <= 57 or 97 <= c <= 122 or 65 <= c <= 90

    @cython.cfunc
    @cython.exceptval(check=False)
    def _hash(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        h: cython.ulonglong = 2166136261
        i: cython.Py_ssize_t
        for i in range(begin, end):
            h = ((h ^ self._text[i]) * 16777619) & _MASK32
        return h

    @cython.cfunc
    @cython.exceptval(check=False)
    def _find(
        self,
        table: cython.const[cython.longlong][:, ::1],
        slots: cython.Py_ssize_t,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.longlong:
        """The value of a name in a table; -1: it is not there."""
        h: cython.ulonglong = self._hash(begin, end)
        at: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, h & cython.cast(cython.ulonglong, slots - 1))
        i: cython.Py_ssize_t
        same: cython.bint
        while table[at, 3] != 0:
            if cython.cast(cython.ulonglong, table[at, 0]) == h and table[at, 2] == end - begin:
                same = True
                for i in range(end - begin):
                    if self._blob[table[at, 1] + i] != self._text[begin + i]:
                        same = False
                        break
                if same:
                    return table[at, 3] - 1
            at = (at + 1) & (slots - 1)
        return -1

    # An event's text

    @cython.cfunc
    @cython.exceptval(check=False)
    def _clear(self) -> cython.void:
        i: cython.int
        for i in range(_PLACES):
            self._out[i] = 0
        self._out[_VCPU] = _NO_VCPU

    @cython.cfunc
    @cython.exceptval(check=False)
    def _put(
        self, to: cython.longlong, shift: cython.longlong, mask: cython.longlong, value: cython.ulonglong
    ) -> cython.void:
        value = value & (cython.cast(cython.ulonglong, mask) & _MASK64)
        value = (value << shift) & _MASK64 if shift >= 0 else value >> -shift
        if to == _VCPU:
            self._out[_VCPU] = value if value < 0x7FFF else _NO_VCPU
        else:
            self._out[to] |= value

    @cython.cfunc
    @cython.exceptval(check=False)
    def _matches(
        self,
        form: cython.longlong,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        """Whether the text is this form; its values are in `_out`, its end in `_l_end`."""
        i: cython.Py_ssize_t = begin
        k: cython.Py_ssize_t
        op: cython.Py_ssize_t
        what: cython.longlong
        first: cython.Py_ssize_t
        count: cython.Py_ssize_t
        value: cython.ulonglong
        digits: cython.int
        found: cython.longlong
        same: cython.bint
        self._clear()
        while i < end and self._text[i] <= 32:
            i += 1
        for op in range(self._form[form, 1], self._form[form, 2]):
            what = self._ops[op, 0]
            first = self._ops[op, 4]
            count = self._ops[op, 5]
            if what == _LITERAL:
                for k in range(first, first + count):
                    if self._blob[k] == 32:
                        while i < end and self._text[i] <= 32:
                            i += 1
                    elif i < end and self._text[i] == self._blob[k]:
                        i += 1
                    else:
                        # The end of a text may lack what only closes it.
                        return False
                continue
            while i < end and self._text[i] <= 32:
                i += 1
            value = 0
            if what == _HEX:
                if i + 1 < end and self._text[i] == 48 and (self._text[i + 1] == 120 or self._text[i + 1] == 88):
                    i += 2
                digits = self._digits(i, min(end, i + 17))
                value = self._digits_value
                i += digits
                if digits == 0 or digits > 16 or (i < end and self._of_name(self._text[i])):
                    return False
            elif what in (_DEC, _NEGATIVE):
                digits = 0
                k = i
                if i < end and self._text[i] == 45:
                    i += 1
                while i < end and 48 <= self._text[i] <= 57 and digits < 20:
                    value = (value * 10 + (self._text[i] - 48)) & _MASK64
                    digits += 1
                    i += 1
                if digits == 0 or (i < end and self._of_name(self._text[i])):
                    return False
                if (self._text[k] == 45) != (what == _NEGATIVE):
                    value = (0 - value) & _MASK64
            elif what in (_POINTER, _WORD, _PERM):
                k = i
                while i < end and self._text[i] > 32 and not (what == _PERM and self._text[i] == 41):
                    i += 1
                if i == k:
                    return False
                continue
            elif what == _ONE_OF:
                same = False
                for k in range(first, first + count):
                    if self._is_name(self._names[k, 0], self._names[k, 1], i, end):
                        i += self._names[k, 1]
                        value = cython.cast(cython.ulonglong, self._names[k, 2])
                        same = True
                        break
                if not same:
                    return False
            elif what == _EXIT:
                k = i
                while i < end and self._text[i] > 32:
                    i += 1
                if (
                    i + 5 <= end
                    and self._text[i + 1] == 101
                    and self._text[i + 2] == 120
                    and self._text[i + 3] == 99
                    and self._text[i + 4] == 112
                ):
                    i += 5  # `PF excp`
                found = self._find(self._exit_table, 1024, k, i)
                if found >= 0:
                    value = cython.cast(cython.ulonglong, found & _MASK32)
                    self._out[_VENDOR] = 1 + cython.cast(cython.ulonglong, found >> 32)
                    if self._prefixed(min(i + 1, end), end, b"FAILED_VMENTRY"):
                        i += 15
                        value |= _SIGN32
                else:
                    # `UNKNOWN (77)`, or the number alone
                    if self._prefixed(k, end, b"UNKNOWN ("):
                        k += 9
                        i = k
                        while i < end and 48 <= self._text[i] <= 57:
                            value = (value * 10 + (self._text[i] - 48)) & _MASK32
                            i += 1
                        if i == k or i >= end or self._text[i] != 41:
                            return False
                        i += 1
                    else:
                        value = self._hexadecimal(k, i)
                        if value == _MASK64:
                            return False
            elif what == _PFERR:
                i = self._fault_bits(i, end)
                value = self._pferr
            elif what == _FAILED:
                if self._ends(i, end, b"failed") or self._ends(i, end, b"FAIL"):
                    value = 1
                i = end
            self._put(self._ops[op, 1], self._ops[op, 2], self._ops[op, 3], value)
        self._l_end = i
        return not (i < end and self._goes_on(i, end))

    @cython.cfunc
    @cython.exceptval(check=False)
    def _goes_on(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether what is left is more of the event: ` name 0x...`, of a longer form or of one not in the table."""
        i: cython.Py_ssize_t = begin
        k: cython.Py_ssize_t
        while i < end and (self._text[i] <= 32 or self._text[i] == 44):
            i += 1
        k = i
        while i < end and self._of_name(self._text[i]) and not 48 <= self._text[k] <= 57:
            i += 1
        if i - k < 3:
            return False
        while i < end and (self._text[i] == 32 or self._text[i] == 61 or self._text[i] == 58):
            i += 1
        return i < end and 48 <= self._text[i] <= 57

    @cython.cfunc
    @cython.exceptval(check=False)
    def _is_name(
        self,
        offset: cython.Py_ssize_t,
        length: cython.Py_ssize_t,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        i: cython.Py_ssize_t
        if length > end - begin:
            return False
        for i in range(length):  # noqa: SIM110 (C has no generators)
            if self._blob[offset + i] != self._text[begin + i]:
                return False
        return True

    @cython.cfunc
    @cython.exceptval(check=False)
    def _ends(
        self,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        tail: bytes,
    ) -> cython.bint:
        return end - begin >= len(tail) and self._prefixed(end - len(tail), end, tail)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _digits(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """How many hexadecimal digits there are from `begin` on; their value is in `_digits_value`."""
        i: cython.Py_ssize_t = begin
        c: cython.int
        value: cython.ulonglong = 0
        while i < end:
            c = self._text[i]
            if 48 <= c <= 57:
                c -= 48
            elif 97 <= c <= 102:
                c -= 87
            elif 65 <= c <= 70:
                c -= 55
            else:
                break
            value = ((value << 4) & _MASK64) | c
            i += 1
        self._digits_value = value
        return cython.cast(cython.int, i - begin)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _hexadecimal(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        """A number of at most 32 bits with 0x; all ones: it is none."""
        value: cython.ulonglong = 0
        i: cython.Py_ssize_t
        c: cython.int
        if end - begin < 3 or end - begin > 10 or self._text[begin] != 48 or self._text[begin + 1] != 120:
            return _MASK64
        for i in range(begin + 2, end):
            c = self._text[i]
            if 48 <= c <= 57:
                c -= 48
            elif 97 <= c <= 102:
                c -= 87
            else:
                return _MASK64
            value = (value << 4) | c
        return value

    @cython.cfunc
    @cython.exceptval(check=False)
    def _fault_bits(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """`P|W|RSVD|0x100000000` into `_pferr`; where it ends. A code without bits is not printed at all."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        bits: cython.ulonglong = 0
        more: cython.ulonglong
        length: cython.Py_ssize_t
        while True:
            first = i
            while i < end and (65 <= self._text[i] <= 90 or 48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 122):
                i += 1
            length = i - first
            more = 0
            if length == 1 and self._text[first] == 80:
                more = 1
            elif length == 1 and self._text[first] == 87:
                more = 2
            elif length == 1 and self._text[first] == 85:
                more = 4
            elif length == 1 and self._text[first] == 70:
                more = 16
            elif length == 4 and self._text[first] == 82:
                more = 8
            elif length == 2 and self._text[first] == 80:
                more = 32
            elif length == 2 and self._text[first] == 83:
                more = 64
            elif length == 3 and self._text[first] == 83:
                more = 1 << 15
            elif length > 2 and self._text[first] == 48 and self._text[first + 1] == 120:
                more = self._wide(first + 2, i)
            if more == 0:
                i = first
                break
            bits |= more
            if i >= end or self._text[i] != 124:
                break
            i += 1
        self._pferr = bits
        return i

    @cython.cfunc
    @cython.exceptval(check=False)
    def _wide(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        value: cython.ulonglong = 0
        i: cython.Py_ssize_t
        c: cython.int
        for i in range(begin, min(end, begin + 16)):
            c = self._text[i]
            value = (value << 4) | (c - 48 if c <= 57 else c - 87 if 97 <= c <= 102 else 0)
        return value

    @cython.cfunc
    @cython.exceptval(check=False)
    def _fields(
        self,
        event: cython.longlong,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        """`exit_reason=48 guest_rip=0xfff0`, or perf trace's `vcpu_id: 0, rip: 5)`: whether one is known."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        last: cython.Py_ssize_t
        found: cython.longlong
        failed: cython.bint
        colon: cython.bint
        base: cython.longlong
        known: cython.int = 0
        value: cython.ulonglong
        k: cython.Py_ssize_t
        digits: cython.int
        self._clear()
        while i < end and self._text[i] <= 32:
            i += 1
        failed = self._prefixed(i, end, b"[FAILED TO PARSE]")  # libtraceevent, of a format that it does not know
        if failed:
            i += 17
        while i < end:
            while i < end and (
                self._text[i] <= 32 or self._text[i] == 44 or self._text[i] == 40 or self._text[i] == 41
            ):
                i += 1
            first = i
            while i < end and self._of_name(self._text[i]):
                i += 1
            last = i
            if i == first or i >= end or (self._text[i] != 61 and self._text[i] != 58):
                break
            colon = self._text[i] == 58  # perf trace's
            i += 1
            while i < end and self._text[i] == 32:
                i += 1
            found = -1 if last - first > 56 else self._field(event, first, last)
            base = _DECIMAL if found < 0 or colon or failed else self._field_targets[found, 3]
            k = i
            if i < end and self._text[i] == 45:
                i += 1
            value = 0
            digits = 0
            if i + 1 < end and self._text[i] == 48 and (self._text[i + 1] == 120 or self._text[i + 1] == 88):
                i += 2
                digits = self._digits(i, min(end, i + 16))
                value = self._digits_value
                i += digits
            elif base == _BARE and not self._in_decimal:
                digits = self._digits(i, min(end, i + 16))
                value = self._digits_value
                i += digits
            else:
                while i < end and 48 <= self._text[i] <= 57 and digits < 20:
                    value = (value * 10 + (self._text[i] - 48)) & _MASK64
                    digits += 1
                    i += 1
                if base == _PREFIXED and value != 0 and digits:
                    self._in_decimal = True  # an older libtraceevent, which prints every field so
            if k < end and self._text[k] == 45:
                value = (0 - value) & _MASK64
            while (
                i < end and self._text[i] > 32 and self._text[i] != 44 and self._text[i] != 41
            ):  # what is no number is passed over
                digits = 0
                i += 1
            if digits == 0 or found < 0:
                continue
            known += 1
            if self._field_targets[found, 0] == _VENDOR:
                self._out[_VENDOR] = value if value < 3 else 0
            else:
                self._put(
                    self._field_targets[found, 0], self._field_targets[found, 1], self._field_targets[found, 2], value
                )
                if self._field_targets[found, 0] == _ROLE:
                    self._out[_LEVEL] = value & 15
        self._l_end = i
        return known > 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def _field(
        self,
        event: cython.longlong,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.longlong:
        """The number of an event's field: names are kept as `12.guest_rip`."""
        i: cython.Py_ssize_t
        n: cython.Py_ssize_t = 0
        h: cython.ulonglong = 2166136261
        at: cython.Py_ssize_t
        same: cython.bint
        if event >= 10:
            h = ((h ^ cython.cast(cython.ulonglong, 48 + event // 10)) * 16777619) & _MASK32
            n += 1
        h = ((h ^ cython.cast(cython.ulonglong, 48 + event % 10)) * 16777619) & _MASK32
        h = ((h ^ 46) * 16777619) & _MASK32
        n += 2
        for i in range(begin, end):
            h = ((h ^ self._text[i]) * 16777619) & _MASK32
        at = cython.cast(cython.Py_ssize_t, h & 1023)
        while self._field_table[at, 3] != 0:
            if cython.cast(cython.ulonglong, self._field_table[at, 0]) == h and (
                self._field_table[at, 2] == n + end - begin
            ):
                same = True
                for i in range(end - begin):
                    if self._blob[self._field_table[at, 1] + n + i] != self._text[begin + i]:
                        same = False
                        break
                if same:
                    return self._field_table[at, 3] - 1
            at = (at + 1) & 1023
        return -1
