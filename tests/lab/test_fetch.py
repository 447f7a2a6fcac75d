"""Getting kernels: from a directory, and from Debian through a private apt."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

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


# What `apt-cache show` says: paragraphs, newest version first.
SHOWN = {
    "linux-image-amd64": (
        "Package: linux-image-amd64\nDepends: linux-base-amd64 (= 7.3-1), linux-image-7.3-amd64 (= 7.3-1)\n\n"
        "Package: linux-image-amd64\nDepends: linux-image-7.2-amd64 (= 7.2-1)\n"
    ),
    "linux-image-7.3-amd64=7.3-1": (
        "Package: linux-image-7.3-amd64\nDepends: dracut | linux-initramfs-tool, "
        "linux-binary-7.3-amd64 (= 7.3-1), linux-modules-7.3-amd64 (= 7.3-1)\n"
    ),
    "linux-binary-7.3-amd64=7.3-1": "Package: linux-binary-7.3-amd64\n",
    "linux-modules-7.3-amd64=7.3-1": "Package: linux-modules-7.3-amd64\nDepends: kmod\n",
}


def test_split_packages_of_the_newest_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_debian_sites", lambda: {"Debian": "file:/mirror"})
    made = apt.Apt(tmp_path / "apt", (("Debian", "sid"),))
    monkeypatch.setattr(made, "_run", lambda *arguments: SHOWN[arguments[-1]])
    names = ["linux-image-7.3-amd64", "linux-binary-7.3-amd64", "linux-modules-7.3-amd64"]
    assert made.parts("linux-image-amd64") == dict.fromkeys(names, "7.3-1")


def test_error_of_apt_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_debian_sites", lambda: {"Debian": "file:/mirror"})
    made = apt.Apt(tmp_path / "apt", (("Debian", "sid"),))
    program(tmp_path, "apt-get", "echo 'W: aside' >&2; echo 'E: 404  Not Found' >&2; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Problem, match=r"^apt-get update: E: 404  Not Found$"):
        made.update()
