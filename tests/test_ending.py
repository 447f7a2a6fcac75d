# SPDX-License-Identifier: Apache-2.0
"""What ends a command: streams closed, full or unread, odd terminals, locales and names, and ^C at every moment.

Each in a process of its own; `make quick` runs a few.
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.verbs import RECORDERS, TALKERS, WRITERS, Files, Verb, contents, environment, kvmtrace
from traces import outputs
from traces.command_line.interrupts import CODE as INTERRUPTED
from traces.errors import BAD_INPUT
from traces.synth import Parameters, synthesize

pytestmark = pytest.mark.slow

LIMIT = 64  # bytes that a file may have where the disk is full
BEGINNINGS = (b"no VM is running yet", b"kvmtrace: recording: ")
QUICK = ("info", "report-gate", "synth")


def verbs(given: Sequence[Verb], *, quick: Sequence[str] = QUICK) -> Any:
    def marks(verb: Verb) -> list[pytest.MarkDecorator]:
        if verb.needs:
            return [getattr(pytest.mark, verb.needs)]
        return [] if verb.name in quick else [pytest.mark.slow]

    return pytest.mark.parametrize("verb", [pytest.param(verb, id=verb.name, marks=marks(verb)) for verb in given])


@pytest.fixture(autouse=True)
def _machine(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("live"):
        request.getfixturevalue("live")


def said(done: subprocess.CompletedProcess[bytes], code: int = BAD_INPUT) -> str:
    """The one line of a command that could not do its work: exit code 2."""
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = [
        line for line in done.stderr.splitlines() if not any(begin in line for begin in BEGINNINGS)
    ]  # `record` says that first
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(b"kvmtrace: ")
    return lines[0].decode()


@verbs([*WRITERS, *RECORDERS])
def test_a_full_disk_leaves_what_was_there(
    verb: Verb, files: Files, whole: Callable[[Verb], Path], tmp_path: Path
) -> None:
    places = [tmp_path / "absent"]
    if verb.kind != outputs.RECORDING:
        shutil.copy(whole(verb), tmp_path / "there")
        places.append(tmp_path / "there")
        line = said(kvmtrace(verb.words(files, Path("/dev/full"))))
        assert "No space left on device" in line
    before = contents(tmp_path)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))"
    for out in places:
        done = kvmtrace(verb.words(files, out), limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        assert "File too large" in said(done)
        assert contents(tmp_path) == before


PRINTING = [verb for verb in TALKERS if verb.name != "record-flight"]  # which prints the names of its dumps
DOCUMENTED = [verb for verb in (*WRITERS, *RECORDERS) if verb.line.endswith("--json")]


@pytest.mark.slow
@verbs([*PRINTING, *DOCUMENTED])
def test_standard_output_that_is_closed_full_or_unread(verb: Verb, files: Files, tmp_path: Path) -> None:
    places = iter([tmp_path / name for name in ("closed", "full", "closed by a shell", "unread")])
    words = verb.words(files, next(places))
    code = BAD_INPUT
    if verb.name.startswith("doctor"):  # what this machine lacks, 3, it has found by the time it prints
        code = max(code, kvmtrace(words, stdout=subprocess.DEVNULL).returncode)
    if verb.code == BAD_INPUT:
        said(kvmtrace(words, stdout=subprocess.DEVNULL))  # it prints nothing
        return
    closing = "import os; os.dup2(os.open('/dev/null', os.O_RDONLY), 1)"
    assert "standard output" in said(kvmtrace(words, closing), code)
    words = verb.words(files, next(places))
    with Path("/dev/full").open("wb") as full:
        assert "No space left on device" in said(kvmtrace(words, stdout=full), code)
    shell = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "kvmtrace"]
    words = verb.words(files, next(places))
    closed = subprocess.run([*shell, *words], stderr=subprocess.PIPE, check=False, env=environment(words))
    assert "standard output" in said(closed, code)
    reading, writing = os.pipe()
    os.close(reading)
    words = verb.words(files, next(places))
    done = kvmtrace(words, stdout=writing)
    os.close(writing)
    assert b"Broken" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.returncode == verb.code or verb.name.startswith("doctor")
    assert verb.kind is None or sum(1 for _ in tmp_path.iterdir()) == 4, "what was asked for is there"


def test_a_closed_standard_error_does_not_go_to_standard_output(files: Files) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "kvmtrace"]
    done = subprocess.run([*shell, "info", "/nonexistent"], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (BAD_INPUT, b"")


@pytest.mark.slow
@verbs([*TALKERS, *RECORDERS])
def test_a_narrow_dumb_terminal_an_ascii_locale_and_none(verb: Verb, files: Files, tmp_path: Path) -> None:
    places = iter([tmp_path / name for name in "1234"])
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    codes = set()
    for variables in (
        {"COLUMNS": "40", "TERM": "dumb", "LC_ALL": "C"},
        {"COLUMNS": "1", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii:strict", "TERM": ""},
    ):
        done = kvmtrace(verb.words(files, next(places)), env={**plain, **variables})
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        codes.add(done.returncode)
    ours, theirs = pty.openpty()
    words = verb.words(files, next(places))
    narrow = environment(words, {**plain, "COLUMNS": "40", "TERM": "dumb"})
    child = subprocess.Popen([sys.executable, "-m", "kvmtrace", *words], stdout=theirs, stderr=theirs, env=narrow)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # EIO: the terminal's other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert b"Traceback" not in shown, shown.decode(errors="replace")
    codes.add(child.wait())
    assert len(codes) == 1
    assert verb.name.startswith("doctor") or codes == {verb.code}


@verbs([*WRITERS, *RECORDERS, *TALKERS])
def test_a_name_that_is_not_utf_8_is_one_line(verb: Verb, files: Files, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"odd-\xff.parquet")
    shutil.copy(files.trace, odd)
    before = sorted(tmp_path.iterdir())
    given = Files(*[odd] * len(fields(Files)))
    words = verb.words(given, odd.with_suffix(".out"))
    if os.fspath(odd) not in words and verb.kind is None:
        words.append(os.fspath(odd))  # what takes no file takes no such word either
    assert "UTF-8" in said(kvmtrace(words))
    assert sorted(tmp_path.iterdir()) == before


# Sends SIGINT to itself at the n-th import after kvmtrace's own first one, so that no clock decides where it hits.
_AT_IMPORT = """
import os, signal, sys
count, module = None, 'traces.command_line.interrupts'
def hook(event, arguments):
    global count
    if event == 'import':
        if count is not None:
            count += 1
            if count == {at}:
                os.kill(os.getpid(), signal.SIGINT)
        elif arguments[0] == module:
            pass
        elif module in sys.modules and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            count = 0
