# SPDX-License-Identifier: Apache-2.0
"""Durations of exits, returns to userspace and ioctls, which one row begins and another ends, as histograms.

A duration is counted in a bucket, 64 to a power of two, so that p50 and p99 are right to 1 % and memory grows with the
number of buckets in use, not with rows. The longest and the sum are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.passes.lasting import LEADING, Lasting
from analysis.reading.rows import KIND, DecodedRows
from traces.schema import BY_NAME

Ints = NDArray[np.int64]
_KEYS: Final = {"vm": pl.Int32, "code": pl.UInt64, "ret": pl.Int32}
_SCHEMA: Final = _KEYS | dict.fromkeys(("bucket", "begun", "spans", "longest", "ns"), pl.Int64)
_HELD_ROWS: Final = 1 << 18


@dataclass(frozen=True)
class Latencies:
    """Durations from each row of kind `begins` to the next row of `begins` or `ends` of the same vCPU.

    With `calls` it is the next such row of the same thread. A duration is known if that row is one of `ends` (which may
    include `begins`), and for `calls` if it has the same `code`, too. The answer has `vm`, `code`, `ret` (of the row
    that began; 0 unless `failing`), `bucket` (-1: the end is not known), `begun` (rows), `spans` (rows whose end is
    known), `ns` and `longest`, which are null in rows whose durations another row of the same group has in it.
    """

    begins: str
    ends: tuple[str, ...]
    failing: bool = False
    calls: bool = False

    @property
    def name(self) -> str:
        return f"latencies of {self.begins} to {', '.join(self.ends)}"

    @property
    def columns(self) -> frozenset[str]:
        if self.calls:
            return frozenset({"seq", "time", "tid", KIND, "code"})
        return frozenset({"time", "vcpu", KIND, "code", *(["ret"] if self.failing else [])})

    def begin(self) -> _Following | _Calls:
        return (_Calls if self.calls else _Following)(self)


class _Following:
    """Follows vCPUs, whose rows are many: a compiled loop goes through those of each VM."""

    def __init__(self, asked: Latencies) -> None:
        self._asked = asked
        self._vms: dict[int, Lasting] = {}

    def feed(self, vm: int, rows: DecodedRows) -> None:
        if vm < 0:
            return
        asked = self._asked
        if vm not in self._vms:
            itself = asked.begins in asked.ends
            (end,) = (BY_NAME[name].code for name in asked.ends if name != asked.begins)
            self._vms[vm] = Lasting(BY_NAME[asked.begins].code, end, itself)
        ret = rows["ret"] if asked.failing else None
        self._vms[vm].feed(rows["time"], rows["vcpu"], rows[KIND], rows["code"], ret)

    def answer(self) -> pl.DataFrame:
        each = list(self._vms.values())
        used = np.array([lasting.count for lasting in each], np.int64)
        vms = np.repeat(np.array(list(self._vms), np.int32), used)
        codes, rets = (
            np.concatenate([np.zeros(0, kind), *(getattr(lasting, name)[: lasting.count] for lasting in each)])
            for name, kind in (("codes", np.uint64), ("rets", np.int32))
        )
        totals = np.concatenate([np.zeros((0, 4), np.int64), *(lasting.totals[: lasting.count] for lasting in each)])
        firsts = np.cumsum(used) - used
        parts = [lasting.histogram(first) for lasting, first in zip(each, firsts, strict=True)]
        row, bucket, count = np.concatenate([np.zeros((3, 0), np.int64), *parts], axis=1)
        begun, ended, ns, longest = totals.T
        # The sum and the longest are exact and belong to no bucket, and neither do rows without an end.
        place = np.append(row, np.arange(len(vms)))
        nothing, unknown = np.zeros(len(vms), np.int64), np.full(len(row), -1)
        columns = (
            vms[place], codes[place], rets[place], np.append(bucket, nothing - 1), np.append(count, begun - ended),
            np.append(count, nothing), np.append(unknown, longest), np.append(unknown, ns),
        )  # fmt: skip
        answer = pl.DataFrame(dict(zip(_SCHEMA, columns, strict=True)), schema=_SCHEMA)
        return answer.with_columns(pl.when(pl.col("bucket") < 0).then(name) for name in ("longest", "ns"))


class _Calls:
    """Follows threads: the two rows of an ioctl may be among those of different VMs, or of none."""

    def __init__(self, asked: Latencies) -> None:
        self._begins = BY_NAME[asked.begins].code
        self._ends = [BY_NAME[name].code for name in asked.ends]
        self._parts = [pl.DataFrame(schema=_SCHEMA)]
        self._held: list[dict[str, NDArray[Any]]] = []
        self._held_rows = 0

    def feed(self, vm: int, rows: DecodedRows) -> None:
        at = np.flatnonzero(np.logical_or.reduce([rows[KIND] == code for code in (self._begins, *self._ends)]))
        if len(at):
            held = {name: rows[name][at] for name in ("seq", "time", "tid", KIND, "code")}
            self._held.append(held | {"vm": np.full(len(at), vm, np.int32)})
            self._held_rows += len(at)
            if self._held_rows > _HELD_ROWS:
                self._pair()

    def answer(self) -> pl.DataFrame:
        if self._held:
            self._pair()
            left = {name: column[self._held[0][KIND] == self._begins] for name, column in self._held[0].items()}
            self._add_rows(left, np.full(len(left["vm"]), -1, np.int64))
            self._held = []
        self._merge()
        return self._parts[0]

    def _merge(self) -> None:
        found = pl.concat(self._parts).group_by(*_KEYS, "bucket")
        self._parts = [
            found.agg(pl.col("begun", "spans").sum(), pl.col("longest").max(), pl.col("ns").sum()).select(*_SCHEMA)
        ]

    def _pair(self) -> None:
        """Count the calls both of whose rows are there; keep the other rows."""
        found = {name: np.concatenate([held[name] for held in self._held]) for name in self._held[0]}
        order = np.lexsort((found["seq"], found["tid"]))
        found = {name: column[order] for name, column in found.items()}
        kind, tid, code, time = (found[name] for name in (KIND, "tid", "code", "time"))
        begins, ends = kind == self._begins, np.isin(kind, self._ends)
        ended = begins.copy()
        ended[-1:] = False
        ended[:-1] &= ends[1:] & (tid[1:] == tid[:-1]) & (code[1:] == code[:-1])
        place = np.flatnonzero(ended)
        self._add_rows(
            {name: column[place] for name, column in found.items()}, np.maximum(time[place + 1] - time[place], 0)
        )
        left = ~ended & ~np.append(False, ended[:-1])
        self._held = [{name: column[left] for name, column in found.items()}]
        self._held_rows = int(left.sum())

    def _add_rows(self, begun: Mapping[str, NDArray[Any]], ns: Ints) -> None:
        """Count calls by their durations in ns, of which -1 is one that is not known."""
        ended = pl.col("ns") >= 0
        counted = pl.DataFrame({"vm": begun["vm"], "code": begun["code"], "ns": ns}).with_columns(
            pl.when(pl.col("vm") >= 0).then("vm"), ret=pl.lit(0, pl.Int32),
            bucket=pl.Series(np.where(ns < 0, -1, bucket_of(np.maximum(ns, 0)))),
            begun=pl.lit(1, pl.Int64), spans=ended.cast(pl.Int64), longest=pl.col("ns"),
        )  # fmt: skip
        self._parts.append(
            counted.with_columns(pl.when(ended).then(name) for name in ("longest", "ns")).select(*_SCHEMA)
        )
        self._merge()


def bucket_of(ns: Ints) -> Ints:
    """Return the buckets of durations of 0 ns or more: the ns up to 127, above that their leading seven bits."""
    _, exponent = np.frexp(ns.astype(np.float64))  # 2**(exponent - 1) <= ns; exact below 2**53 ns, 104 days
    shift = np.maximum(exponent.astype(np.int64) - 1 - LEADING, 0)
    return (shift << LEADING) + (ns >> shift)


def ns_of(bucket: pl.Expr) -> pl.Expr:
    """Return an expression for the middle of a bucket, in ns."""
    shift = pl.max_horizontal(bucket // (1 << LEADING) - 1, 0)
    width = pl.lit(2, pl.Int64).pow(shift).cast(pl.Int64)
    return (bucket - shift * (1 << LEADING)) * width + (width - 1) // 2


def summed(answer: pl.LazyFrame, keys: Sequence[str]) -> pl.LazyFrame:
    """Sum answers by `keys`: `begun`, `spans`, `ns`, `p50_ns`, `p99_ns`, `longest_ns`.

    The last three are null where no end is known.
    """
    by_bucket = (
        answer.group_by(*keys, "bucket")
        .agg(pl.col("begun", "spans", "ns").sum(), pl.col("longest").max())
        .sort("bucket")
    )
    middle = ns_of(pl.col("bucket"))

    def quantile(share: float) -> pl.Expr:
        reached = (
            (pl.col("bucket") >= 0)
            & (pl.col("spans").sum() > 0)
            & (pl.col("spans").cum_sum() >= pl.col("spans").sum() * share)
        )
        return pl.when(pl.col("spans").sum() > 0).then(
            pl.min_horizontal(middle.filter(reached).first(), pl.col("longest").max())
        )

    return by_bucket.group_by(keys, maintain_order=True).agg(
        pl.col("begun", "spans", "ns").sum(), p50_ns=quantile(0.5), p99_ns=quantile(0.99),
        longest_ns=pl.when(pl.col("spans").sum() > 0).then(pl.col("longest").max()),
    )  # fmt: skip
