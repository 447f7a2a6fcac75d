# SPDX-License-Identifier: Apache-2.0
"""Load a Python file that a user names on the command line, such as a policy or a scenario."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from traces.errors import Problem


def load(path: Path, said: str) -> ModuleType:
    """Import the file and return it as a module.

    Raises Problem, whose text begins with `said` (how the user named the file), if there is no such file or it fails to
    load.
    """
    if not path.is_file():
        raise Problem(f"{said}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"kvmtrace_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Problem(f"{said}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Problem(f"{said}: does not load: {one_line(error)}") from None
    return module


def one_line(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
