# SPDX-License-Identifier: Apache-2.0
# The state of a vCPU after its last row; rows are given by their seq, -1 for none. `vcpu_rows` has it as a numpy type.

cdef struct Vcpu:
    long long opened  # row of the last exit or ioctl
    long long why  # meaning of that exit or ioctl (`exits.Left`)
    long long loaded  # row of the last load of a root
    long long state  # state (`roles`) in the role word of the loaded root
    long long smm  # row of the last SMM transition
    long long reset  # row of the last reset or unload
    long long unloaded  # row of the last trigger that unloads
    long long cr0_reset  # row of the last reset for a write of CR0 of unknown value
    long long cr0_input  # number of the input made of it
    long long entered  # row of the last entry
    long long root  # root at the last entry
    long long dirty  # the vCPU may have to load at its next entry
    long long invalidated  # number of invalidations that the vCPU has served
    long long started  # a root of the vCPU is known
    long long touch  # row of the last touch
    long long touch_input  # number of the input made of it
    long long requested  # gfn that the fault under way is about to map
    long long requested_level  # level at which it will be mapped
    long long split  # row of the last fault that split a huge leaf in place
    long long marked  # gfn of the MMIO SPTE that the fault under way has made; -1: none
    long long present  # the last fault was on a leaf that was present
    long long faulted  # row of the last fault
    long long built  # row at which the vCPU last built a table
    long long built_at  # gfn of that table
    long long wp_flips  # parity of writes that changed CR0.WP, where the role word does not have the bit
    long long maybe_flips  # parity of writes of CR0 of unknown value
    long long efer  # last value written to EFER; -1: none
    long long cr0  # last value written to CR0; -1: none
    long long cr4  # last value written to CR4; -1: none
    long long wrote  # row of the last write of CR0 or CR4 of known value
    long long wrote_trigger  # trigger of that write; -1: none
    long long left  # row of the last exit
    long long left_by_io  # that exit was for port I/O
    long long asked_smi  # row of the last KVM_SMI ioctl by the vCPU's thread
    # The exit under way
    long long record  # number of its record; -1: it has no input yet
    long long first  # number of its first input
    long long has  # which inputs it has (`inputs.HAS_*`)
    long long[12] ns  # times by VcpuState
    long long tables
    long long built_root
    long long still
    long long interrupt
    # Time after the last exit with an input: ns in all, in the guest, and halted
    long long lead
    long long lead_guest
    long long lead_idle
    # Sums
    long long zapped  # ns of inline zaps; they depend on the policy
    long long prefetched  # ns of prefetches; they depend on the policy
    long long rows  # number of rows of the vCPU's thread
    long long fault_rows
    long long faults
    long long interrupts  # number of exits for interrupts of the host
    long long interrupted  # ns that those exits took
    long long nesting  # a nested guest was entered, and no root of it was seen yet
