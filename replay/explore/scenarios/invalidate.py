# SPDX-License-Identifier: Apache-2.0
"""Invalidating all roots, while vCPUs load roots and handle faults.

A fault picks its root before it takes mmu_lock. kvm_mmu_zap_all_fast() may invalidate that root and zap it in between;
what the fault installs after that is never zapped, for the last put of a root zaps nothing. So a fault checks, under
mmu_lock, whether its root is obsolete, and retries (a955cad84cda). That is enough because roots become invalid under
mmu_lock for write, "to ensure that a root doesn't become invalid while there are active readers" (edbdb43fc96b), and
because vCPUs are asked to drop obsolete roots after the roots were marked, so that a retry gets a new one.

Since Linux 6.9 roots are looked up and made under mmu_lock for read. Two vCPUs may both find none; a second lookup,
under tdp_mmu_pages_lock, keeps at most one valid root for each role word.
"""

from __future__ import annotations

from replay.explore.memory import Thing
from replay.explore.model import Model, Mutex, RwLock, Steps, require
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant

EMPTY = "a root is empty when it is freed"
ONE_VALID = "at most one valid root for a role word"
WORDS = ("normal", "smm")


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """vCPUs with two role words each fault in one page, under `preserve`.

    In `look` variants they have no root loaded yet.
    """
    loaded = "look" not in variant
    mmu_lock = RwLock(model, "mmu_lock")
    pages_lock = Mutex(model, "tdp_mmu_pages_lock")
    roots = tuple(  # enough for one invalidation, after which each role word gets a new root
        model.thing(f"R{n}", "root", word="", refs=0, invalid=False, leaves=frozenset()) for n in range(4)
    )
    kvm = model.thing("kvm", roots=())
    vcpus = tuple(model.thing(f"vcpu{n}", root=None, requested=False) for n in range(bounds["vcpus"]))
    words = tuple(WORDS[n % 2] for n in range(len(vcpus)))
    if loaded:
        for root, word in zip(roots, dict.fromkeys(words), strict=False):
            root.word, root.refs = word, 1 + words.count(word)
            kvm.roots += (root,)
        for vcpu, word in zip(vcpus, words, strict=True):
            vcpu.root = find(kvm, word)

    def run(vcpu: Thing, word: str) -> Steps:
        while True:
            yield "handles requests"
            if vcpu.requested:
                vcpu.requested = False
                if vcpu.root is not None and vcpu.root.invalid:
                    yield from unload(vcpu)
            if vcpu.root is None:
                yield from load(vcpu, word)
            yield "enters the guest, which faults, unless there is a request"
            if not vcpu.requested and (yield from fault(vcpu, vcpu.root)):
                break
        yield from unload(vcpu)

    def fault(vcpu: Thing, root: Thing) -> Steps:
        if variant == "early-check":
            yield f"looks whether {root} is obsolete"
            if root.invalid:
                return False
        yield from mmu_lock.read()
        if variant not in ("no-check", "early-check"):
            yield f"looks whether {root} is obsolete"
            if root.invalid:
                mmu_lock.read_unlock()
                return False
        yield f"installs a leaf in {root}"
        root.leaves |= {vcpu}
        mmu_lock.read_unlock()
        return True

    def load(vcpu: Thing, word: str) -> Steps:
        yield from mmu_lock.read()
        yield f"looks for a valid {word} root"
        root = find(kvm, word)
        if root is None:
            yield from pages_lock.lock()
            yield "makes a root" if variant == "one-look" else "looks again, and makes a root if there is none"
            root = None if variant == "one-look" else find(kvm, word)
            if root is None:
                root = next(root for root in roots if not root.word)
                root.word, root.refs = word, 1
                kvm.roots += (root,)
            pages_lock.unlock()
        root.refs += 1
        vcpu.root = root
        mmu_lock.read_unlock()

    def unload(vcpu: Thing) -> Steps:
        yield from mmu_lock.read()
        yield f"puts {vcpu.root}"
        put(vcpu.root)
        vcpu.root = None
        mmu_lock.read_unlock()

    def put(root: Thing) -> None:
        root.refs -= 1
        if not root.refs:
            require(root.invalid, "the final put is never of a valid root", f"{root}")
            require(not root.leaves, EMPTY, f"what was installed in {root} after its zap is leaked")
            kvm.roots = tuple(other for other in kvm.roots if other is not root)

    def request() -> Steps:
        for vcpu in vcpus:
            yield f"asks {vcpu} to drop obsolete roots"
            vcpu.requested = True

    def zap_all_fast() -> Steps:
        lock = mmu_lock.read if variant == "read-invalidate" else mmu_lock.write
        if variant == "request-first":
            yield from request()
        yield from lock()
        doomed = tuple(root for root in kvm.roots if not root.invalid)
        for root in doomed:
            yield f"invalidates {root}"
            root.invalid = True
        if variant != "request-first":
            yield from request()
        if variant == "read-invalidate":
            mmu_lock.read_unlock()
        else:
            mmu_lock.write_unlock()
        for root in doomed:
            yield from mmu_lock.read()
            yield f"zaps {root}, puts the TDP MMU's reference"
            root.leaves = frozenset()
            put(root)
            mmu_lock.read_unlock()

    for vcpu, word in zip(vcpus, words, strict=True):
        model.actor(str(vcpu), run, vcpu, word)
    model.actor("ioctl", zap_all_fast)
    model.always(ONE_VALID, lambda: all(sum(r.word == w and not r.invalid for r in kvm.roots) <= 1 for w in WORDS))


def find(kvm: Thing, word: str) -> Thing | None:
    """Return the valid root with a role word, or None."""
    return next((root for root in kvm.roots if root.word == word and not root.invalid), None)


SCENARIO = Scenario(
    name="invalidate",
    title="Invalidating all roots against loads and faults in flight",
    variants=(
        Variant("no-check", VIOLATION, "the fault trusts the root it picked: a leaf goes into a zapped root"),
        Variant("early-check", VIOLATION, "it looks whether the root is obsolete, but before it has mmu_lock"),
        Variant("read-invalidate", VIOLATION, "it looks under mmu_lock, but roots become invalid under it for read"),
        Variant(
            "request-first", VIOLATION, "vCPUs are asked to drop obsolete roots before there are any: endless retry"
        ),
        Variant("check", HOLDS, "it looks under mmu_lock, roots become invalid under it for write, then the requests"),
        Variant("one-look", VIOLATION, "load under mmu_lock for read, without the second look"),
        Variant("two-looks", HOLDS, "load under mmu_lock for read, with the second look"),
    ),
    build=build,
    bounds={"vcpus": 3},
)
