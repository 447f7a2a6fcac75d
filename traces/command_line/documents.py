# SPDX-License-Identifier: Apache-2.0
"""The JSON documents that `--json` prints."""

from __future__ import annotations

import json
from typing import Any

SCHEMA = 1


def print_json(document: dict[str, Any], schema: int = SCHEMA) -> None:
    """Print a document with its schema version first, which is `schema` where a verb has left version 1."""
    print(json.dumps({"schema": schema, **document}, indent=2))
