# SPDX-License-Identifier: Apache-2.0
"""Fleets from end to end: a bucket on loopback, replayed by processes and by Dask, through deaths and faults.

Results are compared, byte for byte, with a plain loop that replays each file as a whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pyarrow as pa
import pytest

from replay import plan, run
from replay.decode.capabilities import Capabilities
from replay.fleet import engines, fleet_catalogue, fleet_run, fleet_task, results
from replay.fleet.fleet_catalogue import Catalogue
from replay.fleet.fleet_run import FleetRun
from replay.fleet.fleet_schema import COUNTS, RESULTS, SPENT, ends
from replay.fleet.fleet_task import FleetTask, PolicyText, policy_texts
from replay.fleet.outcome_rows import rows_of
from replay.fleet.results import ResultFolder, Results, task_of
from replay.timing.timed_run import Settings
from tests.corpus import CORPUS, REPLAYED
from tests.fleet import servers
from tests.fleet.servers import BUCKET, Proxy, environment
from tests.test_cli import kvmtrace
from tests.traces.forged import KINDS, forged
from tests.waiting import PATIENCE
from traces.reader import Trace
from traces.stores.location import location
from traces.stores.object_store import Objects
from traces.synth import Parameters, synthesize

pytestmark = [pytest.mark.xdist_group("fleet"), pytest.mark.slow]
POLICIES = ("async", "preserve")
CORPUS_SIZE, SYNTH_SIZE = 284, 16
KILLED = 20


@dataclass(frozen=True)
class Fleet:
    """Recordings in a bucket; `plain` is each task's result by a plain loop."""

    port: int
    files: Path
    catalogue: Catalogue
    plain: dict[str, bytes]

    @property
    def rows(self) -> pl.DataFrame:
        return ordered(pl.concat([pl.read_parquet(data) for data in self.plain.values()]))


def ordered(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select(RESULTS.names).sort("trace", "vm", "row", "policy", "vcpu")


def tasks_of(catalogue: Catalogue, where: str, policies: tuple[PolicyText, ...]) -> dict[str, Any]:
    return fleet_run.tasks_of(catalogue, fleet_run.chosen(catalogue, ""), policies, where)


def plainly(files: Path, tasks: dict[str, Any]) -> dict[str, bytes]:
    """Each file replayed as a whole, all of its VMs; what does not replay is left out."""
    found = {}
    by_trace: dict[str, list[FleetTask]] = {}
    for task, _ in tasks.values():
        by_trace.setdefault(task.trace, []).append(task)
    for name, of_trace in by_trace.items():
        capabilities = Capabilities(Trace.open(files / name))
        names = dict.fromkeys([capabilities.own.name, *POLICIES])
        replayed = run.replay(plan.make(capabilities, list(names)), Settings())
        for task in of_trace:
            table = pa.Table.from_pylist(rows_of(replayed, name, task.etag, task.vm), RESULTS)
            found[task.id] = results._written([(task.id, table)])
    return found


def upload(files: Path, place: str) -> None:
    objects = Objects(location(place))
    for path in sorted(files.rglob("*.parquet")):
        objects.create(str(path.relative_to(files)), path.read_bytes())


@pytest.fixture(scope="module")
def fleet(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """300 recordings, the smaller ones of the corpus and synthetic ones."""
    files = tmp_path_factory.mktemp("fleet")
    for path in sorted(REPLAYED, key=lambda path: path.stat().st_size)[:CORPUS_SIZE]:
        (files / path.name).symlink_to(path)
    for seed in range(SYNTH_SIZE):
        path = files / f"dt=2026-11-26/host=h{seed}/synth.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        synthesize(path, Parameters(policy=("async", "preserve")[seed % 2], vms=1 + seed % 3, vcpus=1 + seed % 4,
                                    duration=0.02, seed=seed))  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment(s3_port).items():
            patched.setenv(name, value)
        place = f"s3://{BUCKET}/traces"
        upload(files, place)
        catalogue = fleet_catalogue.index(location(place)).catalogue
        tasks = tasks_of(catalogue, "", policy_texts(POLICIES))
        assert catalogue.rows["trace"].n_unique() == CORPUS_SIZE + SYNTH_SIZE == 300
        assert catalogue.broken.is_empty()
        assert len(tasks) > 320
        yield Fleet(s3_port, files, catalogue, plainly(files, tasks))


