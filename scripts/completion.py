# SPDX-License-Identifier: Apache-2.0
"""Completion for shells, as files that a package installs: `python scripts/completion.py DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from typer import completion

# Where each shell looks under share/.
FILES: Final = {
    "bash": "bash-completion/completions/kvmtrace",
    "fish": "fish/vendor_completions.d/kvmtrace.fish",
    "zsh": "zsh/site-functions/_kvmtrace",
}


def script(shell: str) -> str:
    """The shell's part: it asks the command for what may come next."""
    printed: Any = completion  # what `kvmtrace --show-completion` prints
    return (
        str(printed.get_completion_script(prog_name="kvmtrace", complete_var="_KVMTRACE_COMPLETE", shell=shell)).strip()
        + "\n"
    )


def main(directory: str) -> None:
    """Write them all."""
    for shell, name in FILES.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(shell))


if __name__ == "__main__":
    main(*sys.argv[1:])
