# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.core cimport Core
from replay.simulate.compiled.structures cimport Pace, Queue, Todo


cdef class TimedQueues:
    cdef Core core
    cdef Todo *todo
    cdef Queue *queue
    cdef Pace *pace
    cdef public long long todo_room
    cdef public long long todos
