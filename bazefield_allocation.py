"""What an allocation is: the period of an object in a category of a type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bazefield_answer import Answer


@dataclass(frozen=True)
class Kind:
    """An allocation type."""

    id: int
    name: str


@dataclass(frozen=True)
class Wanted:
    """What is to stand: a category over [since, until), epoch ms."""

    category_id: int
    since: int
    until: int


@dataclass(frozen=True)
class Allocation:
    """What stands. `end` is None while it is open, a category None where there is none."""

    id: int
    of_type: bool | None  # of the type asked about; None: it does not say
    category_id: int | None
    category: str | None
    start: int
    end: int | None
    replaceable: bool     # manual, ended, neither approved nor locked
    raw: Mapping[str, Any]

    def overlaps(self, since: int, until: int) -> bool:
        return self.start < until and (self.end is None or self.end > since)

    def is_exactly(self, wanted: Wanted) -> bool:
        return (self.category_id, self.start, self.end) == (
            wanted.category_id, wanted.since, wanted.until)

    def outside(self, since: int, until: int) -> list[Wanted]:
        """Return what of it lies outside [since, until); it must have a category and an end."""
        parts = [(self.start, min(self.end, since)), (max(self.start, until), self.end)]
        return [Wanted(self.category_id, begin, end) for begin, end in parts if begin < end]


def read_allocation(entry: Answer, kind: Kind) -> Allocation:
    """Return an allocation of an answer; raise `BazefieldError` if it makes no sense."""
    start, end = entry["start"].moment(), entry["end"].moment()
    if start is None or (end is not None and end < start):
        raise entry.wrong(f"has no period: {entry['start'].value!r} to {entry['end'].value!r}")
    of_type, category = find_category(entry, kind)
    locked = any(entry[name].flag() for name in ("approved", "holdCategory", "locked"))
    ended = end is not None and entry["finished"].flag() is not False
    category_id = category and category["id"].whole(int)
    replaceable = bool(entry["manual"].flag() and ended and not locked
                       and of_type and category_id is not None)
    raw = {key: part.value for key, part in entry.items() if key.lower() != "replyinfo"}
    return Allocation(entry["id"].whole(int), of_type, category_id,
                      category and category["name"].text(), start, end, replaceable, raw)


def find_category(entry: Answer, kind: Kind) -> tuple[bool | None, Answer | None]:
    """Return whether an allocation is of this type (None: it does not say), and its category."""
    one, all_ = entry["category"], entry["categories"]
    more = [part for _, part in all_.items()] if isinstance(all_.value, dict) else all_.entries()
    named = [part for part in (one, *more) if part.value]
    types = [None if part["typeId"].value is None else part["typeId"].whole(int) for part in named]
    if kind.id in types:
        return True, named[types.index(kind.id)]
    if None in types:
        return None, named[types.index(None)]
    return (False if named else None), None
