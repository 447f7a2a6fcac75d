# SPDX-License-Identifier: Apache-2.0
"""The kernel headers that bcc needs.

Our programs use uapi types only, so headers of any version serve any kernel. Where those of the running kernel are not
installed, the newest under /usr/src are used; Debian splits them into two trees, which are joined by symlinks in a
temporary directory, so that nothing under /lib/modules has to be touched.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from traces.errors import ENVIRONMENT, Problem

SOURCES = Path("/usr/src")
VARIABLE = "BCC_KERNEL_SOURCE"
INSTALL = "apt-get install linux-headers-amd64"


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path.name))


def find_headers() -> list[Path]:
    """Return the trees that bcc needs, best first; empty where it finds the running kernel's by itself.

    Debian's headers are two trees.
    """
    if VARIABLE in os.environ:
        return []
    build = Path("/lib/modules") / platform.release() / "build"
    if (build / "include/linux/kconfig.h").exists() or (build.parent / "source/include/linux/kconfig.h").exists():
        return []
    if Path("/sys/kernel/kheaders.tar.xz").exists():
        return []
    for tree in sorted(SOURCES.glob("linux-headers-*"), key=_version, reverse=True):
        if not (tree / "include/generated").is_dir():
            continue
        if (tree / "include/linux/kconfig.h").exists():
            return [tree]
        common = tree.with_name(re.sub(r"-[a-z0-9]+$", "-common", tree.name))
        if (common / "include/linux/kconfig.h").exists():
            return [tree, common]
    raise Problem(f"no kernel headers under {SOURCES} or for {platform.release()}: {INSTALL}", ENVIRONMENT)


def _join(trees: list[Path], into: Path) -> None:
    for part in ("include", "arch/x86/include"):
        (into / part).mkdir(parents=True)
        for tree in reversed(trees):  # the architecture's own tree wins
            for entry in (tree / part).iterdir() if (tree / part).is_dir() else ():
                link = into / part / entry.name
                link.unlink(missing_ok=True)
                link.symlink_to(entry)


@contextmanager
def headers() -> Iterator[None]:
    """Make bcc find usable kernel headers within this context."""
    trees = find_headers()
    if not trees:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="kvmtrace-headers-") as name:
        root = trees[0]
        if len(trees) > 1:
            root = Path(name)
            _join(trees, root)
        os.environ[VARIABLE] = str(root)
        try:
            yield
        finally:
            del os.environ[VARIABLE]
