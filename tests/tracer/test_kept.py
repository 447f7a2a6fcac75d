# SPDX-License-Identifier: Apache-2.0
"""Probes kept between recordings: read back as they were, from nobody else's hands, and used without a compiler."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import NOT_ROOT
from tracer.probing import compiled, kept
from tracer.probing.compiled import MAPS, Compiled
from traces.errors import Problem

EXIT = b"\xb7" + bytes(7) + b"\x95" + bytes(7)  # r0 = 0; exit
LOAD_SECOND_MAP = b"\x18\x11\x00\x00\x01\x00\x00\x00" + bytes(8)
SHAPES = dict.fromkeys(MAPS, (2, 4, 8, 1, 0))
PROGRAMS = Compiled(SHAPES, {"nothing": EXIT, "looks": LOAD_SECOND_MAP + EXIT})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for probes, and a bcc of a version of its own."""
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "probes"))
    monkeypatch.setattr(kept, "bcc_version", lambda: "0.99")
    monkeypatch.setattr(kept, "key", lambda text: f"{len(text):032x}")
    return tmp_path / "probes"


def test_what_is_kept_is_found_again(place: Path) -> None:
    assert kept.find("text") == ""
    path = kept.keep("text", PROGRAMS)
    assert path.parent == place
    assert path.stat().st_mode & 0o777 == 0o644
    assert kept.find("text") == PROGRAMS
    assert kept.find("another text") == ""


def test_another_bcc_compiles_anew_but_none_takes_any(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.keep("text", PROGRAMS)
    monkeypatch.setattr(kept, "bcc_version", lambda: "0.100")
    assert kept.find("text") == ""
    monkeypatch.setattr(kept, "bcc_version", lambda: "")
    assert kept.find("text") == PROGRAMS


def test_maps_get_their_descriptors() -> None:
    code = PROGRAMS.with_maps("looks", {name: 100 + i for i, name in enumerate(MAPS)})
    assert code == b"\x18\x11\x00\x00" + (101).to_bytes(4, "little") + bytes(8) + EXIT
    assert PROGRAMS.with_maps("nothing", dict.fromkeys(MAPS, 7)) == EXIT


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_directory_that_others_can_write_is_not_read(place: Path, mode: int) -> None:
    kept.keep("text", PROGRAMS)
    place.chmod(mode)
    said = kept.find("text")
    assert isinstance(said, str)
    assert f"others own {place} or can write in it" in said
    with pytest.raises(Problem, match="can write in it"):
        kept.keep("text", PROGRAMS)


def test_nor_one_below_a_directory_that_others_can_write(tmp_path: Path, place: Path) -> None:
    kept.keep("text", PROGRAMS)
    tmp_path.chmod(0o777)
    assert f"others own {tmp_path} " in str(kept.find("text"))
    if os.geteuid() == 0:  # a sticky one, such as /tmp, is root's
        tmp_path.chmod(0o1777)
        assert kept.find("text") == PROGRAMS


def test_a_file_that_others_can_write_or_own_is_not_read(place: Path) -> None:
    path = kept.keep("text", PROGRAMS)
    path.chmod(0o666)
    assert "others own it or can write it" in str(kept.find("text"))
    path.chmod(0o644)
    if os.geteuid() != 0:
        pytest.skip(NOT_ROOT)
    os.chown(path, 65534, 65534)
    assert "others own it or can write it" in str(kept.find("text"))


def test_a_link_and_a_fifo_are_not_followed(place: Path, tmp_path: Path) -> None:
    path = kept.keep("text", PROGRAMS)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert isinstance(kept.find("text"), str)
    assert kept.find("text")
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in str(kept.find("text"))


def test_an_unusable_file_is_said_once_and_compiled_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept.keep("text", PROGRAMS)
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(kept, "compile_text", lambda _: PROGRAMS)
    assert kept.get("text") == PROGRAMS
    said = capsys.readouterr().err
    assert said.startswith(f"kvmtrace: kept probes are not used: {path}: ")
    assert said.count("\n") == 1
    assert kept.find("text") == PROGRAMS, "and the good ones are kept in its place"


def test_without_bcc_the_line_says_both_ways(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "bcc_version", lambda: "")
    with pytest.raises(
        Problem, match=r"no probes for this kernel.*apt-get install python3-bpfcc, or.*probes build"
    ) as caught:
        kept.get("text")
    assert caught.value.code == 3


def test_the_oldest_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_FILES", 3)
    for number in range(5):
        os.utime(kept.keep("x" * number, PROGRAMS), (number, number))
    assert sorted(path.name[31] for path in place.iterdir()) == ["2", "3", "4"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def refused(document: bytes) -> None:
    """Reading gives either programs that are whole, or a ValueError."""
    try:
        found = compiled.read(document)
    except ValueError:
        return
    descriptors = dict.fromkeys(MAPS, 3)
    for name in found.programs:
        assert len(found.with_maps(name, descriptors)) % 8 == 0


@given(st.binary(max_size=60))
def test_any_bytes(document: bytes) -> None:
    refused(document)


def test_deep_nesting() -> None:
    refused(b"[" * 100_000)


@given(st.sampled_from(["schema", "maps", "programs"]), VALUES)
def test_any_value_in_a_place(name: str, value: Any) -> None:
    refused(json.dumps({**json.loads(PROGRAMS.document()), name: value}).encode())


@given(st.binary(max_size=64))
def test_any_instructions(code: bytes) -> None:
    document = json.loads(PROGRAMS.document())
    document["programs"]["looks"] = base64.b64encode(code).decode()
    refused(json.dumps(document).encode())


def test_a_map_that_there_is_not_is_refused() -> None:
    beyond = LOAD_SECOND_MAP.replace(b"\x01", bytes([len(MAPS)]))
    with pytest.raises(ValueError, match="loads a map that there is not"):
        compiled.read(Compiled(SHAPES, {"looks": beyond + EXIT}).document())


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_a_recording_needs_no_bcc_once_probes_are_built(tmp_path: Path, vmm: str) -> None:
    probes, out = tmp_path / "probes", tmp_path / "t.parquet"
    text = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "probes", "text"], capture_output=True, check=True, timeout=600
    ).stdout
    (tmp_path / "host.json").write_bytes(text)
    build = [
        sys.executable,
        "-m",
        "kvmtrace",
        "probes",
        "build",
        "--for",
        str(tmp_path / "host.json"),
        "-o",
        str(probes),
    ]
    subprocess.run(build, check=True, timeout=600)
    assert len(list(probes.iterdir())) == 1
    command = [sys.executable, "-m", "kvmtrace", "record", "-o", str(out), "--", vmm, "roots", "--loops", "3"]
    environment = {**os.environ, "KVMTRACE_WITHOUT_BCC": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"KVMTRACE_PROBES": str(probes)},
                          check=False, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.exists()
    other = tmp_path / "other.parquet"
    command[command.index(str(out))] = str(other)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600,
                          env=environment | {"KVMTRACE_PROBES": str(tmp_path / "none")})  # fmt: skip
    assert done.returncode == 3
    assert "no probes for this kernel are kept" in done.stderr
    assert not other.exists()
