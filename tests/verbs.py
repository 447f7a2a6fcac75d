# SPDX-License-Identifier: Apache-2.0
"""Every verb and mode that tests walk, as command lines over one small recording; `Files` says what is there.

test_help.py holds that none is left out. What needs more of the machine than files says so with a marker.
"""

from __future__ import annotations

import atexit
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import kvmtrace as command_line
from benchmarks import fleet_rows
from tests.corpus import CORPUS
from tests.lab.synthetic import TREE, bzimage
from tests.traces.making import numbered, write
from tracer.lab.lab_kernels import KERNELS
from tracer.lab.matrix import PROVENANCE, provenance
from traces import outputs
from traces.command_line import ending

TRACE = CORPUS / "huge-6.1.parquet"


@dataclass(frozen=True)
class Verb:
    """A command line; `kind`: what {out} becomes; `code`: its exit code when nothing is in its way.

    `needs`: the marker of what it needs of the machine.
    """

    name: str
    line: str
    kind: outputs.FileKind | None = None
    code: int = 0
    needs: str = ""

    def words(self, files: Files, out: Path | None = None) -> list[str]:
        """Its arguments."""
        values = {**vars(files), "out": out}
        return [word.format(**values) for word in self.line.split()]

    @property
    def input(self) -> str:
        """The field of `Files` that it reads; empty for none."""
        return next((name for name in ("trace", "result", "kvmt", "text") if f"{{{name}}}" in self.line), "")


@dataclass(frozen=True)
class Files:
    """The inputs, in a directory of their own. `schedules`: what `explore --json` found; `recordings`: of a lab.

    `results` are of a fleet; `catalogue` is of a folder with the trace, `replayed` where its replay goes.
    """

    trace: Path
    result: Path
    kvmt: Path
    text: Path
    schedules: Path
    recordings: Path
    results: Path
    catalogue: Path
    replayed: Path


