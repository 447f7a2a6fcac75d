# SPDX-License-Identifier: Apache-2.0
"""Make the golden reports on a made-up fleet again: `python -m tests.golden.fleets`. Review what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from analysis.fleet.fleet_gates import parse
from analysis.fleet.fleet_report import fleet_report
from analysis.fleet.judged import COLUMNS
from analysis.fleet.outcome import FleetOutcome, outcome
from analysis.formats import renderer
from analysis.report_model.report import Report
from benchmarks.fleet_rows import Fleet, parts

HERE: Final = Path(__file__).parent
FLEET: Final = Fleet(hosts=120, days=3, vms=4)
FORMS: Final = {"text": "txt", "md": "md", "json": "json"}
GATES: Final = ("soft_hang > 0", "failed > 1000", "own_policy_mismatch > 100")


def found(by: tuple[str, ...] = ("kernel", "vendor")) -> FleetOutcome:
    tables = (part.select(list(COLUMNS)) for part in parts(FLEET, hosts_a_part=50))
    return outcome((batch for table in tables for batch in table.to_batches(max_chunksize=700)), by, "results")


def report() -> Report:
    return fleet_report(found(), "results", tuple(map(parse, GATES)))


def golden(form: str) -> Path:
    return HERE / f"report-fleet.{FORMS[form]}"


def main() -> None:
    for form in FORMS:
        golden(form).write_text(renderer(form)(report()))


if __name__ == "__main__":
    main()
