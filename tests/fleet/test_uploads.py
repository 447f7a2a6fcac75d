# SPDX-License-Identifier: Apache-2.0
"""Recordings on their way to a store: uploaded once, retried, bounded on disk, and found again after a crash."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import CORPUS
from tests.fleet.servers import BUCKET, Proxy, environment
from tests.flight.rows import Flight, entries
from tests.waiting import until
from tracer.flight.keeper import SECOND, Request
from tracer.upload import upload_process
from tracer.upload.upload_process import NeverUploaded, Uploader, object_name
from tracer.upload.upload_recording import uploading
from tracer.upload.upload_spool import UploadSpool, Waiting, boot_id
from tracer.upload.uploads import Uploads
from traces.errors import ENVIRONMENT, Problem
from traces.stores.location import location
from traces.stores.object_store import Objects

TRACE = CORPUS / "huge-6.1.parquet"
OTHER = CORPUS / "smi-storm-6.1.parquet"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    (tmp_path / "dumps").mkdir()
    return tmp_path / "dumps"


def made(directory: Path, name: str, source: Path = TRACE) -> Path:
    return Path(shutil.copy(source, directory / f"{name}.parquet"))


def stored(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*.parquet")}


def spool(dumps: Path, most: int = 1 << 30) -> UploadSpool:
    return UploadSpool(dumps / "upload", most)


def test_a_name_says_day_host_begin_boot_and_content(dumps: Path) -> None:
    key = object_name(Waiting(TRACE, "0123456789ab", 1), "feedbeef" * 8)
    folder, _, name = key.rpartition("/")
    assert folder.startswith("traces/v=1/dt=20")
    assert "/host=" in folder
    assert name.endswith("Z-0123456789ab-feedbeef.parquet")
    (dumps / "odd.parquet").write_bytes(b"PAR1 no trace PAR1")
    with pytest.raises(NeverUploaded):
        object_name(Waiting(dumps / "odd.parquet", "b", 1), "0" * 8)


def test_what_waits_goes_up_whole_and_once(dumps: Path, place: Path) -> None:
    waits, told = spool(dumps), []
    for name, source in (("a", TRACE), ("b", OTHER)):
        waits.add(made(dumps, name, source))
    uploader = Uploader(waits, str(place), told.append)
    assert uploader.once()
    assert sorted(stored(place).values()) == sorted([TRACE.read_bytes(), OTHER.read_bytes()])
    assert not list(waits.waiting())
    assert [event["there"] for event in told] == [False, False]
    waits.add(dumps / "a.parquet")  # again, as after a crash between the upload and its end
    assert uploader.once()
    assert told[-1]["there"]
    assert len(stored(place)) == 2
    assert sorted(path.name for path in dumps.glob("*.parquet")) == ["a.parquet", "b.parquet"]


def test_the_original_may_go_while_it_waits(dumps: Path, place: Path) -> None:
    waits = spool(dumps)
    waits.add(made(dumps, "a"))
    (dumps / "a.parquet").unlink()
    assert Uploader(waits, str(place), lambda _: None).once()
    assert list(stored(place).values()) == [TRACE.read_bytes()]


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 120))
def test_no_more_waits_than_may_and_the_oldest_go(tmp_path_factory: Any, sizes: list[int], most: int) -> None:
    directory = tmp_path_factory.mktemp("dumps")
    waits, expected, gone = UploadSpool(directory / "upload", most), [], []
    for number, size in enumerate(sizes):
        recording = directory / f"{number:03}.parquet"
        recording.write_bytes(bytes(size))
        os.utime(recording, (number, number))
        gone += [each.path.name for each in waits.add(recording)]
        expected.append((recording.stem, size))
        while sum(size for _, size in expected) > most:
            expected.pop(0)
    assert [(each.path.name.partition("~")[2], each.size) for each in waits.waiting()] == [
        (f"{name}.parquet", size) for name, size in expected
    ]
    assert len(gone) + len(expected) == len(sizes)


def test_a_store_that_is_away_is_tried_later_and_each_time_later(
    dumps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, told = spool(dumps), []
    waits.add(made(dumps, "a"))
    monkeypatch.setattr("random.random", lambda: 1.0)
    uploader, delays = Uploader(waits, str(tmp_path / "later"), told.append), []
    for _ in range(12):
        assert not uploader.once()
        delays.append(uploader.delay)
    assert delays == [min(2.0**n, upload_process.LAST_DELAY) for n in range(12)]
    assert "failed" in told[-1]
    (tmp_path / "later").mkdir()
    assert uploader.once()
    assert list(stored(tmp_path / "later").values()) == [TRACE.read_bytes()]


def test_what_no_store_takes_is_told_once_and_stops_nobody(dumps: Path, place: Path) -> None:
    waits, told = spool(dumps), []
    odd = dumps / "odd.parquet"
    odd.write_bytes(b"no trace")
    waits.add(odd)
    waits.add(made(dumps, "a"))
    uploader = Uploader(waits, str(place), told.append)
    assert uploader.once()
    assert uploader.once()
    assert sorted(next(iter(event)) for event in told) == ["odd", "uploaded"]


def test_a_crash_before_a_recording_waits_loses_no_upload(dumps: Path) -> None:
    waits = spool(dumps)
    waits.announce(dumps / "a.parquet")  # and then the recorder died, its trace being made
    made(dumps, "a")
    waits.announce(dumps / "b.parquet")  # of which there are only segments
    (dumps / "b.kvmt").mkdir()
    waits.announce(dumps / "c.parquet")  # of which there is nothing
    again = spool(dumps)
    assert [each.path.name for each in again.left(dumps)] == [f"{boot_id()}~a.parquet"]
    assert sorted(path.name for path in (dumps / "upload").glob("*.coming")) == [f"{boot_id()}~b.coming"]
    again.add(made(dumps, "b"))
    assert not list((dumps / "upload").glob("*.coming"))
    assert sorted(each.path.name.partition("~")[2] for each in again.waiting()) == ["a.parquet", "b.parquet"]


def test_a_recording_keeps_the_boot_that_it_was_made_in(dumps: Path) -> None:
    waits = spool(dumps)
    (dumps / "upload" / "0000deadbeef~a.coming").touch()
    waits.add(made(dumps, "a"))
    assert [each.boot for each in waits.waiting()] == ["0000deadbeef"]


@pytest.mark.slow
def test_the_process_uploads_while_others_are_made_and_tells_at_the_end(dumps: Path, place: Path) -> None:
    said: list[str] = []
    uploads = Uploads(str(place), dumps / "upload", dumps, 1 << 30, said.append)
    assert said[0].startswith(f"uploading to {place}; 1.07 GB may wait in")
    uploads.add(made(dumps, "a"))
    assert until(lambda: len(stored(place)) == 1)
    uploads.add(made(dumps, "b", OTHER))
    assert until(lambda: len(stored(place)) == 2)
    outcome = uploads.close()
    assert sorted(outcome.uploaded) == sorted(stored(place))
    assert (outcome.waits, outcome.dropped, outcome.odd, outcome.why) == (0, 0, 0, "")
    assert outcome.text == f"2 recordings uploaded to {place}, 0 dropped"


@pytest.mark.slow
def test_what_a_crash_left_is_uploaded_by_the_next_start(dumps: Path, place: Path) -> None:
    spool(dumps).add(made(dumps, "a"))
    said: list[str] = []
    uploads = Uploads(str(place), dumps / "upload", dumps, 1 << 30, said.append)
    assert f"1 recording of an earlier start first ({TRACE.stat().st_size:,} bytes)" in said[0]
    assert len(uploads.close().uploaded) == 1
    assert list(stored(place).values()) == [TRACE.read_bytes()]


@pytest.mark.slow
def test_a_full_spool_drops_and_counts(dumps: Path, place: Path) -> None:
    said: list[str] = []
    uploads = Uploads(str(place), dumps / "upload", dumps, TRACE.stat().st_size, said.append)
    shutil.rmtree(place)  # the store goes away
    for name in "abc":
        uploads.add(made(dumps, name))
    outcome = uploads.close()
    assert (outcome.waits, outcome.dropped) == (1, 2)
    assert any("dropped, not uploaded: the spool is full; 2 so far" in line for line in said)
    assert "waiting for the next start 1 " in outcome.text
    assert "2 dropped" in outcome.text


@pytest.mark.slow
def test_a_process_that_is_killed_is_begun_again(dumps: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.upload.uploads._RESTARTS", (0.01, 0.01))
    said: list[str] = []
    uploads = Uploads(str(place), dumps / "upload", dumps, 1 << 30, said.append)
    child = until(lambda: uploads._child)
    child.send_signal(signal.SIGKILL)
    assert until(lambda: uploads._child is not child)
    uploads.add(made(dumps, "a"))
    assert len(uploads.close().uploaded) == 1
    assert any("begun again" in line for line in said)


def test_it_has_no_capability(tmp_path: Path) -> None:
    code = "from tracer.upload.privileges import drop_all; drop_all(); print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    found = dict(line.split(":\t") for line in done.stdout.splitlines() if line.startswith(("Cap", "NoNew")))
    assert {found[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1"


@pytest.mark.slow
def test_a_recording_is_uploaded_when_it_is_there(dumps: Path, place: Path) -> None:
    with uploading(str(place), dumps / "a.parquet", 1 << 30) as found:
        made(dumps, "a")
    assert found.outcome is not None
    assert len(found.outcome.uploaded) == 1
    with uploading("", dumps / "a.parquet", 1 << 30) as none:
        pass
    assert none.outcome is None
    for wrong in ("ftp://x", "s3://key:secret@bucket", str(dumps / "nowhere")):
        with pytest.raises(Problem) as raised, uploading(wrong, dumps / "a.parquet", 1 << 30):
            pass
        assert "secret" not in str(raised.value)


def test_a_recording_that_fails_is_not_uploaded(dumps: Path, place: Path) -> None:
    with pytest.raises(RuntimeError), uploading(str(place), dumps / "a.parquet", 1 << 30):
        raise RuntimeError
    assert not stored(place)


def in_store(port: int, prefix: str) -> dict[str, bytes]:
    objects = Objects(location(f"s3://{BUCKET}/{prefix}"))
    return {each.key: objects.read_all(each.key) for each in objects.list()}


@pytest.mark.slow
def test_to_s3_through_a_network_that_fails(
    s3: int, dumps: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """503, an answer lost after the object was written, a reset: each is there once, and reported as uploaded."""
    faults = {0: "503", 1: "lost", 2: "reset"}
    asked = []

    def fault(method: str, path: str, before: int) -> str:
        if method != "PUT":
            return ""
        asked.append(path)
        return faults.get(len(asked) - 1, "")

    with Proxy(s3, fault) as proxy:
        for name, value in environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        uploads = Uploads(f"s3://{BUCKET}/up", dumps / "upload", dumps, 1 << 30)
        uploads.add(made(dumps, "a"))
        uploads.add(made(dumps, "b", OTHER))
        outcome = uploads.close()
    assert len(outcome.uploaded) == 2, outcome
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
    found = in_store(s3, "up")
    assert sorted(found.values()) == sorted([TRACE.read_bytes(), OTHER.read_bytes()])
    assert sorted(found) == sorted(outcome.uploaded)
    assert len(asked) > 2


@pytest.mark.slow
def test_a_store_that_refuses_is_said_once_and_what_waits_stays(
    s3: int, dumps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    uploads = Uploads("s3://no-such-bucket-here/up", dumps / "upload", dumps, 1 << 30, said.append)
    uploads.add(made(dumps, "a"))
    assert until(lambda: len(said) > 1)
    outcome = uploads.close()
    assert outcome.waits == 1
    assert "bucket does not exist" in outcome.why
    assert sum("bucket does not exist" in line for line in said) == 1


@pytest.mark.slow
def test_the_lines_of_the_process_are_json(dumps: Path, place: Path) -> None:
    spool(dumps).add(made(dumps, "a"))
    done = subprocess.run(
        [sys.executable, "-m", "tracer.upload.upload_process", str(os.getpid()), str(dumps / "upload"), str(place)],
        input="", capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    (event,) = map(json.loads, io.StringIO(done.stdout))
    assert event["key"] in stored(place)
    spool(dumps).add(made(dumps, "b", OTHER))
    shutil.rmtree(place)
    late = subprocess.run(
        [sys.executable, "-m", "tracer.upload.upload_process", str(os.getpid()), str(dumps / "upload"), str(place)],
        input="", capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert late.returncode == ENVIRONMENT


@pytest.mark.slow
def test_a_flights_dumps_go_up(dumps: Path, place: Path) -> None:
    uploads = Uploads(str(place), dumps / "upload", dumps, 1 << 30)
    flight = Flight(dumps, seconds=3600, uploads=uploads)
    flight.give(entries(SECOND, 100, 1000), 2 * SECOND - 1)
    request = Request("manual", at=2 * SECOND - 1)
    flight.thread.ask(request)
    flight.thread.tick()
    path = request.answer.result()
    assert until(lambda: stored(place))
    assert list(stored(place).values()) == [path.read_bytes()]
    assert flight.close() == [path]
    assert len(uploads.close().uploaded) == 1
