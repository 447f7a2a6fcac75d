# SPDX-License-Identifier: Apache-2.0
"""Objects of a place: listed, read in ranges, created once. Errors are one Problem that says what and where.

obstore does the work, its retries with jitter included: of refused connections, of answers 429 and 5xx, and of bodies
that break off or stall, which it continues from where they were if the object is still the same. What it does not retry
is repeated here: pages of a listing that break off, and requests to create an object or to delete some whose answer is
lost or breaks off. Repeating these has no further effect.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from mmap import mmap
from typing import TYPE_CHECKING, Any, Final

from traces import durable
from traces.errors import ENVIRONMENT, Problem
from traces.stores.location import CLOUDS, MEMORY, Location
from traces.text import printable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

CONNECT_TIMEOUT: Final = timedelta(seconds=5)
READ_TIMEOUT: Final = timedelta(seconds=15)  # for which no byte arrives
TIMEOUT: Final = timedelta(minutes=10)  # for a whole request: that of a large recording takes long
RETRIES: Final = 10  # from 0.1 s on, each time twice as long, up to 15 s: a busy store is given a minute
RETRY_TIMEOUT: Final = timedelta(seconds=90)
WHOLE: Final = 64 << 20  # bytes of an object that is written in one request, which has to end within TIMEOUT
PART: Final = 16 << 20  # bytes of each part of a larger object
MOST_PARTS: Final = 10_000  # parts that S3 and Google take of one object
PARTS_AT_ONCE: Final = 4
TRIES: Final = 5  # times that continuing a listing, creating an object or deleting some is tried
_DELAY: Final = 0.2  # seconds before the second try
_STATUS: Final = re.compile(r"status code: (\d{3}) ?([A-Za-z ]*)")
# Also errors of a machine that has no role to ask for.
_REFUSED: Final = re.compile(r"status code: 40[13]\b|169\.254\.169\.254|metadata\.google")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")
_NOT_REPEATED: Final = re.compile(r"\bkind: (Interrupted|Timeout)\b")
_PASSED: Final = re.compile(r"\?[^\s\"']*")  # of a URL: there may be a signature in it
_memory: dict[str, Any] = {}


class StoreProblem(Problem):
    """A store did not do something, or does not have something."""


class ChangedObject(StoreProblem):
    """An object is no longer the one that was asked for."""


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing; its `etag` changes whenever its bytes do."""

    key: str
    size: int
    etag: str


