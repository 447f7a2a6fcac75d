# SPDX-License-Identifier: Apache-2.0
"""The catalogue: what footers say, read once each, and what no trace, or a hostile one, costs."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from replay.fleet import fleet_catalogue
from replay.fleet.fleet_schema import CATALOGUE
from tests.corpus import CORPUS, RECORDINGS
from tests.fleet.servers import BUCKET, Proxy, environment
from tests.test_cli import kvmtrace
from tests.traces.forged import KINDS, forged
from tests.waiting import PATIENCE
from traces.errors import ENVIRONMENT, Problem
from traces.reader import Trace
from traces.stores import object_store, remote_trace
from traces.stores.location import location
from traces.stores.object_store import Objects

pytestmark = pytest.mark.xdist_group("fleet")
SOME = RECORDINGS[::40]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "traces"
    (found / "host=h-7").mkdir(parents=True)
    for path in SOME:
        shutil.copy(path, found / path.name)
    shutil.copy(CORPUS / "churn-6.1.parquet", found / "host=h-7" / "churn.parquet")  # of several VMs
    return found


def test_rows_are_what_the_traces_say(folder: Path) -> None:
    found = fleet_catalogue.index(location(str(folder)))
    rows = found.catalogue.rows
    assert (found.read, found.kept, found.gone, found.others) == (len(SOME) + 1, 0, 0, 0)
    assert rows.to_arrow().cast(CATALOGUE).schema == CATALOGUE
    assert rows["trace"].n_unique() == len(SOME) + 1
    for (key,), part in rows.group_by("trace"):
        path = folder / str(key)
        trace = Trace.open(path)
        meta = trace.metadata
        assert part.sort("vm")["vm"].to_list() == [vm["id"] for vm in meta.vms]
        for row in part.iter_rows(named=True):
            groups = trace.groups(row["vm"])
            assert row["size"] == path.stat().st_size
            assert row["events"] == sum(group.rows for group in groups)
            assert row["bytes"] == sum(group.size for group in groups)
            assert row["decoded"] > row["events"] * 100
            assert row["kernel"] == meta.kernel
            assert row["vendor"] in ("amd", "intel")
            assert row["duration_ns"] == meta.spans[row["vm"]][1] - meta.spans[row["vm"]][0]
            assert row["vm_name"]
            assert row["reason"] == ""
    assert set(rows.filter(pl.col("trace") == "host=h-7/churn.parquet")["host"]) == {"h-7"}


@pytest.mark.slow
def test_what_was_not_changed_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "catalogue.parquet")
    first = fleet_catalogue.index(location(str(folder)))
    fleet_catalogue.write(first.catalogue, out)
    assert fleet_catalogue.read(out).rows.equals(first.catalogue.rows)
    (folder / SOME[0].name).unlink()
    shutil.copy(SOME[1], folder / SOME[2].name)
    (folder / "README.txt").touch()
    second = fleet_catalogue.index(location(str(folder)), fleet_catalogue.earlier(out))
    assert (second.read, second.kept, second.gone, second.others) == (1, len(SOME) - 1, 1, 1)
    assert second.catalogue.rows.equals(fleet_catalogue.index(location(str(folder))).catalogue.rows)
    elsewhere = fleet_catalogue.index(location(str(CORPUS)), fleet_catalogue.earlier(out))
    assert elsewhere.kept == 0


@pytest.mark.slow
def test_one_request_for_each_footer_and_none_the_second_time(
    folder: Path, s3: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(
        s3, lambda method, path, before: "503" if path.endswith("bar-6.1.parquet") and not before else ""
    ) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        place = location(f"s3://{BUCKET}/index")
        objects = Objects(place)
        for path in folder.rglob("*.parquet"):
            objects.create(str(path.relative_to(folder)), path.read_bytes())
        proxy.seen.clear()
        found = fleet_catalogue.index(place)
        gets = {path: n for (method, path), n in proxy.seen.items() if method == "GET" and "list-type" not in path}
        retried = [path for path, n in gets.items() if n > 1]
        assert len(gets) == len(SOME) + 1
        assert [path.rpartition("/")[2] for path in retried] == ["bar-6.1.parquet"]
        local = fleet_catalogue.index(location(str(folder))).catalogue.rows
        assert found.catalogue.rows.drop("etag").equals(local.drop("etag"))
        where = f"s3://{BUCKET}/index/catalogue.parquet"
        fleet_catalogue.write(found.catalogue, where)
        proxy.seen.clear()
        again = fleet_catalogue.index(place, fleet_catalogue.earlier(where), but=where)
        assert again.catalogue.rows.equals(found.catalogue.rows)
        assert [path for method, path in proxy.seen if "list-type" not in path] == [
            f"/{BUCKET}/index/catalogue.parquet"
        ]


def test_footers_are_asked_for_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read ends before as many are under way: one after the other would never."""
    shutil.copy(SOME[0], tmp_path / "0.parquet")
    for number in range(1, 2 * fleet_catalogue.READERS):
        (tmp_path / f"{number}.parquet").hardlink_to(tmp_path / "0.parquet")
    together = threading.Barrier(fleet_catalogue.READERS, timeout=PATIENCE)
    read = Objects.read

    def waiting(self: Objects, key: str, *more: Any) -> bytes:
        together.wait()
        return read(self, key, *more)

    monkeypatch.setattr(Objects, "read", waiting)
    found = fleet_catalogue.index(location(str(tmp_path)))
    assert found.catalogue.rows["trace"].n_unique() == 2 * fleet_catalogue.READERS
    assert found.catalogue.broken.is_empty()


