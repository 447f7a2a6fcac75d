# SPDX-License-Identifier: Apache-2.0
"""Giving up root's privileges: a process that talks to a network needs none of those that recording needs."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_NO_NEW_PRIVILEGES: Final = 38  # PR_SET_NO_NEW_PRIVS
_AMBIENT: Final = 47  # PR_CAP_AMBIENT
_CLEAR_ALL: Final = 4  # PR_CAP_AMBIENT_CLEAR_ALL
_VERSION_3: Final = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def drop_all() -> None:
    """Drop every capability of this process and of what it executes, for good. Raises OSError where that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = _Header(_VERSION_3, 0), (_Sets * 2)()
    for call, arguments in (
        (libc.prctl, (_NO_NEW_PRIVILEGES, 1, 0, 0, 0)),
        (libc.prctl, (_AMBIENT, _CLEAR_ALL, 0, 0, 0)),
        (libc.capset, (ctypes.byref(header), none)),
    ):
        if call(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