_REPORT = "report {trace} --no-replay --format"
# Those that write a file.
WRITERS = [
    Verb("replay", "replay {trace} --no-time -o {out}", outputs.RESULT),
    Verb("report-text", f"{_REPORT} text -o {{out}}", outputs.PROSE),
    Verb("report-md", f"{_REPORT} md -o {{out}}", outputs.PROSE),
    Verb("report-mail", f"{_REPORT} mail -o {{out}}", outputs.PROSE),
    Verb("report-html", f"{_REPORT} html -o {{out}}", outputs.PAGE),
    Verb("report-json", f"{_REPORT} json -o {{out}}", outputs.DOCUMENT),
    Verb("report-junit", f"{_REPORT} junit -o {{out}}", outputs.JUNIT),
    Verb("report-result", "report {result} -o {out}", outputs.PROSE),
    Verb("diff-text", "diff {result} {trace} -o {out}", outputs.PROSE),
    Verb("diff-md", "diff {trace} {result} --format md -o {out}", outputs.PROSE),
    Verb("diff-mail", "diff {result} {result} --format mail -o {out}", outputs.PROSE),
    Verb("diff-json", "diff {result} {result} --format json -o {out}", outputs.DOCUMENT),
    Verb("export-csv", "export {trace} --csv gfns -o {out}", outputs.FileKind("the rows of query gfns")),
    Verb("export-list", "export {trace} --list -o {out}", outputs.QUERIES),
    Verb("export-ftrace", "export {trace} --ftrace-text -o {out}", outputs.FTRACE_TEXT),
    Verb("export-dat", "export {trace} --trace-dat -o {out}", outputs.TRACE_DAT),
    Verb("export-perf", "export {trace} --perf-script -o {out}", outputs.PERF_TEXT),
    Verb("export-perfetto", "export {trace} --perfetto -o {out}", outputs.TIMELINE),
    Verb("export-result-csv", "export {result} --csv roots -o {out}", outputs.FileKind("the rows of query roots")),
    Verb("export-result-list", "export {result} --list -o {out}", outputs.QUERIES),
    Verb("export-result-perfetto", "export {result} --perfetto -o {out}", outputs.TIMELINE),
    Verb("synth", "synth {out} --duration 0.02", outputs.SYNTHETIC),
    Verb("synth-json", "synth {out} --duration 0.02 --json", outputs.SYNTHETIC),
    Verb("recover", "recover {kvmt} -o {out}", outputs.RECORDING),
    Verb("import", "import {text} -o {out}", outputs.IMPORTED),
    Verb("import-json", "import {text} -o {out} --json", outputs.IMPORTED),
    Verb("recover-json", "recover {kvmt} -o {out} --json", outputs.RECORDING),
    Verb("fleet-report-text", "fleet report {results} -o {out}", outputs.PROSE),
    Verb("fleet-report-md", "fleet report {results} --format md -o {out}", outputs.PROSE),
    Verb("fleet-report-html", "fleet report {results} --format html -o {out}", outputs.PAGE),
    Verb("fleet-report-json", "fleet report {results} --format json -o {out}", outputs.DOCUMENT),
    Verb("fleet-diff-text", "fleet diff {results} {results} -o {out}", outputs.PROSE),
    Verb("fleet-diff-json", "fleet diff {results} {results} --format json -o {out}", outputs.DOCUMENT),
    Verb("fleet-index", "fleet index {recordings} -o {out}", outputs.CATALOGUE),
    Verb("fleet-index-json", "fleet index {recordings} -o {out} --json", outputs.CATALOGUE),
]
# The same, of those that make something else each time.
RECORDERS = [
    Verb("record", "record --events roots --duration 0.1 -o {out}", outputs.RECORDING, needs="live"),
    Verb("record-json", "record --events roots --duration 0.1 -o {out} --json", outputs.RECORDING, needs="live"),
    Verb("lab-run", "lab run --kernel 6.1 --scenario steady -o {out}", outputs.RECORDING, needs="lab"),
]
# Those that answer on standard output.
TALKERS = [
    Verb("info", "info {trace}"),
    Verb("info-json", "info {trace} --json"),
    Verb("validate", "validate {trace}"),
    Verb("validate-json", "validate {trace} --json"),
    Verb("validate-part", "validate {trace} --vm 1 --from 1ms"),
    Verb("replay", "replay {trace}"),
    Verb("replay-json", "replay {trace} --json"),
    Verb("replay-sweep", "replay {trace} --sweep smi-rate=10:100:log"),
    Verb("replay-smi-rate", "replay {trace} --smi-rate 10"),
    Verb("replay-aging", "replay {trace} --aging locked"),
    Verb("replay-zap-lock", "replay {trace} --zap-lock read"),
    Verb("replay-apicv", "replay {trace} --apicv gfn"),
    Verb("replay-tdp-pages", "replay {trace} --tdp-pages list"),
    Verb("report-text", "report {trace}"),
    Verb("report-part", "report {trace} --vm 1 --vcpu 0 --from 1ms --to 1s"),
    Verb("report-gate", "report {trace} --fail-on roots_created>0", code=1),
    Verb("report-md", "report {trace} --format md"),
    Verb("report-mail", "report {trace} --format mail"),
    Verb("report-html", "report {trace} --format html"),
    Verb("report-json", "report {trace} --format json"),
    Verb("report-junit", "report {trace} --format junit"),
    Verb("diff", "diff {trace} {result}"),
    Verb("diff-part", "diff {trace} {trace} --vm 1=1 --vcpu 0 --to 1s"),
    Verb("fleet-report", "fleet report {results} --by host,day"),
    Verb("fleet-report-gate", "fleet report {results} --fail-on vms>0", code=1),
    Verb("fleet-diff-md", "fleet diff {results} {results} --format md"),
    Verb("export-csv", "export {trace} --csv gfns"),
    Verb("export-list", "export {trace} --list"),
    Verb("explore", "explore vm-destroy --variant v2", code=1),
    Verb("explore-json", "explore vm-destroy --variant v2 --json", code=1),
    Verb("explore-list", "explore --list"),
    Verb("explore-replay", "explore --replay {schedules}", code=1),
    Verb("kernels", "kernels"),
    Verb("kernels-one", "kernels 6.1"),
    Verb("kernels-two", "kernels 5.15 6.12"),
    Verb("kernels-json", "kernels 6.1 --json"),
    Verb("doctor", "doctor"),  # its exit code is the machine's
    Verb("doctor-json", "doctor --json"),
    Verb("fleet-replay", "fleet replay {catalogue} -o {replayed}"),
    Verb("fleet-replay-json", "fleet replay {catalogue} -o {replayed} --json"),
    Verb("dump", "dump {kvmt}", code=2),  # nobody records into it
    Verb("dump-json", "dump {kvmt} --json", code=2),
    Verb("top", "top {trace} --once"),
    Verb("top-json", "top {trace} --once --json"),
    Verb("lab-list", "lab list"),
    Verb("lab-list-json", "lab list --json"),
    Verb("lab-fetch", "lab fetch 6.1"),
    Verb("lab-matrix", "lab matrix -o {recordings} --kernel 6.1 --scenario steady --no-shadow"),
    Verb("lab-matrix-json", "lab matrix -o {recordings} --kernel 6.1 --scenario steady --no-shadow --json"),
    Verb("lab-corpus", "lab corpus {recordings} --cpu amd"),
    Verb("lab-corpus-json", "lab corpus {recordings} --cpu amd --json"),
    Verb("lab-run-bare", "lab run --kernel 6.1 --scenario steady --bare", needs="lab"),
    Verb("record-flight", "record --flight 1s --events roots --duration 0.1 -o {recordings}", needs="live"),
    Verb("probes-text", "probes text", needs="live"),
    Verb("probes-build", "probes build -o {recordings}", needs="live"),
    Verb("help", "replay --help"),
    Verb("version", "--version"),
]


