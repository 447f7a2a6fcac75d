# SPDX-License-Identifier: Apache-2.0
"""The commands `kvmtrace fleet index` and `fleet replay`: catalogue the recordings of many hosts, and replay them."""

from __future__ import annotations

from typing import Annotated

import typer

from traces.command_line.documents import print_json
from traces.command_line.help_text import examples
from traces.errors import VERDICT_FAILED, Problem
from traces.options import Force, Json

app = typer.Typer()


@app.command(
    short_help="Make or renew the catalogue of a store's recordings.",
    epilog=examples(
        "kvmtrace fleet index /srv/traces -o catalogue.parquet",
        "kvmtrace fleet index s3://bucket/traces -o s3://bucket/catalogue.parquet",
    ),
)
def index(
    where: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            help="A folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX. Credentials come "
            "from the environment, as the store's own tools take them.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str, typer.Option("-o", "--output", help="The catalogue, a Parquet file, or an object of a store.")
    ] = "catalogue.parquet",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """List each VM in a place's recordings (*.parquet): where it is, its host, kernel and policy, and its size.

    Only footers are read. Recordings that the catalogue has, and that were not changed since, are not read again.
    """
    from replay.fleet import fleet_catalogue, fleet_text
    from traces import outputs
    from traces.stores.location import is_remote, location

    root = location(where)
    if not is_remote(out):
        outputs.check(fleet_catalogue.local_path(out), outputs.CATALOGUE, force=force)
    found = fleet_catalogue.index(root, fleet_catalogue.earlier(out), but=out)
    fleet_catalogue.write(found.catalogue, out, force=force)
    if as_json:
        print_json(fleet_text.indexed_to_dict(found, out))
    else:
        print(fleet_text.render_indexed(found, out), end="")


@app.command(
    short_help="Replay the recordings of a catalogue under other root policies.",
    epilog=examples(
        "kvmtrace fleet replay catalogue.parquet -o results",
        "kvmtrace fleet replay s3://bucket/catalogue.parquet --policy async \\\n"
        "  --where \"kernel LIKE '6.1%' AND lost = 0\" -o s3://bucket/results",
        "kvmtrace fleet replay s3://bucket/catalogue.parquet \\\n"
        "  --engine tcp://scheduler:8786 -o s3://bucket/results",
    ),
)
def replay(
    catalogue: Annotated[
        str, typer.Argument(help="What `fleet index` wrote: a file, or an object of a store.", show_default=False)
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="The results: a folder, or a place in a store. Tasks whose results are there are not run again.",
            show_default=False,
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="sync, async, preserve-worker, preserve, shadow, a file with a policy of your own, or an entry point; "
            "repeatable. The recorded one is always among them. [default: preserve, async]"
        ),
    ] = None,
    where: Annotated[
        str,
        typer.Option(
            help="Only VMs that fulfil this condition on the catalogue's columns, in polars' SQL. It is never run"
            " as Python.",
            show_default=False,
        ),
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            help="local: processes of this machine; dask: a Dask cluster of this machine (kvmtrace[fleet]); "
            "tcp://HOST:PORT: the Dask scheduler there, whose workers have this kvmtrace."
        ),
    ] = "local",
    workers: Annotated[
        int, typer.Option(help="Processes of local and dask. [default: one for each CPU]", min=0, show_default=False)
    ] = 0,
    memory: Annotated[
        str,
        typer.Option(
            help="Memory for the rows of the VMs being replayed, such as 8G; at least one VM always is. [default:"
            " half of what is free]"
        ),
    ] = "",
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds that one VM may take; one that takes longer has failed, and its process is ended. 0: no "
            "limit.",
            min=0,
        ),
    ] = 3600,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also try tasks again that failed in an earlier run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Replay each VM of a catalogue under other root policies, one task each; exit 1 when any of them failed.

    A task that fails does not affect the others, and leaves a row with the reason. Run again after an interruption, the
    command continues where it stopped.
    """  # fmt: skip
    from replay import plan
    from replay.fleet import engines, fleet_catalogue, fleet_run, fleet_task, fleet_text
    from replay.fleet.results import ResultFolder
    from traces.command_line.sizes import size_of
    from traces.stores.location import is_remote, location

    plan.check(policy or [])
    policies = fleet_task.policy_texts(policy or plan.DEFAULT)
    room = size_of(memory) if memory else 0
    found = fleet_catalogue.read(catalogue)
    rows = fleet_run.chosen(found, where)
    if rows.is_empty():
        raise Problem(f"{catalogue}: no VM in it can be replayed{' of which --where is true' if where else ''}")
    place = location(out)
    if engine not in (engines.LOCAL, engines.DASK) and (place.local or not is_remote(found.root)):
        fleet_text.warn_of_folders(place.text, found.root)
    folder = ResultFolder(place, make=True)
    folder.claim({"policies": [each.mark for each in policies], "made_by": fleet_task.made_by()})
    tasks = fleet_run.tasks_of(found, rows, policies, place.text, time_limit)
    with engines.opened(engine, workers) as opened:
        done = fleet_run.run(tasks, folder, opened, room, retry_failed=retry_failed)
    if as_json:
        print_json(fleet_text.replayed_to_dict(done, found, place.text))
    else:
        print(fleet_text.render_replayed(done, found, place.text), end="")
    if done.failed or done.failed_before:
        raise typer.Exit(VERDICT_FAILED)
