"""KVM's counters from debugfs, while VMs come and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer import host


def test_counters_by_vm_and_vcpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = tmp_path / "4242-13"
    (vm / "vcpu0").mkdir(parents=True)
    (tmp_path / "exits").write_text("9\n")
    (vm / "mmu_shadow_zapped").write_text("7\n")
    (vm / "halt_poll_hist").write_text("1 2 3\n")
    (vm / "vcpu0" / "pf_taken").write_text("514\n")
    (vm / "vcpu0" / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path)
    assert host.kvm_counters() == {"4242-13": {"mmu_shadow_zapped": 7, "vcpu0/pf_taken": 514}}


def test_a_vm_that_ends_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in the lab: the directory was listed, and gone when its vCPU's was opened."""
    for name in ("1-1", "2-2"):
        (tmp_path / name / "vcpu0").mkdir(parents=True)
        (tmp_path / name / "vcpu0" / "exits").write_text("1")
    listed = Path.iterdir

    def iterdir(path: Path):  # type: ignore[no-untyped-def]
        if path.name == "vcpu0" and path.parent.name == "1-1":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return listed(path)

    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert host.kvm_counters() == {"1-1": {}, "2-2": {"vcpu0/exits": 1}}


def test_no_debugfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DEBUGFS_KVM", tmp_path / "none")
    assert host.kvm_counters() == {}


@pytest.mark.parametrize(
    ("release", "version"), [("6.1.0-56-amd64", (6, 1)), ("7.3-rc7", (7, 3)), ("5.10.262", (5, 10)), ("odd", (0, 0))]
)
def test_versions(release: str, version: tuple[int, int]) -> None:
    assert host.kernel_version(release) == version
