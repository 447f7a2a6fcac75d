# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace import`: every era's lines, every tool's, what mailers do to them, and what the trace says of itself."""

from __future__ import annotations

import bz2
import gzip
import html
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections import Counter
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from tests.replay.plain import plain
from tests.traces.excerpts import EXCERPTS, mailed, text_of
from tests.verbs import invoke, kvmtrace
from tracer import vmm
from traces.errors import BAD_INPUT, Problem
from traces.imports import scan
from traces.imports.form_program import pieces, program
from traces.imports.importing import import_file
from traces.imports.told import ToldOfText
from traces.kernels.printed import FIELDS, FORMS
from traces.metadata import Metadata
from traces.reader import Trace
from traces.schema import BY_NAME

COLUMNS = ("time", "vcpu", "tid", "cpu", "role", "level", "gfn", "old", "new", "addr", "code", "value", "rip", "refs",
           "ret", "flags", "as_id", "table")  # fmt: skip


def imported(path: Path, text: bytes | str, **options: Any) -> tuple[pl.DataFrame, Metadata]:
    """Write the text, import it; the trace's rows and metadata."""
    source, out = path / "text", path / "out.parquet"
    source.write_bytes(text.encode() if isinstance(text, str) else text)
    import_file(source, out, ToldOfText(**options), force=True)
    return pl.read_parquet(out).sort("seq"), Trace.open(out).metadata


