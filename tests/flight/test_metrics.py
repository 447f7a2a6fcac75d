# SPDX-License-Identifier: Apache-2.0
"""Metrics: what is counted, that it is what Prometheus reads, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.flight.rows import KVM, Rows, row
from tests.test_help import ROOT
from tests.waiting import PATIENCE
from tracer.flight.metrics import BUCKETS, FAMILIES, MOST_VMS, OTHERS, FlightMetrics, RecorderFacts, Sample
from tracer.probing.probes import preset_kinds
from traces.errors import Problem
from traces.schema import BY_NAME

exporter = pytest.importorskip("tracer.flight.exporter", exc_type=Problem)
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families as parse_text  # noqa: E402

SECOND, MS = 10**9, 10**6
DASHBOARD = Path(__file__).parents[2] / "scripts" / "kvmtrace-grafana.json"
DOCS = Path(__file__).parents[2] / "docs" / "always-on.md"
LEVELS = ("mmu", "time", "roots", "counters")
FACTS = RecorderFacts(
    {"kvm_entry": 7},
    {"kvm_entry": 1},
    {"manual": 2},
    {"signal": 3},
    0,
    1000,
    9.5,
    1.25,
    0.004,
    "time",
    LEVELS,
    (2, 1, 3),
)


def ran(at: int, exits: int, guest: int, out: int, pid: int = 7, kvm: int = KVM) -> Rows:
    """A vCPU that is `guest` ns in its guest and `out` ns out of it, again and again."""
    rows = []
    for number in range(exits):
        begin = at + number * (guest + out)
        rows.append(row("kvm_entry", begin, kvm=kvm, vcpu=0, tgid=pid, tid=pid))
        rows.append(row("kvm_exit", begin + guest, kvm=kvm, vcpu=0, tgid=pid, tid=pid))
        rows.append(row("kvm_page_fault", begin + guest, kvm=kvm, vcpu=0, tgid=pid, tid=pid, w0=number << 12))
    return np.concatenate(rows)


def counting(*batches: tuple[Rows, int]) -> FlightMetrics:
    metrics = FlightMetrics((), preset_kinds("mmu"), None)
    metrics.now(SECOND)
    for rows, until in batches:
        metrics.see(rows)
        assert metrics.now(until)
    return metrics


def values(metrics: FlightMetrics, name: str) -> dict[tuple[str, ...], object]:
    return {sample.labels: sample.value for sample in metrics.samples() if sample.family.name == name}


def test_counts_and_times_are_those_of_the_rows() -> None:
    metrics = counting(
        (ran(SECOND, 100, 3 * MS, 7 * MS), 2 * SECOND), (ran(2 * SECOND, 100, 3 * MS, 7 * MS), 3 * SECOND)
    )
    me = ("process 7", "7")
    assert values(metrics, "kvmtrace_vm_page_faults") == {me: 200}
    assert values(metrics, "kvmtrace_vm_refaults") == {me: 100}
    seconds = {labels[2]: value for labels, value in values(metrics, "kvmtrace_vm_vcpu_seconds").items()}
    assert seconds["guest"] == pytest.approx(0.6, abs=0.01)
    assert seconds["other"] == pytest.approx(1.4, abs=0.01)
    ((counts, total),) = values(metrics, "kvmtrace_vm_exit_seconds").values()  # type: ignore[misc]
    assert sum(counts) == 199, "the last one goes on"
    assert counts[BUCKETS.index(1e-2)] == 199, "of 7 ms each"
    assert total == pytest.approx(199 * 0.007)


def test_a_kernel_that_shows_no_entry_shows_no_fault_either_and_0_is_not_said() -> None:
    rows = np.concatenate([
        row("kvm_userspace_exit", SECOND + number * MS, kvm=KVM, vcpu=0, tgid=7, tid=7) for number in range(5)
    ])  # fmt: skip
    metrics = counting((rows, 2 * SECOND))
    assert values(metrics, "kvmtrace_vm_userspace_exits") == {("process 7", "7"): 5}
    for name in ("page_faults", "refaults", "smis", "vcpu_seconds", "exit_seconds"):
        assert values(metrics, f"kvmtrace_vm_{name}") == {}


def test_what_is_left_out_has_no_sample_and_counts_go_on_afterwards() -> None:
    metrics = counting((ran(SECOND, 100, 3 * MS, 7 * MS), 2 * SECOND))
    metrics.leave_out(frozenset(preset_kinds("mmu") - preset_kinds("roots")))
    assert metrics.now(3 * SECOND)
    assert values(metrics, "kvmtrace_vm_page_faults") == {}
    assert values(metrics, "kvmtrace_vm_vcpu_seconds") == {}
    assert values(metrics, "kvmtrace_vm_roots_built") == {("process 7", "7"): 0}
    metrics.leave_out(frozenset())
    metrics.see(ran(4 * SECOND, 10, 3 * MS, 7 * MS))
    assert metrics.now(5 * SECOND)
    assert values(metrics, "kvmtrace_vm_page_faults") == {("process 7", "7"): 110}


def test_a_host_of_many_vms_has_so_many_labels_and_no_more() -> None:
    rows = np.concatenate([ran(SECOND, 1, MS, MS, pid=pid, kvm=KVM + 4096 * pid) for pid in range(1, MOST_VMS + 45)])
    rows = rows[np.argsort(rows["time"], kind="stable")]
    metrics = counting((rows, 2 * SECOND))
    faults = values(metrics, "kvmtrace_vm_page_faults")
    assert len(faults) == MOST_VMS + 1
    assert faults[OTHERS, ""] == 44


def test_a_vm_that_ended_is_forgotten_in_time() -> None:
    metrics = counting((ran(SECOND, 10, MS, MS), 2 * SECOND))
    for second in range(3, 320):
        metrics.now(second * SECOND)
    assert metrics.samples() == ()


def samples() -> list[Sample]:
    metrics = counting((ran(SECOND, 100, 3 * MS, 7 * MS), 2 * SECOND))
    metrics.names["7"] = 'web "1"\\\n'
    metrics.see(ran(2 * SECOND, 1, MS, MS))
    metrics.now(3 * SECOND)
    return [*metrics.samples(), *FACTS.samples()]


def exported() -> dict[str, set[str]]:
    """Labels by sample name, as an OpenMetrics reader sees them."""
    registry = exporter.prometheus_client.CollectorRegistry()
    registry.register(exporter._Collector(samples))
    from prometheus_client.openmetrics.exposition import generate_latest

    found: dict[str, set[str]] = {}
    families = list(parse_openmetrics(generate_latest(registry).decode()))
    assert {family.name for family in families} == {family.name for family in FAMILIES}, "each is shown somewhere"
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_names_have_units_as_openmetrics_wants_them() -> None:
    names = exported()
    assert any(name.endswith("_bucket") for name in names)
    for family in FAMILIES:
        assert family.name.startswith("kvmtrace_")
        assert not re.search(r"_(ms|us|ns|percent|mb|total)$", family.name)
        assert family.help.endswith(".")
        assert set(family.labels) <= {"vm", "pid", "state", "kind", "trigger", "level"}


def test_every_query_of_the_dashboard_asks_for_what_is_exported() -> None:
    names = exported()
    document = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
    queries += [entry["query"] for entry in document["templating"]["list"] if entry["type"] == "query"]
    assert len(queries) > 15
    asked = set()
    for query in queries:
        mine = re.findall(r"kvmtrace_\w+", query)
        assert mine, query
        assert set(mine) <= names.keys(), query
        asked |= set(mine)
        labels = {label for name in mine for label in names[name]} | {"instance", "le"}
        selected = {label for part in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*=~?", part)}
        grouped = {
            label
            for part in re.findall(r"(?:by|ignoring) \(([^)]*)\)", query)
            for label in part.replace(" ", "").split(",")
        }
        assert selected | grouped <= labels, query
    bases = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert bases == {family.name for family in FAMILIES}, "every metric is on it"
    for panel in document["panels"]:
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= {label for name in re.findall(r"kvmtrace_\w+", target["expr"]) for label in names[name]}


def test_the_documentation_has_every_metric() -> None:
    text = DOCS.read_text()
    for family in FAMILIES:
        assert f"`{family.name}" in text, family.name


@pytest.mark.slow
def test_they_are_read_over_http_and_from_a_file(tmp_path: Path) -> None:
    served = exporter.Exporter(exporter.place("127.0.0.1:29417"), samples)
    try:
        with pytest.raises(Problem, match=r"--metrics 127\.0\.0\.1:29417: Address already in use"):
            exporter.Exporter(exporter.place("127.0.0.1:29417"), samples)
        with urllib.request.urlopen("http://127.0.0.1:29417/metrics", timeout=PATIENCE) as page:
            families = {family.name: family for family in parse_text(page.read().decode())}
    finally:
        served.close()
    (faults,) = families["kvmtrace_vm_page_faults"].samples
    assert faults.labels == {"vm": 'web "1"\\\n', "pid": "7"}
    assert faults.value == 101
    path = tmp_path / "kvmtrace.prom"
    written = exporter.Exporter(exporter.place(str(path)), samples)
    from tests.waiting import until

    assert until(path.exists)
    assert list(tmp_path.iterdir()) == [path]
    assert {family.name for family in parse_text(path.read_text())} >= {"kvmtrace_vm_page_faults", "kvmtrace_level"}
    written.close()
    assert not path.exists(), "what is there is of a recorder that runs"


@pytest.mark.parametrize("text", ["9417", ":0", ":99999", "", "file.txt", "a b:1", "/nowhere/at/all.prom"])
def test_what_is_no_place_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(Problem, match="--metrics"):
        exporter.place(text)


def test_the_option_is_there() -> None:
    assert any("--metrics" in parameter.opts for parameter in ROOT.commands["record"].params)


def test_kinds_that_metrics_need_are_events() -> None:
    assert {kind for family in FAMILIES for kind in family.needs} <= BY_NAME.keys()
