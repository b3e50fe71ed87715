"""A stand-in Bazefield: the documented HTTP contract over a real socket, with faults on demand.

    with FakeBazefield() as server:
        server.add_object("1164AFE219C9D000", "LAN-01", {"ActivePower": {t_ms: value}})
        server.faults.append(("delete", "cut after"))      # the next delete is done, the answer lost

As the real one it matches request keys in any case, ignores those it does not know, treats every field
as optional, and says nothing of how many samples a delete took away.
"""

from __future__ import annotations

import json
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PREFIX = "/bazefield.services"

ROUTES = {  # (verb, path) -> our name of the operation
    ("GET", "/api/metadata"): "metadata",
    ("GET", "/api/objects"): "find_objects",
    ("POST", "/api/objects/structure"): "list_objects",
    ("POST", "/api/objects/getschemas"): "points",
    ("POST", "/api/objects/timeseries"): "read",
    ("POST", "/api/objects/points/delete"): "delete",
    ("GET", "/api/allocationtypes"): "allocation_types",
    ("GET", "/api/allocationcategories"): "allocation_categories",
    ("POST", "/api/allocations/insert"): "insert_allocation",
    ("POST", "/api/allocations/delete"): "delete_allocation",
}
WRITES = {"delete", "insert_allocation", "delete_allocation"}
METADATA = ["ObjectsByKeyGetRequest", "ObjectStructureGetRequest", "ObjectDomainSchemasGetRequest",
            "GetDomainPointTimeSeries", "DeleteObjectPointValues"]


