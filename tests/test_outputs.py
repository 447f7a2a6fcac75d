# SPDX-License-Identifier: Apache-2.0
"""Every verb that writes, with every place that it may not or cannot write to, in this process."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.traces.making import numbered, trace
from tests.verbs import WRITERS, Files, Verb, contents, invoke
from traces import durable, outputs
from traces.errors import BAD_INPUT, Problem
from traces.synth import Parameters, synthesize

pytestmark = pytest.mark.slow

QUICK = ("replay", "report-text", "diff-json", "export-csv", "export-perfetto", "synth", "recover")
writers = [pytest.param(verb, id=verb.name, marks=() if verb.name in QUICK else pytest.mark.slow) for verb in WRITERS]
every_writer = pytest.mark.parametrize("verb", writers)


def refused(verb: Verb, files: Files, out: Path, *more: str) -> str:
    """Check that a verb does not write there, in one line, and that nothing was changed; the line."""
    before = contents(files.trace.parent, out.parent if out.parent.is_dir() else files.trace.parent)
    with pytest.raises(Problem) as raised:
        invoke([*verb.words(files, out), *more])
    assert raised.value.code == BAD_INPUT
    assert "\n" not in str(raised.value)
    assert str(out) in str(raised.value)
    assert contents(files.trace.parent, out.parent if out.parent.is_dir() else files.trace.parent) == before
    return str(raised.value)


def forced(verb: Verb) -> tuple[str, ...]:
    return () if verb.kind == outputs.RECORDING else ("--force",)


@pytest.mark.parametrize("how", ["itself", "symlink", "symlinks", "hard link", "another way"])
@pytest.mark.parametrize("verb", [each for each in writers if each.values[0].input])
def test_an_input_is_never_written(verb: Verb, files: Files, tmp_path: Path, how: str) -> None:
    given: Path = getattr(files, verb.input)
    if given.is_dir():
        given /= "manifest.json"
    out = tmp_path / "out"
    if how == "itself":
        out = given
    elif how == "symlink":
        out.symlink_to(given)
    elif how == "symlinks":
        (tmp_path / "other").symlink_to(given)
        out.symlink_to(tmp_path / "other")
    elif how == "hard link":
        out.hardlink_to(given)
    else:
        out = given.parent / ".." / given.parent.name / given.name
    for more in ((), forced(verb)):
        refused(verb, files, out, *more)


def test_a_policy_and_a_baseline_are_inputs(files: Files, tmp_path: Path) -> None:
    policy, baseline = tmp_path / "mine.py", tmp_path / "base.json"
    shutil.copy(Path("replay/examples/keep_n.py"), policy)
    invoke(["report", str(files.trace), "--format", "json", "-o", str(baseline)])
    for out, words in (
        (policy, ["replay", "--policy", str(policy)]),
        (policy, ["report", "--policy", str(policy)]),
        (baseline, ["report", "--format", "json", "--baseline", str(baseline)]),
    ):
        before = out.read_bytes()
        with pytest.raises(Problem, match="is what is read"):
            invoke([words[0], str(files.trace), *words[1:], "-o", str(out), "--force"])
        assert out.read_bytes() == before


@every_writer
def test_a_recording_is_never_overwritten(verb: Verb, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = files.trace.read_bytes()
    flipped = bytes(byte ^ 0xFF if at == len(whole) - 100 else byte for at, byte in enumerate(whole))
    for there in (whole, whole[:-1], whole[: len(whole) // 2], whole[:5], flipped):
        out.write_bytes(there)
        for more in ((), forced(verb)):
            assert "recording" in refused(verb, files, out, *more)


@every_writer
def test_what_a_recorder_left_is_never_changed(verb: Verb, files: Files) -> None:
    for name in ("manifest.json", "seg-00000.arrows", "seg-00007.arrows", "new"):
        for more in ((), forced(verb)):
            refused(verb, files, files.kvmt / name, *more)


@pytest.mark.slow
@every_writer
def test_another_kind_is_replaced_by_force_alone(
    verb: Verb, files: Files, whole: Callable[[Verb], Path], tmp_path: Path
) -> None:
    kept = [(other, whole(other).read_bytes()) for other in WRITERS]
    out, failed = tmp_path / "out", []
    for other, there in kept:
        out.write_bytes(there)
        if other.kind == verb.kind and verb.kind != outputs.RECORDING:
            continue  # below
        if other.kind == outputs.RECORDING:
            if verb.kind != other.kind:
                refused(verb, files, out, *forced(verb))
            continue
        refused(verb, files, out)
    out.write_bytes(b"of a user: not what kvmtrace has written\n")
    refused(verb, files, out)
    if verb.kind != outputs.RECORDING:
        invoke([*verb.words(files, out), "--force"])
        assert out.read_bytes() == whole(verb).read_bytes() or verb.name == "report-html", failed


@every_writer
def test_its_own_kind_an_empty_file_and_a_link_are_written(
    verb: Verb, files: Files, whole: Callable[[Verb], Path], tmp_path: Path
) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    out.symlink_to(target)
    for there in (None, b"", whole(verb).read_bytes()):
        target.unlink(missing_ok=True)
        if there is not None:
            if not there and verb.kind == outputs.RECORDING:
                continue
            target.write_bytes(there)
            target.chmod(0o640)
        invoke(verb.words(files, out))
        assert target.read_bytes() == whole(verb).read_bytes()
        assert out.is_symlink()
        assert there is None or target.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


@every_writer
def test_a_directory_and_a_place_that_is_not_there(verb: Verb, files: Files, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in ("directory", "absent/out", "file/out", "loop", "n" * 300):
        for more in ((), forced(verb)):
            assert "cannot be written" in refused(verb, files, tmp_path / out, *more) or out == "directory"


def test_a_recording_made_meanwhile_is_kept(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = outputs.Output(out, outputs.RESULT, force=True)
    output.write(b"PAR1")
    shutil.copy(files.trace, out)
    with pytest.raises(Problem, match="is a recording"):
        output.commit()
    output.discard()
    assert contents(tmp_path) == {tmp_path: None, out: files.trace.read_bytes()}


def test_recover_may_be_repeated_but_not_over_another_recording(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    for _ in range(2):
        invoke(["recover", str(files.kvmt), "-o", str(out)])
    trace(tmp_path / "other.parquet", numbered(7))
    refused(next(verb for verb in WRITERS if verb.name == "recover"), files, tmp_path / "other.parquet")


@pytest.mark.parametrize("call", ["write_all", "sync", "replace"])
def test_a_disk_that_fails_leaves_what_was_there(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    synthesize(out, Parameters(duration=0.01))
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable, call, fail)
    with pytest.raises(Problem, match="cannot be written: Input/output error"):
        synthesize(out, Parameters(duration=0.02))
    assert contents(tmp_path) == before


DESIGNS = (["--aging", "locked"], ["--zap-lock", "read"], ["--apicv", "gfn"], ["--tdp-pages", "list"])
RATES = (["--sweep", "smi-rate=10:100:log"], ["--smi-rate", "10"])
UNSERVED = [
    *([*mode, "-o", "{out}"] for mode in (*RATES, *DESIGNS)),
    *([*mode, "--policy", "async"] for mode in DESIGNS),
    *([*mode, *other] for mode in DESIGNS for other in RATES),
]


@pytest.mark.parametrize("words", UNSERVED, ids=" ".join)
def test_what_a_mode_does_not_serve_is_refused(words: list[str], files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Problem, match=r"^replay --[-a-z]+: [^\n]*$") as raised:
        invoke(["replay", str(files.trace), *(word.format(out=out) for word in words)])
    assert raised.value.code == BAD_INPUT
    assert not out.exists()


@pytest.mark.parametrize("form", ["html", "junit"])
def test_a_format_that_diff_does_not_serve_is_refused(form: str, files: Files) -> None:
    with pytest.raises(Problem, match=r"^diff[^\n]*$") as raised:
        invoke(["diff", str(files.trace), str(files.trace), "--format", form])
    assert raised.value.code == BAD_INPUT
