"""How the stand-in Bazefield speaks HTTP, well or badly: requests, answers, faults on the wire."""

from __future__ import annotations

import base64
import gzip
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, quote, unquote, urlsplit

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

FAULTS = {  # answers instead of the work; KEY is replaced by the key, in one spelling or another
    "401": (401, '{"responseStatus": {"errorCode": "Unauthorized",'
                 ' "message": "key KEY has expired"}}', {}),
    "403": (403, '{"responseStatus": {"errorCode": "Forbidden",'
                 ' "message": "no write access"}}', {}),
    "408": (408, "", {"Connection": "close"}),
    "429": (429, "slow down", {"Retry-After": "7"}),
    "500": (500, "Error: SerializationException", {"Content-Type": "text/html"}),
    "503": (503, "<html>\n<h1>down for maintenance</h1>", {"Content-Type": "text/html"}),
    "html": (200, "<!DOCTYPE html>\n<title>Log in, KEY</title>", {"Content-Type": "text/html"}),
    "reply error": (200, '{"replyInfo": {"error": "point is read only"}}', {}),
    "response status": (200, '{"responseStatus": {"errorCode": "Locked",'
                             ' "message": "range is archived"}}', {}),
    "redirect": (302, "", {"Location": "https://elsewhere.example/login?key=KEY"}),
    "deep": (200, "[" * 100_000, {}),
    "huge number": (200, '{"replyInfo": {"rcvTime": ' + "9" * 5_000 + "}}", {}),
    "text": (200, '"as you wish"', {}),
    "list": (200, '["a", 1, null]', {}),
    "strange": (200, '{"data": 7, "domaininfo": "x", "objects": [1], "id": "x", "replyInfo": "",'
                     ' "responseStatus": {}}', {}),
    "controls": (500, "\x1b[2J\x07 KEY \x9b31m\x85", {}),
}
SPELLINGS = {
    "plain": lambda key: key,
    "percent": lambda key: "".join(f"%{ord(c):02X}" for c in key),
    "json": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "html": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "hex": lambda key: key.encode().hex(),
    "hex as .NET writes it": lambda key: key.encode().hex("-").upper(),
    "hex of UTF-16": lambda key: key.encode("utf-16-le").hex(),
    "base64 of UTF-16": lambda key: base64.b64encode(key.encode("utf-16-le")).decode(),
    "escaped lines": lambda key: "\\r\\n".join(key),
    "percent-encoded lines": lambda key: "%0D%0A".join(key),
    "tags": lambda key: "<wbr>".join(key),
    "blanks of no width": lambda key: "\xad".join(key),
    "basic": lambda key: base64.b64encode(f"{key}:".encode()).decode(),
    "base64 in base64's middle": lambda key: quote(base64.b64encode(f"x {key}".encode()), safe=""),
}


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
            return self.hang_up()
        if (refusal := self.refusal(name)) or name is None:
            return self.send(*(refusal or (404, "{}")))
        if fault == "status line":
            self.wfile.write(f"HTTP/9 {self.server_key()}\r\n\r\n".encode())
            return self.hang_up()
        if fault in FAULTS:
            status, text, headers = FAULTS[fault]
            return self.send(status, text.replace("KEY", self.server_key()), headers)
        if fault and fault.endswith(" late"):  # the work is done two seconds from now
            self.server.later(2, lambda: self.server.do(name, request))
            return self.lost(fault.removesuffix(" late"))
        given = self.server.do(name, request)
        if fault in ("cut after", "504", "never"):
            return self.lost(fault)
        if given is None or given == "NOT FOUND":
            return self.send(404 if given else 204, "")
        return self.send_json(given if isinstance(given, str) else json.dumps(given), fault)

    def lost(self, how: str) -> None:
        """Let the answer be lost."""
        if how == "504":
            return self.send(504, "Gateway Timeout")
        if how in FAULTS:
            return self.send(*FAULTS[how])
        if how == "never":
            self.server.never.wait(30)
        return self.hang_up()

    def send_json(self, text: str, fault: str | None) -> None:
        """Send a good answer, or one that something is wrong with on its way."""
        if fault == "short":
            self.send(200, text, cut=len(text) // 2)
            return self.hang_up()
        if fault == "gzip":
            return self.send(200, gzip.compress(text.encode()), {"Content-Encoding": "gzip"})
        if fault == "until closed":
            self.send(200, text, {"Content-Length": None, "Connection": "close"})
            return self.hang_up()
        if fault == "negative chunk":
            self.send(200, b"-1\r\n", {"Content-Length": None, "Transfer-Encoding": "chunked"})
            while not self.server.never.wait(0.02):
                self.wfile.write(b" " * 65_536)
        if fault in ("endless", "drip"):
            return self.go_on(b" " * 65_536 if fault == "endless" else b" ", fault == "drip")
        if fault == "late 408":  # unasked, on a connection that is idle
            self.send(200, text)
            self.wfile.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            return self.hang_up()
        if fault == "100s":
            while not self.server.never.wait(0.02):
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.send(200, text)
        return self.hang_up() if self.server.ways.hangs_up else None

    def go_on(self, piece: bytes, slowly: bool) -> None:
        """Send a body without an end, as fast as it goes or drop by drop."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.server.never.wait(0.02 if slowly else 0):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def understand(self, verb: str) -> tuple[str | None, dict]:
        url = urlsplit(self.path)
        if len(url.query) > 2_048 or len(self.path) > 4_096:  # as IIS does
            return None, {}
        request = {k.lower(): v[0] for k, v in parse_qs(url.query).items()}
        if length := int(self.headers.get("Content-Length") or 0):
            request |= {k.lower(): v for k, v in json.loads(self.rfile.read(length)).items()}
        path = url.path.lower().removeprefix(PREFIX)
        parts = url.path.split("/")
        if "/api/allocations/" in path and "/from/" in path:
            request |= {"type": unquote(parts[-5]), "from": parts[-3], "to": parts[-1]}
            return "allocations", request
        if verb == "GET" and path.startswith("/api/allocations/"):
            return "allocation", request | {"id": parts[-1]}
        return ROUTES.get((verb, path)), request

    def next_fault(self, name: str | None) -> str | None:
        for n, (operation, fault) in enumerate(self.server.faults):
            if operation in ("*", name):
                del self.server.faults[n]
                return fault
        return None

    def key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def server_key(self) -> str:
        """Return the key as the server likes to repeat it."""
        return SPELLINGS[getattr(self.server, "key_spelling", "plain")](self.key())

    def refusal(self, name: str | None) -> tuple[int, str] | None:
        rights = self.server.keys.get(self.key())
        if rights is None:
            code, text = "Unauthorized", f"unknown key {self.key()}"
        elif name in WRITES and "write" not in rights:
            code, text = "Forbidden", "no write access to the data"
        else:
            return None
        return 401 if code == "Unauthorized" else 403, json.dumps(
            {"responseStatus": {"errorCode": code, "message": text}})

    def send(self, status: int, content: str | bytes, headers: dict | None = None,
             cut: int | None = None) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        chunked = self.server.ways.chunked and status == 200 and cut is None and not headers
        for _ in range(self.server.ways.interim):
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
        self.send_response(status)
        length = {"Transfer-Encoding": "chunked"} if chunked else {
            "Content-Length": None if status == 204 else str(len(data))}
        headers = {"Content-Type": "application/json"} | length | (headers or {})
        for header, value in headers.items():
            if value is not None:
                self.send_header(header, value)
        self.end_headers()
        if chunked:
            for n in range(0, len(data), 1_000):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data[n:n + 1_000]), data[n:n + 1_000]))
            data = b"0\r\n\r\n"
        self.wfile.write(data[:cut])


