# SPDX-License-Identifier: Apache-2.0
"""Mutated and cut texts, and texts of others: one clear line, or a trace that reads. Never anything else."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.traces.excerpts import EXCERPTS, mailed, text_of
from tests.traces.mutations import outcome
from traces.imports.told import ToldOfText

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("MUTATIONS", "20"))  # of each form of text
_NASTY = (
    b"\0", b"\xff\xfe", b"=\n", b"=3D", b"&gt;", b"> > > ", b"[", b"]: ", b"-1", b"99999999999999999999", b"0x",
    b"\r\n",
    b"18446744073709551616.999999: ", b"kvm_exit: ", b"[FAILED TO PARSE] role=",
    b"CPU:70000 [LOST 99999999999999999999 EVENTS]\n",
    b"(" * 50, b"A" * 5000, b"vcpu 70000", b"vcpu -1", b"lost 18446744073709551615", b"\x1f\x8b", b"# tracer: nop\n",
)  # fmt: skip


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def mutated(text: bytes, chosen: random.Random) -> bytes:
    """The text with a few changes: bytes, pieces cut out, doubled, moved, put in."""
    data = bytearray(text)
    for _ in range(chosen.randrange(1, 8)):
        at = chosen.randrange(len(data) + 1)
        end = min(len(data), at + chosen.randrange(1, 60))
        how = chosen.randrange(6)
        if how == 0 and at < len(data):
            data[at] = chosen.randrange(256)
        elif how == 1:
            del data[at:end]
        elif how == 2:
            data[at:at] = data[at:end]
        elif how == 3:
            data[at:at] = chosen.choice(_NASTY)
        elif how == 4:
            data[at:end] = bytes(chosen.randrange(256) for _ in range(end - at))
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("form", EXCERPTS)
def test_a_mutated_text_is_one_line_or_a_trace(form: str, tmp_path: Path) -> None:
    pack: list[Callable[[bytes], bytes]] = [bytes, bytes, bytes, gzip.compress, lzma.compress, bz2.compress, _zstd]
    made, said = 0, list[str]()
    for seed in range(COUNT):
        chosen = random.Random(f"{form} {seed}")
        text = mailed(text_of(form), seed) if chosen.random() < 0.3 else text_of(form).encode() * chosen.randrange(1, 4)
        packed = chosen.choice(pack)
        data = mutated(packed(text), chosen) if chosen.random() < 0.5 else packed(mutated(text, chosen))
        if line := outcome(data, tmp_path, ToldOfText(chosen.choice(("", "6.1.20", "7.x"))), seed):
            said.append(line)
        else:
            made += 1
    assert not [line for line in said if "\n" in line]
    # Else they say nothing of rows. Of ticks there is one line.
    assert made > COUNT // (8 if form == "ticks" else 4)
