# SPDX-License-Identifier: Apache-2.0
"""A kernel's description as a trace's metadata holds it (`kernel`, format 1.1), so that it always reads the same.

What a later version of kvmtrace knows better does not change what an old trace says of itself. What is read may be
damaged or hostile: everything is checked, and what this version does not know is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from traces.errors import Problem
from traces.kernels import roles
from traces.kernels.kernel import Kernel, ReturnCodes
from traces.kernels.policies import POLICIES
from traces.kernels.spte import SpteLayout
from traces.kernels.triggers import Trigger
from traces.kernels.vendors import VENDORS, Vendor

_MOST: Final = 1024  # entries of a list
_LONGEST: Final = 200  # characters of a name
_PASS_LEVELS: Final = range(6)


def document(kernel: Kernel) -> dict[str, Any]:
    """Return the JSON object of a kernel."""
    made = {
        field.name: getattr(kernel, field.name)
        for field in fields(kernel)
        if isinstance(getattr(kernel, field.name), bool | int | str)
    }
    layout = {name: [shift, width] for name, shift, width in kernel.layout.fields}
    return made | {
        "version": list(kernel.version),
        "unloads": [trigger.name for trigger in sorted(kernel.unloads)],
        "layout": {"fields": layout, "guest_bits": kernel.layout.guest_bits},
        "spte": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(kernel.spte).items()},
        "ret_pf": dict(vars(kernel.ret_pf)),
        "passes": list(kernel.passes),
        "points": sorted(kernel.points),
        "page_struct": dict(kernel.page_struct),
        "vendor": kernel.vendor.name,
    }


def kernel_of(value: Any, otherwise: Kernel) -> Kernel:
    """Return the kernel that a trace describes; what an older minor version lacks is taken from `otherwise`.

    Raises Problem where it is not what the format says.
    """
    if not isinstance(value, Mapping):
        raise Problem("damaged: its metadata's `kernel` is not an object")
    hints = get_type_hints(Kernel)
    found: dict[str, Any] = {}
    for field in fields(Kernel):
        if field.name not in value:
            continue
        try:
            read = _READERS.get(field.name) or _reader(hints[field.name])
            found[field.name] = read(value[field.name])
        except (_Unfit, KeyError, TypeError, ValueError):
            raise Problem(f"damaged: its metadata's `kernel.{field.name}` is not what the format says") from None
    return replace(otherwise, **found)


class _Unfit(Exception):
    pass


def _need(holds: bool) -> None:
    if not holds:
        raise _Unfit


def _number(value: Any, most: int = 1 << 64) -> int:
    _need(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most)
    return int(value)


def _text(value: Any) -> str:
    _need(isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable())
    return str(value)


def _list(value: Any) -> list[Any]:
    _need(isinstance(value, list) and len(value) <= _MOST)
    return list(value)


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return the function that reads a plain field: a flag, a number, one of several words, or a text."""

    def word(value: Any) -> Any:
        _need(isinstance(value, str) and value in get_args(hint))
        return value

    def flag(value: Any) -> bool:
        _need(isinstance(value, bool))
        return bool(value)

    if get_origin(hint) is Literal:
        return word
    plain: dict[Any, Callable[[Any], Any]] = {bool: flag, int: _number, str: _text}
    return plain[hint]


def _version(value: Any) -> tuple[int, ...]:
    _need(len(_list(value)) == 3)
    return tuple(_number(part, 1 << 31) for part in value)


def _policy(value: Any) -> str:
    _need(isinstance(value, str) and (value in POLICIES or value == "unknown"))
    return str(value)


def _unloads(value: Any) -> frozenset[Trigger]:
    return frozenset(Trigger[name] for name in _list(value) if isinstance(name, str) and name in Trigger.__members__)


def _layout(value: Any) -> roles.RoleLayout:
    found = roles.fields_of(value["fields"])
    _need(found is not None and len(found) <= _MOST and isinstance(value["guest_bits"], bool))
    assert found is not None
    return roles.RoleLayout(tuple((_text(name), shift, width) for name, shift, width in found), value["guest_bits"])


def _spte(value: Any) -> SpteLayout:
    def pair(name: str) -> tuple[int, int]:
        npt, ept = _list(value[name])
        return _number(npt), _number(ept)

    return SpteLayout(
        present=_number(value["present"]),
        type_shift=_number(value["type_shift"], 63),
        nonpresent=_number(value["nonpresent"]),
        frozen=None if value["frozen"] is None else _number(value["frozen"]),
        host_writable=pair("host_writable"),
        mmu_writable=pair("mmu_writable"),
    )


def _ret_pf(value: Any) -> ReturnCodes:
    codes = {field.name: value[field.name] for field in fields(ReturnCodes)}
    optional = codes.pop("write_protected")
    return ReturnCodes(
        **{name: _number(code, 1 << 31) for name, code in codes.items()},
        write_protected=None if optional is None else _number(optional, 1 << 31),
    )


def _passes(value: Any) -> tuple[int, ...]:
    _need(len(_list(value)) <= len(_PASS_LEVELS) and all(_number(level) in _PASS_LEVELS for level in value))
    return tuple(value)


def _points(value: Any) -> frozenset[str]:
    return frozenset(_text(name) for name in _list(value))


def _page_struct(value: Any) -> tuple[tuple[str, int], ...]:
    _need(isinstance(value, dict) and len(value) <= _MOST)
    return tuple((_text(name), _number(offset, 1 << 16)) for name, offset in value.items())


def _vendor(value: Any) -> Vendor:
    return {vendor.name: vendor for vendor in VENDORS}[value]


_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "version": _version,
    "policy": _policy,
    "unloads": _unloads,
    "layout": _layout,
    "spte": _spte,
    "ret_pf": _ret_pf,
    "passes": _passes,
    "points": _points,
    "page_struct": _page_struct,
    "vendor": _vendor,
}
