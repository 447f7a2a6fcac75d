# SPDX-License-Identifier: Apache-2.0
"""Makes the table in docs/explore.md: what `kvmtrace explore` finds for each scenario and variant, and what that costs.

    python -m benchmarks.explore_table

States and steps are the same on every machine; seconds are those of the machine that made the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from replay.explore.scenario import ScenarioRun, run
from replay.explore.scenarios import SCENARIOS

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "explore.md"
BEGIN: Final = "<!-- Made by `python -m benchmarks.explore_table`. -->\n"
END: Final = "<!-- End of what was made. -->\n"


def rows(runs: Iterable[ScenarioRun]) -> list[tuple[str, ...]]:
    """Return the cells of one table row for each run; the last cell is the duration in seconds."""
    return [
        (
            f"`{made.scenario.name}`",
            ", ".join(f"{name} {count}" for name, count in made.bounds.items()),
            f"`{made.variant.name}`",
            f"**{made.schedule.invariant}**" if made.schedule else "holds",
            f"{len(made.schedule.lines)}" if made.schedule else "",
            f"{made.exploration.states:,}",
            f"{made.exploration.seconds:.1f}",
        )
        for made in runs
    ]


def render(runs: Iterable[ScenarioRun]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| scenario | bounds | variant | found: broken invariant | steps | states | s |",
        "|-|-|-|-|-:|-:|-:|",
        *("| " + " | ".join(row) + " |" for row in rows(runs)),
    ]
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, str, str]:
    """Return the text of the document before the table, the table, and the text after it."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, table, after


def main() -> None:
    """Explore every scenario and variant with its default bounds, and replace the table in docs/explore.md."""
    runs = [run(scenario, variant.name, {}) for scenario in SCENARIOS for variant in scenario.variants]
    before, _, after = split(DOCUMENT.read_text())
    DOCUMENT.write_text(before + BEGIN + render(runs) + END + after)


if __name__ == "__main__":
    main()
