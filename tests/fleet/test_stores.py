# SPDX-License-Identifier: Apache-2.0
"""Places in stores: what a text means, what is refused, and reading and writing through faults."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from tests.fleet.servers import BUCKET, Proxy, environment, free_port
from traces.errors import ENVIRONMENT, Problem
from traces.stores import object_store
from traces.stores.location import is_remote, location
from traces.stores.object_store import ChangedObject, Objects

pytestmark = pytest.mark.xdist_group("fleet")
DATA = os.urandom(300_000)


@pytest.fixture(params=["folder", "memory", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "folder":
        return Objects(location(str(tmp_path)))
    if request.param == "memory":
        return Objects(location(f"memory://{uuid4()}"))
    request.getfixturevalue("s3")
    return Objects(location(f"s3://{BUCKET}/{uuid4()}"))


def test_a_text_means_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert location("traces/x").folder == tmp_path / "traces" / "x"
    assert location("file:///a%20b/c").folder == Path("/a b/c")
    assert location("s3://bucket/p/q/").text == "s3://bucket/p/q"
    assert location("s3://bucket/p").under("x").text == "s3://bucket/p/x"
    place, name = location("gs://bucket/p/catalogue.parquet").apart()
    assert (place.text, name) == ("gs://bucket/p", "catalogue.parquet")
    assert [is_remote(text) for text in ("s3://b", "file:///x", "/x", "a/b")] == [True, False, False, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://KEY:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://KEY@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("az://account/container/x?sig=hunter2", "AZURE_STORAGE_SAS_TOKEN"),
        ("https://bucket.example/hunter2", "not a kind of store"),
        ("s3:///x", "names no bucket"),
        ("az://account", "names no container"),
        ("file://elsewhere/x", "another machine"),
    ],
)
def test_what_is_no_place_is_refused_without_repeating_a_secret(text: str, said: str) -> None:
    with pytest.raises(Problem, match=said) as refused:
        location(text)
    assert "hunter2" not in str(refused.value)


def test_objects_are_written_once_listed_and_read(objects: Objects) -> None:
    use(objects)


def use(objects: Objects) -> None:
    """Everything that a place is used for."""
    assert list(objects.list()) == []
    assert objects.create("a/b c.parquet", DATA)
    assert not objects.create("a/b c.parquet", b"other")
    objects.replace("a/d", b"12345")
    found = {each.key: each for each in objects.list()}
    assert {key: each.size for key, each in found.items()} == {"a/b c.parquet": len(DATA), "a/d": 5}
    assert list(objects.list("a")) == list(objects.list())
    assert list(objects.list("b")) == []
    etag = found["a/b c.parquet"].etag
    assert etag
    assert objects.read("a/b c.parquet", 10, 20, etag) == DATA[10:20]
    assert objects.read_all("a/b c.parquet", etag) == DATA
    objects.replace("a/b c.parquet", b"changed!" * 9)
    with pytest.raises(ChangedObject, match="was changed meanwhile"):
        objects.read("a/b c.parquet", 10, 20, etag)
    with pytest.raises(Problem, match=r"a/d: .*of 10 bytes"):
        objects.read("a/d", 2, 12)
    objects.delete(["a/none", "a/d"])
    with pytest.raises(Problem, match="a/d: is not there"):
        objects.read_all("a/d")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["", "503", "reset", "torn", "lost", "torn after"])
def test_a_large_object_goes_up_in_parts_once(what: str, s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(method: str, path: str, before: int) -> str:
        """One of the parts, and the last request: that they are all there."""
        return what if not before and "uploadId=" in path and (method == "POST" or "partNumber=2" in path) else ""

    with Proxy(s3, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        of_parts(Objects(location(f"s3://{BUCKET}/large-{what}")), monkeypatch)
        assert len([path for method, path in proxy.seen if method == "PUT"]) == 3
        assert proxy.done.get(what, 0) == (2 if what else 0)


def of_parts(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object of three parts is created once."""
    monkeypatch.setattr(object_store, "WHOLE", 6 << 20)
    monkeypatch.setattr(object_store, "PART", 5 << 20)  # S3 takes no smaller ones
    data = os.urandom(12 << 20)
    assert objects.create("a", data)
    assert not objects.create("a", b"other" + data[5:])
    (found,) = objects.list()
    assert found.size == len(data)
    assert objects.read_all("a", found.etag) == data


