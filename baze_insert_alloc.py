"""Bazefield Insert Allocation: put a period of objects into a category.

parameters: {"object_filter": {"selected": {"parent": ["LAN"]}},
             "start": "2026-03-01 00:00:00", "end": "2026-03-01 06:00:00",
             "allocation_type": "Internal", "allocation_category": "Night",
             "child_category": "Grid", "on_overlap": "fail"}
steps:      one per object
result:     {"inserted": [71], "standing": [], "replaced": [], "skipped": []}, allocation ids

With child_category a second allocation is inserted beside the main one, in the sub-type linked to
allocation_type. What already stands exactly so is not inserted again, so a step may be repeated.

on_overlap, when other allocations of the type stand in the window:
  fail     (default) the step fails and names them; nothing is inserted
  skip     the object is left as it is
  replace  manual ones are replaced, and what of them lies outside the window is kept; automatic,
           locked or approved ones make the step fail

Never twice: steps on one object and type take turns, whatever their jobs. Before an insert is
sent, a row in bazefield_inserts says so; it goes when the allocation has been seen or refused.
Whoever finds the row of a step that died or lost the answer looks until that insert can no longer
arrive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg

import bazefield
import object_filter
from bazefield import STEP_OBJECTS_SQL, Lookup, nearest, waits
from bazefield_allocation import Allocation, Kind, Wanted
from bazefield_answer import EPOCH, Answer
from jobs import TIME, JobInstance, JobStepError, parse_time, query

LATE_SECONDS = 15.0   # a server may carry out what it has accepted a little later
LOCK_SECONDS = 600.0  # for a step on the same object and type, in another job, to end


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
        self._targets: list[tuple[Kind, int]] = []  # type and category id, of main and child
        super().__init__(job_id, skip_test)

    def _create_steps(self) -> list[dict[str, Any]]:
        bazefield.read_settings()  # wrong settings fail the job, not each of its steps
        return [{"name": name, "object_id": object_id} for object_id, name, _ in
                object_filter.select(self.connection, self.parameters["object_filter"])]

    def _run_step(self, step_id: int) -> dict[str, Any]:
        with bazefield.working() as client:
            if not self._targets:
                self._targets = find_targets(client, self.parameters)
            if self._lookup is None:
                self._lookup = Lookup(client, query(self.connection, STEP_OBJECTS_SQL,
                                                    {"job_id": self.job_id}))
            object_id = self._lookup.bazefield_id(self.step["object_id"])
            since, until = (bazefield.to_ms(parse_time(self.parameters[key]))
                            for key in ("start", "end"))
            places = [Place(client, self.connection, object_id, kind,
                            Wanted(category_id, since, until))
                      for kind, category_id in self._targets]
            with turn(places):
                return put(places, self.parameters.get("on_overlap", "fail"))


# ---------------------------------------------------------------------------------- what is wanted


def find_targets(client: bazefield.Client, parameters: dict[str, Any]) -> list[tuple[Kind, int]]:
    """Return type and category id of the main and, if asked for, the child allocation.

    A category's name means something within its type only. Raise `JobStepError` with the nearest
    names.
    """
    types = client.allocation_types()
    kind = as_kind(pick("allocation type", parameters["allocation_type"], types))
    main = pick(f"category of {kind.name!r}", parameters["allocation_category"],
                client.allocation_categories(kind.id))["id"].whole(int)
    if "child_category" not in parameters:
        return [(kind, main)]
    linked = [as_kind(t) for t in types
              if t["subType"].flag() and t["linkedTypeId"].value == kind.id]
    if len(linked) != 1:
        raise JobStepError(f"child_category needs one sub-type linked to {kind.name!r}; "
                           f"Bazefield has {len(linked)}")
    child = pick(f"category of {linked[0].name!r}", parameters["child_category"],
                 [c for c in client.allocation_categories(linked[0].id)
                  if c["parentCategoryId"].value in (None, 0, main)])
    return [(kind, main), (linked[0], child["id"].whole(int))]


def pick(what: str, name: str, entries: list[Answer]) -> Answer:
    """Return the one entry of that name that is in use."""
    names = [entry["name"].text() for entry in entries]
    found = [entry for entry, given in zip(entries, names, strict=True) if given == name
             and entry["enabled"].flag() is not False and not entry["disabled"].flag()]
    if len(found) != 1:
        raise JobStepError(f"Bazefield has {len(found)} in use of {what} named {name!r}"
                           + nearest(name, [n for n in names if n and n != name]))
    return found[0]


def as_kind(entry: Answer) -> Kind:
    return Kind(entry["id"].whole(int), entry["name"].whole(str))


# ------------------------------------------------------------------------------------ taking turns


# Two keys, so that they never meet the one-key locks of the workers. Taken by a session, not by a
# transaction: none may be open while Bazefield works. PostgreSQL frees it with a lost connection.
LOCK_SQL = "SELECT pg_try_advisory_lock(hashtext('bazefield allocations'), hashtext(%(place)s))"

UNLOCK_SQL = "SELECT pg_advisory_unlock(hashtext('bazefield allocations'), hashtext(%(place)s))"


@contextlib.contextmanager
def turn(places: list[Place]) -> Iterator[None]:
    """Keep all other steps away from these objects and types; wait for one that is there.

    Raise `JobStepError` if it does not leave within LOCK_SECONDS.
    """
    connection, sleep = places[0].connection, places[0].client.sleep
    keys = sorted({place.key for place in places})  # one order: no two wait for each other
    try:
        for key in keys:
            take(connection, key, sleep)
        yield
    finally:
        with contextlib.suppress(psycopg.Error):  # a lost connection has freed them
            for key in keys:  # of one that was not taken PostgreSQL merely says so
                query(connection, UNLOCK_SQL, {"place": key})


def take(connection: psycopg.Connection, key: str, sleep: Callable[[float], Any]) -> None:
    """Take the lock of one object and type, waiting LOCK_SECONDS at most."""
    for pause in (0.0, *waits(LOCK_SECONDS, longest=1.0)):
        if pause:
            sleep(pause)
        if query(connection, LOCK_SQL, {"place": key})[0][0]:
            return
    raise JobStepError(f"Another step has been at the allocations of {key} for {LOCK_SECONDS:g} "
                       "s; nothing was changed; jobctl retry tries again")


# --------------------------------------------------------------------------------------- one place


# Written before an insert is sent, and only while the session that holds the lock is alive.
NOTE_SQL = """
INSERT INTO bazefield_inserts (bazefield_id, allocation_type_id, category_id, start_time, end_time,
                               may_arrive_until)
