# SPDX-License-Identifier: Apache-2.0
"""Getting kernels: from a directory, and from Debian through a private apt."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.lab.synthetic import TREE, add_archive, elf, program, whole_kernel
from tracer.lab import apt, fetch, lab_kernels, modules
from traces.errors import ENVIRONMENT, Problem


def test_kernel_from_a_directory(store: Path) -> None:
    assert fetch.present("6.1") is None
    add_archive(store, whole_kernel())
    kernel = fetch.present("6.1")
    assert kernel is not None
    assert kernel.package == "linux-image-6.1.0-56-amd64 6.1.192-2"
    assert set(modules.Directory(*kernel.modules)) == set(TREE) - {"unused"}
    assert sorted(path.name for path in lab_kernels.cache().iterdir()) == ["6.1"]
    assert fetch.present("5.10") is None
    assert fetch.present("6.1-async") is None


def test_variant_replaces_only_its_modules(store: Path) -> None:
    add_archive(store, whole_kernel())
    (store / "6.1.0-56-amd64-async").mkdir()
    (store / "6.1.0-56-amd64-async" / "kvm-amd.ko").write_bytes(elf("depends=kvm", "other=1"))
    kernel = fetch.present("6.1-async")
    assert kernel is not None
    assert kernel.policy == "async"
    tree = modules.Directory(*kernel.modules)
    assert tree["kvm_amd"] == elf("depends=kvm", "other=1")
    assert tree["kvm"] == TREE["kvm"]


def test_update_replaces_the_cached_kernel(store: Path) -> None:
    add_archive(store, whole_kernel())
    fetch.fetch("6.1")
    newer = whole_kernel() | {"k/lib/modules/v/kvm.ko": elf("depends=irqbypass", "newer=1")}
    add_archive(store, newer)
    assert modules.Directory(*fetch.fetch("6.1").modules)["kvm"] == TREE["kvm"]
    assert modules.Directory(*fetch.fetch("6.1", update=True).modules)["kvm"] == elf("depends=irqbypass", "newer=1")


def test_a_kernel_wanted_by_two_is_unpacked_by_one(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, and takes what the first made."""
    add_archive(store, whole_kernel())
    kept = fetch._keep
    made: list[str] = []

    def slow(name: str, *rest: Any) -> lab_kernels.Bootable:
        made.append(name)
        if len(made) == 1:
            other.start()
            other.join(timeout=0.5)
        return kept(name, *rest)

    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(fetch.present("6.1")))
    monkeypatch.setattr(fetch, "_keep", slow)
    assert fetch.present("6.1") is not None
    other.join()
    assert found == [lab_kernels.fetched("6.1")]
    assert made == ["6.1"]


def test_archive_does_not_decide_where_files_go(store: Path, tmp_path: Path) -> None:
    members = whole_kernel()
    members["../../../kvm.ko"] = members.pop("k/lib/modules/v/kvm.ko")
    add_archive(store, members)
    kernel = fetch.present("6.1")
    assert kernel is not None
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.ko")} == {"cache"}


@pytest.mark.parametrize(
    "missing", ["k/boot/vmlinuz-6.1.0-56-amd64", "k/lib/modules/v/kvm.ko", "k/lib/modules/v/ccp.ko"]
)
def test_incomplete_archive_leaves_no_kernel(store: Path, missing: str) -> None:
    members = whole_kernel()
    del members[missing]
    add_archive(store, members)
    with pytest.raises(Problem):
        fetch.present("6.1")
    assert list(lab_kernels.cache().iterdir()) == []


def test_damaged_archive(store: Path) -> None:
    add_archive(store, whole_kernel())
    archive = store / "6.1.0-56-amd64.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(Problem, match=r"amd64\.tar\.xz: "):
        fetch.present("6.1")


def test_no_space_for_a_fetch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_archive(store, whole_kernel())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(Problem, match="1 MiB free, 700 needed: make room or set XDG_CACHE_HOME") as caught:
        fetch.fetch("6.1")
    assert caught.value.code == ENVIRONMENT


def test_sites_come_from_the_machines_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path,
        "apt-get",
        "echo 'Debian|Debian|file:/mirror'; echo 'Other|Debian|file:/not'; echo 'Debian|Debian-Security|file:/sec'",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    made = apt.Apt(tmp_path / "apt", lab_kernels.KERNELS["6.12"].suites)
    sources = (tmp_path / "apt" / "sources.list").read_text().splitlines()
    assert [line.split("] ")[1] for line in sources] == ["file:/sec trixie-security main", "file:/mirror trixie main"]
    assert made.suites == "trixie-security, trixie"


