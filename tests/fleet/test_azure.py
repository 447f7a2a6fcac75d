# SPDX-License-Identifier: Apache-2.0
"""Azure's blobs as Microsoft's emulator has them (Azurite, of npm): places, and a fleet from index to report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from replay.fleet.results import open_results
from tests.corpus import CORPUS
from tests.fleet.servers import AZURE_ACCOUNT, AZURE_KEY, BUCKET, azure, azure_environment
from tests.fleet.test_stores import DATA, of_parts, use
from tests.test_cli import kvmtrace
from traces.errors import Problem
from traces.stores.location import location
from traces.stores.object_store import Objects

pytestmark = [pytest.mark.xdist_group("fleet"), pytest.mark.nightly]
PLACE = f"az://{AZURE_ACCOUNT}/{BUCKET}"
SOME = ("huge-6.1", "smi-storm-6.1", "churn-6.1")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with azure() as found:
        yield found


@pytest.fixture(autouse=True)
def _store(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in azure_environment(port).items():
        monkeypatch.setenv(name, value)


def test_objects_are_written_once_listed_and_read() -> None:
    use(Objects(location(f"{PLACE}/used")))
    with pytest.raises(Problem, match="the container does not exist"):
        list(Objects(location(f"az://{AZURE_ACCOUNT}/no-such-container/x")).list())


def test_some_of_many_that_are_deleted_are_gone_already() -> None:
    objects = Objects(location(f"{PLACE}/many"))
    names = [f"{number:03}" for number in range(600)]  # in a request of Azure's are 256
    for name in names[::2]:
        objects.create(name, DATA[:9])
    objects.delete(names)
    assert list(objects.list()) == []


def test_a_large_object_goes_up_in_parts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of_parts(Objects(location(f"{PLACE}/large")), monkeypatch)


def test_a_fleet_is_the_same_as_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "traces"
    files.mkdir()
    objects = Objects(location(f"{PLACE}/traces"))
    for name in SOME:
        path = Path(shutil.copy(CORPUS / f"{name}.parquet", files))
        assert objects.create(path.name, path.read_bytes())
    found = []
    for root, to in ((f"{PLACE}/traces", PLACE), (str(files), str(tmp_path))):
        catalogue, results = f"{to}/catalogue.parquet", f"{to}/results"
        assert kvmtrace("fleet", "index", root, "-o", catalogue).returncode == 0
        words = ["fleet", "replay", catalogue, "-o", results, "--policy", "async", "--json"]
        done, again = (json.loads(kvmtrace(*words).stdout)["tasks"] for _ in range(2))
        assert done["done"] == again["before"] == done["all"]
        assert again["done"] == 0
        report = kvmtrace("fleet", "report", results, "--format", "json")  # no width depends on a path
        assert report.returncode == 0, report.stderr
        rows = open_results(results).rows().drop("etag").collect().sort("trace", "vm", "row", "policy", "vcpu")
        found.append((rows, report.stdout.replace(results, "RESULTS")))
    assert found[0][0].equals(found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][0].filter(pl.col("row") == "vm").height >= 2 * len(SOME)
    # No secret in what was written.
    written = [Objects(location(PLACE)).read_all(name) for name in ("catalogue.parquet", "results/job.json")]
    assert not any(AZURE_KEY.encode() in data for data in written)
