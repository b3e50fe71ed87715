"""Bazefield Insert Allocation: put a period of objects into a category.

parameters: {"object_filter": {"selected": {"parent": ["LAN"]}}, "start": "2026-03-01 00:00:00",
             "end": "2026-03-01 06:00:00", "allocation_type": "Internal", "allocation_category": "Night",
             "child_category": "Grid", "on_overlap": "fail"}
steps:      one per object
result:     {"inserted": [71], "standing": [], "replaced": [], "skipped": []}, allocation ids

With child_category a second allocation is inserted beside the main one, in the sub-type linked to
allocation_type. What already stands exactly so is not inserted again, so a step may be repeated.

on_overlap, when other allocations of the type stand in the window:
  fail     (default) the step fails and names them; nothing is inserted
  skip     the object is left as it is
  replace  manual ones are replaced, and what of them lies outside the window is kept; automatic, locked
           or approved ones make the step fail
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bazefield
import object_filter
from bazefield import STEP_OBJECTS_SQL, Lookup, nearest
from jobs import TIME, JobInstance, JobStepError, parse_time, query

INSERT_TRIES = 3  # each after reading back what a lost answer has left


class JobBazeInsertAlloc(JobInstance):
    """Insert allocation history into Bazefield for a list of objects."""

    _name = "Bazefield Insert Allocation"
    _parameters_schema = {
        "type": "object",
        "required": ["object_filter", "start", "end", "allocation_category", "allocation_type"],
        "additionalProperties": False,
        "properties": {
            "object_filter": object_filter.OBJECT_FILTER,
            "start": TIME,
            "end": TIME,
            "allocation_category": {"type": "string", "minLength": 1},
            "allocation_type": {"type": "string", "minLength": 1},
            "child_category": {"type": "string", "minLength": 1},
            "on_overlap": {"enum": ["fail", "skip", "replace"], "default": "fail"},
        },
    }

    def __init__(self, job_id: int, skip_test: bool = True) -> None:
        self._lookup: Lookup | None = None
        self._targets: list[tuple[dict[str, Any], dict[str, Any]]] = []  # (type, category), main and child
        super().__init__(job_id, skip_test)

    def _create_steps(self) -> list[dict[str, Any]]:
        bazefield.read_settings()  # wrong settings fail the job, not each of its steps
        return [{"name": name, "object_id": object_id} for object_id, name, _ in
                object_filter.select(self.connection, self.parameters["object_filter"])]

    def _run_step(self, step_id: int) -> dict[str, Any]:
        client = bazefield.client()
        if not self._targets:
            self._targets = find_targets(client, self.parameters)
        if self._lookup is None:
            self._lookup = Lookup(client, query(self.connection, STEP_OBJECTS_SQL, {"job_id": self.job_id}))
        object_id = self._lookup.bazefield_id(self.step["object_id"])
        period = [bazefield.to_ms(parse_time(self.parameters[key])) for key in ("start", "end")]
        places = [Place(client, object_id, *target, *period) for target in self._targets]
        return put(places, self.parameters.get("on_overlap", "fail"))


def find_targets(client: bazefield.Client, parameters: dict[str, Any]) -> list[tuple[dict, dict]]:
    """Return (type, category) of the main and, if asked for, the child allocation.

    A category's name means something within its type only. Raise `JobStepError` with the nearest names.
    """
    types = client.allocation_types()
    kind = pick("allocation type", parameters["allocation_type"], types)
    main = pick(f"category of {kind['name']!r}", parameters["allocation_category"],
                client.allocation_categories(kind["id"]))
    if "child_category" not in parameters:
        return [(kind, main)]
    linked = [t for t in types if t.get("subType") and t.get("linkedTypeId") == kind["id"]]
    if len(linked) != 1:
        raise JobStepError(f"child_category needs one sub-type linked to {kind['name']!r}; Bazefield has {len(linked)}")
    child = pick(f"category of {linked[0]['name']!r}", parameters["child_category"],
                 [c for c in client.allocation_categories(linked[0]["id"])
                  if c.get("parentCategoryId") in (None, 0, main["id"])])
    return [(kind, main), (linked[0], child)]


def pick(what: str, name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one entry of that name that is in use."""
    found = [e for e in entries if e.get("name") == name and e.get("enabled") is not False and not e.get("disabled")]
    if len(found) != 1:
        raise JobStepError(f"Bazefield has {len(found)} in use of {what} named {name!r}"
                           + nearest(name, [e["name"] for e in entries if e.get("name") and e["name"] != name]))
    return found[0]


