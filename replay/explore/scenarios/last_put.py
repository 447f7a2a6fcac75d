# SPDX-License-Identifier: Apache-2.0
"""The last put of a root: why it took a temporary reference and a work item, and why `preserve` needs neither.

Until Linux 6.3 (since 5.18) a root died with the last reference that a vCPU held. kvm_tdp_mmu_put_root() then marked it
invalid, gave it a reference again and queued it. The comment that the patch removed says why: zapping yields mmu_lock,
"and writers do not expect to see refcount=0"; those that must visit all roots, such as an MMU notifier, would skip it.
And the worker "is required because kvm_tdp_mmu_invalidate_all_roots() skips already-invalid roots": only the workqueue
makes kvm_mmu_zap_all_fast() wait for it. With edbdb43fc96b (Linux 6.4) the TDP MMU holds a reference of its own until a
root is invalidated: a final put finds an invalid, zapped root, or KVM_BUG_ON.

Unloading and invalidating take mmu_lock for write (as up to 6.8), the worker takes it for read and yields once.
"""

from __future__ import annotations

from replay.explore.memory import Thing, freed
from replay.explore.model import Model, RwLock, Steps, require, until
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant

REFCOUNT_0 = "no writer sees a root with refcount 0"
ZAPPED = "zap_all_fast returns only after all roots that were there are zapped"
FINAL_PUT = "the final put is never of a valid root"


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """vCPUs with all their roots about to be unloaded, a memslot ioctl, an MMU notifier, and the zap worker."""
    preserve = variant.startswith("preserve")
    own = 1 if variant == "preserve" else 0  # the TDP MMU's reference
    count = bounds["roots"]
    vcpus = bounds["vcpus"]
    holders = tuple({n % vcpus, (n + n % 2) % vcpus} for n in range(count))  # every other root is shared by two vCPUs
    kvm = model.thing("kvm", roots=(), queue=(), running=0, waits=())
    mmu_lock = RwLock(model, "mmu_lock")
    roots = tuple(
        model.thing(f"R{n}", "root", refs=own + len(holders[n]), invalid=False, zapped=False) for n in range(count)
    )
    kvm.roots = roots

    def unload(slots: tuple[Thing, ...]) -> Steps:
        yield from mmu_lock.write()
        for root in slots:
            yield f"puts {root}"
            root.refs -= 1
            if not root.refs:
                yield from last(root)
        mmu_lock.write_unlock()

    def last(root: Thing) -> Steps:
        if preserve:
            require(root.invalid, FINAL_PUT, f"KVM_BUG_ON: {root}")
        if root.invalid:
            yield f"unlinks and frees {root}"
            release(root)
            return
        yield f"marks {root} invalid"
        root.invalid = True
        if variant != "no-reference":
            yield f"gives {root} a reference again"
            root.refs = 1
        if variant != "no-work":
            yield f"queues {root} to be zapped"
            kvm.queue += (root,)
            return
        mmu_lock.write_unlock()  # zaps it at once; zapping yields
        yield from mmu_lock.write()
        yield f"zaps {root}, puts it"
        root.zapped = True
        drop(root)

    def worker() -> Steps:
        while True:
            yield until("takes work from the queue", lambda: kvm.queue)
            yield from work(take())

    def take() -> Thing:
        root: Thing = kvm.queue[0]
        kvm.queue = kvm.queue[1:]
        kvm.running += 1
        return root

    def work(root: Thing) -> Steps:
        yield from mmu_lock.read()
        mmu_lock.read_unlock()  # yields before it is done
        yield from mmu_lock.read()
        yield f"zaps {root}"
        root.zapped = True
        yield f"puts {root}"
        if variant == "no-reference":
            release(root)
        else:
            drop(root)
        mmu_lock.read_unlock()
        kvm.running -= 1

    def drop(root: Thing) -> None:
        root.refs -= 1
        if not root.refs:
            require(root.invalid, FINAL_PUT, f"KVM_BUG_ON: {root}")
            release(root)

    def release(root: Thing) -> None:
        require(root.zapped, "a root is zapped before it is freed", f"{root}")
        kvm.roots = tuple(other for other in kvm.roots if other is not root)
        root.refs = 0

    def zap_all_fast() -> Steps:
        yield from mmu_lock.write()
        there = kvm.roots
        for root in there:
            yield f"invalidates and queues {root}, unless it is invalid"
            if root.invalid:
                continue
            root.invalid = True
            if not preserve:  # the worker is given a reference: the TDP MMU's own, or a new one
                require(root.refs, REFCOUNT_0, f"{root}")
                root.refs += 1
            kvm.queue += (root,)
        mmu_lock.write_unlock()
        yield until("flush_workqueue(): waits for all work", lambda: not kvm.queue and not kvm.running)
        require(
            all(freed(root) or root.zapped for root in there), ZAPPED, " ".join(f"{r}" for r in there if not r.zapped)
        )

    def notifier() -> Steps:
        yield from mmu_lock.write()
        for root in kvm.roots:
            yield f"unmaps in {root}, by taking a reference"
            require(root.refs, REFCOUNT_0, f"{root} is skipped")
        mmu_lock.write_unlock()

    for n in range(vcpus):
        model.actor(f"vcpu{n}", unload, tuple(root for root, by in zip(roots, holders, strict=True) if n in by))
    model.actor("ioctl", zap_all_fast)
    model.actor("notifier", notifier)
    model.actor("worker", worker, daemon=True)
    model.at_end("no root is left", lambda: not kvm.roots)


SCENARIO = Scenario(
    name="last-put",
    title="The last put of a root: the temporary reference, the work item, and the TDP MMU's own reference",
    variants=(
        Variant("no-reference", VIOLATION, "the old way without refcount_set(1): a notifier skips a dying root"),
        Variant("no-work", VIOLATION, "the old way, but the putter zaps: zap_all_fast does not wait for it"),
        Variant("async", HOLDS, "the old way, with the temporary reference and the work item"),
        Variant("preserve-unowned", VIOLATION, "the new put, but the TDP MMU holds no reference: KVM_BUG_ON"),
        Variant("preserve", HOLDS, "the TDP MMU holds a reference until it invalidates: neither is needed"),
    ),
    build=build,
    bounds={"roots": 4, "vcpus": 3},
)
