# SPDX-License-Identifier: Apache-2.0
"""The catalogue of the recordings in a place: one row for each trace and VM, made from the traces' footers.

Of each object only the footer is read, many objects at a time; one that has not changed since an earlier catalogue is
not read again. An object that is not a sound trace gets a row with the reason, and does not affect the others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NoReturn

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.fleet.fleet_schema import CATALOGUE, FORMAT, KEY
from traces import outputs
from traces.columns import SCHEMA
from traces.command_line.progress import Progress
from traces.errors import ENVIRONMENT, Problem
from traces.metadata import Metadata
from traces.outputs import Output
from traces.reader import Trace
from traces.stores.location import Location, is_remote, location
from traces.stores.object_store import Objects, StoredObject, StoreProblem
from traces.stores.remote_trace import remote_trace
from traces.text import printable
from traces.untrusted import object_at, text_at
from traces.vm_names import VmNames
from traces.wall_clock import wall_ns

SUFFIX: Final = ".parquet"
READERS: Final = 32  # objects that are read at a time
_LONGEST: Final = 300  # the most characters kept of a text that comes from a trace
_VENDORS: Final = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}  # by vendor_id of /proc/cpuinfo
_NAMELESS: Final = "(none)"  # the host name that the kernel has until somebody sets one
# The bytes that a row with all of its columns takes in memory.
_ROW: Final = sum((field.type.bit_width if pa.types.is_integer(field.type) else 32) // 8 for field in SCHEMA)
_OLD: Final = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Catalogue:
    """A catalogue. `rows` has the columns of CATALOGUE; the keys in it are relative to the place `root`."""

    root: str
    rows: pl.DataFrame

    @property
    def broken(self) -> pl.DataFrame:
        """The rows of objects that cannot be replayed, each with its `reason`."""
        return self.rows.filter(pl.col("reason") != "")


@dataclass(frozen=True)
class Indexed:
    """A catalogue, and the number of objects that were read, kept from an earlier catalogue, or gone since."""

    catalogue: Catalogue
    read: int
    kept: int
    gone: int
    others: int  # objects that are no *.parquet, which were not looked at


def index(root: Location, before: Catalogue | None = None, but: str = "") -> Indexed:
    """Return the catalogue of a place. Objects that have not changed since `before` keep their rows from there.

    `but` is an object to leave out, such as the catalogue itself.
    """
    objects = Objects(root)
    left_out = location(but).text if but else ""
    others = 0
    found: list[StoredObject] = []
    with Progress("listing") as progress:
        for each in objects.list():
            if f"{root.text}/{each.key}" == left_out:
                continue
            if each.key.endswith(SUFFIX):
                found.append(each)
            else:
                others += 1
            progress.at(len(found))
    old = before.rows if before is not None and before.root == root.text else _frame([])
    there = pl.DataFrame(
        {"trace": [each.key for each in found], "etag": [each.etag for each in found], "at": range(len(found))},
        schema={"trace": pl.String, "etag": pl.String, "at": pl.Int64},
    ).with_columns(size=pl.Series([each.size for each in found], dtype=pl.Int64))
    same = ["trace", "etag", "size"]
    kept = old.filter(pl.col("etag") != "").join(there, on=same, how="semi")
    new = [found[at] for at in there.join(kept, on=same, how="anti")["at"]]
    rows = _frame(list(_read(objects, new)))
    known = old["trace"].unique()
    return Indexed(
        Catalogue(root.text, pl.concat([kept, rows]).sort("trace", "vm")),
        read=len(new),
        kept=len(found) - len(new),
        gone=len(set(known) - set(there["trace"])),
        others=others,
    )


def _read(objects: Objects, found: list[StoredObject]) -> Iterator[dict[str, Any]]:
    failed: list[StoreProblem] = []

    def one(each: StoredObject) -> list[dict[str, Any]]:
        try:
            return _rows_of(objects, each)
        except StoreProblem as problem:
            failed.append(problem)
            return [_broken(each, "", str(problem))]  # without an etag, the next index reads the object again
        except Problem as problem:
            return [_broken(each, each.etag, str(problem).removeprefix(f"{each.key}: "))]

    with Progress("reading footers", len(found)) as progress, ThreadPoolExecutor(READERS) as pool:
        for number, rows in enumerate(pool.map(one, found)):
            progress.at(number + 1)
            yield from rows
    if failed and len(failed) == len(found):
        raise failed[0]


def _rows_of(objects: Objects, found: StoredObject) -> list[dict[str, Any]]:
    """Return an object's rows. Raises Problem if it is not a sound trace, as far as its footer tells."""
    with remote_trace(objects, found, footer_only=True) as trace:
        rows = [_row(found, trace, vm) for vm in trace.metadata.vms] or [_broken(found, found.etag, "no VM is in it")]
    try:
        pa.RecordBatch.from_pylist(rows, CATALOGUE)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        raise Problem(f"{found.key}: damaged: its metadata has numbers that nothing counts") from None
    return rows


