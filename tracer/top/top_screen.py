# SPDX-License-Identifier: Apache-2.0
"""The screen of `kvmtrace top`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Footer, Input, Static

from tracer.top.meter import VcpuSecond
from tracer.top.top_table import NAMES, chosen, text
from traces.errors import Problem
from traces.text import events_lost

Show = Callable[[list[VcpuSecond]], None]
_HEAD = Style(bold=True, reverse=True)
_ALL = 1 << 16  # columns of text: none is left out, one can scroll


class VcpuTable(ScrollView, can_focus=True):
    """Lines of text below a head that stays in place; only visible lines that changed are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._head, self.rows = Strip.blank(0), list[str]()

    def show(self, head: str, rows: list[str]) -> None:
        """Show these lines instead."""
        before, self._head, self.rows = (self._head.text, self.rows), Strip([Segment(head)]), rows
        if before != (head, rows):
            width = max((Strip([Segment(each)]).cell_length for each in (head, *rows)), default=0)
            self.virtual_size = Size(width, len(rows) + 1)
            self.refresh()

    def scroll_to(self, x: float | None = None, y: float | None = None, **how: Any) -> None:
        """Scroll at once: textual would wait for the next refresh, and forget keys that are pressed before that."""
        super().scroll_to(x, y, **how | {"immediate": True})

    def action_page_down(self) -> None:
        """Go down by a page, without the head's line, which textual's own page would count."""
        self.scroll_to(y=self.scroll_target_y + self.size.height - 1)

    def action_page_up(self) -> None:
        """Go up by a page."""
        self.scroll_to(y=self.scroll_target_y - self.size.height + 1)

    def render_line(self, y: int) -> Strip:
        """Return line `y` of the screen."""
        left, above = self.scroll_offset
        at = above + y - 1
        line = self._head if not y else Strip([Segment(self.rows[at])] if at < len(self.rows) else [])
        style = self.rich_style if y else self.rich_style + _HEAD
        return line.crop_extend(left, left + self.size.width, style).apply_style(style)


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

    def __init__(
        self, what: str, dump: Callable[[], str] | None, start: Callable[[Show], None],
        lost: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        """`dump` makes a dump and returns a text; None where nothing is recorded. `start` is given `show`.

        `lost` returns how many events were lost so far; None where that cannot change.
        """
        super().__init__()
        self.animation_level = "none"  # a key that is pressed while lines still move is as good as not pressed
        self._what, self._dump, self._start, self._lost, self._status = what, dump, start, lost, ""
        self._lines: list[VcpuSecond] = []
        self._sort, self._wanted, self.frozen, self._said = NAMES[0], "", False, ""

    def compose(self) -> ComposeResult:
        yield Static(self._what, id="status", markup=False)
        yield Input(placeholder="a VM's name, or a verdict")
        yield VcpuTable()
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(VcpuTable).focus()
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGHUP):
            # It leaves the terminal as it was. And with a handler of its own, asyncio is woken by every signal: without
            # one, textual's of a new size (SIGWINCH) that comes as the loop falls asleep waits for the next key.
            loop.add_signal_handler(ending, self.exit)
        self._start(self.show)

    def show(self, lines: list[VcpuSecond]) -> None:
        """Show the lines of a second."""
        if self.is_running:
            self.call_from_thread(self._take, lines)

    def _take(self, lines: list[VcpuSecond]) -> None:
        if not self.frozen:
            self._lines = lines
            self._draw()

    def _draw(self) -> None:
        shown = chosen(self._lines, self._sort, self._wanted)
        head, *rows = text(shown, _ALL).splitlines()
        self.query_one(VcpuTable).show(head, rows)
        state = f"by {self._sort}" + (f", of {self._wanted}" if self._wanted else "")
        state += ", frozen" if self.frozen else ""
        lost = f"; {events_lost(count)}" if self._lost is not None and (count := self._lost()) else ""
        none = "" if self._lines else "; no vCPU shows anything"
        said = f"{self._what}: {len(shown)} vCPUs {state}{none}{lost} {self._said}"
        if said != self._status:
            self._status = said
            self.query_one("#status", Static).update(said, layout=False)

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
        self.query_one(VcpuTable).focus()
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