@pytest.fixture(autouse=True)
def _store(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(fleet.port).items():
        monkeypatch.setenv(name, value)


def replayed(
    fleet: Fleet, engine: str, name: str, tasks: dict[str, Any] | None = None, policies: tuple[str, ...] = POLICIES
) -> tuple[FleetRun, ResultFolder]:
    """A run of tasks (all) by an engine of two workers, into a place of this name; nothing is merged."""
    place = location(f"s3://{BUCKET}/{name}")
    folder = ResultFolder(place)
    texts = policy_texts(policies)
    folder.claim({"policies": [each.mark for each in texts], "made_by": fleet_task.made_by()})
    wanted = tasks_of(fleet.catalogue, place.text, texts) if tasks is None else tasks
    with engines.opened(engine, 2) as opened:
        return fleet_run.run(wanted, folder, opened), folder


@pytest.fixture
def unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MERGE", 1 << 30)


def objects_of(folder: ResultFolder) -> dict[str, bytes]:
    return {task_of(each): folder.objects.read_all(each.key) for each in folder.state().tasks}


@pytest.mark.parametrize("engine", ["local", "dask"])
@pytest.mark.usefixtures("unmerged")
def test_results_are_those_of_a_plain_loop_byte_for_byte(engine: str, fleet: Fleet) -> None:
    done, folder = replayed(fleet, engine, f"equal-{engine}")
    assert (done.done, done.failed) == (len(fleet.plain), [])
    assert objects_of(folder) == fleet.plain
    expected = fleet.rows
    assert ordered(Results(folder).rows().collect()).equals(expected)
    folder.merge(least=1)
    assert not folder.state().tasks
    assert ordered(Results(folder).rows().collect()).equals(expected)


def test_results_are_what_replay_prints(fleet: Fleet) -> None:
    """Another source for the rows: the document of `kvmtrace replay --json`."""
    rows = fleet.rows
    names = sorted(rows["trace"].unique())[::60]
    for name in names:
        done = kvmtrace("replay", str(fleet.files / name), "--json", *(f"--policy={each}" for each in POLICIES))
        document = json.loads(done.stdout)
        timed = {vm["vm"]: vm for vm in document["time"]["vms"]}
        for vm in document["vms"]:
            for said in vm["policies"]:
                found = rows.filter(
                    (pl.col("trace") == name) & (pl.col("vm") == vm["vm"]) & (pl.col("policy") == said["policy"])
                )
                whole = found.filter(pl.col("row") == "vm").row(0, named=True)
                for count in COUNTS:
                    low, high = said[count] if isinstance(said[count], list) else (said[count], said[count])
                    assert [whole[end] for end in ends(count)] == [low, high], (name, count)
                under = [each for each in timed[vm["vm"]]["policies"] if each["policy"] == said["policy"]]
                for vcpu in said["vcpus"]:
                    row = found.filter(pl.col("vcpu") == vcpu["vcpu"]).row(0, named=True)
                    assert row["row"] == "vcpu"
                    assert row["no_times"] == timed[vm["vm"]]["refused"]
                    times = [each for end in under for each in end["vcpus"] if each["vcpu"] == vcpu["vcpu"]]
                    if not times:
                        assert row["wall_ns"] is None
                        continue
                    assert row["wall_ns"] == times[0]["wall"]
                    assert [row[each] for each in SPENT] == [times[0][each] for each in SPENT]
                    assert row["wall_low_ns"] == min(each["band"][0] for each in times)
                    assert row["stalls_low"] == min(len(each["stalls"]) for each in times)


def test_a_run_that_was_killed_goes_on_where_it_was(fleet: Fleet, tmp_path: Path) -> None:
    catalogue, place = str(tmp_path / "catalogue.parquet"), f"s3://{BUCKET}/resumed"
    fleet_catalogue.write(fleet.catalogue, catalogue)
    words = ["fleet", "replay", catalogue, "-o", place, "--workers", "2", *(f"--policy={each}" for each in POLICIES)]
    objects = Objects(location(place))
    for number, least in ((signal.SIGKILL, 9), (signal.SIGINT, 60)):
        began = subprocess.Popen(
            [sys.executable, "-m", "kvmtrace", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(list(objects.list("tasks"))) < least:
            assert began.poll() is None
            time.sleep(0.1)
        children = psutil.Process(began.pid).children(recursive=True)
        assert len(children) >= 2
        began.send_signal(number)
        _, said = began.communicate(timeout=PATIENCE)
        assert began.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert "Traceback" not in said
        _, alive = psutil.wait_procs(children, timeout=PATIENCE)
        assert not alive, "no process is left behind"
    before = len(list(objects.list("tasks")))
    assert 60 <= before < len(fleet.plain)
    done = kvmtrace(*words, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["tasks"]
    assert told["before"] >= before
    assert told["done"] + told["before"] == len(fleet.plain)
    assert ordered(Results(ResultFolder(location(place))).rows().collect()).equals(fleet.rows)
    again = json.loads(kvmtrace(*words, "--json").stdout)["tasks"]
    assert (again["done"], again["before"]) == (0, len(fleet.plain))


# Where a process is killed, of one task each.
PLACES = [
    (method, when)
    for method in ("HEAD", "GET", "PUT")  # is it done already; the recording; the result
    for when in ("kill", "kill after")
]


def killing(tasks: dict[str, Any], count: int) -> tuple[Callable[[str, str, int], str], list[str]]:
    """Kills the process of this many tasks, each once, at one of the places in turn."""
    chosen = list(tasks)[:: len(tasks) // count][:count]
    plan = {}
    for number, name in enumerate(chosen):
        task = tasks[name][0]
        method, when = PLACES[number % len(PLACES)]
        path = f"traces/{task.trace}" if method == "GET" else f"tasks/{name}.parquet"
        plan[method, path] = when

    def fault(method: str, path: str, before: int) -> str:
        found = next((key for key in plan if key[0] == method and path.endswith(key[1])), None)
        return plan.pop(found) if found is not None else ""

    return fault, chosen


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize(
    ("engine", "count"), [("local", KILLED), ("dask", 6), pytest.param("dask", KILLED, marks=pytest.mark.nightly)]
)
def test_processes_killed_at_every_place_lose_and_double_nothing(
    engine: str, count: int, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"killed-{engine}-{count}"
    one_vm = fleet.catalogue.rows.filter(pl.len().over("trace") == 1).sort("size").head(60)
    some = Catalogue(fleet.catalogue.root, one_vm)
    tasks = tasks_of(some, f"s3://{BUCKET}/{name}", policy_texts(POLICIES))
    fault, chosen = killing(tasks, count)
    with Proxy(fleet.port, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        done, folder = replayed(fleet, engine, name, tasks)
        assert len(chosen) == count == len(proxy.killed)
        assert done.failed == []
        assert objects_of(folder) == {task: fleet.plain[task] for task in tasks}


POISON = """
import os, signal
from pathlib import Path
from replay.simulate.policy_api import Policy

class Mine(Policy):
    name = "mine"

    def on_put_to_zero(self, vm, root, cause, vcpu):
        marks = Path({marks!r})
        for mark in ("once", "memory"):
            try:
                (marks / mark).unlink()
            except FileNotFoundError:
                continue
            if mark == "memory":
                bytearray(1 << 60)
            os.kill(os.getpid(), signal.SIGKILL)
        vm.free(root, cause, vcpu)
"""


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_a_poisoned_trace_one_without_memory_and_one_that_is_killed_in_the_middle(
    engine: str, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned: whoever reads it dies, each time."""
    policy, marks = tmp_path / "mine.py", tmp_path / "marks"
    marks.mkdir()
    (marks / "once").touch()
    (marks / "memory").touch()
    policy.write_text(POISON.format(marks=str(marks)))
    some = fleet.catalogue.rows.filter(pl.col("trace").str.contains("smi-(one|grow|both)-6")).sort("trace")
    assert len(some) >= 12
    poisoned = some["trace"][5]
    place = f"s3://{BUCKET}/poisoned-{engine}"
    tasks = tasks_of(Catalogue(fleet.catalogue.root, some), place, policy_texts([str(policy)]))
    bad = lambda method, path, before: "kill" if path.endswith(f"/{poisoned}") else ""  # noqa: E731
    with Proxy(fleet.port, bad) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
        done, _ = replayed(fleet, engine, place.rpartition("/")[2], tasks, (str(policy),))
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(fleet.port)["AWS_ENDPOINT_URL"])
    assert not list(marks.iterdir())
    reasons = {each.task.trace: each.reason for each in done.failed}
    assert len(done.failed) == 2
    assert "alone and 3 times: killed" in reasons.pop(poisoned)
    (other,) = reasons.items()
    assert "memory" in other[1]
    rows = Results(ResultFolder(location(place))).rows().collect()
    failed = rows.filter(pl.col("row") == "failed").sort("trace")
    assert failed["trace"].to_list() == sorted([poisoned, other[0]])
    assert failed["kernel"].is_not_null().all()
    assert rows.filter(pl.col("row") == "vm")["trace"].n_unique() == len(tasks) - 2
    again, _ = replayed(fleet, engine, place.rpartition("/")[2], tasks, (str(policy),))
    assert (again.done, again.failed_before) == (0, 2)


GREEDY = """
import sys, time
from itertools import repeat
from replay.simulate.policy_api import Policy

class Mine(Policy):
    name = "mine"

    def on_put_to_zero(self, vm, root, cause, vcpu):
        frame = sys._getframe()
        while "task" not in frame.f_locals:
            frame = frame.f_back
        if frame.f_locals["task"].trace in ({never!r}, {hungry!r}):
            if frame.f_locals["task"].trace == {never!r}:
                sum(repeat(0))  # in C, where Python runs nothing else
            held = []
            while len(held) < 300:
                held.append(bytearray(b"x") * (10 << 20))
                time.sleep(0.05)
            raise RuntimeError("nobody minds 3 GB")
        vm.free(root, cause, vcpu)
"""


@pytest.fixture
def greedy(fleet: Fleet, tmp_path: Path) -> tuple[Path, pl.DataFrame, str, str]:
    """A policy under which one recording is replayed for ever, and one takes more and more memory; the recordings."""
    some = fleet.catalogue.rows.filter(pl.col("trace").str.contains("smi-(one|grow|both)-6")).sort("trace")
    assert len(some) >= 6
    never, hungry = some["trace"][4], some["trace"][1]
    policy = tmp_path / "mine.py"
    policy.write_text(GREEDY.format(never=never, hungry=hungry))
    return policy, some, never, hungry


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_a_replay_that_never_ends_costs_its_own_task(
    engine: str, fleet: Fleet, greedy: tuple[Path, pl.DataFrame, str, str]
) -> None:
    policy, some, never, hungry = greedy
    place, policies = f"s3://{BUCKET}/never-{engine}", policy_texts([str(policy)])
    rows = Catalogue(fleet.catalogue.root, some.filter(pl.col("trace") != hungry))
    # Long enough for the others, on a machine that has much else to do.
    tasks = fleet_run.tasks_of(rows, rows.rows, policies, place, 20)
    done, folder = replayed(fleet, engine, place.rpartition("/")[2], tasks, (str(policy),))
    assert [(each.task.trace, each.reason) for each in done.failed] == [
        (never, "not done after 20 seconds, the limit for a task (--time-limit)")
    ]
    found = Results(folder).rows().collect()
    assert found.filter(pl.col("row") == "failed")["trace"].to_list() == [never]
    assert done.done == found.filter(pl.col("row") == "vm")["trace"].n_unique() == len(tasks) - 1


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_one_that_takes_more_memory_than_there_is_costs_its_own_task(
    engine: str, fleet: Fleet, greedy: tuple[Path, pl.DataFrame, str, str], tmp_path: Path
) -> None:
    """Dask's nanny ends a worker at 95 % of its limit, as the kernel ends a process when memory runs out; of a limit of
    the process itself (RLIMIT_DATA) the task is told.
    """
    policy, some, never, hungry = greedy
    catalogue, place = str(tmp_path / "catalogue.parquet"), f"s3://{BUCKET}/hungry-{engine}"
    fleet_catalogue.write(fleet.catalogue, catalogue)
    chosen = ", ".join(f"'{each}'" for each in some["trace"] if each != never)
    words = ["fleet", "replay", catalogue, "-o", place, "--policy", str(policy), "--where", f"trace IN ({chosen})"]
    own = [sys.executable, "-m", "kvmtrace", *words, "--json"]
    if engine == "local":
        done = subprocess.run(["prlimit", f"--data={2 << 30}", *own], capture_output=True, text=True, check=False)
        reason = "there was not enough memory for it"
    else:
        with cluster("--nanny", "--memory-limit", "700MiB") as (address, _):
            done = subprocess.run([*own, "--engine", address], capture_output=True, text=True, check=False)
        reason = "the process that replays it died, alone and 3 times: killed, or ended, as when memory runs out"
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert [(each["trace"], each["reason"]) for each in told["failed"]] == [(hungry, reason)]
    found = Results(ResultFolder(location(place))).rows().collect()
    assert found.filter(pl.col("row") == "failed")["trace"].to_list() == [hungry]
    assert told["tasks"]["done"] == found.filter(pl.col("row") == "vm")["trace"].n_unique() == len(some) - 2


@pytest.mark.usefixtures("unmerged")
def test_a_store_that_fails_in_every_way_while_it_is_used(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    some = fleet.catalogue.rows.filter(pl.len().over("trace") == 1).sort("size").head(80)
    tasks = tasks_of(Catalogue(fleet.catalogue.root, some), f"s3://{BUCKET}/faulty", policy_texts(POLICIES))
    changed = some["trace"][40]
    stalls = [0]

    def fault(method: str, path: str, before: int) -> str:
        if "list-type" in path or "job.json" in path or changed in path:
            return ""
        if before == 0 and hash_of(path) % 40 == 7 and method == "GET" and not stalls[0]:
            stalls[0] += 1
            return "stall"
        kinds = ("503", "reset", "torn", "cut", "lost", "torn after", "", "", "", "")
        return kinds[hash_of(f"{method} {path} {before}") % len(kinds)] if before < 2 else ""

    objects = Objects(location(f"s3://{BUCKET}/traces"))
    original = objects.read_all(changed)
    objects.replace(changed, (fleet.files / some["trace"][41]).read_bytes())
    try:
        with Proxy(fleet.port, fault) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy.port)["AWS_ENDPOINT_URL"])
            done, folder = replayed(fleet, "local", "faulty", tasks)
            faults = dict(proxy.done)
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(fleet.port)["AWS_ENDPOINT_URL"])
    finally:
        objects.replace(changed, original)
    assert set(faults) == {"503", "reset", "torn", "cut", "lost", "torn after", "stall"}
    assert sum(faults.values()) > 60
    assert [(each.task.trace, each.reason) for each in done.failed if each.task.trace != changed] == []
    assert [each.task.trace for each in done.failed] == [changed]
    assert "was changed meanwhile" in done.failed[0].reason
    folder = ResultFolder(folder.place)
    assert objects_of(folder) == {name: fleet.plain[name] for name, (task, _) in tasks.items() if task.trace != changed}


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-24:], "little") * 2654435761 % (1 << 32) >> 8


def test_hostile_traces_cost_their_own_tasks(fleet: Fleet, tmp_path: Path) -> None:
    files = tmp_path / "hostile"
    files.mkdir()
    for kind in KINDS:
        for number in range(6):
            (files / f"{kind}-{number}.parquet").write_bytes(forged(CORPUS / "huge-6.1.parquet", kind, number))
    sound = sorted(fleet.plain)[:3]
    tasks = tasks_of(fleet.catalogue, "", policy_texts(POLICIES))
    names = {tasks[name][0].trace for name in sound}
    for name in names:
        (files / Path(name).name).write_bytes((fleet.files / name).read_bytes())
    place = f"s3://{BUCKET}/hostile"
    upload(files, place)
    catalogue = fleet_catalogue.index(location(place)).catalogue
    folder = ResultFolder(location(f"s3://{BUCKET}/hostile-results"))
    folder.claim({"policies": list(POLICIES), "made_by": fleet_task.made_by()})
    wanted = tasks_of(catalogue, folder.place.text, policy_texts(POLICIES))
    with engines.opened("local", 2) as opened:
        done = fleet_run.run(wanted, folder, opened)
    assert len(catalogue.broken) > 6
    assert len(done.failed) >= 3
    assert all(each.reason and each.reason.isprintable() for each in done.failed)
    assert done.done + len(done.failed) == len(wanted)
    rows = Results(folder).rows().collect()
    drop = ["trace", "etag", "host"]
    for name in names:
        mine = rows.filter(pl.col("trace") == Path(name).name).drop(drop)
        plain = fleet.rows.filter(pl.col("trace") == name).drop(drop)
        order = ["vm", "row", "policy", "vcpu"]
        assert mine.sort(order).equals(plain.sort(order))


@contextmanager
def cluster(*options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and two workers that somebody else has started: its address and process. `options` of the workers."""
    address = f"tcp://127.0.0.1:{servers.free_port()}"
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"]
    worker = [*dask, "worker", address, "--nthreads", "1", "--no-dashboard", *(options or ["--no-nanny"])]
    commands = [scheduler, worker, worker]
    # What kills its worker is told at once, not after three more of them.
    environment_ = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    started = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment_)
        for command in commands
    ]
    try:
        yield address, started[0]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_cluster_that_is_there_and_its_scheduler_dying(fleet: Fleet, tmp_path: Path) -> None:
    catalogue = str(tmp_path / "catalogue.parquet")
    fleet_catalogue.write(fleet.catalogue, catalogue)
    words = ["fleet", "replay", catalogue, *(f"--policy={each}" for each in POLICIES), "-o"]
    with cluster() as (address, scheduler):
        some = ["--where", "trace LIKE 'dt=%'", "--engine", address]
        done = kvmtrace(*words, f"s3://{BUCKET}/of-cluster", *some)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        rows = Results(ResultFolder(location(f"s3://{BUCKET}/of-cluster"))).rows().collect()
        assert ordered(rows).equals(fleet.rows.filter(pl.col("trace").str.starts_with("dt=")))
        began = subprocess.Popen(
            [sys.executable, "-m", "kvmtrace", *words, f"s3://{BUCKET}/of-dying", "--engine", address],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        objects = Objects(location(f"s3://{BUCKET}/of-dying"))
        while not list(objects.list("tasks")):
            assert began.poll() is None
            time.sleep(0.1)
        scheduler.kill()
        _, said = began.communicate(timeout=PATIENCE)
    assert began.returncode == 3, said
    assert said.splitlines() == [
        f"kvmtrace: {address}: the scheduler is gone, or gave the tasks up: run the same again, what is done is kept"
    ]


def test_a_scheduler_that_is_not_there(tmp_path: Path, fleet: Fleet) -> None:
    catalogue = str(tmp_path / "catalogue.parquet")
    fleet_catalogue.write(fleet.catalogue, catalogue)
    port = servers.free_port()
    words = ["fleet", "replay", catalogue, "-o", str(tmp_path / "out"), "--engine", f"tcp://127.0.0.1:{port}"]
    done = kvmtrace(*words)
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stderr.splitlines() if "same folders" not in line]
    assert len(lines) == 1
    assert f"tcp://127.0.0.1:{port}" in lines[0]