sys.addaudithook(hook)
sys.argv[0] = 'kvmtrace'
"""
# ... and when a file is to get its name.
_AT_RENAME = """
import os, signal, sys
sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGINT) if event == 'os.rename' else None)
"""
# ... and at the n-th call or return after a file was created that gets its name later: nobody may have its path yet.
_AT_CREATION = """
import os, signal, sys
count = None
def hook(frame, event, called):
    global count
    if count is not None:
        count += 1
        if count == {at}:
            os.kill(os.getpid(), signal.SIGINT)
    elif event == 'c_return' and called is os.open and frame.f_code.co_name == 'create_beside':
        count = 0
sys.setprofile(hook)
"""
COMMAND = Path(__file__).parents[1] / "scripts" / "kvmtrace"


@pytest.mark.parametrize("ignored", [False, True])
def test_interrupted_while_python_itself_starts(ignored: bool, files: Files, tmp_path: Path) -> None:
    """Python runs sitecustomize before the command's first import, as it does what .pth files say."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = ["/bin/sh", "-c", ("trap '' INT; " if ignored else "") + 'exec "$@"', "sh"]
    done = subprocess.run(
        [*shell, COMMAND, "info", files.trace],
        capture_output=True, check=False, env={**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == ((0, b"") if ignored else (INTERRUPTED, b"kvmtrace: interrupted\n"))


def test_the_command_is_the_module_and_loads_nothing_from_where_it_is_called(files: Files, tmp_path: Path) -> None:
    (tmp_path / "traces.py").write_text("raise SystemExit('not ours')")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [COMMAND, "info", files.trace], capture_output=True, check=False, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stdout) == (0, kvmtrace(["info", str(files.trace)]).stdout)


def test_processes_that_the_command_starts_find_what_it_finds(files: Files, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [COMMAND, "fleet", "replay", files.catalogue, "-o", tmp_path / "results"],
        capture_output=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


_SOME = (
    "info", "report-html", "report-text", "export-perfetto", "replay", "diff-text", "synth", "recover", "validate",
    "doctor", "explore", "kernels-one", "record", "lab-list", "probes-text",
)  # fmt: skip


@verbs([verb for verb in (*WRITERS, *RECORDERS, *TALKERS) if verb.name in _SOME], quick=())
def test_interrupted_while_modules_load(verb: Verb, files: Files, tmp_path: Path) -> None:
    out, hit = tmp_path / "out", 0
    for at in (1, 2, 3, 5, 8, 20, 50, 120, 250, 400, 550, 700, 900, 1200, 1600):
        done = kvmtrace(verb.words(files, out), _AT_IMPORT.format(at=at))
        assert b"Traceback" not in done.stderr, (at, done.stderr.decode())
        if done.returncode != INTERRUPTED:
            break
        hit += 1
        assert done.stderr == b"kvmtrace: interrupted\n", (at, done.stderr)
        assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])
    assert hit > 5


