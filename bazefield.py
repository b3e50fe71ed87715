"""Bazefield's operations in the jobs' words, and looking objects and points up.

    python bazefield.py --check     which of the operations used here does the server know?

Facts come from the metadata pages of a Bazefield server ("[D]": documented there), from public client
code ("[C]": worked for somebody) or are assumed ("[A]": the vendor publishes nothing; confirm them with
--check and on your server's /api/metadata before the first write).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import bazefield_http as http
from bazefield_http import BazefieldError as BazefieldError
from bazefield_http import LostAnswer as LostAnswer
from bazefield_http import SettingsError as SettingsError
from bazefield_http import read_settings as read_settings
from jobs import JobStepError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PAGE = 20_000                  # samples per read: bounds the memory, about 2 MB an answer
HEX_ID = re.compile("[0-9A-Fa-f]{16}")
NAME_ATTRIBUTE = "shortName"  # what objects are looked up by [D]


class Client(http.Client):
    """What the jobs ask for, in their own words."""

    def find_objects(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return name -> objectIds of the objects of these names; a name nobody has is left out."""
        found: dict[str, list[str]] = {}
        for chunk in chunks(list(names), 50):
            for entry in self.call("find_objects", query={"key": NAME_ATTRIBUTE, "values": ",".join(chunk)}) or []:
                name = entry.get("attributes", {}).get(NAME_ATTRIBUTE)
                if name in chunk:
                    found.setdefault(name, []).append(entry["objectId"])
        return found

    def all_names(self) -> list[str]:
        """Return the names of all objects there are."""
        answer = self.call("list_objects", body={"attributes": [NAME_ATTRIBUTE]})
        return [name for entry in answer.get("data", [])
                if (name := entry.get("attributes", {}).get(NAME_ATTRIBUTE))]

    def points(self, object_ids: Sequence[str]) -> dict[str, set[str]]:
        """Return objectId -> names of its points; objects of one model share a set."""
        points: dict[str, set[str]] = {}
        for chunk in chunks(list(object_ids), 100):
            answer = self.call("points", body={"objectIds": chunk})
            schemas = {domain: {s["schema"] for s in info.get("schemas", [])}
                       for domain, info in (answer.get("domaininfo") or {}).items()}
            points |= {i: schemas.get(str(domain), set()) for i, domain in (answer.get("data") or {}).items()}
        return points

    def sample_times(self, object_id: str, point: str, start: datetime, end: datetime) -> Iterator[int]:
        """Yield the times (epoch ms) of all samples in [start, end), page by page, in order.

        The next page begins at the last time seen, because several samples may share it.
        """
        since, until, seen = to_ms(start), to_ms(end), 0
        while since < until:
            times = self._page(object_id, point, since, until)
            yield from times[seen:]
            if len(times) < PAGE:
                return
            last = times[-1]
            # A page of nothing but one moment: step over it, or this would never end.
            since, seen = (last + 1, 0) if last == since else (last, times.count(last))

    def _page(self, object_id: str, point: str, since: int, until: int) -> list[int]:
        answer = self.call("read", body={
            "objectIds": [object_id], "points": [point], "from": str(since), "to": str(until),
            "take": PAGE, "descending": False, "bounds": False})
        series = ((answer.get("objects") or {}).get(object_id) or {}).get("points", {}).get(point) or []
        return sorted(sample["t"] for one in series for sample in one.get("timeSeries") or []
                      if since <= sample["t"] < until)

    def delete_samples(self, object_id: str, point: str, since: int, last: int) -> None:
        """Delete the samples of one point with `since` <= t <= `last` (epoch ms).

        Whether the server counts a sample at `to` in is documented nowhere; callers look afterwards.
        """
        if not HEX_ID.fullmatch(object_id) or not point or not isinstance(since, int) or not since <= last:
            raise ValueError(f"refusing to delete {point!r} of {object_id!r} from {since!r} to {last!r}")
        self.call("delete", body={"objectIds": [object_id], "points": [point],
                                  "from": str(since), "to": str(last)})

    def allocation_types(self) -> list[dict[str, Any]]:
        return self.call("allocation_types")

    def allocation_categories(self, type_id: int) -> list[dict[str, Any]]:
        """Return the categories of one allocation type."""
        return [c for c in self.call("allocation_categories", query={"typeId": str(type_id)})
                if c.get("typeId") == type_id]

    def allocations(self, object_id: str, kind: Mapping[str, Any], since: int, until: int) -> list[dict[str, Any]]:
        """Return the allocations of one object and type that overlap [since, until), times in epoch ms.

        The server may return those of other objects as well: it ignores what it does not know.
        """
        answer = self.call("allocations", query={"objectIds": object_id}, parts={
            "type_name": kind["name"], "type_id": str(kind["id"]), "from": str(since), "to": str(until)})
        found = [dict(a, start=moment_ms(a["start"]), end=moment_ms(a.get("end"))) for a in answer
                 if same_id(a.get("objectId"), object_id) and a["category"]["typeId"] == kind["id"]]
        return [a for a in found if a["start"] < until and (a["end"] is None or a["end"] > since)]

    def insert_allocation(self, object_id: str, type_id: int, category_id: int, since: int, until: int) -> None:
        """Insert a manual allocation once; `LostAnswer` if nobody knows whether it was."""
        self._write("insert_allocation", {"objectId": object_id, "allocationTypeId": type_id,
                                          "categoryId": category_id, "start": since, "end": until, "manual": True})

    def delete_allocation(self, allocation_id: int) -> None:
        self._write("delete_allocation", {"id": allocation_id})

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        fields = self.settings.operations[name].fields
        self.call(name, body={fields[key]: value for key, value in values.items()}, repeat=False)


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[n:n + size] for n in range(0, len(items), size))


