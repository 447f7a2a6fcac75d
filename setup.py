# SPDX-License-Identifier: Apache-2.0
"""The compiled modules. All else about the package is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

# gcc's vectoriser of straight-line code costs up to 4 % in storms. Without a compiler it runs as Python, and says so.
FLAGS = ["-O3", "-fno-tree-slp-vectorize"]
COMPILED = (
    "replay/decode/decoder.py",
    "replay/decode/dense.py",
    "replay/decode/inferred.py",
    "replay/decode/groups.py",
    "replay/decode/row_counts.py",
    "replay/decode/lasting.py",
    "replay/decode/removals.py",
    "replay/decode/same_rip.py",
    "replay/decode/timeline.py",
    "replay/simulate/core.py",
    "replay/decode/specialize.py",
    "replay/timing/lock_waits.py",
    "replay/timing/steal.py",
    "tracer/top/meter_rows.py",
    "traces/imports/event_text.py",
    "traces/imports/line_head.py",
    "traces/imports/line_rows.py",
    "traces/imports/line_text.py",
    "traces/imports/named_fields.py",
    "traces/imports/samples.py",
    "traces/imports/scan.py",
)
EXTENSIONS = [
    Extension(path.removesuffix(".py").replace("/", "."), [path], extra_compile_args=FLAGS, optional=True)
    for path in COMPILED
]
setup(ext_modules=cythonize(EXTENSIONS, build_dir="build"))
