"""Bazefield's operations in the jobs' words, and looking objects and points up.

    python bazefield.py --check     which of the operations used here does the server know?

Facts come from the metadata pages of a Bazefield server ("[D]": documented there), from public
client code ("[C]": worked for somebody) or are assumed ("[A]": the vendor publishes nothing;
confirm them with --check and on your server's /api/metadata before the first write). The table of
operations stands in bazefield_settings.py.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote_plus

import bazefield_http as http
from bazefield_allocation import Allocation, Kind, Wanted, read_allocation
from bazefield_answer import EPOCH, HEX_ID, NO_DATA, Answer, hex_id, is_object, member
from bazefield_answer import BazefieldError as BazefieldError
from bazefield_answer import from_ms as from_ms
from bazefield_answer import to_ms as to_ms
from bazefield_http import LostAnswer as LostAnswer
from bazefield_settings import SettingsError as SettingsError
from bazefield_settings import read_settings as read_settings
from jobs import JobStepError

PAGE = 20_000                 # samples asked for at once: about 2 MB an answer
NAME_ATTRIBUTE = "shortName"  # what objects are looked up by [D]
NAMES_BYTES = 1_800           # of names in one query
BEYOND_MS = 60_000            # allocations are asked for so much beyond the window
LEAST_PATIENCE_SECONDS = 5.0


class Client(http.Client):
    """What the jobs ask for, in their own words. Moments are epoch ms."""

    @property
    def patience(self) -> float:
        """Seconds for which a call may still be carried out after its answer was lost."""
        return max(self.settings.timeout, LEAST_PATIENCE_SECONDS)

    def ask(self, name: str, **request: Any) -> Answer:
        """Carry out an operation that must answer something; `BazefieldError` if it does not."""
        value = self.call(name, **request)
        if value is None:
            raise BazefieldError(f"{name}: an empty answer; nobody can tell what that means")
        return Answer(name, value, self.clean)

    # Objects and points.

    def find_objects(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return name -> ids of the objects of these names; a name nobody has is left out.

        Names differ in letter case only if there is none that is spelled the same.
        """
        seen: dict[str, dict[str, str]] = {}
        for chunk in name_chunks(names):
            answer = self.call("find_objects", query={"key": NAME_ATTRIBUTE, "values": jsv(chunk)})
            for entry in Answer("find_objects", answer, self.clean).entries():
                name = entry["attributes"][NAME_ATTRIBUTE].whole(str)
                object_id = self._id(entry["objectId"])
                seen.setdefault(name, {})[object_id.upper()] = object_id
        same = {name: seen.get(name) or {key: value for other, ids in seen.items()
                                         if other.casefold() == name.casefold()
                                         for key, value in ids.items()} for name in names}
        return {name: list(ids.values()) for name, ids in same.items() if ids}

    def _id(self, given: Answer) -> str:
        """Return an object's id as the server spells it, if that is hex, else in hex."""
        value, object_id = given.value, hex_id(given.value)
        if object_id is None:
            raise given.wrong(f"is {given.shown()}, no object's id")
        return value if isinstance(value, str) and HEX_ID.fullmatch(value) else object_id

    def all_names(self) -> list[str]:
        """Return the names of all objects there are."""
        answer = self.call("list_objects", body={"attributes": [NAME_ATTRIBUTE]})
        entries = Answer("list_objects", answer, self.clean)["data"].entries()
        return [name for entry in entries if (name := entry["attributes"][NAME_ATTRIBUTE].text())]

    def points(self, object_ids: Sequence[str]) -> dict[str, tuple[str, set[str]]]:
        """Return id in upper case -> (id as the server spells it, names of its points)."""
        found: dict[str, tuple[str, set[str]]] = {}
        for n in range(0, len(object_ids), 100):
            answer = self.ask("points", body={"objectIds": list(object_ids[n:n + 100])})
            schemas = {domain: {entry["schema"].whole(str) for entry in info["schemas"].entries()}
                       for domain, info in answer["domaininfo"].items()}
            for key, domain in answer["data"].items():
                if (object_id := hex_id(key)) is None:
                    raise domain.wrong("stands under no object's id")
                spelled = key if HEX_ID.fullmatch(key) else object_id
                found[object_id] = spelled, schemas.get(str(domain.value), set())
        return found

    # Samples.

    def sample_times(self, object_id: str, point: str, start: datetime,
                     end: datetime) -> Iterator[int]:
        """Yield the times of all samples in [start, end), page by page, in order.

        Servers cap pages silently, so the last page is the one that brings nothing new. A page
        begins at the last time seen, because several samples may share it.
        """
        since, until, seen, largest = to_ms(start), to_ms(end), 0, 0
        ask = since - 1  # lest a server that leaves out `from` itself leave out the first sample
        while ask < until:
            times = self._times(object_id, point, str(ask), str(until))
            page = sorted(t for t in times if ask <= t < until)
            if not page and len({t for t in times if not ask <= t <= until}) > 2:  # its bounds
                raise self.error("read", f"of {len(times)} samples none lies between {ask} and "
                                 f"{until}, as was asked for; the first is at {times[0]}")
            if page and times != sorted(times):
                self._check_order(object_id, point, ask, page[0])
            fresh = [t for t in page if t >= since]
            shared = min(seen, fresh.count(since))
            yield from fresh[shared:]
            if len(fresh) > shared:
                ask = since = fresh[-1]
                seen = fresh.count(since)
            elif len(page) < largest or not page:
                return
            else:  # a full page of nothing but one moment: step over it
                ask, seen = ask + 1, 0
                since = max(since, ask)
            largest = max(largest, len(page))

    def _check_order(self, object_id: str, point: str, since: int, first: int) -> None:
        """Raise if a page that is not in order leaves out samples before its first."""
        before = self._times(object_id, point, str(since), str(first - 1)) if since < first else []
        if any(since <= t < first for t in before):
            raise self.error("read", "the samples do not come oldest first, as was asked for, and "
                             "not all at once: nobody can tell how many there are")

    def _times(self, object_id: str, point: str, since: str, until: str) -> list[int]:
        """Return the times of one page of samples, whatever lies outside included."""
        answer = self.ask("read", shrink=sample_time, body={
            "objectIds": [object_id], "points": [point], "from": since, "to": until,
            "take": PAGE, "descending": False, "bounds": False})
        times: list[int] = []
        for part in self._ours(answer["objects"], lambda key: is_object(key, object_id)):
            for series in self._ours(part["points"], lambda key: key.lower() == point.lower()):
                for one in series.entries():
                    times += self._series_times(one, object_id, point)
        return times

    def _ours(self, parts: Answer, is_ours: Callable[[str], bool | None]) -> list[Answer]:
        """Return the members that were asked for; raise if there are others only."""
        keys = {key: is_ours(key) for key, _ in parts.items()}
        if None in keys.values() or (keys and True not in keys.values()):
            shown = ", ".join(map(repr, list(keys)[:3]))
            raise parts.wrong(f"holds {shown}, not what was asked for")
        return [part for key, part in parts.items() if keys[key]]

    def _series_times(self, series: Answer, object_id: str, point: str) -> list[int]:
        given = series["objectId"].value, series["pointName"].value
        if (given[0] is not None and not is_object(given[0], object_id)) or (
                given[1] is not None and str(given[1]).lower() != point.lower()):
            raise series.wrong(f"is of {given[1]!r} of {given[0]!r}, which was not asked for")
        said = series["error"].value
        if said and not NO_DATA.fullmatch(str(said)):
            raise series.wrong(f"says of {point!r}: {said}")
        samples = series["timeSeries"]
        return [t if type(t) is int else self._moment(samples, n)
                for n, t in enumerate(samples.values())]

    def _moment(self, samples: Answer, n: int) -> int:
        value = samples.value[n]
        value = member(value, "t") if isinstance(value, dict) else value
        sample = Answer(samples.operation, value, self.clean, f"{samples.path}[{n}].t")
        moment = sample.moment()
        if moment is None:
            raise sample.wrong("is missing")
        return moment

    def delete_samples(self, object_id: str, point: str, since: int, last: int) -> None:
        """Delete the samples of one point with `since` <= t <= `last`.

        Whether the server counts a sample at `to` in is documented nowhere: look afterwards.
        """
        check_delete(object_id, point, since, last)
        self._delete(object_id, point, str(since), str(last))

    def delete_moment(self, object_id: str, point: str, moment: int) -> None:
        """Delete the samples at one moment and none a millisecond later, however `to` is counted.

        `to` is a tenth of a millisecond after it. Whether the server understands that is asked
        first, by a read up to the same: raise `BazefieldError` unless that ends with this moment.
        """
        check_delete(object_id, point, moment, moment)
        to = f"{EPOCH + timedelta(milliseconds=moment):%Y-%m-%dT%H:%M:%S}.{moment % 1000:03}1000Z"
        seen = self._times(object_id, point, str(moment - 1), to)
        if max(seen, default=None) != moment:
            raise BazefieldError(f"read: the server does not tell {from_ms(moment)} from the "
                                 "millisecond after it")
        self._delete(object_id, point, str(moment), to)

    def _delete(self, object_id: str, point: str, since: str, to: str) -> None:
        self.call("delete", body={"objectIds": [object_id], "points": [point],
                                  "from": since, "to": to})

    # Allocations.

    def allocation_types(self) -> list[Answer]:
        return self.ask("allocation_types").entries()

    def allocation_categories(self, type_id: int) -> list[Answer]:
        """Return the categories of one allocation type."""
        entries = self.ask("allocation_categories", query={"typeId": str(type_id)}).entries()
        return [entry for entry in entries if entry["typeId"].whole(int) == type_id]

    def allocations(self, object_id: str, kind: Kind, since: int, until: int) -> list[Allocation]:
        """Return the allocations of one object and type that overlap [since, until).

        It is asked for a little more: a server may cut what it returns to the window, and what
        reaches beyond must not look as if it ended there. The server may return other objects' and
        types' as well; one of which nobody can tell whose it is raises `BazefieldError`.
        """
        answer = self.ask("allocations", query={"objectIds": object_id}, parts={
            "type_name": kind.name, "type_id": str(kind.id), "object_id": object_id,
            "from": str(since - BEYOND_MS), "to": str(until + BEYOND_MS)})
        found: dict[int, Allocation] = {}
        for entry in answer.entries():
            ours = is_object(entry["objectId"].value, object_id)
            if ours is False:
                continue
            allocation = read_allocation(entry, kind)
            if not allocation.overlaps(since, until) or allocation.of_type is False:
                continue
            if ours is None:
                raise entry.wrong(f"(allocation {allocation.id}) is of objectId "
                                  f"{entry['objectId'].shown()}: nobody can tell whose it is")
            found[allocation.id] = allocation
        return list(found.values())

    def allocation(self, allocation_id: int, object_id: str, kind: Kind) -> Allocation:
        """Return one allocation as it stands now, whole; raise unless it is of this object."""
        entry = self.ask("allocation", parts={"id": str(allocation_id)})
        found = read_allocation(entry, kind)
        if found.id != allocation_id or not is_object(entry["objectId"].value, object_id):
            raise entry.wrong(f"is not allocation {allocation_id} of object {object_id}")
        return found

    def insert_allocation(self, object_id: str, type_id: int, wanted: Wanted) -> None:
        """Insert a manual allocation once; `LostAnswer` if nobody knows whether it was."""
        self._write("insert_allocation", {
            "objectId": object_id, "allocationTypeId": type_id, "categoryId": wanted.category_id,
            "start": wanted.since, "end": wanted.until, "manual": True})

    def delete_allocation(self, allocation_id: int) -> None:
        """Delete an allocation once; `LostAnswer` if nobody knows whether it was."""
        self._write("delete_allocation", {"id": allocation_id})

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        fields = self.settings.operations[name].fields
        self.call(name, body={fields[key]: value for key, value in values.items()}, repeat=False)


