# SPDX-License-Identifier: Apache-2.0
# make demo and make test do all the set-up they need; see README.md.
.PHONY: setup demo quick test nightly mutations lab-test lab-guests lab-guests-check lint check ci-example bench corpus \
	simultaneous chroots man pictures site dist clean

PYTHON := .venv/bin/python

# Where this is set, each of the suite's thousands of processes compiles every module anew: half of `make quick`.
unexport PYTHONDONTWRITEBYTECODE

setup:
	@scripts/setup

demo: setup
	@scripts/demo

# On all CPUs; tests of one xdist group run one after the other.
PYTEST := $(PYTHON) -m pytest --dist loadgroup -n

# Small recordings are thousands of files: in memory, where there is room (a container often has 64 MiB of it), and gone
# as soon as their test has passed.
IN_MEMORY = $(shell [ "$$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 1000000 ] 2>/dev/null && echo TMPDIR=/dev/shm)

# In about a minute of two CPUs: lint, types, and the tests that need nothing of the machine and not much time. A worker
# begins with files that stand together, so that what their tests share is made once, and takes from another when it has
# none left; polars has as many threads as the worker.
quick: lint
	$(IN_MEMORY) POLARS_MAX_THREADS=1 $(PYTHON) -m pytest -q -n auto --dist worksteal --hypothesis-profile quick \
	    -o tmp_path_retention_policy=failed -m "not (lab or live or kvm or browser or corpus or slow or nightly)"

# All tests but the lab's, with recordings of this machine's own KVM where it has one (root): one worker more than there
# are CPUs, for the one that records waits half of its time.
test: setup
	$(PYTEST) $$(($$(nproc) + 1)) -m "not lab and not nightly"

# The long forms of tests whose short forms are in `make test`, with recordings of this machine's own KVM (root).
# Microsoft's emulator of Azure's store is npm's.
nightly: setup
	@command -v azurite-blob >/dev/null || npm install --silent --no-audit --no-fund --prefix build/azurite azurite@3
	PATH="$$PWD/build/azurite/node_modules/.bin:$$PATH" $(PYTHON) -m pytest -m nightly

# `make demo` and `make test` in a fresh Debian 12 and a fresh Debian 13, for the night (root, debootstrap): two hours.
chroots:
	scripts/chroots bookworm
	scripts/chroots trixie

# Real kernels under QEMU's and Bochs's emulation: fetched, booted, recorded, compared with the recordings we ship. On two
# workers, for an emulator is busy with one CPU for most of its time.
lab-test: setup
	$(PYTEST) 2 -m lab

# Guests that nobody here wrote, on two kernels, held against the model: an hour. Writes docs/lab-guests.md.
lab-guests: setup
	$(PYTHON) -m benchmarks.lab_guests

# The smaller set: five of KVM's selftests on one kernel, in some three minutes.
lab-guests-check: setup
	$(PYTHON) -m benchmarks.lab_guests --check

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-cache

# Every mutation of a recording that changes what its rows show is found by replaying it, and every mutation of a text, a
# trace.dat or a perf.data is imported or refused in one line (200 or 300 of each in `make test`).
mutations: setup
	MUTATIONS=10000 $(PYTEST) auto tests/replay/test_own_policy.py tests/traces/test_import_fuzz.py \
	    tests/traces/test_binary_sources.py -k mutat

# What CI runs.
check: lint test lab-test lab-guests-check ci-example

# docs/ci.md: record in the lab, validate, replay, report, gate; and see the gate fail.
ci-example: setup
	@scripts/ci-example

bench: setup
	$(PYTHON) -m benchmarks.soft_hang
	$(PYTHON) -m benchmarks.format
	$(PYTHON) -m benchmarks.record
	$(PYTHON) -m benchmarks.flight_overhead
	$(PYTHON) -m benchmarks.top
	$(PYTHON) -m benchmarks.replay
	$(PYTHON) -m benchmarks.report
	$(PYTHON) -m benchmarks.whole_commands
	$(PYTHON) -m benchmarks.imports

# Record traces/corpus anew: every scenario on every kernel of the lab.
corpus: setup
	.venv/bin/kvmtrace lab corpus --jobs 2

# Record traces/simultaneous anew: six scenarios on four kernels, each by kvmtrace, trace-cmd and perf at once.
simultaneous: setup
	$(PYTHON) -m tracer.lab.simultaneous traces/simultaneous

# Man pages of every verb, from the command line's own help: `man -M build/man kvmtrace-report`.
man: setup
	$(PYTHON) scripts/man.py build/man/man1

# The documents as a site, build/site/index.html. It needs no network, and a link that leads nowhere is an error.
site: setup
	rm -rf build/site
	$(PYTHON) -m sphinx -q -W --keep-going -b html -d build/doctrees -c docs . build/site

# The pictures of a report's page in docs/, of shipped recordings, in Chromium.
pictures: setup
	$(PYTHON) -m tests.golden.pictures

# A source distribution, and a wheel for each CPython at hand, in dist/.
dist:
	scripts/dist

clean:
	rm -rf .venv build demo dist share *.egg-info tracer/vmm/kvmtrace-vmm
	find analysis replay tracer traces -name "*.so" -delete
