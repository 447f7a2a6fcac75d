# SPDX-License-Identifier: Apache-2.0
"""What export prints, import reads: every form of every era, whole recordings as ftrace's and perf's text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import CORPUS
from tests.traces.shown_counts import outside
from tests.verbs import invoke, kvmtrace
from traces import kernels
from traces.imports.form_program import ROLE_FIELDS, FormPart, pieces
from traces.imports.printing import COLUMNS, Printer, forms_of
from traces.imports.scan import Scanner
from traces.kernels.exit_names import codes
from traces.kernels.printed import FORMS, Form
from traces.kernels.vendors import SVM, VMX
from traces.reader import Trace
from traces.schema import BY_NAME

pytestmark = pytest.mark.slow

KERNEL = kernels.at("6.1.192")
INTEL = kernels.at("6.1.192", kernels.Facts(cpu=VMX.cpu))
RECORDINGS = ("smi-grow-5.10", "smi-storm-6.1-async", "two-vms-6.12", "huge-7.x", "smi-one-6.1-ept", "roots-6.1-npt0")
APART = ("gap", "fast_page_fault")  # forms that have tests of their own
# Of other than the kernel's printing: put together from what is printed, or not printed at all.
INFERRED = ("seq", "vm", "vcpu", "root", "role", "table")


def values(form: Form, part: FormPart, intel: bool) -> st.SearchStrategy[int]:
    """What a part of a form may be, as the column's bits."""
    if "=" in part.how:
        return st.sampled_from([value for _, value in part.names])
    if part.column.startswith("role."):
        return st.integers(0, ROLE_FIELDS[part.column.removeprefix("role.")][1])
    if part.how == "exit":
        return st.sampled_from(codes(VMX if intel else SVM))
    if part.how == "failed" or part.column == "flags":
        return st.integers(0, 1)
    if part.column == "vcpu":
        return st.integers(0, 4095)
    if part.column in ("level", "as_id"):
        return st.integers(0, 5)
    if part.column in ("refs", "ret"):
        return st.integers(1, 130) if part.how == "-d" else st.integers(0, (1 << 31) - 1)
    if part.shift < 0:
        return st.integers(0, (1 << 50) - 1)
    if part.mask < 1 << 32:
        return st.integers(0, part.mask)
    return st.integers(0, (1 << 64) - 1)


@st.composite
def rows(draw: Any, form: Form, intel: bool) -> dict[str, int]:
    """Values of a row that is printed by this form, by column; those of `role` by field."""
    row: dict[str, int] = {}
    for part in pieces(form.text):
        if not part.column:
            continue
        value = draw(values(form, part, intel))
        if part.how == "pferr" and part.column in row:
            continue
        if part.how == "-d":
            value = -4 if form.when == ("ret", "==", -4) else -value
        shift = max(part.shift, 0)
        row[part.column] = row.get(part.column, 0) | value << shift if value >= 0 else value
    return row


@pytest.mark.parametrize("intel", [False, True], ids=["svm", "vmx"])
@pytest.mark.parametrize("form", [form for form in FORMS if form.kind not in APART],
                         ids=lambda form: f"{form.event}-{form.since[0]}.{form.since[1]}")  # fmt: skip
@given(data=st.data())
def test_every_form_is_read_as_it_is_printed(form: Form, intel: bool, data: st.DataObject) -> None:
    row = data.draw(rows(form, intel))
    kernel = INTEL if intel else KERNEL
    columns: dict[str, Any] = {name: np.zeros(1, np.int64) for name in COLUMNS}
    role = 0
    for name, value in row.items():
        if name.startswith("role."):
            role |= _role_bits(kernel, name.removeprefix("role."), value)
        else:
            columns[name] = np.array([value], np.int64 if value < 0 else np.uint64)
    columns["role"] = np.array([role], np.uint32)
    text, fits = Printer(kernel, {}, perf=False).text(form, columns)
    assert fits.all()
    for head in ("CPU 0/KVM-7 [000] ..... 1.000000: ", "CPU 0/KVM 7/8 [000] 1.000000000: kvm:"):  # ftrace's, perf's
        _is_read(f"{head}{form.event}: {text[0].as_py()}\n".encode(), form, row, kernel)


