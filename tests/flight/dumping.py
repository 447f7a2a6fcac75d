# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.flight.dumping DIRECTORY`: a keeper that is asked for dump after dump, until it is killed.

Each dump that was answered is a line on standard output: its name, and how many rows it must have.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from tests.flight.rows import Flight, entries
from tracer.flight.keeper import SECOND, Request

ROWS = 20_000


def main(directory: Path) -> None:
    """Dump for ever."""
    flight = Flight(directory, seconds=3600)
    for number in itertools.count(1):
        flight.give(entries(number * SECOND, ROWS, 1000), (number + 1) * SECOND - 1)
        flight.thread.accounts.clear()  # no quota
        request = Request("manual", at=(number + 1) * SECOND - 1)
        flight.thread.ask(request)
        flight.thread.tick()
        path = request.answer.result()
        print(path.name, number * ROWS, flush=True)
        if number == 20:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
