"""`kvmtrace fleet index` and `fleet replay`: recordings of many hosts in a store, and their replay."""

from __future__ import annotations

from typing import Annotated

import typer

from traces.documents import print_json
from traces.help_text import examples
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
    """Say of each VM in a place's recordings (*.parquet) where it is, of which host, kernel and policy, and how large.

    Only footers are read. What a catalogue of that name has already, and was not changed since, is not read again.
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