@verbs([verb for verb in WRITERS if verb.name in ("synth", "replay")], quick=("synth",))
def test_interrupted_while_a_file_is_created(verb: Verb, files: Files, tmp_path: Path) -> None:
    for at in range(1, 25):
        done = kvmtrace(verb.words(files, tmp_path / "out"), _AT_CREATION.format(at=at))
        assert (done.returncode, done.stderr) == (INTERRUPTED, b"kvmtrace: interrupted\n"), at
        assert not list(tmp_path.iterdir()), at


@verbs(WRITERS, quick=("synth",))
def test_interrupted_while_a_file_gets_its_name(
    verb: Verb, files: Files, whole: Callable[[Verb], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = kvmtrace(verb.words(files, out), _AT_RENAME)
    assert (done.returncode, done.stderr) == (INTERRUPTED, b"kvmtrace: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])
    if out.exists():
        assert out.read_bytes() == whole(verb).read_bytes()


@pytest.mark.slow
def test_interrupted_with_many_vms_at_work(tmp_path: Path) -> None:
    trace, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    synthesize(trace, Parameters(policy="async", vms=6, events=2_000_000))
    for rows in (1, 100_000, 300_000):
        stop = f"""
import os, signal
from traces.command_line.progress import Progress
at = Progress.at
def stopped(self, done):
    if done >= {rows}:
        os.kill(os.getpid(), signal.SIGINT)
    at(self, done)
Progress.at = stopped
"""
        done = kvmtrace(["replay", str(trace), "-o", str(out)], stop)
        assert (done.returncode, done.stderr) == (INTERRUPTED, b"kvmtrace: interrupted\n"), rows
        assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_an_interrupt_in_a_weak_references_callback_is_not_lost(tmp_path: Path) -> None:
    """Python would print it there, with the lines of its own code, and go on."""
    trace = tmp_path / "in.parquet"
    synthesize(trace, Parameters(events=10_000))
    stop = """
import os, signal, weakref
from traces.command_line.progress import Progress
class Key:
    pass
class Data(dict):
    def __delitem__(self, key):
        os.kill(os.getpid(), signal.SIGINT)
        super().__delitem__(key)
kept = weakref.WeakKeyDictionary()
kept.data = Data()
at = Progress.at
def stopped(self, done):
    kept[Key()] = done
    for _ in range(100):
        signal.sigtimedwait([], 0.01)
    at(self, done)
Progress.at = stopped
"""
    done = kvmtrace(["replay", str(trace)], stop)
    assert (done.returncode, done.stderr, done.stdout) == (INTERRUPTED, b"kvmtrace: interrupted\n", b"")


def test_behind_a_shells_ampersand_an_ignored_interrupt_stays_ignored(files: Files) -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + _AT_IMPORT.format(at=100)
    done = kvmtrace(["info", str(files.trace)], ignored)
    assert done.returncode == 0
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