def contents(*directories: Path) -> dict[Path, bytes | None]:
    """All files, with what is in them."""
    found = [path for directory in directories for path in (directory, *directory.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def invoke(words: Sequence[str]) -> None:
    """Run a command line in this process; raises its Problem."""
    command_line.app(list(words), standalone_mode=False)


def answered(*words: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run a command line in this process, for what it prints and its exit code: a process of its own takes longer."""
    out, err = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, COLUMNS=str(columns)), redirect_stdout(out), redirect_stderr(err):
        code = ending._code_of(lambda: command_line.app(list(words), standalone_mode=False) or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def printed(*words: str, code: int = 0, columns: int = 80) -> str:
    """What a command line prints that ends with this exit code, in this process."""
    done = answered(*words, columns=columns)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout


def kvmtrace(words: list[str], before: str = "", **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run a command line in a process of its own; `before` is run in it first."""
    code = f"{before}\nimport sys; sys.argv[0] = 'kvmtrace'\nimport kvmtrace; kvmtrace.main()"
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 1200, **options}
    given["env"] = environment(words, given.get("env"))
    return subprocess.run([sys.executable, "-c", code, *words], check=False, **given)  # type: ignore[call-overload,no-any-return]


@cache
def _lab() -> Path:
    """A cache with every kernel of the lab, made up: none is booted, and none is fetched."""
    directory = Path(tempfile.mkdtemp(prefix="kvmtrace-lab-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in KERNELS:
        home = directory / "kvmtrace" / "kernels" / name
        (home / "modules").mkdir(parents=True)
        (home / "vmlinuz").write_bytes(bzimage(f"{name}.0-1-amd64 (b@h) #1 SMP Debian {name}.0-1 (2026-11-16)"))
        for module, image in TREE.items():
            (home / "modules" / f"{module}.ko").write_bytes(image)
    return directory


def environment(words: Sequence[str], given: object = None) -> dict[str, str]:
    """The environment of a command line: `given` or ours, with the kernels of `_lab` where none is to be booted."""
    assert given is None or isinstance(given, dict)
    base = dict(os.environ if given is None else given)
    return {**base, "XDG_CACHE_HOME": str(_lab())} if words[0] == "lab" and words[1] != "run" else base


def make_files(directory: Path) -> Files:
    """The inputs, made anew."""
    trace, result, kvmt = (directory / name for name in ("in.parquet", "result.parquet", "left.kvmt"))
    schedules, recordings = directory / "found.json", directory / "recordings"
    recordings.mkdir()
    shutil.copy(CORPUS / PROVENANCE, recordings)
    for row in provenance(recordings):
        (recordings / row.file).touch()  # what is there is not recorded again
    schedules.write_text(printed("explore", "vm-destroy", "--variant", "v2", "--json", code=1))
    shutil.copy(TRACE, trace)
    printed("replay", os.fspath(trace), "-o", os.fspath(result))
    write(kvmt, numbered(50))
    text = directory / "trace_pipe.txt"
    results = directory / "results"
    fleet_rows.write(fleet_rows.Fleet(hosts=3, days=1, vms=2), results)
    text.write_text(" CPU 0/KVM-7 [000] ..... 1.000000: kvm_entry: vcpu 0, rip 0xfff0\n" * 50)
    catalogue, replayed = directory / "catalogue.parquet", directory / "replayed"
    (directory / "fleet").mkdir()
    shutil.copy(TRACE, directory / "fleet")
    printed("fleet", "index", os.fspath(directory / "fleet"), "-o", os.fspath(catalogue))
    return Files(trace, result, kvmt, text, schedules, recordings, results, catalogue, replayed)
