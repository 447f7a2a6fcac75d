# SPDX-License-Identifier: Apache-2.0
"""Results are in a place once: created once, merged whatever is in the way, read in any state."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from replay.fleet import results
from replay.fleet.fleet_schema import KEY, RESULTS
from replay.fleet.results import ResultFolder, Results, in_order, open_results, task_of
from tests.thinned import thinned
from traces.errors import Problem
from traces.stores.location import location
from traces.stores.object_store import Objects

JOB = {"policies": ["async"], "made_by": "test"}


def table(task: int) -> pa.Table:
    common = {"trace": f"t{task}.parquet", "etag": "e", "vm": 1, "policy": "async"}
    rows = [{"row": "vm", **common}, *({"row": "vcpu", "vcpu": vcpu, **common} for vcpu in range(task % 4))]
    return pa.Table.from_pylist(rows, RESULTS)


def name(task: int) -> str:
    return f"{task:032x}"


@pytest.fixture
def folder() -> ResultFolder:
    found = ResultFolder(location(f"memory://{uuid4()}"))  # a disk would be asked to sync each of them
    found.claim(JOB)
    for task in range(40):
        found.put(name(task), table(task))
    return found


def rows(folder: ResultFolder) -> pl.DataFrame:
    return Results(folder).rows().collect().sort("trace", "row", "vcpu")


EXPECTED = pl.DataFrame(pl.from_arrow(pa.concat_tables([table(task) for task in range(40)])))


def check(folder: ResultFolder) -> None:
    assert rows(folder).equals(EXPECTED.sort("trace", "row", "vcpu"))
    assert folder.state().done([name(task) for task in range(90)]) == {name(task) for task in range(40)}


def test_rows_are_those_that_were_put_before_and_after_merging(folder: ResultFolder) -> None:
    check(folder)
    folder.put(name(7), table(8))  # it is there already
    check(folder)
    assert folder.merge(least=41) == 0
    assert folder.merge(least=40) == 40
    assert sorted(each.key.partition("/")[0] for each in folder.objects.list()) == ["job.json", "merged"]
    check(folder)
    assert folder.merge(least=1) == 0
    some = Results(folder).rows().filter(pl.col("vcpu") == 2).select("trace").collect()
    assert some.sort("trace").equals(EXPECTED.filter(pl.col("vcpu") == 2).select("trace").sort("trace"))


def test_merging_by_parts_is_the_same(folder: ResultFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MERGE_TASKS", 7)
    monkeypatch.setattr(results, "_GROUP_ROWS", 6)
    folder.merge(least=1)
    assert len(folder.state().merged) == 6
    check(folder)


@pytest.mark.parametrize("at", thinned(8, range(0, 15, 2)))
def test_a_merge_that_is_killed_at_any_step(folder: ResultFolder, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MERGE_TASKS", 10)
    monkeypatch.setattr(results, "DELETES", 4)
    steps = 0

    def counted(real: object) -> object:
        def step(*given: object) -> object:
            nonlocal steps
            steps += 1
            if steps > at:
                raise KeyboardInterrupt
            return real(*given)  # type: ignore[operator]

        return step

    with monkeypatch.context() as patched:
        patched.setattr(Objects, "create", counted(Objects.create))
        patched.setattr(Objects, "delete", counted(Objects.delete))
        if at < 14:  # four are written, and ten times four deleted
            with pytest.raises(KeyboardInterrupt):
                folder.merge(least=1)
        else:
            folder.merge(least=1)
    check(folder)
    folder.merge(least=1)
    check(folder)
    assert not folder.state().tasks


def test_two_merges_at_once_that_took_the_same_tasks(folder: ResultFolder) -> None:
    state = folder.state()
    assert not state.doubled
    for part in (state.tasks[:25], state.tasks[15:]):
        tables = [(task_of(each), table(int(task_of(each), 16))) for each in part]
        folder.objects.create(f"merged/{len(part)}-{part[0].key[-20:]}", results._written(tables))
    assert folder.state().doubled
    check(folder)
    folder.merge(least=1)
    check(folder)


def test_what_failed_is_a_row_until_it_is_done(folder: ResultFolder) -> None:
    folder.put_failed(name(50), {"trace": "bad.parquet", "vm": 3, "reason": "first"})
    folder.put_failed(name(50), {"trace": "bad.parquet", "vm": 3, "reason": "again"})
    found = rows(folder).filter(pl.col("row") == "failed")
    assert found.select("trace", "vm", "reason").rows() == [("bad.parquet", 3, "again")]
    folder.put(name(50), table(1))
    assert rows(folder).filter(pl.col("row") == "failed").is_empty()
    folder.merge(least=100)
    assert not folder.state().failed


def test_a_place_holds_one_jobs_results(folder: ResultFolder) -> None:
    folder.claim(JOB)
    with pytest.raises(Problem, match=r"holds results of other policies .*async.*: choose another place"):
        folder.claim({**JOB, "policies": ["sync"]})
    assert open_results(folder.place.text).metadata["policies"] == ["async"]


def test_what_is_damaged_or_no_results_is_one_line(folder: ResultFolder, tmp_path: Path) -> None:
    folder.objects.replace(f"tasks/{name(9)}.parquet", b"PAR1 no PAR1")
    with pytest.raises(Problem, match=r"tasks/0+9.parquet: damaged: .*replay again"):
        list(open_results(folder.place.text).batches())
    folder.objects.replace("job.json", b"[]")
    with pytest.raises(Problem, match="no results of a fleet"):
        open_results(folder.place.text)
    with pytest.raises(Problem, match="fleet replay -o` writes them"):
        open_results(str(tmp_path))


def test_results_of_another_version_are_refused_in_one_line(folder: ResultFolder) -> None:
    said = {1: "results of an earlier kvmtrace, .*replay again", 3: "of a newer kvmtrace: upgrade this one"}
    job = folder.job()
    for major, text in said.items():
        folder.objects.replace("job.json", json.dumps({**job, "format": {"major": major, "minor": 0}}).encode())
        for use in (lambda: folder.claim(JOB), lambda: open_results(folder.place.text)):
            with pytest.raises(Problem, match=text):
                use()


def test_an_object_that_names_other_tasks_than_it_has_is_damaged(folder: ResultFolder) -> None:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, RESULTS, store_schema=False) as writer:
        writer.write_table(table(2))
        writer.add_key_value_metadata({KEY: results.footer_of([name(60), name(61)], [1, 3])})
    folder.objects.create("merged/odd.parquet", sink.getvalue())
    with pytest.raises(Problem, match=r"merged/odd.parquet: damaged: it does not name the tasks of its rows"):
        open_results(folder.place.text)


def test_results_in_a_folder_that_is_made(tmp_path: Path) -> None:
    found = ResultFolder(location(str(tmp_path / "deep" / "results")), make=True)
    found.claim(JOB)
    found.put(name(3), table(3))
    assert open_results(str(tmp_path / "deep" / "results")).rows().collect().height == 4
    found.merge(least=1)
    assert rows(found).height == 4
    (tmp_path / "file").touch()
    with pytest.raises(Problem, match="cannot be made"):
        ResultFolder(location(str(tmp_path / "file")), make=True)


def test_a_window_over_items_keeps_their_order() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for each in range(50):
            asked.append(each)
            yield each

    found = in_order(lambda each: each * each, list(items()))
    assert [next(found) for _ in range(3)] == [0, 1, 4]
    found.close()  # type: ignore[attr-defined]
