"""A stand-in Bazefield: the documented HTTP contract over a real socket, with faults and whims.

    with FakeBazefield() as server:
        server.add_object("1164AFE219C9D000", "LAN-01", {"ActivePower": {t_ms: value}})
        server.faults.append(("delete", "cut after"))  # the next delete is done, the answer lost
        server.ways.take_cap = 5000                    # whatever `take` says
        server.vary(7)                                 # all that the facts leave open, at random

As the real one it matches request keys in any case, ignores those it does not know, treats every
field as optional, and says nothing of how many samples a delete took away. What it does later it
does when its clock comes there: `advance`, or by itself with `real_time`.
"""

from __future__ import annotations

import csv
import random
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from typing import Any

from fake_bazefield_http import Handler

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
METADATA = ["ObjectsByKeyGetRequest", "ObjectStructureGetRequest", "ObjectDomainSchemasGetRequest",
            "GetDomainPointTimeSeries", "DeleteObjectPointValues", "GetAllocation"]


@dataclass
class Ways:
    """What the facts leave open. The defaults are what a client would hope for."""

    id_spelling: str = "same"         # or lower, upper; in allocations also decimal, number
    point_spelling: str = "same"      # or lower, upper
    take_cap: int | None = None       # samples in one answer at most, whatever is asked for
    read_includes_to: bool = True
    read_includes_from: bool = True
    delete_includes_to: bool = True
    null_members: bool = True         # False: they are left out
    flags: bool = True                # False: those of an allocation that are false are left out
    dates: str = "iso7"               # or iso, offset, slash
    open_end: str | None = None       # the date by which one allocation says that it is open
    cuts: bool = False                # allocations are cut to the window that was asked for
    trims: bool = False               # an insert cuts away what it overlaps
    refuses_silently: bool = False    # writes do nothing and report success
    void: str = "reply"               # or 204, null: the answer to a write
    late: dict[str, float] = field(default_factory=dict)  # operation -> seconds until it is done
    says_no_data: bool = False        # an empty read has a text in replyInfo.error
    interim: int = 0                  # 103 answers before each real one
    chunked: bool = False
    hangs_up: bool = False            # after each answer, without having said so


