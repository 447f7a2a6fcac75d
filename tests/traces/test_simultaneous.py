"""Runs that kvmtrace, trace-cmd and perf recorded at once: what is imported is what was recorded natively."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.verbs import invoke
from traces.errors import Problem
from traces.imports.importing import import_file
from traces.imports.told import ToldOfText
from traces.reader import Trace
from traces.schema import BY_NAME

DIRECTORY = Path(__file__).parents[2] / "traces" / "simultaneous"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.parquet"))
# Not in the preset that kvmtrace records with.
PEERS_ONLY = {"kvm_pio", "kvm_emulate_insn"}
# What no tracepoint has: a root's frame stands in `table`, where it is created or zapped, and in `root`.
NOT_SHOWN = {"root", "role of kvm_page_fault", "table of kvm_mmu_get_page", "table of kvm_mmu_prepare_zap_page"}
SHARED = ("tid", "cpu", "vcpu")


def rows_of(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path).sort("seq").with_columns(pl.col("kind").cast(pl.String))


def test_there_are_six_scenarios_on_four_kernels() -> None:
    assert len(NAMES) == 24
    for name in NAMES:
        assert (DIRECTORY / f"{name}.dat.xz").is_file()
        assert (DIRECTORY / f"{name}.data.xz").is_file()


@pytest.mark.parametrize("tool", ["dat", "data"])
@pytest.mark.parametrize("name", NAMES)
def test_every_event_of_both_is_in_both_with_equal_fields_in_order(name: str, tool: str, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / f"{name}.{tool}.xz", out, ToldOfText())
    native, theirs = rows_of(DIRECTORY / f"{name}.parquet"), rows_of(out)
    tracepoints = set(theirs["kind"].unique()) - PEERS_ONLY
    counts = [dict(rows.group_by("kind").len().rows()) for rows in (native, theirs)]
    assert {kind: counts[1][kind] for kind in tracepoints} == {kind: counts[0].get(kind) for kind in tracepoints}
    assert {kind for kind in counts[0] if kind.startswith("kvm_")} <= tracepoints  # and none of ours is missing
    for kind in tracepoints:
        columns = [*SHARED, *(each for each in BY_NAME[kind].columns if not {each, f"{each} of {kind}"} & NOT_SHOWN)]
        mine, other = (rows.filter(pl.col("kind") == kind).select(columns) for rows in (native, theirs))
        assert other.rows() == mine.rows(), kind
    # On one CPU all three see events one after the other; between CPUs each takes the time when it comes to it.
    shown = native.filter(pl.col("kind").is_in(tracepoints))
    mine, other = (
        rows.filter(~pl.col("kind").is_in(PEERS_ONLY)).sort("cpu", maintain_order=True).select("cpu", "tid", "kind")
        for rows in (shown, theirs)
    )
    assert other.rows() == mine.rows()
    meta = Trace.open(out).metadata
    assert meta.kernel == Trace.open(DIRECTORY / f"{name}.parquet").metadata.kernel
    assert meta.raw["clock"]["name"] == "mono"
    assert meta.raw["source"]["kind"] == {"dat": "trace.dat", "data": "perf.data"}[tool]
    assert meta.raw["source"]["odd"] == 0
    assert meta.lost == 0


def test_times_of_one_clock_differ_by_what_recording_takes(tmp_path: Path) -> None:
    """All three run on CLOCK_MONOTONIC, or count from the boot as it does; an event's times are of one moment."""
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / "smi-storm-6.1.dat.xz", out, ToldOfText())
    native, theirs = rows_of(DIRECTORY / "smi-storm-6.1.parquet"), rows_of(out)
    times = [rows.filter(pl.col("kind") == "kvm_page_fault")["time"].to_numpy() for rows in (native, theirs)]
    assert abs(times[0] - times[1]).max() < 50_000_000  # under emulation, two other tools' handlers in between


# What a run's rows decide under every policy. The end of VMs is in no source but ours: what is freed then is not here.
COUNTED = ("loads", "creations", "reuses", "faults", "refaults", "hits", "fixes", "tables_built")


def replayed(path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """By VM, what replay counts under each policy."""
    invoke(["replay", str(path), "--no-time", "--json"])
    vms = json.loads(capsys.readouterr().out)["vms"]
    return [{each["policy"]: {key: each[key] for key in COUNTED} for each in vm["policies"]} for vm in vms]


@pytest.mark.parametrize("tool", ["dat", pytest.param("data", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_replay_counts_what_it_counts_of_the_native_recording(
    name: str, tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / f"{name}.{tool}.xz", out, ToldOfText())
    if name in ("smi-storm-5.10", "smi-both-5.10"):  # which shows no root, and two roles of them
        with pytest.raises(Problem, match="loads of roots are not in its source"):
            replayed(out, capsys)
        return
    assert replayed(out, capsys) == replayed(DIRECTORY / f"{name}.parquet", capsys)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("smi") and "5.10" not in name])
def test_whether_roots_are_kept_is_seen_in_smm(name: str, tmp_path: Path) -> None:
    """Debian's 6.1.0-56 is 6.1.192, which preserves roots; the release alone would be one that frees them."""
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / f"{name}.dat.xz", out, ToldOfText())
    assert Trace.open(out).metadata.policy == "preserve"
