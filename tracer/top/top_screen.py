# SPDX-License-Identifier: Apache-2.0
"""The screen of `kvmtrace top`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static

from tracer.top.meter import VcpuSecond
from tracer.top.top_table import NAMES, cells, chosen
from traces.errors import Problem

Show = Callable[[list[VcpuSecond]], None]


class TopScreen(App[None]):
    """Shows each second's lines as they come: `show` may be called from any thread."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "Sort by the next column"),
        Binding("slash", "filter", "Filter"),
        Binding("f", "freeze", "Freeze"),
        Binding("d", "dump", "Dump"),
        Binding("q", "quit", "Quit"),
    ]
    CSS = "Input { display: none; } Input.asked { display: block; } #status { height: 1; }"

    def __init__(self, what: str, dump: Callable[[], str] | None, start: Callable[[Show], None]) -> None:
        """`dump` makes one and says where it is; None where nobody records. `start` is told who shows lines."""
        super().__init__()
        self._what, self._dump, self._start = what, dump, start
        self._lines: list[VcpuSecond] = []
        self._sort, self._wanted, self.frozen, self._said = NAMES[0], "", False, ""

    def compose(self) -> ComposeResult:
        yield Static(self._what, id="status", markup=False)
        yield Input(placeholder="a VM's name, or a verdict")
        yield DataTable(cursor_type="row")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns(*NAMES)
        self.query_one(DataTable).focus()
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGHUP):
            # It leaves the terminal as it was. And with a handler of its own, asyncio is woken by every signal: without
            # one, textual's of a new size (SIGWINCH) that comes as the loop falls asleep waits for the next key.
            loop.add_signal_handler(ending, self.exit)
        self._start(self.show)

    def show(self, lines: list[VcpuSecond]) -> None:
        """A second's lines."""
        if self.is_running:
            self.call_from_thread(self._take, lines)

    def _take(self, lines: list[VcpuSecond]) -> None:
        if not self.frozen:
            self._lines = lines
            self._draw()

    def _draw(self) -> None:
        table = self.query_one(DataTable)
        at, left = table.cursor_row, table.scroll_offset
        shown = chosen(self._lines, self._sort, self._wanted)
        table.clear()
        table.add_rows(cells(line) for line in shown)
        table.move_cursor(row=min(at, max(len(shown) - 1, 0)))
        table.scroll_to(left.x, left.y, animate=False)
        none = "" if self._lines else "; no vCPU shows anything"
        state = f"by {self._sort}" + (f", of {self._wanted}" if self._wanted else "") + (
            ", frozen" if self.frozen else ""
        )  # fmt: skip
        self.query_one("#status", Static).update(f"{self._what}: {len(shown)} vCPUs {state}{none} {self._said}")

    def action_sort(self) -> None:
        self._sort = NAMES[(NAMES.index(self._sort) + 1) % len(NAMES)]
        self._draw()

    def action_filter(self) -> None:
        field = self.query_one(Input)
        field.add_class("asked")
        field.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._wanted = event.value
        event.input.remove_class("asked")
        self.query_one(DataTable).focus()
        self._draw()

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self._draw()

    def action_dump(self) -> None:
        if self._dump is None:
            self._said = "(no flight recorder to dump: give --dumps DIR)"
            self._draw()
        else:
            self._said = "(dumping)"
            self._draw()
            self.run_worker(self._dumped, thread=True)

    def _dumped(self) -> None:
        assert self._dump is not None
        try:
            said = f"({self._dump()})"
        except Problem as problem:
            said = f"({problem})"
        self.call_from_thread(self._say, said)

    def _say(self, said: str) -> None:
        self._said = said
        self._draw()