class Objects:
    """The objects below a place. Any thread may use it; each process opens its own."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._store = _opened(place)

    def list(self, under: str = "") -> Iterator[StoredObject]:
        """Yield all objects below the place, or below a folder in it; none where the folder does not exist yet."""
        from obstore.exceptions import GenericError

        last: str | None = None
        for left in reversed(range(TRIES)):
            with self._failing(under):
                try:
                    for page in self._store.list(under or None, offset=last):
                        for each in page:
                            last = str(each["path"])
                            yield StoredObject(last, int(each["size"]), str(each["e_tag"] or ""))
                except FileNotFoundError:
                    return
                except GenericError as error:
                    if not left or not _of_answer(error):
                        raise
                else:
                    return
            _pause(left)

    def has(self, key: str) -> bool:
        """Return whether an object of that name exists."""
        with self._failing(key):
            try:
                self._store.head(key)
            except FileNotFoundError:
                return False
        return True

    def read(self, key: str, start: int, end: int, etag: str = "") -> bytes:
        """Return the bytes from `start` up to `end`. Raises Problem; ChangedObject if the object has another etag."""
        options: dict[str, Any] = {"range": (start, end)}
        return self._body(key, options, end - start, etag)

    def read_all(self, key: str, etag: str = "") -> bytes:
        """Return a whole object."""
        return self._body(key, {}, None, etag)

    def create(self, key: str, data: bytes | mmap) -> bool:
        """Write an object unless one of its name exists; return whether it was written. It appears whole or not at all.

        If the answer is lost, the request is repeated: the object then exists already, and the result is False. A store
        takes a condition with a whole object only: one of more than WHOLE bytes is uploaded in parts, and whether there
        is one of its name is asked before. Two that write it at once both succeed: its name has to identify its
        content.
        """
        from obstore.exceptions import AlreadyExistsError

        if len(data) > WHOLE and self.place.scheme in CLOUDS:
            return self._create_in_parts(key, data)
        with self._failing(key):
            try:
                _repeated(lambda: self._store.put(key, data, mode="create"))
            except AlreadyExistsError:
                return False
        self._sync(key)
        return True

    def _create_in_parts(self, key: str, data: bytes | mmap) -> bool:
        if self.has(key):
            return False
        part = max(PART, -(-len(data) // MOST_PARTS))
        with self._failing(key):
            try:
                self._store.put(key, data, use_multipart=True, chunk_size=part, max_concurrency=PARTS_AT_ONCE)
            except FileNotFoundError:
                if not self.has(key):
                    raise
                # The last answer was lost, and when the request was repeated the upload was done already.
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Write an object, whether or not one of its name exists."""
        with self._failing(key):
            self._store.put(key, data, use_multipart=False)
        self._sync(key)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, up to 1,000 in one request; an object that is already gone is no error."""
        if self.place.scheme in CLOUDS:
            # Azure and Google say of an object that it was not there, and then what became of the rest is not known.
            with self._failing(keys[0] if keys else ""), contextlib.suppress(FileNotFoundError):
                _repeated(lambda: self._store.delete(list(keys)))
                return
        for key in keys:
            with self._failing(key), contextlib.suppress(FileNotFoundError):
                self._store.delete(key)

    def _sync(self, key: str) -> None:
        """Make a local file survive a crash of its machine."""
        if self.place.folder is None:
            return
        path = self.place.folder / key
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                durable.sync(fd)
            finally:
                os.close(fd)
            durable.sync_directory(path.parent)
        except OSError as error:
            raise StoreProblem(f"{path}: cannot be written: {error.strerror}") from None

    def _body(self, key: str, options: dict[str, Any], size: int | None, etag: str) -> bytes:
        if etag:
            options["if_match"] = etag
        with self._failing(key):
            answer = self._store.get(key, options=options)  # type: ignore[arg-type]
            data = bytes(answer.bytes())
            wanted = answer.range[1] - answer.range[0] if size is None else size
            if len(data) != wanted:
                raise ValueError(f"{len(data):,} of {wanted:,} bytes came")
        return data

    @contextlib.contextmanager
    def _failing(self, key: str) -> Iterator[None]:
        try:
            yield
        except _errors() as error:
            raise self._failed(key, error) from None

    def _failed(self, key: str, error: Exception) -> Problem:
        from obstore.exceptions import PermissionDeniedError, PreconditionError, UnauthenticatedError

        where = printable(self.place.text + (f"/{key}" if key else ""))
        if isinstance(error, PreconditionError):
            return ChangedObject(f"{where}: was changed meanwhile: it is not the object that was indexed")
        if isinstance(error, FileNotFoundError):
            return StoreProblem(f"{where}: {_missing(error) or 'is not there'}")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(str(error)):
            return StoreProblem(
                f"{where}: the store refuses access ({_reason(error)}): {_CREDENTIALS[self.place.scheme]}", ENVIRONMENT
            )
        if not self.place.local and (missing := _missing(error)):
            return StoreProblem(f"{where}: {missing}")
        return StoreProblem(f"{where}: {_reason(error)}", ENVIRONMENT)


_CREDENTIALS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or give this machine a service account",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or give this machine an identity",
    "file": "look at its permissions",
    MEMORY: "",
}


def _opened(place: Location) -> ObjectStore:
    from obstore.store import AzureStore, LocalStore, MemoryStore, from_url

    if place.folder is not None:
        if not place.folder.is_dir():
            what = "is not a folder" if place.folder.exists() else "no such folder"
            raise StoreProblem(f"{printable(place.text)}: {what}")
        return LocalStore(place.folder)
    if place.scheme == MEMORY:
        store: ObjectStore = _memory.setdefault(place.text, MemoryStore())
        return store
    assert place.scheme in CLOUDS
    client: ClientConfig = {
        "connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "timeout": TIMEOUT,
        "user_agent": "kvmtrace", "allow_http": _allows_http(place.scheme),
    }  # fmt: skip
    retries: RetryConfig = {"max_retries": RETRIES, "retry_timeout": RETRY_TIMEOUT}
    try:
        if place.scheme == "az":  # of a URL obstore would take the account from the environment only
            account, container, *prefix = place.text.partition("://")[2].split("/", 2)
            return AzureStore(
                container, prefix="".join(prefix) or None, account_name=account, client_options=client,
                retry_config=retries,
            )  # fmt: skip
        return from_url(place.text, client_options=client, retry_config=retries)
    except _errors() as error:
        raise StoreProblem(f"{place.text}: {_reason(error)}", ENVIRONMENT) from None


def _allows_http(scheme: str) -> bool:
    """Whether the environment allows a store without TLS, such as one on loopback; our client options override it."""
    prefix = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[scheme]
    return os.environ.get(f"{prefix}_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")


def _errors() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return (BaseError, OSError, ValueError)


def _repeated(act: Callable[[], object]) -> None:
    """Do what may be done twice, and repeat it where obstore would not."""
    from obstore.exceptions import GenericError

    for left in reversed(range(TRIES)):
        try:
            act()
            return
        except GenericError as error:
            if not left or not (_NOT_REPEATED.search(str(error)) or _of_answer(error)):
                raise
        _pause(left)


def _pause(left: int) -> None:
    """Wait before the next of TRIES, of which `left` are left."""
    time.sleep(_DELAY * 2 ** (TRIES - 1 - left) * (0.5 + random.random()))


def _of_answer(error: Exception) -> bool:
    """Whether an answer began well, but its body did not arrive whole."""
    text = str(error)
    return _STATUS.search(text) is None and ("body error" in text or "timed out" in text or "TimedOut" in text)


def _missing(error: Exception) -> str:
    """Return that there is no such bucket or container, where a store says so; else empty."""
    codes = {"NoSuchBucket": "the bucket does not exist", "ContainerNotFound": "the container does not exist"}
    return next((said for code, said in codes.items() if f"<Code>{code}</Code>" in str(error)), "")


def _reason(error: Exception) -> str:
    """Return an error in a few words, without what a URL may carry."""
    text = str(error)
    if found := _STATUS.search(text):
        code = _CODE.search(text)
        return f"the store answers {found[1]} {found[2].strip()}" + (f" ({code[1]})" if code else "")
    for mark, said in _KNOWN:
        if mark in text:
            return said
    first = (text.splitlines() or [type(error).__name__])[0]
    return printable(_PASSED.sub("?...", first)[:200])


_KNOWN: Final = (
    ("timed out", "the store does not answer (timed out)"),
    ("TimedOut", "the store does not answer (timed out)"),
    ("dns error", "the store's name is not known (DNS)"),
    ("Connection refused", "the store cannot be reached (connection refused)"),
    ("ConnectionRefused", "the store cannot be reached (connection refused)"),
    ("error sending request", "the store cannot be reached, or ends the connection"),
    ("body error", "the store's answer broke off"),
)