def sample_time(entry: dict[str, Any]) -> Any:
    """Keep the time of a sample alone: a large answer then takes a fifth of the memory."""
    return entry["t"] if is_sample(entry) else entry


def is_sample(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("t"), int | float | str) and "timeSeries" not in entry


def check_delete(object_id: str, point: str, since: int, last: int) -> None:
    """Raise `ValueError` before a delete that names not exactly one object, point and period."""
    if not (HEX_ID.fullmatch(object_id) and point and isinstance(since, int) and since <= last):
        raise ValueError(f"refusing to delete {point!r} of {object_id!r} "
                         f"from {since!r} to {last!r}")


def jsv(names: Iterable[str]) -> str:
    """Return a list as the server's query strings want it: names that hold , or " in quotes."""
    return ",".join('"' + name.replace('"', '""') + '"' if re.search(r'[\[\]{},"]', name) else name
                    for name in names)


def name_chunks(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names in pieces that fit into a query; one too long for that is left out."""
    chunk, size = [], 0
    for name in names:
        length = len(quote_plus(jsv([name]) + ","))
        if length > NAMES_BYTES:
            continue
        if size + length > NAMES_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += length
    if chunk:
        yield chunk


def waits(seconds: float, longest: float = 10.0) -> Iterator[float]:
    """Yield growing waits that add up to so many seconds."""
    wait = 0.25
    while seconds > 0:
        yield min(wait, seconds)
        seconds -= wait
        wait = min(2 * wait, longest)


# ------------------------------------------------------------------------------------------ lookup


# The objects of the steps, not of the parameters: what the filter selects may have changed since.
STEP_OBJECTS_SQL = """
SELECT DISTINCT o.id, o.name, o.bazefield_id
  FROM job_steps s
  JOIN objects o ON o.id = s.object_id
 WHERE s.job_instance_id = %(job_id)s
"""


class Lookup:
    """What Bazefield knows of a job's objects, asked once and kept: ids and points."""

    def __init__(self, client: Client, objects: Iterable[tuple[int, str, str | None]]) -> None:
        self.client = client
        self.objects = {object_id: (name, known) for object_id, name, known in objects}
        unknown = [name for name, known in self.objects.values() if not known]
        self._found = client.find_objects(unknown) if unknown else {}

    @functools.cached_property
    def _names(self) -> list[str]:
        return self.client.all_names()

    @functools.cached_property
    def _points(self) -> dict[str, tuple[str, set[str]]]:
        ids = [known.upper() if known else (self._found.get(name) or [""])[0]
               for name, known in self.objects.values()]
        return self.client.points([i for i in ids if HEX_ID.fullmatch(i)])

    def bazefield_id(self, object_id: int) -> str:
        """Return Bazefield's id of one of our objects; `JobStepError` if none or several."""
        if object_id not in self.objects:
            raise JobStepError("The object was deleted after the job was created; insert a new "
                               "job")
        name, known = self.objects[object_id]
        if known and not HEX_ID.fullmatch(known):
            raise JobStepError(f"objects.bazefield_id of {name!r} is {known!r}; write 16 hex "
                               "digits")
        ids = [known.upper()] if known else self._found.get(name, [])
        if len(ids) > 1:
            raise JobStepError(f"Bazefield has {len(ids)} objects named {name!r}: "
                               f"{', '.join(ids)}; write the right one to objects.bazefield_id")
        if not ids:
            raise JobStepError(f"Bazefield has no object named {name!r}"
                               f"{nearest(name, self._names)}; or write its id to "
                               "objects.bazefield_id")
        return ids[0]

    def point(self, bazefield_id: str, name: str) -> tuple[str, str]:
        """Return the id and the name of a point as the server spells them.

        Raise `JobStepError` with the nearest names if the object has no such point, or two whose
        names differ in letter case alone.
        """
        spelled, points = self._points.get(bazefield_id.upper(), (bazefield_id, set()))
        same = sorted(point for point in points if point.lower() == name.lower())
        if not points:
            raise JobStepError(f"Bazefield names no points of object {bazefield_id}; is it there, "
                               "and may the key's user see it?")
        if not same:
            raise JobStepError(f"{name!r} is no point of object {bazefield_id}"
                               f"{nearest(name, points)}")
        if len(same) > 1:
            raise JobStepError(f"Object {bazefield_id} has points that differ in letter case "
                               f"alone: {', '.join(map(repr, same))}; nothing was deleted")
        return spelled, same[0]


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, close))}" if close else ""