class FakeBazefield(ThreadingHTTPServer):
    """The server, its data and what it was asked."""

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, certificate: tuple[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, dict] = {}  # id -> {"name", "points": {point: {t_ms: value}}}
        self.types = [{"id": 1, "name": "Internal", "subType": False, "linkedTypeId": 0},
                      {"id": 2, "name": "Internal sub", "subType": True, "linkedTypeId": 1},
                      {"id": 3, "name": "IEC", "subType": False, "linkedTypeId": 0}]
        self.categories = [
            {"id": 10, "name": "Night", "typeId": 1, "enabled": True},
            {"id": 11, "name": "Service", "typeId": 1, "enabled": True},
            {"id": 20, "name": "Grid", "typeId": 2, "parentCategoryId": 10, "enabled": True},
            {"id": 21, "name": "Grid", "typeId": 2, "parentCategoryId": 11, "enabled": True},
            {"id": 30, "name": "Night", "typeId": 3, "enabled": True}]
        self.allocations: dict[int, dict] = {}
        self.keys = {"k3y-write": {"read", "write"}, "k3y-read": {"read"}}
        self.faults: list[tuple[str, str]] = []  # (operation or "*", fault), each met once
        self.log: list[tuple[str, dict]] = []    # (operation, request) of all requests
        self.before: dict[str, Callable[[dict], Any]] = {}  # what somebody else does just before
        self.after: dict[str, Callable[[dict], Any]] = {}   # and just after an operation
        self.ways = Ways()
        self.metadata = list(METADATA)
        self.never = threading.Event()           # what an answer that never comes waits for
        self.real_time = False
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], Any]]] = []
        self._ids = iter(range(71, 10_000))
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://localhost:{self.server_port}"

    def __enter__(self) -> FakeBazefield:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.never.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        """Connections that are cut are no news here."""

    def vary(self, seed: int) -> None:
        """Choose at random among the ways in which both jobs must come to the same end."""
        pick = random.Random(seed).choice
        self.ways = Ways(
            id_spelling=pick(["same", "lower", "upper", "decimal", "number"]),
            point_spelling=pick(["same", "lower", "upper"]), take_cap=pick([None, None, 7, 100]),
            read_includes_to=pick([True, False]), read_includes_from=pick([True, False]),
            delete_includes_to=pick([True, False]), null_members=pick([True, False]),
            flags=pick([True, False]), dates=pick(["iso7", "iso", "offset", "slash"]),
            open_end=pick([None, "0001", "9999"]), cuts=pick([True, False]),
            void=pick(["reply", "204", "null"]), says_no_data=pick([True, False]),
            late=pick([{}, {"delete": 1.0}, {"insert_allocation": 2.0, "delete_allocation": 1.0}]),
            interim=pick([0, 1]), chunked=pick([True, False]), hangs_up=pick([True, False, False]))

    def add_object(self, object_id: str, name: str, points: dict[str, dict] | None = None) -> None:
        self.objects[object_id] = {"name": name, "points": points or {}}

    def add_allocation(self, object_id: str, category_id: int, start: int, end: int | None,
                       **more) -> int:
        new = next(self._ids)
        category = next(c for c in self.categories if c["id"] == category_id)
        self.allocations[new] = {"id": new, "objectId": object_id, "category": category,
                                 "start": start, "end": end, "manual": True, "approved": False,
                                 "holdCategory": False} | more
        return new

    def standing(self, object_id: str) -> list[tuple[int, int, int | None]]:
        """Return (category, start, end) of an object's allocations, sorted."""
        return sorted((a["category"]["id"], a["start"], a["end"])
                      for a in self.allocations.values() if a["objectId"] == object_id)

    def calls(self, operation: str) -> list[dict]:
        return [request for name, request in self.log if name == operation]

    # The clock.

    def later(self, seconds: float, action: Callable[[], Any]) -> None:
        if self.real_time:
            threading.Timer(seconds, action).start()
        else:
            self.due.append((self.now + seconds, action))

    def advance(self, seconds: float) -> None:
        """Let the clock go on, and do what has become due."""
        self.now += seconds
        due, self.due = ([d for d in self.due if d[0] <= self.now],
                         [d for d in self.due if d[0] > self.now])
        for _, action in sorted(due, key=lambda d: d[0]):
            action()

    # The operations. `r` is the request, keys in lower case.

    def do(self, name: str, r: dict):
        if name in self.before:
            self.before[name](r)
        answer = getattr(self, f"do_{name}")(r)
        if name in self.after:
            self.after[name](r)
        return answer

    def write(self, name: str, action: Callable[[], Any], answer: Any = None) -> Any:
        """Carry out a write at its time, and return the answer to it."""
        if not self.ways.refuses_silently:
            if seconds := self.ways.late.get(name):
                self.later(seconds, action)
            else:
                action()
        return answer if self.ways.void == "reply" else {"204": None, "null": NULL}[self.ways.void]

    def do_metadata(self, r):
        return {"operations": [{"name": name} for name in self.metadata]}

    def do_find_objects(self, r):
        return [{"objectId": self.spell(i), "attributes": {r["key"]: o["name"]}}
                for i, o in self.objects.items()
                if r["key"] == "shortName" and o["name"] in split_jsv(r["values"])]

    def do_list_objects(self, r):
        return reply(data=[{"objectId": i, "attributes": {"shortName": o["name"]}}
                           for i, o in self.objects.items()])

    def do_points(self, r):
        ids = [i for i in self.objects if i.lower() in {x.lower() for x in r.get("objectids", [])}]
        return reply(data={self.spell(i): n for n, i in enumerate(ids)}, domaininfo={
            str(n): {"domainID": n, "schemas": [{"schema": p} for p in self.objects[i]["points"]]}
            for n, i in enumerate(ids)})

    def do_read(self, r):
        found, empty = {}, True
        for i in self.asked(r["objectids"], self.objects):
            points = found.setdefault(self.spell(i), {"points": {}})["points"]
            for p in self.asked(r["points"], self.objects[i]["points"]):
                rows = self.samples(self.objects[i]["points"][p], r)
                empty = empty and not rows
                if rows or self.ways.null_members:
                    points[getattr(p, self.ways.point_spelling, lambda p=p: p)()] = [{
                        "pointName": p, "timeSeries": rows}]
        return reply("No data found." if empty and self.ways.says_no_data else None,
                     **({"objects": found} if found or self.ways.null_members else {}))

    def samples(self, values: dict[int, Any], r: dict) -> list[dict]:
        low, high, ways = moment(r["from"]), moment(r["to"]), self.ways
        rows = [{"t": t, "q": 192, "v": v} for t, v in sorted(values.items())
                if low <= t <= high and (t != low or ways.read_includes_from)
                and (t != high or ways.read_includes_to)]
        return rows[:min(r.get("take") or 10**9, ways.take_cap or 10**9)]

    def do_delete(self, r):
        low = moment(r["from"]) if r.get("from") else -10**15
        high = moment(r["to"]) if r.get("to") else 10**15

        def action():
            for i in self.asked(r.get("objectids") or self.objects, self.objects):
                points = self.objects[i]["points"]
                for p in self.asked(r.get("points") or points, points):
                    for t in [t for t in points[p] if low <= t < high
                              or (t == high and self.ways.delete_includes_to)]:
                        points[p].pop(t, None)
        return self.write("delete", action, reply())

    def do_allocation_types(self, r):
        return self.types

    def do_allocation_categories(self, r):
        return self.categories

    def do_allocations(self, r):
        low, high = int(r["from"]), int(r["to"])
        cut = (low, high) if self.ways.cuts else (-10**15, 10**15)
        return [self.shown(a, *cut) for a in self.allocations.values()  # of every object
                if a["start"] < high and (a["end"] is None or a["end"] > low)]

    def do_allocation(self, r):
        found = self.allocations.get(int(r["id"]))
        if found and found["end"] is None and self.ways.open_end:
            year = 1 if self.ways.open_end == "0001" else 9999
            return self.shown(found | {"end": to_ms(datetime(year, 12 if year > 1 else 1,
                                                             31 if year > 1 else 1, tzinfo=UTC))})
        return self.shown(found) if found else NOT_FOUND

    def shown(self, a: dict, low: int = -10**15, high: int = 10**15) -> dict:
        """Return an allocation as the server writes it."""
        end = a["end"] if a["end"] is None else min(a["end"], high)
        given = a | {"objectId": self.spell(a["objectId"], True),
                     "start": date(max(a["start"], low), self.ways.dates),
                     "end": end if end is None else date(end, self.ways.dates)}
        return {key: value for key, value in given.items()
                if (value is not None or self.ways.null_members)
                and (value is not False or self.ways.flags)}

    def do_insert_allocation(self, r):
        if not {"objectid", "allocationtypeid", "categoryid", "start", "end"} <= set(r):
            return reply()  # as the real one: what is missing is no error
        object_id = next(i for i in self.objects if i.lower() == r["objectid"].lower())

        def action():
            if self.ways.trims:
                self.trim(object_id, r["allocationtypeid"], r["start"], r["end"])
            self.add_allocation(object_id, r["categoryid"], r["start"], r["end"],
                                manual=r.get("manual", False))
        return self.write("insert_allocation", action, reply())

    def trim(self, object_id: str, type_id: int, start: int, end: int) -> None:
        """Cut away what stands in a period; of what reaches over both the first part stays."""
        for a in list(self.allocations.values()):
            if (a["objectId"] != object_id or a["category"]["typeId"] != type_id
                    or a["start"] >= end or a["end"] <= start):
                continue
            if a["start"] < start:
                a["end"] = start
            elif a["end"] > end:
                a["start"] = end
            else:
                del self.allocations[a["id"]]

    def do_delete_allocation(self, r):
        return self.write("delete_allocation",
                          lambda: self.allocations.pop(r.get("id"), None), reply())

    # How things are spelled.

    def spell(self, object_id: str, allocation: bool = False) -> Any:
        """Return an id as the server writes it; in decimal in allocations only."""
        way = self.ways.id_spelling
        if way in ("decimal", "number"):
            number = int(object_id, 16)
            return object_id if not allocation else str(number) if way == "decimal" else number
        return getattr(object_id, way, lambda: object_id)()

    def asked(self, names, known) -> list[str]:
        """Return those of `known` that are asked for, in any case."""
        lower = {name.lower() for name in names}
        return [name for name in known if name.lower() in lower]


NULL = "null"          # an answer that is JSON null; None is one without a body
NOT_FOUND = "NOT FOUND"


def reply(error: str | None = None, **answer) -> dict:
    return answer | {"replyInfo": {"rcvTime": 0, "replyTime": 0, "clientRequestHandle": None,
                                   "error": error}}


def split_jsv(text: str) -> list[str]:
    """Return the values of a list as JSV writes it: in quotes, doubled inside, where need be."""
    return next(csv.reader([text]))


def to_ms(when: datetime) -> int:
    return (when - EPOCH) // timedelta(milliseconds=1)


def moment(text: str) -> float:
    """Return `from` or `to`, epoch ms or ISO text, as epoch ms with its fraction."""
    if text.lstrip("-").isdecimal():
        return int(text)
    return (datetime.fromisoformat(text) - EPOCH) / timedelta(milliseconds=1)


def date(ms: int, way: str) -> str:
    if way == "slash":
        return f"/Date({ms})/"
    text = (EPOCH + timedelta(milliseconds=ms)).isoformat()[:19]
    fraction = f".{ms % 1000:03}"
    return text + {"iso": "", "iso7": f"{fraction}0000", "offset": f"{fraction}+00:00"}[way]