def _is_read(line: bytes, form: Form, row: dict[str, int], kernel: kernels.Kernel) -> None:
    scanner = Scanner(8)
    scanner.take(line, 0, True)
    assert scanner.rows == 1, line
    kind = BY_NAME[form.kind]
    assert scanner.columns["kind"][0] == kind.code, line
    for name, value in row.items():
        if name.startswith("role."):
            shift, mask = ROLE_FIELDS[name.removeprefix("role.")]
            known = name.removeprefix("role.") in kernel.layout.shifts or name in ("role.nx", "role.gpte")
            assert not known or int(scanner.columns["role"][0]) >> shift & mask == value, line
            continue
        places = dict(zip(kind.words, ("w0", "w1", "w2", "w3"), strict=False)) | (
            {kind.count: "n"} if kind.count else {}
        )
        found = int(scanner.columns[places.get(name, name)][0])
        assert found == value & (0xFFFFFFFF if name == kind.count else (1 << 64) - 1), line


@given(vcpu=st.integers(0, 4095), words=st.tuples(*[st.integers(0, (1 << 64) - 1)] * 3), fixed=st.booleans())
def test_a_fast_fault_is_read_as_it_is_printed(vcpu: int, words: tuple[int, int, int], fixed: bool) -> None:
    """Its text has words for two return codes, whose numbers are the kernel's."""
    (form,) = (form for form in FORMS if form.kind == "fast_page_fault")
    columns: dict[str, Any] = {name: np.zeros(1, np.int64) for name in COLUMNS}
    columns |= {name: np.array([word], np.uint64) for name, word in zip(("addr", "old", "new"), words, strict=True)}
    codes = KERNEL.ret_pf
    columns |= {"vcpu": np.array([vcpu]), "ret": np.array([codes.fixed if fixed else codes.spurious])}
    text, _ = Printer(KERNEL, {}, perf=False).text(form, columns)
    scanner = Scanner(8)
    scanner.take(f"CPU 0/KVM-7 [000] ..... 1.000000: {form.event}: {text[0].as_py()}\n".encode(), 0, True)
    found = {name: int(scanner.columns[name][0]) for name in ("kind", "vcpu", "w0", "w1", "w2", "w3", "n")}
    kind = BY_NAME["fast_page_fault"]
    assert (found["kind"], found["vcpu"], found["n"] & 3) == (kind.code, vcpu, 1 if fixed else 2)
    places = dict(zip(kind.words, ("w0", "w1", "w2", "w3"), strict=False))
    assert tuple(found[places[name]] for name in ("addr", "old", "new")) == words


@pytest.mark.parametrize("perf", [False, True])
@given(cpu=st.integers(0, 4095), lost=st.integers(1, (1 << 32) - 1))
def test_losses_are_read_as_they_are_printed(perf: bool, cpu: int, lost: int) -> None:
    columns: dict[str, Any] = {name: np.zeros(1, np.int64) for name in COLUMNS}
    columns |= {"cpu": np.array([cpu]), "value": np.array([lost], np.uint64)}
    scanner = Scanner(8)
    scanner.take(Printer(KERNEL, {}, perf).lines(columns, np.zeros(1, np.int64), ["gap"]), 0, True)
    assert [int(scanner.columns[name][0]) for name in ("kind", "cpu", "w0")] == [BY_NAME["gap"].code, cpu, lost]


def _role_bits(kernel: kernels.Kernel, name: str, value: int) -> int:
    layout = kernel.layout
    if name == "nx":
        return layout.nx if value else 0
    if name == "gpte":
        return layout.mask("has_4_byte_gpte") if value == 4 else 0
    return value << layout.shifts[name][0] if name in layout.shifts else 0


