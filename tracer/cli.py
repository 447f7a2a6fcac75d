# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace probes`: compile the recorder's BPF programs ahead, here or for another machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from traces.command_line.help_text import examples
from traces.errors import ENVIRONMENT, Problem
from traces.options import Modules

app = typer.Typer(
    no_args_is_help=True,
    short_help="Compile the recorder's BPF programs ahead.",
    help="Compile the recorder's BPF programs ahead, here or for another machine.",
)

_KEY = re.compile(r"[0-9a-f]{32}")


@app.command(
    short_help="Compile and keep the probes.",
    epilog=examples(
        "sudo kvmtrace probes build",
        "kvmtrace probes build --for 6.12 -o probes/",
        "sudo kvmtrace probes build --for host.json -o probes/",
    ),
)
def build(
    kernel: Annotated[
        str,
        typer.Option(
            "--for",
            help="A name in `kvmtrace lab list`, a bzImage, or what `probes text` wrote. [default: this kernel]",
        ),
    ] = "",
    modules: Modules = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write to. [default: this machine's cache]")
    ] = None,
) -> None:
    """Compile and keep the probes, so that recording needs no clang and no kernel headers.

    Bring the file into /var/cache/kvmtrace/probes of the other machine, owned by root. Another machine's kernel is
    booted under emulation to learn its layout.
    """
    from tracer.probing import kept
    from tracer.probing.compiled import bcc_version, compile_text

    if kernel and not kernel.endswith(".json"):
        from tracer.lab.fetch import choose
        from tracer.lab.session import compiled_probes

        made = compiled_probes(choose(kernel, modules))
        name, document, whose = made.name, made.read_bytes(), kernel
    else:
        if os.geteuid() != 0:
            raise Problem("bcc makes the probes' maps as it compiles, which needs root: run it with sudo", ENVIRONMENT)
        asked = _read(Path(kernel)) if kernel else _of_this_kernel()
        name, whose = kept.file_name(asked["key"], bcc_version()), asked["kernel"]
        document = compile_text(asked["text"]).document()
    path = kept.write(out or kept.directory(), name, document)
    print(f"{path}: the probes for {whose}")


@app.command(
    short_help="Print what `probes build --for` needs to know of this kernel.",
    epilog=examples("kvmtrace probes text > host.json"),
)
def text() -> None:
    """Print what `probes build --for` needs to know of this machine's kernel, as JSON; this needs no clang."""
    print(json.dumps(_of_this_kernel()))


def _of_this_kernel() -> dict[str, str]:
    """Return for this kernel {"kernel": its release, "key": the name of its kept file, "text": the C source}."""
    import platform

    from tracer.probing import attachments, kept, tracefs
    from tracer.probing.btf import kernel_btf

    if tracefs.tracefs() is None:
        raise Problem(f"tracefs is not mounted or not readable: {tracefs.MOUNT_COMMAND}", ENVIRONMENT)
    layout = attachments.this_layout()
    if unknown := layout.unknown():
        raise Problem(unknown, ENVIRONMENT)
    source = attachments.choices().text(kernel_btf(), layout)
    return {"kernel": platform.release(), "key": kept.key(source), "text": source}


def _parsed(document: str, where: str) -> dict[str, str]:
    try:
        raw = json.loads(document)
    except ValueError:
        raw = None
    names = ("kernel", "key", "text")
    if not isinstance(raw, dict) or not all(isinstance(raw.get(name), str) for name in names):
        raise Problem(f"{where}: not what `kvmtrace probes text` prints")
    if not _KEY.fullmatch(raw["key"]):
        raise Problem(f"{where}: its key is not one of ours")
    return {name: raw[name] for name in names}


def _read(path: Path) -> dict[str, str]:
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or 'not a text'}") from None