def test_a_footer_beyond_the_first_read_takes_a_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fleet_catalogue.index(location(str(folder))).catalogue.rows
    monkeypatch.setattr(remote_trace, "TAIL", 4096)
    objects = Objects(location(str(folder)))
    asked: list[str] = []
    read = Objects.read
    monkeypatch.setattr(Objects, "read", lambda self, key, *more: asked.append(key) or read(self, key, *more))
    assert fleet_catalogue.index(objects.place).catalogue.rows.equals(whole)
    assert sorted(asked) == sorted(2 * [str(path.relative_to(folder)) for path in folder.rglob("*.parquet")])


@pytest.mark.slow
def test_a_place_that_does_not_answer_is_no_empty_catalogue(
    folder: Path, s3: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "RETRIES", 1)
    place = location(f"s3://{BUCKET}/silent")
    Objects(place).create("a.parquet", SOME[0].read_bytes())
    Objects(place).create("b.parquet", SOME[0].read_bytes())
    fails = {"a.parquet", "b.parquet"}
    with Proxy(s3, lambda method, path, before: "503" if path.rpartition("/")[2] in fails else "") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        with pytest.raises(Problem, match="503") as failed:
            fleet_catalogue.index(place)
        assert failed.value.code == ENVIRONMENT
        fails.remove("a.parquet")
        found = fleet_catalogue.index(place).catalogue
        assert found.broken["trace"].to_list() == ["b.parquet"]
        fails.clear()
        assert fleet_catalogue.index(place, found).read == 1, "a failure of the store is no property of the object"


@pytest.mark.slow
def test_hostile_objects_cost_their_own_rows_only(folder: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        for number in range(8):
            (folder / f"{kind}-{number}.parquet").write_bytes(forged(CORPUS / "huge-6.1.parquet", kind, number))
    (folder / "empty.parquet").touch()
    (folder / "gzip.parquet").write_bytes(b"\x1f\x8b" + bytes(200_000))
    (folder / "lying.parquet").write_bytes(b"PAR1" + bytes(200_000) + b"\xff\xff\xff\x7fPAR1")
    out = tmp_path / "catalogue.parquet"
    done = kvmtrace("fleet", "index", str(folder), "-o", str(out), "--json")
    assert done.returncode == 0, done.stderr
    broken = {each["trace"]: each["reason"] for each in json.loads(done.stdout)["broken"]}
    assert all(reason and reason.isprintable() for reason in broken.values())
    assert {"empty.parquet", "gzip.parquet", "lying.parquet"} < set(broken)
    assert "compressed by gzip" in broken["gzip.parquet"]
    assert all(f"deep-{number}.parquet" in broken for number in range(8))
    rows = fleet_catalogue.read(str(out)).rows
    sound = rows.filter(pl.col("reason") == "")["trace"].unique()
    assert {path.name for path in SOME} < set(sound)
    assert not set(broken) & set(sound)


@pytest.mark.slow
def test_what_is_no_catalogue_is_refused_and_not_written_over(tmp_path: Path, folder: Path) -> None:
    for path in (SOME[0], tmp_path / "none.parquet", Path(__file__)):
        with pytest.raises(Problem):
            fleet_catalogue.read(str(path))
        assert fleet_catalogue.earlier(str(path)) is None
    done = kvmtrace("fleet", "index", str(folder), "-o", str(folder / SOME[0].name))
    assert done.returncode == 2
    assert "is a recording" in done.stderr
    newer = tmp_path / "newer.parquet"
    fleet_catalogue.write(fleet_catalogue.index(location(str(folder))).catalogue, str(newer))
    table = pq.read_table(newer)
    text = table.schema.metadata[b"kvmtrace.fleet"].replace(b'"major": 1', b'"major": 2')
    pq.write_table(table.replace_schema_metadata({b"kvmtrace.fleet": text}), newer)
    with pytest.raises(Problem, match="of a newer kvmtrace"):
        fleet_catalogue.read(str(newer))


@pytest.mark.slow
def test_a_catalogue_in_the_place_itself_is_no_recording(folder: Path) -> None:
    out = str(folder / "catalogue.parquet")
    for _ in range(2):
        done = kvmtrace("fleet", "index", str(folder), "-o", out, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["broken"] == []