client_for = functools.lru_cache(maxsize=1)(Client)  # this process's, made anew for other settings


def client() -> Client:
    """Return this process's client; raise `SettingsError` naming all that is wrong."""
    return client_for(read_settings())


@contextlib.contextmanager
def working() -> Iterator[Client]:
    """Give this process's client to a step, and let no error leave it that shows the key.

    What the server says may come up in texts that are made far from the transport.
    """
    here = client()
    try:
        yield here
    except Exception as exc:
        exc.args = tuple(here.hide(arg) if isinstance(arg, str) else arg for arg in exc.args)
        raise


# ----------------------------------------------------------------------------------------- --check


def check() -> int:
    """Print which operations the server's metadata lists; return 1 if one is missing, else 0."""
    here = client()
    listed = json.dumps(here.call("metadata"))
    missing = 0
    for name, operation in here.settings.operations.items():
        if name == "metadata":
            continue
        there = f'"{operation.metadata}"' in listed
        missing += not there
        print(f"  {'yes' if there else 'NO ':<4} {name:<22} {operation.known}  "
              f"{operation.verb:<5} {operation.route:<48} {operation.metadata}")
    if missing:
        print(f"\n  {missing} operations are not listed under these names. Look for them on the "
              "server's /api/metadata pages\n  and write verb, route, metadata and fields to a "
              "file for BAZEFIELD_OPERATIONS.")
    return 1 if missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True,
                        help="say which of the operations used here the server knows; 1 if one is "
                             "missing")
    parser.parse_args(argv)
    try:
        return check()
    except BazefieldError as exc:
        print(f"bazefield: {exc}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    raise SystemExit(main())