def to_ms(moment: datetime) -> int:
    """Return a moment as epoch milliseconds, Bazefield's "Javascript time"."""
    return (moment - EPOCH) // timedelta(milliseconds=1)


def from_ms(ms: int | None) -> str:
    return "open" if ms is None else f"{EPOCH + timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S}Z"


def moment_ms(text: str | None) -> int | None:
    """Return ISO text as epoch ms; without an offset it is UTC; None and the year 1 mean: still open."""
    if not text or text.startswith("0001-"):
        return None
    moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    return to_ms(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def same_id(given: Any, object_id: str) -> bool:
    """Whether an id, 16 hex digits or the same as a decimal number, is `object_id`."""
    if isinstance(given, int):
        return given == int(object_id, 16)
    return str(given).lower() == object_id.lower()


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
        self._names: list[str] | None = None
        self._points: dict[str, set[str]] | None = None

    def bazefield_id(self, object_id: int) -> str:
        """Return Bazefield's id of one of our objects; `JobStepError` if it has none or several."""
        name, known = self.objects[object_id]
        ids = [known] if known else self._found.get(name, [])
        if len(ids) > 1:
            raise JobStepError(f"Bazefield has {len(ids)} objects named {name!r}: {', '.join(ids)}; "
                               "write the right one to objects.bazefield_id")
        if not ids:
            if self._names is None:
                self._names = self.client.all_names()
            raise JobStepError(f"Bazefield has no object named {name!r}{nearest(name, self._names)}; "
                               "or write its id to objects.bazefield_id")
        return ids[0]

    def require_point(self, bazefield_id: str, point: str) -> None:
        """Raise `JobStepError` with the nearest names if the object has no such point."""
        if self._points is None:
            ids = [known or (self._found.get(name) or [None])[0] for name, known in self.objects.values()]
            self._points = self.client.points([i for i in ids if i])
        points = {i.lower(): names for i, names in self._points.items()}.get(bazefield_id.lower(), set())
        if point not in points:
            raise JobStepError(f"{point!r} is no point of object {bazefield_id}{nearest(point, points)}")


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, close))}" if close else ""


_client: list[Client] = []  # this process's, made at the first use


def client() -> Client:
    """Return this process's client, made anew when the settings have changed.

    Raise `SettingsError` naming everything wrong with the settings.
    """
    settings = read_settings()
    if not _client or _client[0].settings != settings:
        _client[:] = [Client(settings)]
    return _client[0]


# ------------------------------------------------------------------------------------------ --check


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
        print(f"  {'yes' if there else 'NO ':<4} {name:<22} {operation.known}  {operation.verb:<5} "
              f"{operation.route:<48} {operation.metadata}")
    if missing:
        print(f"\n  {missing} operations are not listed under these names. Look for them on the server's "
              "/api/metadata pages\n  and write verb, route, metadata and fields to a file for BAZEFIELD_OPERATIONS.")
    return 1 if missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True,
                        help="say which of the operations used here the server knows; 1 if one is missing")
    parser.parse_args(argv)
    try:
        return check()
    except BazefieldError as exc:
        print(f"bazefield: {exc}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    raise SystemExit(main())