def test_machine_without_debian_sources(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "apt-get", "echo 'Ubuntu|Ubuntu|file:/mirror'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Problem, match="no Debian archive among this machine's apt sources") as caught:
        fetch.fetch("6.12")
    assert caught.value.code == ENVIRONMENT
    assert list(lab_kernels.cache().iterdir()) == []


# What `apt-cache show` says: a paragraph for each version, in no order.
SHOWN = {
    "linux-image-7.3-amd64": (
        "Package: linux-image-7.3-amd64\nSource: linux\nVersion: 7.3~rc7-1~exp1\n\n"
        "Package: linux-image-7.2.9+deb13-amd64\nVersion: 7.2.9-1~bpo13+1\n\n"
        "Package: linux-image-7.2.13+deb14-amd64\nVersion: 7.2.13-1\n"
    ),
    "linux-image-7.2.13+deb14-amd64=7.2.13-1": (
        "Package: linux-image-7.2.13+deb14-amd64\nDepends: dracut | linux-initramfs-tool, "
        "linux-binary-7.2.13+deb14-amd64 (= 7.2.13-1), linux-modules-7.2.13+deb14-amd64 (= 7.2.13-1)\n"
    ),
    "linux-binary-7.2.13+deb14-amd64=7.2.13-1": "Package: linux-binary-7.2.13+deb14-amd64\n",
    "linux-modules-7.2.13+deb14-amd64=7.2.13-1": "Package: linux-modules-7.2.13+deb14-amd64\nDepends: kmod\n",
}
NAMES = (
    "linux-image-7.2.9+deb13-amd64 linux-image-7.2.13+deb14-amd64 linux-image-7.2.13+deb14-cloud-amd64 "
    "linux-image-7.2.13+deb14-amd64-dbg linux-image-7.2.13+deb14-rt-amd64 linux-image-7.3-amd64"
)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> apt.Apt:
    """An archive that has 7.2.9, 7.2.13 and a candidate of 7.3."""
    monkeypatch.setattr(apt, "_debian_sites", lambda: {"Debian": "file:/mirror"})
    made = apt.Apt(tmp_path / "apt", (("Debian", "sid"),))
    asked = {"pkgnames": NAMES, "linux-image-7.3-amd64": SHOWN["linux-image-7.3-amd64"]}
    monkeypatch.setattr(made, "_run", lambda *words: asked.get(words[1]) or SHOWN[words[-1]])
    return made


def test_newest_released_version_before_a_candidate(archive: apt.Apt) -> None:
    assert archive.images("7") == [
        ("linux-image-7.2.13+deb14-amd64", "7.2.13-1"),
        ("linux-image-7.2.9+deb13-amd64", "7.2.9-1~bpo13+1"),
        ("linux-image-7.3-amd64", "7.3~rc7-1~exp1"),
    ]


def test_series_is_not_a_prefix_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_debian_sites", lambda: {"Debian": "file:/mirror"})
    made = apt.Apt(tmp_path / "apt", (("Debian", "sid"),))
    shown: list[tuple[str, ...]] = []

    def run(program: str, *words: str) -> str:
        if words[0] == "show":
            shown.append(words[1:])
        return "linux-image-6.12.9+deb13-amd64 linux-image-6.1.0-56-amd64 linux-image-6.1.0-56-amd64-unsigned"

    monkeypatch.setattr(made, "_run", run)
    made.images("6.1")
    assert shown == [("linux-image-6.1.0-56-amd64", "linux-image-6.1.0-56-amd64-unsigned")]


def test_all_packages_that_a_kernel_is_split_into(archive: apt.Apt) -> None:
    names = [f"linux-{part}-7.2.13+deb14-amd64" for part in ("image", "binary", "modules")]
    assert archive.parts("linux-image-7.2.13+deb14-amd64", "7.2.13-1") == dict.fromkeys(names, "7.2.13-1")


def test_a_package_that_the_archive_no_longer_has(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before it is taken, and the user is told."""
    add_archive(store, whole_kernel(), "whole.tar.xz")

    class Archive:
        suites = "sid"

        def __init__(self, home: Path, suites: object) -> None: ...
        def update(self) -> None: ...
        def images(self, series: str) -> list[tuple[str, str]]:
            return [("newest", "2"), ("older", "1")]

        def parts(self, package: str, version: str) -> dict[str, str]:
            return {package: version}

        def download(self, package: str, version: str) -> Path:
            if package == "newest":
                raise Problem("apt-get download newest=2: E: 404  Not Found", ENVIRONMENT)
            return store / "whole.tar.xz"

    monkeypatch.setattr(fetch, "Apt", Archive)
    said: list[str] = []
    kernel = fetch.fetch("6.1", said.append)
    assert kernel.package == "linux-image-6.1.0-56-amd64 6.1.192-2"
    assert said[1:] == ["newest 2", "kernel 6.1: apt-get download newest=2: E: 404  Not Found", "older 1"]


def test_series_that_the_table_does_not_have(store: Path) -> None:
    kernel = lab_kernels.known("6.18")
    assert (kernel.series, kernel.policy, kernel.parameters) == ("6.18", "preserve", ())
    assert lab_kernels.known("5.12").parameters == ("kvm.tdp_mmu=1",)
    assert {label for label, _ in kernel.suites} == {"Debian", "Debian-Security"}
    assert lab_kernels.cached() == list(lab_kernels.KERNELS)
    (lab_kernels.cache() / "6.18").mkdir(parents=True)
    assert lab_kernels.cached() == [*lab_kernels.KERNELS, "6.18"]
    with pytest.raises(Problem, match=r"kernel 6\.18 is not here: kvmtrace lab fetch 6\.18"):
        raise lab_kernels.missing("6.18")
    with pytest.raises(Problem, match="6: no such kernel"):
        lab_kernels.known("6")


def test_error_of_apt_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_debian_sites", lambda: {"Debian": "file:/mirror"})
    made = apt.Apt(tmp_path / "apt", (("Debian", "sid"),))
    program(tmp_path, "apt-get", "echo 'W: aside' >&2; echo 'E: 404  Not Found' >&2; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Problem, match=r"^apt-get update: E: 404  Not Found$"):
        made.update()