class Place:
    """One object, type and category in one window, and what stands there."""

    def __init__(self, client: bazefield.Client, object_id: str, kind: dict[str, Any], category: dict[str, Any],
                 since: int, until: int) -> None:
        self.client, self.object_id, self.kind, self.category = client, object_id, kind, category
        self.since, self.until = since, until
        self.standing = self.read(since, until)

    def read(self, since: int, until: int) -> list[dict[str, Any]]:
        return self.client.allocations(self.object_id, self.kind, since, until)

    def others(self) -> list[dict[str, Any]]:
        """Return what stands in the window and is not exactly what is wanted."""
        return [a for a in self.standing if not is_exactly(a, self.category["id"], self.since, self.until)]

    def exact(self, category_id: int, since: int, until: int) -> int | None:
        """Return the id of the allocation that stands exactly so, None if there is none."""
        return next((a["id"] for a in self.read(since, until) if is_exactly(a, category_id, since, until)), None)

    def ensure(self, category_id: int, since: int, until: int) -> tuple[int, bool]:
        """Have an allocation stand exactly so; return its id and whether it had to be inserted.

        The insert is never blindly repeated: after a lost answer the server is asked what stands.
        """
        error = None
        for attempts in range(INSERT_TRIES + 1):
            if (found := self.exact(category_id, since, until)) is not None:
                return found, attempts > 0
            if attempts and not error:
                raise JobStepError("Bazefield accepted the allocation, but it is not there; confirm the field names "
                                   "of insert_allocation: python bazefield.py --check")
            if attempts < INSERT_TRIES:
                error = attempt(lambda: self.client.insert_allocation(
                    self.object_id, self.kind["id"], category_id, since, until))
        raise error

    def remove(self, allocation: dict[str, Any]) -> int:
        """Delete an allocation after what of it lies outside the window stands as its own."""
        start, end, category_id = allocation["start"], allocation["end"], allocation["category"]["id"]
        if start < self.since:
            self.ensure(category_id, start, self.since)
        if end > self.until:
            self.ensure(category_id, self.until, end)
        error = attempt(lambda: self.client.delete_allocation(allocation["id"]))
        if any(a["id"] == allocation["id"] for a in self.read(self.since, self.until)):
            raise error or JobStepError(f"Bazefield accepted the deletion of allocation {allocation['id']}, "
                                        "but it still stands")
        return allocation["id"]


def put(places: list[Place], on_overlap: str) -> dict[str, Any]:
    """Insert what is wanted at all places (main, child) or, if others stand there, do as `on_overlap` says."""
    others = [(place, a) for place in places for a in place.others()]
    result: dict[str, Any] = {"inserted": [], "standing": [], "replaced": [], "skipped": []}
    if others and on_overlap == "skip":
        return result | {"skipped": [a["id"] for _, a in others]}
    if others and on_overlap == "fail":
        raise JobStepError(f"Other allocations stand in the window, nothing was inserted: {listed(others)}; "
                           "on_overlap 'skip' leaves them, 'replace' replaces manual ones")
    if kept := [(place, a) for place, a in others if not is_replaceable(a)]:
        raise JobStepError("Only ended manual allocations that are neither approved nor locked are replaced, "
                           f"nothing was changed: {listed(kept)}")
    for place in places:
        allocation_id, inserted = place.ensure(place.category["id"], place.since, place.until)
        result["inserted" if inserted else "standing"].append(allocation_id)
    result["replaced"] = [place.remove(a) for place, a in others]
    return result


def attempt(write: Callable[[], None]) -> bazefield.LostAnswer | None:
    """Carry out a write; return the error if nobody knows whether it was carried out."""
    try:
        write()
    except bazefield.LostAnswer as exc:
        return exc
    return None


def is_exactly(allocation: dict[str, Any], category_id: int, since: int, until: int) -> bool:
    return (allocation["category"]["id"], allocation["start"], allocation["end"]) == (category_id, since, until)


def is_replaceable(allocation: dict[str, Any]) -> bool:
    return bool(allocation.get("manual") and allocation["end"] is not None
                and not (allocation.get("approved") or allocation.get("holdCategory")))


def listed(others: list[tuple[Place, dict[str, Any]]]) -> str:
    texts = [f"{a['id']} ({a['category'].get('name')!r}, {bazefield.from_ms(a['start'])} to "
             f"{bazefield.from_ms(a['end'])})" for _, a in others[:5]]
    return ", ".join(texts) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