@pytest.mark.parametrize("name", EXCERPTS)
def test_lines_of_every_era_and_tool(name: str, tmp_path: Path) -> None:
    rows, meta = imported(tmp_path, text_of(name))
    expected = [line for line in EXCERPTS[name] if line.kind]
    if not any(line.kind == "other" for line in expected):
        rows = rows.filter(pl.col("kind").cast(pl.String) != "other")
    assert rows["kind"].cast(pl.String).to_list() == [line.kind for line in expected]
    for row, line in zip(rows.to_dicts(), expected, strict=True):
        assert {column: row[column] for column in line.row} == line.row, line.text
    assert meta.raw["source"]["odd"] == 0, meta.raw["source"]["first_odd"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_mails_are_the_same_events(seed: int, tmp_path: Path) -> None:
    name = list(EXCERPTS)[seed % len(EXCERPTS)]
    if name in ("perf trace", "trace-cmd report -R", "latency format", "function_graph", "cut at the end"):
        name = "6.1"
    (tmp_path / "plain").mkdir()
    (tmp_path / "mail").mkdir()
    rows, _ = imported(tmp_path / "plain", text_of(name))
    quoted, meta = imported(tmp_path / "mail", mailed(text_of(name), seed))
    shown = ["kind", *COLUMNS]
    assert quoted.select(shown).rows() == rows.select(shown).rows()
    assert meta.raw["source"]["odd"] > 0  # its headers


@pytest.mark.parametrize(
    "packed", ["gzip", "xz", "bzip2", "zstd", "twice", "utf-16", "utf-16-le", "utf-16-be", "damaged by a crash"]
)
def test_compressed_texts_are_known_by_content(packed: str, tmp_path: Path) -> None:
    text = text_of("6.1").encode()
    data = {
        "gzip": lambda: gzip.compress(text),
        "xz": lambda: lzma.compress(text),
        "bzip2": lambda: bz2.compress(text),
        "zstd": lambda: bytes(pa.compress(text, "zstd", asbytes=True)),
        "twice": lambda: gzip.compress(lzma.compress(text)),
        "utf-16": lambda: text.decode().encode("utf-16"),
        "utf-16-le": lambda: text.decode().encode("utf-16-le"),
        "utf-16-be": lambda: text.decode().encode("utf-16-be"),
        "damaged by a crash": lambda: text + bytes(4096),
    }[packed]()
    rows, _ = imported(tmp_path, data)
    assert (rows["kind"].cast(pl.String) != "other").sum() == sum(bool(line.kind) for line in EXCERPTS["6.1"])


@pytest.mark.parametrize("form", ["base64", "alternative", "attached", "attached, packed", "html"])
def test_mails_in_parts_have_each_event_once(form: str, tmp_path: Path) -> None:
    text = text_of("6.1")
    mail = EmailMessage()
    mail["Subject"] = "Re: hang"
    mail["From"] = "a@example.org"
    if form == "attached, packed":
        mail.set_content("See below.\n")
        mail.add_attachment(gzip.compress(text.encode()), maintype="application", subtype="gzip", filename="trace.gz")
    elif form == "attached":
        mail.set_content("See below.\n")
        mail.add_attachment(text, filename="trace.txt")
    elif form == "html":
        mail.set_content(f"<html><pre>{html.escape(text)}</pre></html>", subtype="html", cte="base64")
    else:
        mail.set_content(text, cte="base64")
    if form == "alternative":
        mail.add_alternative(f"<html><pre>{html.escape(text)}</pre></html>", subtype="html")
    rows, meta = imported(tmp_path, mail.as_bytes())
    assert (rows["kind"].cast(pl.String) != "other").sum() == sum(bool(line.kind) for line in EXCERPTS["6.1"])
    assert meta.raw["source"]["undone"][0] == "mail"


def test_headings_may_name_the_kernel(tmp_path: Path) -> None:
    _, meta = imported(tmp_path, text_of("latency format"))
    assert meta.kernel == "5.15.0-91-generic"
    _, meta = imported(tmp_path, f"# os release : 6.12.9\n{text_of('perf script')}")
    assert meta.kernel == "6.12.9"
    _, meta = imported(tmp_path, text_of("latency format"), kernel="6.1.20")
    assert meta.kernel == "6.1.20"


def test_events_that_are_cut_short_are_texts_and_counted(tmp_path: Path) -> None:
    rows, meta = imported(tmp_path, text_of("cut at the end"))
    assert rows["text"].drop_nulls().to_list() == [
        line.text.partition(": ")[2] for line in EXCERPTS["cut at the end"] if line.kind == "other"
    ]
    assert any(line.startswith("3 events cut short") for line in meta.raw["source"]["remarks"])


def test_a_cut_archive_gives_what_is_there(tmp_path: Path) -> None:
    data = gzip.compress(text_of("6.1").encode() * 200, mtime=0)
    rows, meta = imported(tmp_path, data[: len(data) // 2])
    assert len(rows) > 10
    assert not meta.complete
    assert "ends in the middle" in meta.discrepancies[0]


def test_lost_events_are_gaps_and_counted(tmp_path: Path) -> None:
    text = (
        "q-1 [002] 1.000000: kvm_entry: vcpu 0\nCPU:2 [LOST 771 EVENTS]\nCPU:1 [EVENTS DROPPED]\n"
        "q-1 [002] 2.000000: kvm_entry: vcpu 0\n"
    )
    rows, meta = imported(tmp_path, text)
    assert meta.lost == 771
    assert meta.gap_count == 2
    assert [(gap["cpu"], gap["lost"], gap["since"]) for gap in meta.gaps] == [(2, 771, 10**9), (1, 0, 0)]
    assert rows.filter(pl.col("kind").cast(pl.String) == "gap")["vm"].null_count() == 2


def test_vms_are_told_apart_by_process_and_by_vcpu_numbers(tmp_path: Path) -> None:
    named = "".join(
        f"v-{tid} ({tid // 100}) [000] 1.00000{n}: kvm_entry: vcpu {n}\n" for n, tid in ((0, 100), (1, 101), (2, 200))
    )
    _, meta = imported(tmp_path, named)
    assert [(vm["pid"], len(vm["vcpus"])) for vm in meta.vms] == [(1, 2), (2, 1)]
    bare = "".join(f"v-{tid} [000] 1.000000: kvm_entry: vcpu {vcpu}\n" for tid, vcpu in ((100, 0), (101, 1), (200, 0)))
    rows, meta = imported(tmp_path, bare)
    assert rows["vm"].to_list() == [1, 1, 2]
    assert any("taken for 2 VMs" in line and "--vm-of 200=NAME" in line for line in meta.raw["source"]["inferred"])
    rows, meta = imported(tmp_path, bare, vm_of={100: "web", 101: "db", 200: "web"})
    assert rows["vm"].to_list() == [1, 2, 1]
    assert [vm["name"] for vm in meta.vms] == ["web", "db"]


def test_roots_follow_the_tables_made_at_their_level(tmp_path: Path) -> None:
    page = "kvm_mmu_get_page: sp gen 0 gfn 0 l{} 8-byte q0 direct wux nxe ad root 1 sync new"
    events = [
        page.format(4), "kvm_entry: vcpu 0, rip 0x1", page.format(3), "kvm_entry: vcpu 0, rip 0x1",
        "kvm_smm_transition: vcpu 0: entering SMM, smbase 0x30000", page.format(4), "kvm_entry: vcpu 0, rip 0x1",
        "kvm_smm_transition: vcpu 0: leaving SMM, smbase 0x30000", "kvm_entry: vcpu 0, rip 0x1",
    ]  # fmt: skip
    text = "".join(f"CPU 0/KVM-7 [000] 1.00000{at}: {event}\n" for at, event in enumerate(events))
    rows, meta = imported(tmp_path, text, kernel="6.1.20")
    entries = rows.filter(pl.col("kind").cast(pl.String) == "kvm_entry")
    assert entries["root"].to_list() == [1, 1, 2, 1]
    made = rows.filter((pl.col("kind").cast(pl.String) == "kvm_mmu_get_page") & (pl.col("level") == 4))
    assert made["root"].to_list() == [1, 2]
    assert [role >> 24 for role in made["role"]] == [0, 1]
    assert meta.root_count == 2
    assert not meta.uncreated_roots


@pytest.mark.slow
def test_what_a_text_cannot_show_is_said_and_replay_limits_itself(tmp_path: Path) -> None:
    rows, meta = imported(tmp_path, text_of("6.1"))
    assert meta.raw["origin"] == "imported"
    source = meta.raw["source"]
    assert {"which VM", "ioctls", "memslots", "roots"} <= set(source["cannot_show"])
    assert source["others"] == {"kvm_apic": 1}
    assert source["printed_since"] == [6, 1]
    lacking = {probe["kind"]: probe for probe in meta.raw["probes"]}
    assert lacking["memslot"]["how"] == "none"
    assert "root" in lacking["kvm_page_fault"]["lacks"]
    with pytest.raises(Problem, match="import it with --kernel"):
        invoke(["replay", str(tmp_path / "out.parquet")])
    imported(tmp_path, text_of("6.1"), kernel="6.1.20")
    with pytest.raises(Problem, match=r"loads of roots are not in its source: nothing to replay"):
        invoke(["replay", str(tmp_path / "out.parquet")])
    assert len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [["info"], ["report", "--no-replay"], ["report", "--no-replay", "--format", "json"]])
def test_info_and_report_say_where_it_comes_from(verb: list[str], tmp_path: Path) -> None:
    imported(tmp_path, text_of("6.1"), kernel="6.1.20")
    done = kvmtrace([*verb, str(tmp_path / "out.parquet")])
    assert done.returncode == 0, done.stderr
    assert b"imported from the text" in done.stdout


@pytest.mark.slow
def test_what_has_no_event_is_named_in_one_line(tmp_path: Path) -> None:
    given = {
        "empty": (b"", "an empty file"),
        "prose": (b"Dear list,\nmy VM hangs.\n", "no line of ftrace"),
        "sched": (b" x-1 [000] 1.000000: sched_switch: a ==> b\n" * 3, "3 others (sched_switch)"),
        "elf": (b"\x7fELF\0\0\0", "ELF"),
        "trace": (b"PAR1\0\0", "nothing to import"),
        "dat": (b"\x17\x08Dtracing6\0\0\x08", "a damaged trace.dat"),
        "perf": (b"PERFILE2\0\0\0", "a damaged perf.data"),
    }
    for name, (data, expected) in given.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(Problem, match=r"^[^\n]*$") as caught:
            invoke(["import", str(path), "-o", str(tmp_path / "out.parquet")])
        assert caught.value.code == BAD_INPUT
        assert expected in str(caught.value)
        assert not (tmp_path / "out.parquet").exists()


@pytest.mark.slow
def test_standard_input_and_json(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    done = kvmtrace(["import", "-", "-o", str(out), "--json"], input=text_of("6.1").encode())
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["events"] == Trace.open(out).metadata.events
    assert document["others"] == {"kvm_apic": 1}
    done = kvmtrace(["import", "-", "-o", str(out)], input=text_of("5.4").encode())
    assert done.returncode == 0, done.stderr  # an imported trace may be imported anew
    assert Trace.open(out).metadata.events == len(EXCERPTS["5.4"])


def test_memslots_are_told(tmp_path: Path) -> None:
    source, out = tmp_path / "text", tmp_path / "out.parquet"
    source.write_text(text_of("5.4"))
    invoke(["import", str(source), "-o", str(out), "--memslot", "0+640K", "--memslot", "0x100000+3G@0x7f1200000000"])
    (vm,) = Trace.open(out).metadata.vms
    assert [(slot["gfn"], slot["pages"], slot["hva"]) for slot in vm["slots"]] == [
        (0, 160, 0), (256, 786432, 0x7F1200000000),
    ]  # fmt: skip
    for wrong in ("x", "1+4K", "0+0", "0+4097", "0+8000T"):
        with pytest.raises(Problem, match="--memslot"):
            invoke(["import", str(source), "-o", str(out), "--memslot", wrong])
    with pytest.raises(Problem, match="--vm-of"):
        invoke(["import", str(source), "-o", str(out), "--vm-of", "web=1"])


def test_events_of_other_kinds_are_kept_as_text_and_given_back(tmp_path: Path) -> None:
    text = (
        "CPU 0/KVM-7 [001] 1.000000: kvm_entry: vcpu 0, rip 0x1\n"
        "<idle>-0 [002] 1.000001: sched_switch: prev_comm=swapper/2 prev_pid=0 ==> next_comm=CPU 0/KVM next_pid=7\n"
        "CPU 0/KVM-7 [001] 1.000002: kvm_apic: apic_read APIC_ID = 0x0\n"
        "CPU 0/KVM-7 [001] 1.000003: kvm_exit: vcpu 0 reason HLT rip 0x1 info1 0x0000000000000000 "
        "info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000\n"
        f"x-9 [003] 1.000004: long: {'y' * 900}\n"
    )
    rows, meta = imported(tmp_path, text, kernel="6.1.20")
    kinds = rows["kind"].cast(pl.String)
    assert kinds.to_list() == ["kvm_entry", "other", "other", "kvm_exit", "other"]
    assert rows["text"].to_list()[:4] == [
        None, "sched_switch: prev_comm=swapper/2 prev_pid=0 ==> next_comm=CPU 0/KVM next_pid=7",
        "kvm_apic: apic_read APIC_ID = 0x0", None,
    ]  # fmt: skip
    assert len(rows["text"][4]) == 480
    others = rows.filter(kinds == "other")
    assert others.select("cpu", "tid").rows() == [(2, 0), (1, 7), (3, 9)]
    assert others["vm"].null_count() == others["vcpu"].null_count() == len(others)
    assert len(meta.vms) == 1  # a thread with no event of KVM is no VM's
    assert meta.raw["source"]["others"] == {"sched_switch": 1, "kvm_apic": 1, "long": 1}
    for style in ("--ftrace-text", "--perf-script"):
        back = tmp_path / "back"
        invoke(["export", str(tmp_path / "out.parquet"), style, "-o", str(back), "--force"])
        invoke(["import", str(back), "-o", str(tmp_path / "again.parquet"), "--kernel", "6.1.20", "--force"])
        again = pl.read_parquet(tmp_path / "again.parquet").sort("seq")
        shown = ["time", "cpu", "tid", "kind", "text"]
        assert again.select(shown).rows() == rows.select(shown).rows()


def test_a_trace_without_other_events_has_no_column_more(tmp_path: Path) -> None:
    rows, _ = imported(tmp_path, text_of("5.4"))
    assert "text" not in rows.columns


@pytest.mark.kvm
@pytest.mark.live
def test_perf_data_of_this_machine(tmp_path: Path) -> None:
    """All that perf recorded is there, under the kernel's release that the file has."""
    if shutil.which("perf") is None:
        pytest.skip("no perf here")
    data, out = tmp_path / "perf.data", tmp_path / "out.parquet"
    events = "kvm:kvm_userspace_exit,kvm:kvm_entry,kvm:kvm_exit,kvm:kvm_page_fault,kvmmmu:*"
    workload = [str(vmm.binary()), "storm", "--loops", "2"]
    recorded = subprocess.run(["perf", "record", "-q", "-o", str(data), "-e", events, *workload], capture_output=True)
    assert recorded.returncode == 0, recorded.stderr
    printed = subprocess.run(
        ["perf", "script", "-F", "event", "-i", str(data)], capture_output=True, text=True, check=True
    )
    counted = Counter(line.strip().strip(":").partition(":")[2] for line in printed.stdout.splitlines() if line.strip())
    invoke(["import", str(data), "-o", str(out)])
    meta = Trace.open(out).metadata
    assert dict(meta.kinds) == counted
    assert meta.raw["source"]["odd"] == 0, meta.raw["source"]["first_odd"]
    assert meta.kernel == os.uname().release


def test_pieces_of_a_text_may_end_anywhere() -> None:
    text = text_of("6.1").encode() * 3
    whole = _scanned(text, len(text))
    for size in (1, 7, 64, 333):
        assert _scanned(text, size) == whole


def test_the_compiled_scanner_reads_as_the_plain_one() -> None:
    beneath = ("line_text", "line_head", "named_fields", "event_text", "line_rows")
    reference = plain("traces.imports.scan", *(f"traces.imports.{each}" for each in beneath))
    assert not reference.COMPILED
    assert all("as_python" in each.__module__ for each in reference.Scanner.__mro__[:-1])
    for name in EXCERPTS:
        text = text_of(name).encode()
        assert _scanned(text, len(text), reference.Scanner) == _scanned(text, len(text))
    for seed in range(12):
        text = mailed(text_of("6.1"), seed)
        assert _scanned(text, len(text), reference.Scanner) == _scanned(text, len(text))


def _scanned(text: bytes, size: int, scanner: Any = scan.Scanner) -> Any:
    made, left = scanner(), b""
    for at in range(0, len(text), size):
        left += text[at : at + size]
        left = left[made.take(left, 0, False) :]
    made.take(left, 0, True)
    rows = {name: values[: made.rows].tolist() for name, values in made.columns.items()}
    return rows, made.odd, made.first_odd, made.threads, made.others(), made.forms.tolist(), made.texts


@pytest.mark.skipif(not os.environ.get("CI") and not scan.COMPILED, reason="the engine is not compiled: scripts/setup")
def test_the_scanner_is_compiled() -> None:
    assert scan.COMPILED


def test_the_table_of_forms_fits_the_kinds() -> None:
    made = program()
    assert len(made.order) == len(FORMS)
    for form in FORMS:
        assert form.kind in BY_NAME
        for piece in pieces(form.text):
            assert not piece.column or piece.column.startswith("role.") or piece.column in (
                "vcpu", *BY_NAME[form.kind].columns
            )  # fmt: skip
    for kind, fields in FIELDS.items():
        assert {target.partition("<<")[0].partition(">>")[0].partition("&")[0] for target in fields.values()} <= {
            "vcpu", "isa", *BY_NAME[kind].columns,
        }  # fmt: skip


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten times the text takes no more memory, within what a batch takes."""
    line = text_of("6.1").encode()
    peaks = []
    for times in (2_000, 20_000):
        path = tmp_path / "text"
        path.write_bytes(line * times)
        code = (
            "import resource, sys; from pathlib import Path; from traces.imports.importing import import_file\n"
            "from traces.imports.told import ToldOfText\n"
            "import_file(Path(sys.argv[1]), Path(sys.argv[2]), ToldOfText(), force=True)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / "out.parquet")], capture_output=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 200_000  # KiB; 20,000 copies are 40 MB of text and 20 MB of records
