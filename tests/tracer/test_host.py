# SPDX-License-Identifier: Apache-2.0
"""KVM's counters from debugfs, while VMs come and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.probing import host


def test_counters_are_read_without_holding_a_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file in a VM's own directory is a reference to the VM."""
    vm = tmp_path / "4242-13"
    (vm / "vcpu0").mkdir(parents=True)
    (tmp_path / "exits").write_text("9\n")
    (tmp_path / "pf_taken").write_text("514\n")
    (tmp_path / "halt_poll_hist").write_text("1 2 3\n")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (vm / "pf_taken").write_text("514\n")
    opened: list[str] = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: (opened.append(path.name), read(path))[1])
    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path)
    assert host.kvm_counters() == {"exits": 9, "pf_taken": 514}
    assert vm.name not in opened
    assert opened.count("pf_taken") == 1


def test_what_a_vm_counted_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path)
    faults = tmp_path / "pf_fixed"
    faults.write_text("100\n")
    counted = host.Counted()
    for value in (150, 30, 40):  # in between a VM with some 120 ended
        faults.write_text(f"{value}\n")
        stats = counted.look()
    assert stats == {"start": {"all": {"pf_fixed": 100}}, "end": {"all": {"pf_fixed": 160}}}


def test_a_vm_that_ends_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in the lab: the directory was listed, and gone when it was looked at."""
    (tmp_path / "1-1").mkdir()
    (tmp_path / "exits").write_text("1")
    real = Path.is_dir

    def is_dir(path: Path) -> bool:
        if path.name == "1-1":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path)
    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert host.kvm_counters() == {"exits": 1}


def test_no_debugfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path / "none")
    assert host.kvm_counters() == {}


@pytest.mark.parametrize(
    ("release", "version"), [("6.1.0-56-amd64", (6, 1)), ("7.3-rc7", (7, 3)), ("5.10.262", (5, 10)), ("odd", (0, 0))]
)
def test_versions(release: str, version: tuple[int, int]) -> None:
    assert host.kernel_version(release) == version
