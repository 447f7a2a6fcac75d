# SPDX-License-Identifier: Apache-2.0
"""Probes that a lab's guest has compiled serve until something changes that they are made from."""

from __future__ import annotations

import grimp

from tracer.lab import prebuilt


def test_a_change_of_any_module_that_makes_probes_has_them_compiled_anew() -> None:
    sources = {path for part in prebuilt._SOURCES for path in prebuilt.ROOT.glob(part)}
    assert all([*prebuilt.ROOT.glob(part)] for part in prebuilt._SOURCES)
    graph = grimp.build_graph("tracer", cache_dir=None)
    recorder = {"tracer.recorder", *graph.find_upstream_modules("tracer.recorder")}
    found = {prebuilt.ROOT / f"{name.replace('.', '/')}.py" for name in recorder}
    assert len(found) > 15
    assert {path for path in found if path.is_file()} <= sources