class FakeBazefield(ThreadingHTTPServer):
    """The server, its data and what it was asked."""

    daemon_threads = True

    def __init__(self, certificate: tuple[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, dict] = {}      # objectId -> {"name", "points": {point: {t_ms: value}}}
        self.types = [{"id": 1, "name": "Internal", "subType": False, "linkedTypeId": 0},
                      {"id": 2, "name": "Internal sub", "subType": True, "linkedTypeId": 1},
                      {"id": 3, "name": "IEC", "subType": False, "linkedTypeId": 0}]
        self.categories = [{"id": 10, "name": "Night", "typeId": 1, "enabled": True},
                           {"id": 11, "name": "Service", "typeId": 1, "enabled": True},
                           {"id": 20, "name": "Grid", "typeId": 2, "parentCategoryId": 10, "enabled": True},
                           {"id": 21, "name": "Grid", "typeId": 2, "parentCategoryId": 11, "enabled": True},
                           {"id": 30, "name": "Night", "typeId": 3, "enabled": True}]
        self.allocations: dict[int, dict] = {}
        self.keys = {"k3y-write": {"read", "write"}, "k3y-read": {"read"}}
        self.faults: list[tuple[str, str]] = []  # (operation or "*", fault), each met once, in order
        self.log: list[tuple[str, dict]] = []    # (operation, request) of all requests
        self.to_is_inclusive = True
        self.metadata = list(METADATA)
        self.never = threading.Event()           # what an answer that never comes waits for
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

    def add_object(self, object_id: str, name: str, points: dict[str, dict[int, object]] | None = None) -> None:
        self.objects[object_id] = {"name": name, "points": points or {}}

    def add_allocation(self, object_id: str, category_id: int, start: int, end: int | None, **more) -> int:
        new = next(self._ids)
        category = next(c for c in self.categories if c["id"] == category_id)
        self.allocations[new] = {"id": new, "objectId": object_id, "category": category, "start": start, "end": end,
                                 "manual": True, "approved": False, "holdCategory": False} | more
        return new

    def standing(self, object_id: str) -> list[tuple[int, int, int | None]]:
        """Return (category, start, end) of an object's allocations, sorted."""
        return sorted((a["category"]["id"], a["start"], a["end"]) for a in self.allocations.values()
                      if a["objectId"] == object_id)

    def calls(self, operation: str) -> list[dict]:
        return [request for name, request in self.log if name == operation]

    # The operations. `r` is the request, keys in lower case.

    def do(self, name: str, r: dict):
        return getattr(self, f"do_{name}")(r)

    def do_metadata(self, r):
        return {"operations": [{"name": name} for name in self.metadata]}

    def do_find_objects(self, r):
        return [{"objectId": i, "attributes": {r["key"]: o["name"]}} for i, o in self.objects.items()
                if r["key"] == "shortName" and o["name"] in r["values"].split(",")]

    def do_list_objects(self, r):
        return reply(data=[{"objectId": i, "attributes": {"shortName": o["name"]}} for i, o in self.objects.items()])

    def do_points(self, r):
        ids = [i for i in r.get("objectids", []) if i in self.objects]
        return reply(data={i: n for n, i in enumerate(ids)}, domaininfo={
            str(n): {"domainID": n, "schemas": [{"schema": p} for p in self.objects[i]["points"]]}
            for n, i in enumerate(ids)})

    def do_read(self, r):
        low, high = int(r["from"]), int(r["to"])
        found = {i: {"points": {p: [{"timeSeries": [
            {"t": t, "q": 192, "v": v} for t, v in sorted(self.objects[i]["points"].get(p, {}).items())
            if low <= t <= high][:r.get("take") or None]}] for p in r["points"]}}
            for i in r["objectids"] if i in self.objects}
        return reply(objects=found)

    def do_delete(self, r):
        low = int(r["from"]) if r.get("from") else -10**15
        high = int(r["to"]) if r.get("to") else 10**15
        for i in r.get("objectids") or self.objects:
            for p in r.get("points") or self.objects[i]["points"]:
                values = self.objects[i]["points"].get(p, {})
                for t in [t for t in values if low <= t < high or (t == high and self.to_is_inclusive)]:
                    del values[t]
        return reply()

    def do_allocation_types(self, r):
        return self.types

    def do_allocation_categories(self, r):
        return self.categories

    def do_allocations(self, r):
        low, high = int(r["from"]), int(r["to"])
        return [a | {"start": iso(a["start"]), "end": a["end"] and iso(a["end"])} for a in self.allocations.values()
                if a["start"] < high and (a["end"] is None or a["end"] > low)]  # of every object

    def do_insert_allocation(self, r):
        if not {"objectid", "allocationtypeid", "categoryid", "start", "end"} <= set(r):
            return reply()  # as the real one: what is missing is no error
        return {"id": self.add_allocation(r["objectid"], r["categoryid"], r["start"], r["end"],
                                          manual=r.get("manual", False))}

    def do_delete_allocation(self, r):
        self.allocations.pop(r.get("id"), None)
        return reply()


def reply(**answer) -> dict:
    return answer | {"replyInfo": {"rcvTime": 0, "replyTime": 0, "clientRequestHandle": None, "error": None}}


def iso(ms: int) -> str:
    return f"{EPOCH + timedelta(milliseconds=ms):%Y-%m-%dT%H:%M:%S.%f}0"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, verb: str) -> None:
        """Find the operation, meet its next fault, carry it out, answer."""
        name, request = self.understand(verb)
        self.server.log.append((name, request))
        fault = self.next_fault(name)
        if fault == "cut before":
            self.close_connection = True
            return self.connection.close()
        if (refusal := self.refusal(name)) or name is None:
            return self.send(*(refusal or (404, {})))
        if fault in FAULTS:
            status, content, headers = FAULTS[fault]
            return self.send(status, content.replace("KEY", self.key()), headers)
        content = json.dumps(self.server.do(name, request))
        if fault == "cut after":
            self.close_connection = True
            return self.connection.close()
        if fault == "never":
            self.server.never.wait(30)
            self.close_connection = True
            return None
        if fault == "short":
            self.send(200, content, cut=len(content) // 2)
            self.close_connection = True
            return self.connection.close()
        return self.send(200, content)

    def understand(self, verb: str) -> tuple[str | None, dict]:
        url = urlsplit(self.path)
        request = {k.lower(): v[0] for k, v in parse_qs(url.query).items()}
        if length := int(self.headers.get("Content-Length") or 0):
            request |= {k.lower(): v for k, v in json.loads(self.rfile.read(length)).items()}
        path = url.path.lower().removeprefix(PREFIX)
        parts = url.path.split("/")
        if "/api/allocations/" in path and "/from/" in path:
            request |= {"type": unquote(parts[-5]), "from": parts[-3], "to": parts[-1]}
            return "allocations", request
        return ROUTES.get((verb, path)), request

    def next_fault(self, name: str | None) -> str | None:
        for n, (operation, fault) in enumerate(self.server.faults):
            if operation in ("*", name):
                del self.server.faults[n]
                return fault
        return None

    def key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def refusal(self, name: str | None) -> tuple[int, dict] | None:
        rights = self.server.keys.get(self.key())
        if rights is None:
            return 401, {"responseStatus": {"errorCode": "Unauthorized", "message": f"unknown key {self.key()}"}}
        if name in WRITES and "write" not in rights:
            return 403, {"responseStatus": {"errorCode": "Forbidden", "message": "no write access to the data"}}
        return None

    def send(self, status: int, content: str | dict, headers: dict | None = None, cut: int | None = None) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for header, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])


FAULTS = {
    "401": (401, '{"responseStatus": {"errorCode": "Unauthorized", "message": "key KEY has expired"}}', {}),
    "403": (403, '{"responseStatus": {"errorCode": "Forbidden", "message": "no write access"}}', {}),
    "429": (429, "slow down", {"Retry-After": "7"}),
    "500": (500, "Error: SerializationException", {"Content-Type": "text/html"}),
    "503": (503, "<html>\n<h1>down for maintenance</h1>", {"Content-Type": "text/html"}),
    "html": (200, "<!DOCTYPE html>\n<title>Log in, KEY</title>", {"Content-Type": "text/html"}),
    "reply error": (200, '{"replyInfo": {"error": "point is read only"}}', {}),
    "response status": (200, '{"responseStatus": {"errorCode": "Locked", "message": "range is archived"}}', {}),
    "redirect": (302, "", {"Location": "https://elsewhere.example/login?key=KEY"}),
}
