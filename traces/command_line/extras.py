# SPDX-License-Identifier: Apache-2.0
"""Packages that not every installation has, and which extra of pyproject.toml brings each."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from traces.errors import ENVIRONMENT, Problem

EXTRAS: Final = {
    "altair": "report",
    "dask": "fleet",
    "distributed": "fleet",
    "jinja2": "report",
    "lz4": "record",
    "markupsafe": "report",
    "obstore": "fleet",
    "perfetto": "report",
    "polars": "report",
    "prometheus_client": "metrics",
    "pyarrow": "report",
    "textual": "top",
    "vl_convert": "report",
}

_DEBIAN: Final = "/usr/lib/kvmtrace"  # where the Debian packages have it: debian/rules


def have(package: str) -> bool:
    """Whether a package is installed, without loading it."""
    return find_spec(package) is not None


def how_to_get(package: str, extra: str = "") -> str:
    """Return the command that installs what brings a package, into the Python that runs this."""
    if Path(__file__).is_relative_to(_DEBIAN):
        return "apt-get install kvmtrace-report"
    return f"{sys.executable} -m pip install 'kvmtrace[{extra or EXTRAS[package]}]'"


def need(package: str, what: str, extra: str = "") -> None:
    """Raise Problem if a package that `what` needs is not installed; `extra` is the smallest extra that brings it."""
    if not have(package):
        raise Problem(f"{what} needs {package}, which is not installed: {how_to_get(package, extra)}", ENVIRONMENT)


def missing(error: ImportError) -> str | None:
    """Return the line for a user if a package of an extra is not installed; None for any other failed import."""
    package = (error.name or "").partition(".")[0]
    if package == "cython":
        return "its modules are not compiled: install gcc, libc6-dev and python3-dev, then kvmtrace again"
    if package not in EXTRAS or have(package):
        return None
    return f"this needs {package}, which is not installed: {how_to_get(package)}"
