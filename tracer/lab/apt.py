# SPDX-License-Identifier: Apache-2.0
"""A private apt: Debian's archives as this machine's sources name them, but other suites.

It has its own state, cache and list of sources; the system's are read and never changed. Nothing here needs root.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from traces.errors import ENVIRONMENT, Problem

# A kernel's package: not the cloud's or the real-time one, no debug symbols. Signed or not, it is the same image.
_IMAGE: Final = re.compile(r"linux-image-\d[\d.]*(?:\+deb[\d.]+)?(?:-\d+)?-amd64(?:-unsigned)?")
# The parts a kernel is split into since 7.0; before, linux-image-VERSION was all of it.
_PART: Final = re.compile(r"\b(linux-(?:image|binary|modules)-[a-z0-9.+-]+)(?: \(= ([^)]+)\))?")
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Apt:
    """A private apt: Debian's archives as the machine's sources name them, with the suites asked for."""

    def __init__(self, home: Path, suites: Sequence[tuple[str, str]]) -> None:
        """`suites` are (archive label, suite). Raises Problem when the machine has no Debian source for any."""
        self.home = home
        sites = _debian_sites()
        reachable = [(sites[label], suite) for label, suite in suites if label in sites]
        if not reachable:
            raise Problem(
                "no Debian archive among this machine's apt sources: set KVMTRACE_KERNELS to a directory of kernels, "
                "or give --kernel the path of an image",
                ENVIRONMENT,
            )
        self.suites = ", ".join(suite for _, suite in reachable)
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (home / directory).mkdir(parents=True)
        options = "arch=amd64" + (f" signed-by={_KEYRING}" if _KEYRING.exists() else "")
        lines = [f"deb [{options}] {site} {suite} main\n" for site, suite in reachable]
        (home / "sources.list").write_text("".join(lines))
        self.options = [
            f"-oDir::State={home / 'state'}",
            f"-oDir::Cache={home / 'cache'}",
            f"-oDir::Etc::sourcelist={home / 'sources.list'}",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::State::status=/dev/null",
            "-oAPT::Architecture=amd64",
            "-oAPT::Sandbox::User=root",  # when run by root: its own sandbox user cannot enter root's cache
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=2",
            "-qq",
        ]

    def update(self) -> None:
        """Download the suites' package lists (some 10 MB each)."""
        self._run("apt-get", "update")

    def images(self, series: str) -> list[tuple[str, str]]:
        """Return the kernels of a series ("6.12", "7"): (package, version), the newest released one first.

        Release candidates come last, newest first: Debian's experimental has one most of the time.
        """
        pattern = f"linux-image-{series}"
        names = [name for name in self._run("apt-cache", "pkgnames", pattern).split() if _IMAGE.fullmatch(name)]
        names = [name for name in names if name[len(pattern)] in ".+-"]  # 6.12 is not of the series 6.1
        shown = self._run("apt-cache", "show", *names) if names else ""
        found = re.findall(r"^Package: (\S+)$(?:\n.+)*?\nVersion: (\S+)$", shown, re.MULTILINE)
        return sorted(found, key=lambda image: (_age(image[1]), image[0]), reverse=True)

    def newest(self, package: str) -> str:
        """Return the newest version of a package."""
        versions: list[str] = re.findall(r"^Version: (\S+)$", self._run("apt-cache", "show", package), re.MULTILINE)
        return max(versions, key=_age)

    def parts(self, package: str, version: str) -> dict[str, str]:
        """Return the packages that a version of a kernel's package consists of, with their versions."""
        found = {package: version}
        pending = [(package, version)]
        while pending:
            name, version = pending.pop()
            paragraph = self._run("apt-cache", "show", f"{name}={version}").split("\n\n")[0]
            depends = re.search(r"^(?:Pre-)?Depends: (.*)$", paragraph, re.MULTILINE)
            # A name without a version is an alternative or a metapackage of another kind.
            exact = [part for part in _PART.findall(depends[1] if depends else "") if part[1]]
            pending += [part for part in exact if part[0] not in found]
            found.update(exact)
        return found

    def download(self, package: str, version: str) -> Path:
        """Download a package and return its contents as a tar file; apt checks it with the signed lists."""
        place = self.home / package
        place.mkdir()
        self._run("apt-get", "download", f"{package}={version}", cwd=place)
        tar = place / "data.tar"
        for deb in place.glob("*.deb"):
            with tar.open("wb") as file:
                done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=file, check=False)
            deb.unlink()
            if done.returncode == 0:
                return tar
        raise Problem(f"{package} {version}: cannot be downloaded and unpacked", ENVIRONMENT)

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [program, *self.options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
            raise Problem(f"{program} {' '.join(arguments)}: {(errors or ['failed'])[0]}", ENVIRONMENT)
        return done.stdout


def _age(version: str) -> tuple[bool, list[int]]:
    """Return the sort key of Debian's kernel versions: candidates (7.3~rc7) before released ones, then by numbers."""
    return "~rc" not in version, [int(number) for number in re.findall(r"\d+", version)]


def _debian_sites() -> dict[str, str]:
    """Return the addresses of Debian's archives in the machine's sources, by label (Debian, Debian-Security)."""
    query = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(SITE)", "Created-By: Packages"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return {}
    sites: dict[str, str] = {}
    for line in done.stdout.splitlines():
        origin, label, site = line.split("|", 2)
        if origin == "Debian":
            sites.setdefault(label, site)
    return sites
