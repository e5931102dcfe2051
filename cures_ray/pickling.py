"""Messages that pickle fast. A frozen dataclass with slots is pickled by Python code that asks for its fields again
and again (25 us a message), and each small array costs as much as 100 of its numbers.

`travels(Message)` gives a message class a quick way, for classes whose arrays are small: they go as bytes, and come
back read-only, as Ray's do. `travels(Message, rows="entries")` also sends its field ``entries``, a tuple of messages
of one class, as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np

SLOTS: dict[type, tuple[tuple[str, ...], list[Any]]] = {}  # class -> names of its fields, and what sets each

ROWS = "rows"


def travels(cls: type, rows: str = "") -> None:
    """Give ``cls`` (a frozen dataclass with slots) its way to be pickled."""
    names = tuple(field.name for field in fields(cls))
    SLOTS[cls] = (names, [cls.__dict__[name].__set__ for name in names])
    get, place = attrgetter(*names), names.index(rows) if rows else -1

    def reduce(self: Any) -> tuple[Any, ...]:
        values = list(get(self))
        kinds: list[str | None] = [None] * len(values)
        for i, value in enumerate(values):
            if type(value) is np.ndarray and value.ndim == 1:
                kinds[i], values[i] = value.dtype.char, value.tobytes()
        if rows:
            kinds[place], values[place] = ROWS, pack(values[place])
        return restore, (cls, values, kinds)

    cls.__reduce__ = reduce  # type: ignore[method-assign, assignment]


def restore(cls: type, values: Sequence[Any], kinds: Sequence[str | None]) -> Any:
    """The message of these field values. Their kinds: None as they are, ROWS packed, else the dtype of an array."""
    message: Any = object.__new__(cls)
    for put, value, kind in zip(SLOTS[cls][1], values, kinds, strict=True):
        if kind is not None:
            value = tuple(unpack(value)) if kind == ROWS else np.frombuffer(value, kind)
        put(message, value)
    return message


def pack(rows: Sequence[Any]) -> tuple[Any, ...]:
    """Values of one kind as one value: messages of one class by column, arrays end to end, others as they are."""
    kinds = {type(row) for row in rows}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in SLOTS:
        return kind, [pack([getattr(row, name) for row in rows]) for name in SLOTS[kind][0]]
    if kind is np.ndarray and len({row.dtype for row in rows}) == 1 and all(row.ndim == 1 for row in rows):
        return np.concatenate(rows), [len(row) for row in rows]
    return None, list(rows)


def unpack(packed: tuple[Any, ...]) -> Sequence[Any]:
    """What ``pack`` was given, as a sequence."""
    kind, values = packed
    if kind is None:
        return values
    if isinstance(kind, np.ndarray):
        ends = np.cumsum(values, dtype=np.int64).tolist()
        return [kind[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    plain = [None] * len(values)
    return [restore(kind, row, plain) for row in zip(*(unpack(column) for column in values), strict=True)]
