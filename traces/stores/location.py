# SPDX-License-Identifier: Apache-2.0
"""Places in a store as a user writes them: a folder, `file:`, `s3://`, `gs://` or `az://`.

Credentials come from where the store's own tools take them (environment variables, the machine's identity), never from
here: a command line is seen by every process of its machine, and ends in histories and logs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from traces.errors import Problem
from traces.text import printable

CLOUDS: Final = ("s3", "gs", "az")
MEMORY: Final = "memory"  # of this process; for tests
_WRITTEN: Final = "give a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX"


@dataclass(frozen=True)
class Location:
    """A place. `text` names it for people and for other machines; `folder` is the path of a local one."""

    scheme: str
    text: str
    folder: Path | None = None

    @property
    def local(self) -> bool:
        """Whether the location is a folder of this machine, or one that is mounted here."""
        return self.folder is not None

    def under(self, name: str) -> Location:
        """Return a place below this one."""
        folder = None if self.folder is None else self.folder / name
        return Location(self.scheme, f"{self.text.rstrip('/')}/{name}", folder)

    def apart(self) -> tuple[Location, str]:
        """Return the parent of the object that this place names, and the object's name in it. Raises Problem."""
        parent, _, name = self.text.rpartition("/")
        folder = None if self.folder is None else self.folder.parent
        if not name or parent.endswith(":/"):
            raise Problem(f"{self.text}: names no object: write it like s3://BUCKET/NAME.parquet")
        return Location(self.scheme, parent, folder), name


def is_remote(text: str) -> bool:
    """Whether a text means a store, not a file or folder of this machine."""
    return "://" in text and not text.startswith("file:")


def location(text: str) -> Location:
    """Return the place that a text means. Raises Problem, in which possible credentials are not repeated."""
    if "://" not in text and not text.startswith("file:"):
        return _of_folder(Path(text))
    parts = urlsplit(text)
    scheme = printable(parts.scheme)
    if "@" in parts.netloc or "@" in parts.path.split("/")[0]:
        raise Problem(
            f"{scheme}://...: has a name or a password in it, which every process of this machine could read: give "
            "credentials by the store's own environment variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.query or parts.fragment:
        raise Problem(
            f"{scheme}://...: has a `?` or `#` in it, where tokens are: give credentials by the store's own "
            "environment variables, such as AZURE_STORAGE_SAS_TOKEN"
        )
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise Problem(f"{printable(text)}: names another machine: write file:///FOLDER")
        return _of_folder(Path(unquote(parts.path)))
    if scheme not in (*CLOUDS, MEMORY):
        raise Problem(f"{scheme}://...: not a kind of store: {_WRITTEN}")
    if not parts.netloc or (scheme == "az" and not parts.path.strip("/")):
        raise Problem(f"{printable(text)}: names no {'container' if scheme == 'az' else 'bucket'}: {_WRITTEN}")
    return Location(scheme, printable(text.rstrip("/")))


def _of_folder(path: Path) -> Location:
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - links are followed when it is read, not here
    return Location("file", str(folder), folder)
