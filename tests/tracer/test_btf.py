# SPDX-License-Identifier: Apache-2.0
"""Struct layout from BTF: facts that no kernel changes, the role word against the reference, and its absence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.probing.btf import BTF_DIRECTORY, Btf, kernel_btf
from tracer.probing.offsets import kernel_layout
from traces.errors import Problem

needs_btf = pytest.mark.skipif(not (BTF_DIRECTORY / "vmlinux").exists(), reason="this kernel has no BTF")


@needs_btf
def test_layouts_that_never_change() -> None:
    btf = kernel_btf()
    following = btf.member("list_head", "prev")
    assert following is not None
    assert (following.offset, following.width) == (8, 0)
    assert btf.size("list_head") == 16
    assert btf.member("list_head", "nothing") is None
    assert btf.member("no_such_struct", "x") is None
    nested = btf.member("file", "f_path.dentry")
    path = btf.member("file", "f_path")
    dentry = btf.member("path", "dentry")
    assert nested is not None
    assert path is not None
    assert dentry is not None
    assert nested.offset == path.offset + dentry.offset


@needs_btf
def test_numbers_and_enumerators() -> None:
    btf = kernel_btf()
    assert btf.member_size("task_struct", "pid") == 4
    assert btf.member_size("kmem_cache", "no_such_member") == 0
    assert btf.enumerator("pid_type", "PIDTYPE_PID") == 0
    assert btf.enumerator("pid_type", "PIDTYPE_SID") == 3
    assert btf.enumerator("pid_type", "PIDTYPE_OTHER") is None
    assert btf.enumerator("no_such_enum", "PIDTYPE_PID") is None


@needs_btf
def test_signatures() -> None:
    signature = kernel_btf().signature("vfs_read")
    assert signature is not None
    assert signature[0] == "file *"
    assert len(signature) == 4
    assert kernel_btf().signature("no_such_function") is None


@needs_btf
def test_the_role_word() -> None:
    """The union's bitfields tile the word without overlap; level and smm have not moved since 5.10."""
    layout = kernel_layout(kernel_btf(), (0, 0), {})
    if not layout.role:
        assert "SP_ROLE" in layout.missing, "a KVM that is not loaded has no role word in BTF"
        return
    assert layout.role["level"] == (0, 4)
    assert layout.role["smm"] == (24, 8)
    assert layout.role["direct"] == (7, 1)
    bits = [bit for shift, width in layout.role.values() for bit in range(shift, shift + width)]
    assert len(bits) == len(set(bits))
    assert max(bits) < 32


def test_a_kernel_without_btf(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="CONFIG_DEBUG_INFO_BTF") as caught:
        Btf(tmp_path)
    assert caught.value.code == 3
    assert "\n" not in str(caught.value)


def test_btf_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(b"\x9f\xeb\x01\x00" + bytes(100))
    with pytest.raises(Problem, match="cannot read BTF"):
        Btf(tmp_path)
