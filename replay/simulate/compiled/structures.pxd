# SPDX-License-Identifier: Apache-2.0
# The rows of the pools that the engine works in; `engine` and `timing.timed_engine` have the same as numpy types.

cdef struct Vcpu:  # 64 bytes: all that a touch reads and writes of its vCPU
    long long gen  # of the current root's tree; NONE: no root, or a pending request, or stuck
    long long top  # where the first pass begins: a guess
    long long deep  # whether that is a node of level 5
    long long word  # index of the current root's word
    long long faults
    long long refaults
    long long hits
    long long stuck

cdef struct Slots:
    long long[4] slot  # indices of roots, 0 for none: one current, three previous
    long long word
    long long cause
    long long request
    long long loads
    long long creations
    long long reuses
    long long fixes

cdef struct Word:
    long long gen
    long long leaves  # of the valid root, or of the remembered tree
    long long tables
    long long root  # the valid root with this word, 0 for none
    long long remembered  # the tree is only remembered, for `assume_refault`
    long long top  # node of the root table
    long long level
    long long as_id

cdef struct Root:
    long long id
    long long word
    long long refs
    long long valid
    long long cause
    long long before  # the list of roots alive, in order of creation; row 0 is its head
    long long after

cdef struct Row:
    long long at
    long long event
    long long vcpu
    long long root
    long long word
    long long cause
    long long leaves
    long long tables
    long long roots_alive
    long long tables_alive

cdef struct Todo:  # 72 bytes: an operation until it is done, in the order of the stream
    long long gfn
    long long lead
    long long guest
    long long idle
    long long cost
    long long wall
    long long at
    unsigned int op
    unsigned int was
    unsigned int next  # how many rows on is the next one of its queue; 0: not yet there
    unsigned int guess  # a touch's table, perhaps

cdef struct Pace:
    long long clock
    long long lead  # what is left of the next operation's; NONE: as the operation says
    long long guest
    long long idle
    long long inside
    long long sampled
    long long guessed  # rows of the program that have their guess
    long long weight  # its part of what a worker takes where CPUs are short, of all vCPUs' weights
    long long[10] spent

cdef struct Queue:  # rows; NONE: it is empty
    long long head
    long long tail

cdef struct Turn:  # of a winner tree: what is due first below this node
    long long due
    long long queue

cdef struct Sample:
    long long vcpu
    long long clock
    long long cause
    long long[10] spent

cdef struct Zapped:
    long long leaves
    long long tables
