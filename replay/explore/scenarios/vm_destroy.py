# SPDX-License-Identifier: Apache-2.0
"""VM destruction walks the list of roots while zap workers free them.

The patch "KVM: x86: Preserve TDP MMU roots until they are explicitly invalidated" made kvm_mmu_uninit_tdp_mmu()
invalidate all roots, without mmu_lock, because nobody else uses the VM then. But each root is queued as it is
invalidated, and an unbound workqueue starts at once: the worker may put the last reference and free the root at which
the walk stands. syzbot found that in v2 of the patch (KASAN: use-after-free in kvm_tdp_mmu_invalidate_all_roots); v3
(edbdb43fc96b, Linux 6.4) walks in an RCU read-side section, and roots had always been freed by call_rcu().
"""

from __future__ import annotations

from replay.explore.memory import Thing
from replay.explore.model import Model, Mutex, Rcu, Steps, require, until
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """Each root holds one reference, the TDP MMU's own, since the vCPUs are gone.

    The list is linked as a list_head is.
    """
    in_rcu = variant == "v3"
    head = model.thing("tdp_mmu_roots", next=None, prev=None)
    queue = model.thing("workqueue", items=(), running=0)
    pages_lock = Mutex(model, "tdp_mmu_pages_lock")
    rcu = Rcu(model)
    roots = tuple(
        model.thing(f"R{n}", "root", next=None, prev=None, invalid=False, zapped=False, refs=1)
        for n in range(bounds["roots"])
    )
    ring = (head, *roots)
    for link, following in zip(ring, (*roots, head), strict=True):
        link.next, following.prev = following, link

    def destroy() -> Steps:
        if in_rcu:
            yield "rcu_read_lock()"
            rcu.read_lock()
        yield "takes the first root of the list"
        root = head.next
        while root is not head:
            yield f"looks whether {root} is valid"
            if not root.invalid:
                yield f"marks {root} invalid"
                root.invalid = True
                yield f"queues {root} to be zapped"
                queue.items += (root,)
            yield f"goes on from {root} to the next root"
            root = root.next
        if in_rcu:
            yield "rcu_read_unlock()"
            rcu.read_unlock()
        yield until("destroy_workqueue(): waits for all work", lambda: not queue.items and not queue.running)
        require(head.next is head, "no root is left when the VM is gone")
        yield rcu.barrier()

    def worker() -> Steps:
        while True:
            yield until("takes work from the queue", lambda: queue.items)
            yield from zap(take())

    def take() -> Thing:
        root: Thing = queue.items[0]
        queue.items = queue.items[1:]
        queue.running += 1
        return root

    def zap(root: Thing) -> Steps:
        yield f"zaps {root}"
        root.zapped = True
        yield f"puts the TDP MMU's reference of {root}"
        root.refs -= 1
        if not root.refs:
            require(root.invalid, "the final put is never of a valid root", f"{root}")
            yield from pages_lock.lock()
            yield f"list_del_rcu({root})"  # leaves the root's own links, for walkers that stand on it
            root.prev.next = root.next
            root.next.prev = root.prev
            pages_lock.unlock()
            yield f"call_rcu({root})"
            rcu.call_free(root)
        queue.running -= 1

    model.actor("destroy", destroy)
    for n in range(bounds["workers"]):
        model.actor(f"worker{n}", worker, daemon=True)


SCENARIO = Scenario(
    name="vm-destroy",
    title="VM destroy walks the roots while the zap worker frees one",
    variants=(
        Variant("v2", VIOLATION, "the walk as in v2 of the patch, protected by nothing: what syzbot reported"),
        Variant("v3", HOLDS, "the same walk in an RCU read section, as merged"),
    ),
    build=build,
    bounds={"roots": 4, "workers": 2},
)
