"""The one compiled module. All else about the package is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

# gcc's vectoriser of straight-line code costs up to 4 % in storms. Without a compiler it runs as Python, and says so.
FLAGS = ["-O3", "-fno-tree-slp-vectorize"]
ENGINE = Extension("replay.simulate.core", ["replay/simulate/core.py"], extra_compile_args=FLAGS, optional=True)
setup(ext_modules=cythonize([ENGINE], build_dir="build"))