@pytest.mark.slow
def test_a_listing_of_many_pages(s3: int) -> None:
    objects = Objects(location(f"s3://{BUCKET}/many"))
    for number in range(1100):  # S3 lists 1,000 at a time
        objects.create(f"{number:05}", b"x")
    assert [each.key for each in objects.list()] == [f"{number:05}" for number in range(1100)]


def test_a_place_that_is_not_there(tmp_path: Path, s3: int) -> None:
    with pytest.raises(Problem, match="no such folder"):
        Objects(location(str(tmp_path / "none")))
    (tmp_path / "file").touch()
    with pytest.raises(Problem, match="is not a folder"):
        Objects(location(str(tmp_path / "file")))
    with pytest.raises(Problem, match="the bucket does not exist"):
        list(Objects(location("s3://no-such-bucket/x")).list())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["503", "reset", "torn", "cut", "stall", "silence", "lost", "torn after"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_store_that_fails_some_times(what: str, times: int, s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "READ_TIMEOUT", timedelta(seconds=2))
    with Proxy(s3, lambda method, path, before: what if before < times else "") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        objects = Objects(location(f"s3://{BUCKET}/faults-{what}-{times}"))
        objects.create("a", DATA)  # whether it was this one is not known where an answer was lost
        (found,) = objects.list()
        assert objects.read("a", 5, 250_000, found.etag) == DATA[5:250_000]
        assert proxy.done[what] >= 3
        objects.delete(["a"])
        assert list(objects.list()) == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("503", "503"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("reset", "cannot be reached"), ("cut", "broke off"), ("stall", "timed out"))
        ),
    ],
)
def test_a_store_that_goes_on_failing_is_one_line(
    what: str, said: str, s3: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Objects(location(f"s3://{BUCKET}/failing")).create("a", DATA)
    monkeypatch.setattr(object_store, "READ_TIMEOUT", timedelta(seconds=0.3))
    monkeypatch.setattr(object_store, "RETRIES", 2)
    with Proxy(s3, lambda method, path, before: what) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        objects = Objects(location(f"s3://{BUCKET}/failing"))
        with pytest.raises(Problem, match=said) as failed:
            objects.read("a", 0, len(DATA))
        assert str(failed.value).startswith(f"s3://{BUCKET}/failing/a: ")
        assert failed.value.code == ENVIRONMENT
        assert str(failed.value).isprintable()
        assert "none-secret" not in str(failed.value)


def test_places_of_the_other_clouds_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be tested without them: nothing here answers for Google or Azure."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "bm9uZQ==")
    azure = Objects(location("az://account/container/a/b"))._store
    assert (azure.config["account_name"], azure.config["container_name"]) == ("account", "container")
    assert azure.prefix == "a/b"
    assert Objects(location("az://account/container"))._store.prefix is None
    google = Objects(location("gs://bucket/a/b"))._store
    assert (google.config["bucket"], google.prefix) == ("bucket", "a/b")


def test_access_that_is_refused_says_where_credentials_come_from(s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(s3, lambda method, path, before: "403") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        with pytest.raises(Problem, match=r"the store refuses access .*403.*: set AWS_ACCESS_KEY_ID") as refused:
            list(Objects(location(f"s3://{BUCKET}/refused")).list())
        assert refused.value.code == ENVIRONMENT
        assert "none-secret" not in str(refused.value)


def test_a_store_that_is_not_there(s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", environment(free_port())["AWS_ENDPOINT_URL"])
    with pytest.raises(Problem, match="cannot be reached"):
        Objects(location(f"s3://{BUCKET}/x")).read_all("a")