def _row(found: StoredObject, trace: Trace, vm: Any) -> dict[str, Any]:
    meta = trace.metadata
    number = int(vm["id"])
    groups = trace.groups(number)
    rows = sum(group.rows for group in groups)
    kinds = meta.kinds
    return {
        "trace": found.key, "etag": found.etag, "size": found.size,
        **host_facts(found.key, meta), **vm_facts(meta, number),
        "vcpus": len({vcpu["id"] for vcpu in vm["vcpus"]}),
        "policy": meta.policy, "events": rows, "lost": meta.lost, "complete": meta.complete,
        "bytes": sum(group.size for group in groups), "decoded": rows * _ROW,
        "trigger": _short(text_at(object_at(meta.raw, "flight"), "trigger")),
        "roots": meta.root_count, "page_faults": kinds.get("kvm_page_fault", 0),
        "smis": kinds.get("kvm_smm_transition", 0), "memslot_changes": kinds.get("memslot", 0),
        "invalidations": kinds.get("kvm_mmu_zap_all_fast", 0), "reason": "",
    }  # fmt: skip


def host_facts(key: str, meta: Metadata) -> dict[str, Any]:
    """Return the columns of a catalogue or of results that describe a recording's host."""
    host = object_at(meta.raw, "host")
    name = next((part[len("host=") :] for part in PurePosixPath(key).parts if part.startswith("host=")), "")
    name = name or text_at(host, "name")
    return {
        "host": "" if name == _NAMELESS else _short(name),
        "kernel": _short(meta.kernel),
        "vendor": _VENDORS.get(text_at(host, "vendor"), ""),
        "preset": _short(text_at(meta.raw, "preset")),
    }


def vm_facts(meta: Metadata, vm: int) -> dict[str, Any]:
    """Return the columns of a catalogue or of results that describe one of a recording's VMs."""
    first, last = meta.spans.get(vm, (0, 0))
    began = wall_ns(meta, first)
    return {"start": began, "duration_ns": last - first, "vm": vm, "vm_name": _short(VmNames(meta).process(vm))}


def _broken(found: StoredObject, etag: str, reason: str) -> dict[str, Any]:
    return {"trace": found.key, "etag": etag, "size": found.size, "reason": _short(reason) or "it cannot be read"}


def _short(text: str) -> str:
    return printable(text[:_LONGEST])


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    found = pl.from_arrow(pa.Table.from_pylist(rows, CATALOGUE))
    assert isinstance(found, pl.DataFrame)
    return found


def write(catalogue: Catalogue, where: str, *, force: bool = False) -> None:
    """Write a catalogue to a file or to an object in a store. Raises Problem if that fails."""
    table = catalogue.rows.to_arrow().cast(CATALOGUE)
    document = {"what": "catalogue", "format": FORMAT, "root": catalogue.root}
    table = table.replace_schema_metadata({KEY: json.dumps(document).encode()})
    if is_remote(where):
        place, name = location(where).apart()
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        Objects(place).replace(name, sink.getvalue())
        return
    with Output(local_path(where), outputs.CATALOGUE, force=force) as output:
        pq.write_table(table, output, compression="zstd")


def read(where: str) -> Catalogue:
    """Read a catalogue from a file or from an object in a store. Raises Problem if it is not one."""
    if is_remote(where):
        place, name = location(where).apart()
        source: Any = pa.BufferReader(Objects(place).read_all(name))
    else:
        source = local_path(where)
    try:
        table = pq.read_table(source)
        document = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
        if document.get("what") != "catalogue":
            _no_catalogue(where, "`kvmtrace fleet index` makes catalogues")
        if document["format"]["major"] > FORMAT["major"]:
            _no_catalogue(where, "it is of a newer kvmtrace: upgrade this one")
        rows = pl.from_arrow(table.select(CATALOGUE.names).cast(CATALOGUE))
        assert isinstance(rows, pl.DataFrame)
        return Catalogue(str(document["root"]), rows)
    except FileNotFoundError:
        raise Problem(f"{where}: no such file: `kvmtrace fleet index` makes catalogues") from None
    except _OLD as error:
        _no_catalogue(where, printable((str(error).splitlines() or [type(error).__name__])[0][:200]))


def earlier(where: str) -> Catalogue | None:
    """Return the catalogue that already exists at `where`, or None if there is none."""
    try:
        return read(where)
    except StoreProblem as problem:
        if problem.code == ENVIRONMENT:
            raise
        return None
    except Problem:
        return None


def _no_catalogue(where: str, why: str) -> NoReturn:
    raise Problem(f"{printable(where)}: not a catalogue of recordings: {why}") from None


def local_path(where: str) -> Path:
    """Return the path that a text names which is not the address of a store."""
    if where.startswith("file:"):
        folder = location(where).folder
        assert folder is not None
        return folder
    return Path(where)
