# SPDX-License-Identifier: Apache-2.0
"""Getting a kernel: from a directory of kernels, or from Debian through the machine's own apt sources.

What is kept of a kernel is its image and the few modules that a lab loads: some 15 MB of a package's 400.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tracer.lab.apt import Apt
from tracer.lab.lab_cpus import CPUS
from tracer.lab.lab_kernels import Bootable, LabKernel, cache, fetched, known, missing, own
from tracer.lab.modules import WANTED, WANTED_ON_INTEL, Directory, load_order, module_name
from traces.errors import ENVIRONMENT, Problem

Say = Callable[[str], None]

# A package (110 MB) and its contents unpacked once (450 MB), both only for the time of the fetch.
SPACE_NEEDED: Final = 700 << 20


def kernel_directory() -> Path | None:
    """Return the directory of kernels that need no network: $KVMTRACE_KERNELS, else ../shared/kernels."""
    if given := os.environ.get("KVMTRACE_KERNELS"):
        if not Path(given).is_dir():
            raise Problem(f"KVMTRACE_KERNELS: {given}: no such directory")
        return Path(given)
    beside = Path(__file__).resolve().parents[3] / "shared" / "kernels"
    return beside if beside.is_dir() else None


def present(name: str) -> Bootable | None:
    """Return a kernel of the table that is here, unpacked from the kernel directory if need be; or None."""
    kernel = known(name)
    return fetched(name) or _from_directory(kernel, anew=False)


def fetch(name: str, say: Say = lambda line: None, *, update: bool = False) -> Bootable:
    """Return a kernel of the table, fetched if it is not here; `update` looks for a newer one even if it is.

    `say` is called with a line of progress now and then. Raises Problem (environment): no Debian sources, nothing to
    download, no space.
    """
    kernel = known(name)
    found = _from_directory(kernel, anew=True) if update else present(name)
    # Directories of kernels made before there was Intel in the lab have KVM for AMD only.
    whole = found and all(cpu.runs(Directory(*found.modules)) for cpu in CPUS.values())
    if found and (whole or not update or not kernel.suites):
        return found
    if not kernel.suites:
        raise missing(name)
    say(f"kernel {name}: looking for it in {', '.join(suite for _, suite in kernel.suites)}")
    return _from_debian(kernel, say, anew=update)


def choose(name: str, modules: Path | None = None, kvm_modules: Path | None = None) -> Bootable:
    """Return the kernel named `name` (in the table, or an image's path), with these directories of modules."""
    if "/" not in name and not Path(name).exists():
        found = present(name)
        if found is None:
            raise missing(name)
        if modules:
            raise Problem("--modules is for a kernel given by path; --kvm-modules replaces KVM's only")
    else:
        found = own(Path(name), modules)
    if kvm_modules:
        # Which policy the replaced modules have is not ours to say.
        return replace(found, name=f"{found.name}+{kvm_modules.name}", modules=(*found.modules, kvm_modules), policy="")
    return found


def _from_directory(kernel: LabKernel, *, anew: bool) -> Bootable | None:
    directory = kernel_directory()
    archives = sorted(directory.glob(f"{kernel.series}.*-amd64.tar.xz")) if directory else []
    replaced: dict[str, bytes] = {}
    if kernel.variant:
        folders = {path: path.with_name(path.name.replace(".tar.xz", f"-{kernel.variant}")) for path in archives}
        archives = [path for path in archives if folders[path].is_dir()]
        if archives:
            tree = Directory(folders[archives[-1]])
            replaced = {name: tree[name] for name in tree}
    if not archives:
        return None
    archive = archives[-1]
    with _workplace(kernel.name) as work:
        if not anew and (found := fetched(kernel.name)):
            return found  # by another process, while this one waited
        tar = work / "kernel.tar"
        try:
            with lzma.open(archive) as packed, tar.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise Problem(f"{archive}: {error}") from None
        return _keep(kernel.name, [tar], replaced)


def _from_debian(kernel: LabKernel, say: Say, *, anew: bool) -> Bootable:
    with _workplace(kernel.name) as work:
        if not anew and (found := fetched(kernel.name)):
            return found  # by another process, while this one waited
        apt = Apt(work / "apt", kernel.suites)
        apt.update()
        images = apt.images(kernel.series)
        if not images:
            raise Problem(f"kernel {kernel.name}: no linux-image of {kernel.series} in {apt.suites}", ENVIRONMENT)
        # An archive's lists go on naming kernels whose packages it no longer has.
        for package, version in images[:-1]:
            try:
                return _keep(kernel.name, _download(apt, package, version, say))
            except Problem as problem:
                say(f"kernel {kernel.name}: {problem}")
        return _keep(kernel.name, _download(apt, *images[-1], say))


def _download(apt: Apt, package: str, version: str, say: Say) -> list[Path]:
    """Download all packages that a kernel is split into; return their contents as tar files."""
    tars = []
    for part, exact in apt.parts(package, version).items():
        say(f"{part} {exact}")
        tars.append(apt.download(part, exact))
    return tars


class _Tars(Mapping[str, bytes]):
    """The modules in the contents of packages, by name; those in `replaced` are taken instead, or in addition."""

    def __init__(self, tars: Sequence[tarfile.TarFile], replaced: Mapping[str, bytes]) -> None:
        self.replaced = replaced
        self.members: dict[str, tuple[tarfile.TarFile, tarfile.TarInfo]] = {}
        self.image: tuple[tarfile.TarFile, tarfile.TarInfo] | None = None
        for tar in tars:
            for member in tar:
                base = member.name.rsplit("/", 1)[-1]
                if not member.isfile():
                    continue
                if name := module_name(base):
                    self.members[name] = (tar, member)
                elif base == "vmlinuz" or base.startswith("vmlinuz-"):
                    self.image = (tar, member)

    def __getitem__(self, name: str) -> bytes:
        return self.replaced[name] if name in self.replaced else _contents(*self.members[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.members.keys() | self.replaced.keys())

    def __len__(self) -> int:
        return len(self.members.keys() | self.replaced.keys())


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise Problem(f"{member.name}: not a file")
    return file.read()


def _keep(name: str, paths: Sequence[Path], replaced: Mapping[str, bytes] = MappingProxyType({})) -> Bootable:
    """Put the image and the modules that a lab needs into the cache, all or nothing, and nothing else of the tar files.

    Members are written under names chosen here, so that nothing in an archive decides where a file goes.
    """
    home = cache() / name
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache()))
    try:
        with ExitStack() as opened:
            tree = _Tars([opened.enter_context(tarfile.open(path)) for path in paths], replaced)
            if tree.image is None or "kvm" not in tree:
                raise Problem(f"kernel {name}: no kernel image with KVM modules in what was fetched")
            (made / "modules").mkdir()
            for module in load_order(tree, (*WANTED, *WANTED_ON_INTEL)):
                (made / "modules" / f"{module}.ko").write_bytes(tree[module])
            (made / "vmlinuz").write_bytes(_contents(*tree.image))
        made.chmod(0o755)
        shutil.rmtree(home, ignore_errors=True)
        made.rename(home)
    except tarfile.TarError as error:
        raise Problem(f"kernel {name}: damaged archive ({error})") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    found = fetched(name)
    if found is None:
        raise Problem(f"{home}: cannot be read back", ENVIRONMENT)
    return found


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Let one process at a time make something in that directory."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def _workplace(name: str) -> Iterator[Path]:
    """Yield a directory in the cache for the time of a fetch; there is one fetch at a time.

    Raises Problem when it cannot be made or there is no space.
    """
    with ExitStack() as held:
        try:
            cache().mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(cache()))
            free = shutil.disk_usage(cache()).free
            work = held.enter_context(tempfile.TemporaryDirectory(prefix=f".fetch-{name}-", dir=cache()))
        except OSError as error:
            hint = "set XDG_CACHE_HOME to a directory of yours"
            raise Problem(f"{cache()}: {error.strerror}: {hint}", ENVIRONMENT) from None
        if free < SPACE_NEEDED:
            raise Problem(
                f"{cache()}: {free >> 20} MiB free, {SPACE_NEEDED >> 20} needed: make room or set XDG_CACHE_HOME",
                ENVIRONMENT,
            )
        yield Path(work)
