# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, and the files under share/. All else about the package is in pyproject.toml."""

import os
import sys
from collections import defaultdict
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# gcc's vectoriser of straight-line code costs up to 4 % in storms. Without a compiler it runs as Python, and says so.
FLAGS = ["-O3", "-fno-tree-slp-vectorize", "-g0"]
COMPILED = (
    "analysis/passes/acting_threads.py",
    "analysis/passes/groups.py",
    "analysis/passes/last_mappings.py",
    "analysis/passes/lasting.py",
    "analysis/passes/removal_totals.py",
    "analysis/passes/removals.py",
    "replay/decode/dense.py",
    "replay/decode/row_counts.py",
    "replay/decode/rows/decoder.py",
    "replay/decode/rows/exit_records.py",
    "replay/decode/rows/held_inputs.py",
    "replay/decode/rows/inferred.py",
    "replay/decode/rows/page_installs.py",
    "replay/decode/rows/root_loads.py",
    "replay/decode/rows/unload_triggers.py",
    "replay/decode/rows/vm_events.py",
    "replay/decode/same_rip.py",
    "replay/decode/spans/timeline.py",
    "replay/decode/specialize.py",
    "replay/simulate/compiled/core.py",
    "replay/simulate/compiled/root_slots.py",
    "replay/simulate/compiled/timed_queues.py",
    "replay/simulate/compiled/timer.py",
    "replay/simulate/compiled/trees.py",
    "replay/simulate/compiled/turns.py",
    "replay/simulate/compiled/vcpu_programs.py",
    "replay/simulate/compiled/vm_operations.py",
    "replay/simulate/compiled/vm_pools.py",
    "replay/timing/measuring/lock_waits.py",
    "replay/timing/measuring/operation_samples.py",
    "replay/timing/measuring/row_spans.py",
    "replay/timing/measuring/steal.py",
    "replay/timing/smis_apart.py",
    "tracer/top/meter_rows.py",
    "traces/imports/event_text.py",
    "traces/imports/line_head.py",
    "traces/imports/line_rows.py",
    "traces/imports/line_text.py",
    "traces/imports/named_fields.py",
    "traces/imports/raw_records.py",
    "traces/imports/raw_rows.py",
    "traces/imports/record_walks.py",
    "traces/imports/scan.py",
    "traces/numbering.py",
)
EXTENSIONS = [
    Extension(path.removesuffix(".py").replace("/", "."), [path], extra_compile_args=FLAGS, optional=True)
    for path in COMPILED
]
CPUS = len(os.sched_getaffinity(0))

# Man pages and completion are there once scripts/dist has made them: they come from the command line's own help.
SHARE = defaultdict(list, {
    "share/kvmtrace": ["scripts/kvmtrace-flight.service", "scripts/kvmtrace-grafana.json"],
    "share/kvmtrace/recordings": ["traces/corpus/smi-storm-6.1.parquet", "traces/corpus/smi-storm-6.1-async.parquet"],
})  # fmt: skip
for path in Path("share").rglob("*"):
    if path.is_file():
        SHARE[str(path.parent)].append(str(path))

# What only says what there is compiles nothing.
if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):
    EXTENSIONS = cythonize(EXTENSIONS, build_dir="build")
setup(ext_modules=EXTENSIONS, data_files=sorted(SHARE.items()), options={"build_ext": {"parallel": CPUS}})