VALUES (%(object_id)s, %(type_id)s, %(category_id)s, %(start)s, %(end)s,
        clock_timestamp() + make_interval(secs => %(seconds)s))
ON CONFLICT (bazefield_id, allocation_type_id) DO UPDATE
   SET category_id      = EXCLUDED.category_id,
       start_time       = EXCLUDED.start_time,
       end_time         = EXCLUDED.end_time,
       may_arrive_until = EXCLUDED.may_arrive_until
"""

NOTED_SQL = """
SELECT category_id, start_time, end_time,
       date_part('epoch', may_arrive_until - clock_timestamp())
  FROM bazefield_inserts
 WHERE bazefield_id       = %(object_id)s
   AND allocation_type_id = %(type_id)s
"""

FORGET_SQL = """
DELETE FROM bazefield_inserts
 WHERE bazefield_id       = %(object_id)s
   AND allocation_type_id = %(type_id)s
"""

# Nothing is written to Bazefield by a step whose session, and with it its lock, is gone.
ALIVE_SQL = "SELECT 1"


class Place:
    """One object and allocation type in one window: what stands there, and changing it.

    To be used within `turn`.
    """

    def __init__(self, client: bazefield.Client, connection: psycopg.Connection, object_id: str,
                 kind: Kind, wanted: Wanted) -> None:
        self.client, self.connection = client, connection
        self.object_id, self.kind, self.wanted = object_id, kind, wanted
        self.key = f"{object_id.upper()} {kind.id}"
        self._ids = {"object_id": object_id.upper(), "type_id": kind.id}
        self.standing: list[Allocation] = []  # what the latest read has shown

    def read(self, wanted: Wanted) -> list[Allocation]:
        """Return what stands where `wanted` is to stand."""
        self.standing = self.client.allocations(self.object_id, self.kind, wanted.since,
                                                wanted.until)
        return self.standing

    def look(self, wanted: Wanted, seconds: float = 0) -> int | None:
        """Return the id of the allocation that stands exactly so, looking for `seconds`.

        None if there is none; two are an error.
        """
        for pause in (0.0, *waits(seconds)):
            if pause:
                self.client.sleep(pause)
            if (found := only(self.read(wanted), wanted)) is not None:
                return found
        return None

    def settle(self) -> None:
        """Wait for an insert that was sent and never seen: it is there, or can no longer come."""
        for category_id, start, end, seconds in query(self.connection, NOTED_SQL, self._ids):
            noted = Wanted(category_id, bazefield.to_ms(start), bazefield.to_ms(end))
            self.look(noted, max(seconds, 0))
            self._forget()

    def insert(self, wanted: Wanted) -> int:
        """Insert an allocation, once, and return its id when it is there.

        If the answer is lost it is looked for as long as it may still arrive, and not sent again.
        Raise `JobStepError` with what was seen if it does not come.
        """
        self._note(wanted)
        seconds, why = LATE_SECONDS, "Bazefield accepted the allocation"
        try:
            self.client.insert_allocation(self.object_id, self.kind.id, wanted)
        except bazefield.LostAnswer as exc:
            seconds, why = self.client.patience, str(exc)
        except bazefield.BazefieldError:
            self._forget()  # it was answered: it will not come later
            raise
        if (found := self.look(wanted, seconds)) is None:
            raise JobStepError(f"{why}, but it is not there {seconds:g} s later and was not sent "
                               f"again. {listed(self.standing) or 'Nothing'} stands in its place. "
                               "Confirm the field names (python bazefield.py --check); jobctl "
                               "retry looks again first")
        self._forget()
        return found

    def _note(self, wanted: Wanted) -> None:
        query(self.connection, NOTE_SQL, self._ids | {
            "category_id": wanted.category_id,
            "start": EPOCH + timedelta(milliseconds=wanted.since),
            "end": EPOCH + timedelta(milliseconds=wanted.until),
            "seconds": self.client.settings.timeout + self.client.patience})

    def _forget(self) -> None:
        query(self.connection, FORGET_SQL, self._ids)

    def whole(self, found: Allocation) -> Allocation:
        """Return an allocation as its id gives it: the server may have cut it to the window."""
        whole = self.client.allocation(found.id, self.object_id, self.kind)
        if not whole.overlaps(self.wanted.since, self.wanted.until):
            raise JobStepError(f"Allocation {found.id} was changed meanwhile, nothing was changed "
                               f"here: {listed([found])} in the window, {listed([whole])} by id")
        return whole

    def keep_outside(self, old: Allocation) -> None:
        """Have what of an allocation lies outside the window stand as its own.

        This comes before anything is put into the window: a server that trims what overlaps would
        otherwise cut away the part behind it. Raise `JobStepError` if it does that here: then all
        of the old one still stands, in parts.
        """
        for rest in old.outside(self.wanted.since, self.wanted.until):
            if self.look(rest) is None:
                self.insert(rest)
            self._check_unchanged(old)

    def remove(self, old: Allocation) -> int:
        """Delete an allocation; raise `JobStepError`, and leave it, if it is not what it was."""
        self._check_unchanged(old)
        query(self.connection, ALIVE_SQL)
        seconds, error = LATE_SECONDS, None
        try:
            self.client.delete_allocation(old.id)
        except bazefield.LostAnswer as exc:
            seconds, error = self.client.patience, exc
        if self._stays(old.id, seconds):
            raise error or JobStepError(
                f"Bazefield accepted the deletion of allocation {old.id}, but it still stands; "
                "may the key's user delete allocations?")
        return old.id

    def _check_unchanged(self, old: Allocation) -> None:
        now = self.client.allocation(old.id, self.object_id, self.kind)
        if now.raw != old.raw:
            raise JobStepError(f"Allocation {old.id} was changed while it was being replaced "
                               f"({changes(old.raw, now.raw)}): it stays. Look at it in "
                               "Bazefield; does the server itself trim what overlaps?")

    def _stays(self, allocation_id: int, seconds: float) -> bool:
        for pause in (0.0, *waits(seconds)):
            if pause:
                self.client.sleep(pause)
            if all(found.id != allocation_id for found in self.read(self.wanted)):
                return False
        return True

    def confirm(self) -> None:
        """Raise `JobStepError` unless the latest read has shown what is wanted, and it alone."""
        if only(self.standing, self.wanted) is None or len(self.standing) > 1:
            raise JobStepError("All was done, but what stands now is not what is wanted alone: "
                               f"{listed(self.standing) or 'nothing'}; is somebody at it too?")


# ------------------------------------------------------------------------------------ all together


def put(places: list[Place], on_overlap: str) -> dict[str, Any]:
    """Insert what is wanted at all places (main, child) or do as `on_overlap` says of others."""
    for place in places:
        place.settle()
    found = [(place, place.read(place.wanted)) for place in places]
    there = [(place, only(standing, place.wanted)) for place, standing in found]
    others = [(place, a) for place, standing in found for a in standing
              if not a.is_exactly(place.wanted)]
    if others and on_overlap == "skip":
        return {"inserted": [], "standing": [], "replaced": [],
                "skipped": [a.id for _, a in others]}
    old = replaceable(others, on_overlap) if others else []
    for place, a in old:
        place.keep_outside(a)
    result = {"inserted": [place.insert(place.wanted) for place, known in there if known is None],
              "standing": [known for _, known in there if known is not None],
              "replaced": [place.remove(a) for place, a in old], "skipped": []}
    for place in places:
        if old:
            place.read(place.wanted)
        place.confirm()
    return result


def replaceable(others: list[tuple[Place, Allocation]],
                on_overlap: str) -> list[tuple[Place, Allocation]]:
    """Return what is to be replaced, whole; raise `JobStepError` if anything may not be."""
    if on_overlap == "fail":
        raise JobStepError("Other allocations stand in the window, nothing was inserted: "
                           f"{listed([a for _, a in others])}; on_overlap 'skip' leaves them, "
                           "'replace' replaces manual ones")
    old = [(place, place.whole(a)) for place, a in others]
    if kept := [a for _, a in old if not a.replaceable]:
        raise JobStepError("Only ended manual allocations that are neither approved nor locked "
                           f"are replaced, nothing was changed: {listed(kept)}")
    return old


def only(standing: list[Allocation], wanted: Wanted) -> int | None:
    """Return the id of what stands exactly so, None if nothing does; two are an error."""
    ids = [a.id for a in standing if a.is_exactly(wanted)]
    if len(ids) > 1:
        raise JobStepError(f"{len(ids)} allocations stand exactly so: {', '.join(map(str, ids))}; "
                           "delete all but one of them in Bazefield")
    return ids[0] if ids else None


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return which members differ, and how."""
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    texts = [f"{key}: {str(old.get(key))[:60]} -> {str(new.get(key))[:60]}" for key in keys[:5]]
    return ", ".join(texts) + (" ..." if len(keys) > 5 else "")


def listed(allocations: list[Allocation]) -> str:
    texts = [f"{a.id} ({a.category!r}, {bazefield.from_ms(a.start)} to {bazefield.from_ms(a.end)})"
             for a in allocations[:5]]
    return ", ".join(texts) + (f" and {len(allocations) - 5} more" if len(allocations) > 5 else "")