@pytest.mark.parametrize("style", ["--ftrace-text", "--perf-script"])
@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_come_back(name: str, style: str, tmp_path: Path) -> None:
    source, text, back = CORPUS / f"{name}.parquet", tmp_path / "text", tmp_path / "back.parquet"
    meta = Trace.open(source).metadata
    invoke(["export", str(source), style, "-o", str(text)])
    invoke(["import", str(text), "-o", str(back), "--kernel", meta.kernel])
    made = Trace.open(back).metadata
    assert made.raw["source"]["odd"] == 0, made.raw["source"]["first_odd"]
    assert tuple(made.raw["source"]["printed_since"]) <= kernels.recorded(meta).version[:2]
    old, new = (
        pl.read_parquet(path).sort("seq").with_columns(pl.col("kind").cast(pl.String)) for path in (source, back)
    )
    printable = [kind for kind in meta.kinds if forms_of(kind, kernels.recorded(meta))]
    old = old.filter(pl.col("kind").is_in(printable))
    assert old["kind"].to_list() == new["kind"].to_list()
    if style == "--ftrace-text":  # microseconds
        old, new = (frame.with_columns(pl.col("time") // 1000) for frame in (old, new))
    for kind in printable:
        mine, theirs = (frame.filter(pl.col("kind") == kind) for frame in (old, new))
        shown = {part.column for form in forms_of(kind, kernels.recorded(meta)) for part in pieces(form.text)}
        columns = [*("time", "cpu", "tid", "kind"), *sorted((shown & set(old.columns)) - set(INFERRED))]
        if kind == "fast_page_fault":  # neither fixed nor spurious: which of the other codes is not printed
            columns.remove("ret")
        if kind == "kvm_userspace_exit":  # of a KVM_RUN that failed the reason is not printed
            mine, theirs = (frame.filter(pl.col("ret") == 0) for frame in (mine, theirs))
        assert mine.select(columns).rows() == theirs.select(columns).rows(), kind


@pytest.mark.parametrize("name", ["smi-storm-6.1-async", "smi-grow-6.1"])
def test_replay_counts_from_a_text_what_it_counts_from_the_recording(name: str, tmp_path: Path) -> None:
    source, text, back = CORPUS / f"{name}.parquet", tmp_path / "text", tmp_path / "back.parquet"
    meta = Trace.open(source).metadata
    invoke(["export", str(source), "--perf-script", "-o", str(text)])
    invoke(["import", str(text), "-o", str(back), "--kernel", meta.kernel])
    counts: list[dict[str, Any]] = []
    for trace in (source, back):
        done = kvmtrace(["replay", str(trace), "--recorded-policy", meta.policy, "--no-time", "--json"])
        assert done.returncode == 0, done.stderr
        (vm,) = json.loads(done.stdout)["vms"]
        counts.append({
            policy["policy"]: {key: policy[key] for key in ("creations", "reuses", "faults", "refaults", "hits")}
            for policy in vm["policies"]
        })  # fmt: skip
    assert not outside(*counts)
    for count in ("creations", "faults", "refaults", "hits"):
        assert counts[1][meta.policy][count] == counts[0][meta.policy][count]


@pytest.mark.parametrize(
    "name",
    ["cr4-toggle-6.1", "cr4-toggle-bit-pge-5.10", "cow-7.x", "dirty-log-huge-6.1", "churn-6.1-shadow",
     "efer-toggle-6.1-async", "efer-toggle-5.10", "wp-toggle-6.1-async", "wp-toggle-5.10"],
)  # fmt: skip
def test_counts_from_a_text_contain_those_of_the_recording(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resets for registers' sake, policies that no release tells, memslots that no text has, the shadow MMU."""
    source, text, back = CORPUS / f"{name}.parquet", tmp_path / "text", tmp_path / "back.parquet"
    invoke(["export", str(source), "--ftrace-text", "-o", str(text)])
    invoke(["import", str(text), "-o", str(back), "--kernel", Trace.open(source).metadata.kernel])
    counts = []
    for trace in (source, back):
        capsys.readouterr()
        invoke(
            [
                "replay",
                str(trace),
                "--no-time",
                "--json",
                "--policy",
                "sync",
                "--policy",
                "async",
                "--policy",
                "preserve",
            ]
        )
        vms = json.loads(capsys.readouterr().out)["vms"]
        counts.append([
            {policy["policy"]: _counted(policy) for policy in vm["policies"]} for vm in vms
        ])  # fmt: skip
    assert len(counts[0]) == len(counts[1])
    for mine, theirs in zip(*counts, strict=True):
        assert not outside(mine, theirs)


def _counted(policy: dict[str, Any]) -> dict[str, Any]:
    """Without what roots were freed for, which is not shown; and without role words, which are not printed whole."""
    return {name: value for name, value in policy.items() if name not in ("frees_by_cause", "roots_by_role")}
