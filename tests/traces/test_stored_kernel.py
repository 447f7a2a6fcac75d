# SPDX-License-Identifier: Apache-2.0
"""The kernel's description in a trace: it reads the same whatever the table says later, and cannot break a reader."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces.making import event, stream, trace
from traces import kernels
from traces.errors import Problem
from traces.kernels import Facts, Kernel, fold, stored
from traces.kernels.vendors import VENDORS
from traces.reader import Trace

MANIFEST: dict[str, Any] = {
    "host": {"kernel": "6.13.2", "vendor": "GenuineIntel"},
    "policy": {"name": "preserve-inline", "why": "an old recorder"},
}
VERSIONS = (
    *("5.10", "5.13", "5.15", "5.17", "5.18", "5.19", "6.1.0", "6.1", "6.2", "6.4", "6.9", "6.12", "6.13", "6.14"),
    *("6.15", "6.18", "7.0", "7.3", "7.x"),
)


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda vendor: vendor.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_stored_is_read(version: str, vendor: Any) -> None:
    kernel = kernels.at(version, Facts(cpu=vendor.cpu))
    document = json.loads(json.dumps(stored.document(kernel)))
    assert stored.kernel_of(document, kernels.at("5.10")) == kernel
    assert set(document) == {field.name for field in fields(Kernel)}


def test_a_trace_keeps_what_was_known_when_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace(tmp_path / "a.parquet", stream([event("kvm_entry")]), MANIFEST)
    before = kernels.recorded(Trace.open(tmp_path / "a.parquet").metadata)
    assert (before.policy, before.vendor.name, before.recovers) == ("preserve", "vmx", True)
    monkeypatch.setattr("traces.kernels.fold.CHANGES", ())
    monkeypatch.setattr("traces.kernels.fold._folded", fold._folded.__wrapped__)
    assert not kernels.at("6.13").recovers
    assert kernels.recorded(Trace.open(tmp_path / "a.parquet").metadata) == before


def test_what_an_older_minor_version_did_not_say_is_folded() -> None:
    document = stored.document(kernels.at("6.12"))
    del document["recovers"], document["ret_pf"]
    assert stored.kernel_of(document, kernels.at("6.13")) == replace(
        kernels.at("6.12"), recovers=True, ret_pf=kernels.at("6.13").ret_pf
    )


def test_what_a_newer_one_says_besides_is_passed_over() -> None:
    document = stored.document(kernels.at("6.12"))
    document["unloads"].append("NEW_TRIGGER")
    assert stored.kernel_of({**document, "novelty": [1]}, kernels.at("5.10")) == kernels.at("6.12")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


def read(document: object) -> tuple[Kernel | None, str]:
    """The kernel, or the text of the problem."""
    try:
        return stored.kernel_of(document, kernels.at("6.12")), ""
    except Problem as problem:
        return None, str(problem)


@given(st.data())
def test_hostile_descriptions_are_refused_or_harmless(data: st.DataObject) -> None:
    document = stored.document(kernels.at("6.12"))
    name = data.draw(st.sampled_from(sorted(document)))
    inner = document[name]
    if isinstance(inner, dict) and inner and data.draw(st.booleans()):
        document[name] = {**inner, data.draw(st.sampled_from(sorted(inner))): data.draw(JSON)}
    else:
        document[name] = data.draw(JSON)
    kernel, problem = read(document)
    if kernel is None:
        assert f"`kernel.{name}`" in problem
        assert len(problem.splitlines()) == 1
        return
    assert isinstance(hash(kernel), int)
    assert kernel.parameters("sync").name == "sync"
    assert kernel.layout.constant >= 0
    assert isinstance(kernel.spte.is_present(1 << 63), bool)


@pytest.mark.parametrize("value", [None, [], 1, "6.1", True])
def test_a_description_that_is_no_object(value: object) -> None:
    with pytest.raises(Problem, match="not an object"):
        stored.kernel_of(value, kernels.at("6.1"))
