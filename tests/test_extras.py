# SPDX-License-Identifier: Apache-2.0
"""An installation without some extra: every verb helps, and what needs a missing package says how to get it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.documents import REPOSITORY
from tests.thinned import thinned
from tests.traces.making import numbered
from traces.command_line.extras import EXTRAS, missing
from traces.recording.compact import compact
from traces.recording.recording_summary import of_segments
from traces.recording.segment_writer import SegmentWriter

PROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OURS: Final = {"analysis", "kvmtrace", "replay", "traces", "tracer"}
# Not of PyPI: bcc is the distribution's; cython is there only where nothing is compiled, and engine.py says so.
OTHERS: Final = {"bcc", "cython"}
STORM: Final = REPOSITORY / "traces/corpus/smi-storm-6.1-async.parquet"


def brought(extra: str) -> set[str]:
    """The packages of an extra, with those of the extras that it names and without what every installation has."""
    found = set()
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            found |= {name for each in requirement.extras for name in brought(each)}
        else:
            found.add(canonicalize_name(requirement.name).replace("vl-convert-python", "vl-convert"))
    return found


def imported() -> set[str]:
    """Top-level packages that the product's modules import, wherever in them."""
    graph = grimp.build_graph(*sorted(OURS - {"kvmtrace"}), include_external_packages=True, cache_dir=None)
    found = {module for module in graph.modules if graph.is_module_squashed(module)}
    for node in ast.walk(ast.parse((REPOSITORY / "kvmtrace.py").read_text())):  # no package: the graph has it not
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def without(packages: list[str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command where some packages are not installed."""
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\nimport kvmtrace\n"
        f"sys.argv = ['kvmtrace', *{list(words)!r}]\nkvmtrace.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_every_package_that_is_imported_is_of_every_installation_or_of_an_extra() -> None:
    found = imported() - set(sys.stdlib_module_names) - OURS - OTHERS
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert found - base == EXTRAS.keys()
    for package, extra in EXTRAS.items():
        if package not in ("dask", "markupsafe"):  # distributed's and jinja2's own
            assert canonicalize_name(package) in brought(extra), (package, extra)


def test_all_is_all_and_tests_have_it() -> None:
    extras = PROJECT["optional-dependencies"]
    users = {name for extra in extras if extra not in ("dev", "docs") for name in brought(extra)}
    assert brought("all") == users
    assert users <= brought("dev")


def test_only_a_package_of_an_extra_is_said_to_be_one() -> None:
    assert missing(ModuleNotFoundError("", name="pyarrow.parquet")) is None  # it is here: the error is another one
    assert missing(ModuleNotFoundError("", name="json.nothing")) is None
    assert missing(ImportError("cannot import name")) is None


@pytest.mark.parametrize(
    ("verb", "package"),
    [
        ("report", "polars"),
        ("info", "pyarrow"),
        pytest.param("replay", "pyarrow", marks=pytest.mark.slow),
        pytest.param("validate", "pyarrow", marks=pytest.mark.slow),
        pytest.param("export --csv roots", "polars", marks=pytest.mark.slow),
    ],
)
def test_a_verb_without_its_package_says_how_to_get_it(verb: str, package: str, tmp_path: Path) -> None:
    done = without([package], *verb.split(), str(STORM), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"kvmtrace: this needs {package}, which is not installed: {sys.executable} -m pip install 'kvmtrace[report]'\n"
    )


@pytest.mark.parametrize(
    "words",
    thinned(7, ["lab list", "--version", "record --help", "report --help", "kernels 6.1", "--help", "fleet --help"]),
)
def test_what_needs_no_extra_works_without_any(words: str, tmp_path: Path) -> None:
    done = without(sorted(EXTRAS), *words.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.slow
def test_doctor_works_without_any_extra(tmp_path: Path) -> None:
    done = without(sorted(EXTRAS), "doctor", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert "Traceback" not in done.stderr
    assert "bpf" in done.stdout.lower()


@pytest.mark.slow
def test_a_flight_without_arrow_says_how_to_get_it(tmp_path: Path) -> None:
    for options in (["--flight", "5s", "-o", "."], ["--upload", "s3://none"]):
        done = without(["pyarrow"], "record", *options, cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr.endswith(f"{sys.executable} -m pip install 'kvmtrace[flight]'\n")
        assert done.stderr.count("\n") == 1


def test_segments_that_are_left_say_what_their_trace_will_say(tmp_path: Path) -> None:
    writer = SegmentWriter(
        tmp_path / "a.kvmt", {"loss": {"kvm_exit": {"emitted": {"0": 60}, "lost": {"0": 7, "1": 3}}}}
    )
    writer.write(numbered(50))
    writer.close({})
    left, made = of_segments(tmp_path / "a.kvmt"), compact(tmp_path / "a.kvmt", tmp_path / "a.parquet")
    assert (left.events, left.lost, left.complete) == (made.events, made.lost, None) == (50, 10, None)
    assert left.size == sum(path.stat().st_size for path in (tmp_path / "a.kvmt").iterdir())


def test_a_recorder_is_loaded_without_arrow_and_polars() -> None:
    absent = sorted(EXTRAS.keys() - {"lz4"})
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\nimport tracer.recorder"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
