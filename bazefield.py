"""The Bazefield HTTP client: one kept-alive connection, checked answers, careful repeats.

    BAZEFIELD_URL            https://HOST or https://HOST/BazeField.Services
    BAZEFIELD_API_KEY        sent as Bearer token; or BAZEFIELD_API_KEY_FILE, a file that holds it
    BAZEFIELD_CA_BUNDLE      certificates to trust beside none else; default: the system's
    BAZEFIELD_TIMEOUT        seconds a call may be silent (60)
    BAZEFIELD_OPERATIONS     a JSON file that overrides routes and field names, see OPERATIONS

    python bazefield.py --check     which of the operations used here does the server know?

Facts come from the metadata pages of a Bazefield server ("[D]": documented there), from public client
code ("[C]": worked for somebody) or are assumed ("[A]": the vendor publishes nothing; confirm them with
--check and on your server's /api/metadata before the first write).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from jobs import JobRequestError, JobStepError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TRIES = 5                      # of a call that may be repeated
BUDGET_SECONDS = 120.0         # no further try after so long
LONGEST_WAIT_SECONDS = 30.0    # between two tries, unless the server asks for longer
BUSY = {429, 502, 503, 504}    # worth another try
PAGE = 20_000                  # samples per read: bounds the memory, about 2 MB an answer
MAX_ANSWER_BYTES = 64_000_000
HEX_ID = re.compile("[0-9A-Fa-f]{16}")


class BazefieldError(JobStepError):
    """Bazefield did not do what was asked; the text names the operation and what it said."""


class SettingsError(BazefieldError, JobRequestError):
    """The environment does not say, or wrongly, how to reach Bazefield."""


class LostAnswer(BazefieldError):
    """Nobody knows whether the call was carried out: read back before asking again."""


@dataclass(frozen=True)
class Operation:
    """One call: verb, route with {placeholders}, what the metadata pages call it, how sure we are.

    `fields` maps our names of body fields to the server's; `required` ones must never go out empty:
    the server treats every field as optional, and a delete without bounds would be a disaster.
    """

    verb: str
    route: str
    metadata: str
    known: str
    fields: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()


#: Everything this client calls. BAZEFIELD_OPERATIONS may override verb, route, metadata and fields.
OPERATIONS = {
    "metadata": Operation("GET", "/api/metadata", "", "[D]"),
    "find_objects": Operation("GET", "/api/objects", "ObjectsByKeyGetRequest", "[D]"),
    "list_objects": Operation("POST", "/api/objects/structure", "ObjectStructureGetRequest", "[D]"),
    "points": Operation("POST", "/api/objects/getschemas", "ObjectDomainSchemasGetRequest", "[D]",
                        required=("objectIds",)),
    "read": Operation("POST", "/api/objects/timeseries", "GetDomainPointTimeSeries", "[D]",
                      required=("objectIds", "points", "from", "to")),
    "delete": Operation("POST", "/api/objects/points/delete", "DeleteObjectPointValues", "[D]",
                        required=("objectIds", "points", "from", "to")),
    "allocation_types": Operation("GET", "/api/allocationTypes", "AllocationTypesGetRequest", "[C]"),
    "allocation_categories": Operation("GET", "/api/allocationCategories", "AllocationCategoriesGetRequest", "[A]"),
    "allocations": Operation("GET", "/api/allocations/{type_name}/from/{from}/to/{to}",
                             "AllocationsGetRequest", "[C]"),
    "insert_allocation": Operation(
        "POST", "/api/allocations/insert", "AllocationInsertRequest", "[A]",
        {name: name for name in ("objectId", "allocationTypeId", "categoryId", "start", "end", "manual")},
        required=("objectId", "allocationTypeId", "categoryId", "start", "end")),
    "delete_allocation": Operation("POST", "/api/allocations/delete", "AllocationDeleteRequest", "[A]",
                                   {"id": "id"}, required=("id",)),
}
NAME_ATTRIBUTE = "shortName"  # what objects are looked up by [D]


# ------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """Where the server is and how to talk to it; the key does not show in repr."""

    scheme: str
    host: str
    port: int | None
    path: str
    key: str = field(repr=False)
    ca_bundle: str | None
    timeout: float
    operations: Mapping[str, Operation] = field(repr=False, default_factory=dict)


def read_settings(env: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of the environment; raise `SettingsError` naming everything wrong with them."""
    problems: list[str] = []
    url = urlsplit(env.get("BAZEFIELD_URL", ""))
    if not _is_safe(url):
        problems.append(f"BAZEFIELD_URL={env.get('BAZEFIELD_URL', '')!r}: write https://HOST "
                        "(plain http is taken for localhost only), without user, query or fragment"
                        if not url.username else "BAZEFIELD_URL must not hold a user or password")
    key = _read_key(env, problems)
    ca_bundle = env.get("BAZEFIELD_CA_BUNDLE") or None
    if ca_bundle and not os.path.isfile(ca_bundle):
        problems.append(f"BAZEFIELD_CA_BUNDLE={ca_bundle!r} is no file")
    timeout = _read_timeout(env, problems)
    operations = _read_operations(env, problems)
    if problems:
        raise SettingsError("\n  ".join(["Bazefield cannot be reached from here; nothing was sent:", *problems]))
    return Settings(url.scheme, url.hostname or "", url.port, url.path.rstrip("/") or "/BazeField.Services",
                    key, ca_bundle, timeout, operations)


def _is_safe(url: Any) -> bool:
    try:
        url.port  # noqa: B018  raises if it is no number
    except ValueError:
        return False
    local = url.hostname in ("localhost", "127.0.0.1", "::1")
    return bool(url.hostname and (url.scheme == "https" or (url.scheme == "http" and local))
                and not (url.username or url.password or url.query or url.fragment))


def _read_key(env: Mapping[str, str], problems: list[str]) -> str:
    key, file = env.get("BAZEFIELD_API_KEY", ""), env.get("BAZEFIELD_API_KEY_FILE", "")
    if not key and file:
        try:
            with open(file, encoding="utf-8") as stream:
                key = stream.read()
        except (OSError, UnicodeDecodeError) as exc:
            problems.append(f"BAZEFIELD_API_KEY_FILE={file!r}: {type(exc).__name__}, cannot be read")
            return ""
    key = key.strip()
    if not key:
        problems.append("BAZEFIELD_API_KEY (or BAZEFIELD_API_KEY_FILE) is not set")
    elif not re.fullmatch(r"[\x21-\x7e]+", key):
        problems.append("the API key has characters a header cannot carry")
    return key


def _read_timeout(env: Mapping[str, str], problems: list[str]) -> float:
    text = env.get("BAZEFIELD_TIMEOUT") or "60"
    try:
        if 0 < float(text) < 86_400:
            return float(text)
    except ValueError:
        pass
    problems.append(f"BAZEFIELD_TIMEOUT={text!r}: write seconds, e.g. 60")
    return 60


def _read_operations(env: Mapping[str, str], problems: list[str]) -> dict[str, Operation]:
    """Return OPERATIONS with what the file of BAZEFIELD_OPERATIONS changes."""
    operations = dict(OPERATIONS)
    if not (file := env.get("BAZEFIELD_OPERATIONS")):
        return operations
    try:
        with open(file, encoding="utf-8") as stream:
            changes = json.load(stream)
        for name, change in changes.items():
            if unknown := set(change) - {"verb", "route", "metadata", "fields"}:
                raise ValueError(f"{name}: unknown {sorted(unknown)}")
            operations[name] = replace(operations[name], **change | {
                "fields": {**operations[name].fields, **change.get("fields", {})}})
    except KeyError as exc:
        problems.append(f"BAZEFIELD_OPERATIONS={file!r}: no operation {exc}; known: {', '.join(OPERATIONS)}")
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        problems.append(f"BAZEFIELD_OPERATIONS={file!r}: {exc}")
    return operations


# ------------------------------------------------------------------------------------------ the client


class Client:
    """Calls operations over one kept-alive connection; not for several threads at once."""

    def __init__(self, settings: Settings, sleep: Callable[[float], Any] = time.sleep) -> None:
        self.settings = settings
        self.sleep = sleep
        self._connection: http.client.HTTPConnection | None = None

    def call(self, name: str, *, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None,
             parts: Mapping[str, str] | None = None, repeat: bool = True) -> Any:
        """Carry out an operation and return its answer, parsed.

        `parts` fill the {placeholders} of the route. With `repeat` (reads, deletes) busy servers, lost
        connections and timeouts are tried again with growing random waits, at most TRIES times within
        BUDGET_SECONDS; without it only a 429 is, and a lost answer raises `LostAnswer`. Raise
        `BazefieldError` if the server says no, answers nonsense, or does not answer.
        """
        operation = self.settings.operations[name]
        if missing := [key for key in operation.required if (body or {}).get(operation.fields.get(key, key))
                       in (None, "", [], ())]:
            raise ValueError(f"{name} must never go out without {', '.join(missing)}; nothing was sent")
        path = self.settings.path + operation.route.format_map(
            {key: quote(value, safe="") for key, value in (parts or {}).items()})
        path += "?" + urlencode({**(query or {}), "format": "json"})
        until = time.monotonic() + BUDGET_SECONDS
        for tries_left in range(TRIES - 1, -1, -1):
            try:
                return self._once(name, operation.verb, path, body)
            except _Again as again:
                wait = max(random.uniform(0, min(LONGEST_WAIT_SECONDS, 0.25 * 2 ** (TRIES - tries_left))),
                           again.retry_after)
                may = repeat or again.status == 429
                if not (may and tries_left and time.monotonic() + wait < until):
                    raise (BazefieldError if repeat or again.status == 429 else LostAnswer)(
                        f"{name}: {again.text}" + (f", {TRIES - tries_left} tries" if may else "")) from None
            self.sleep(wait)
        raise AssertionError("unreachable")

    def close(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def _connect(self) -> http.client.HTTPConnection:
        s = self.settings
        if s.scheme == "http":
            return http.client.HTTPConnection(s.host, s.port, timeout=s.timeout)
        import ssl
        return http.client.HTTPSConnection(s.host, s.port, timeout=s.timeout,
                                           context=ssl.create_default_context(cafile=s.ca_bundle))

    def _once(self, name: str, verb: str, path: str, body: Any) -> Any:
        """Send one request; raise `_Again` for whatever another try may cure."""
        if self._connection is None:
            self._connection = self._connect()
        headers = {"Authorization": f"Bearer {self.settings.key}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            self._connection.request(verb, path, None if body is None else json.dumps(body), headers)
            response = self._connection.getresponse()
            if int(response.getheader("Content-Length") or 0) > MAX_ANSWER_BYTES:
                raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            content = response.read()  # without a number: then a body cut short is noticed
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            if type(exc).__name__ == "SSLCertVerificationError":
                raise BazefieldError(f"{name}: the server's certificate is not trusted: {exc.verify_message}; "
                                     "name its authority in BAZEFIELD_CA_BUNDLE") from None
            raise _Again(self._clean(f"no answer from {self.settings.host}: {exc or type(exc).__name__}")) from None
        except BaseException:  # the step's time is over: half an answer must not be read by the next call
            self.close()
            raise
        return self._checked(name, response, content)

    def _checked(self, name: str, response: http.client.HTTPResponse, content: bytes) -> Any:
        """Return the parsed answer if it is a success: 2xx, JSON, and no error inside."""
        said = self._clean(first_line(content))
        if response.will_close:
            self.close()
        if response.status in BUSY:
            raise _Again(f"status {response.status}: {said}", response.status, retry_after(response))
        if 300 <= response.status < 400:
            host = urlsplit(response.getheader("Location", "")).hostname
            raise BazefieldError(f"{name}: redirected to {host!r}, which is not followed; set BAZEFIELD_URL")
        if not 200 <= response.status < 300:
            raise BazefieldError(f"{name}: status {response.status}: {said}{hint(response.status)}")
        try:
            answer = json.loads(content)
        except ValueError:
            raise BazefieldError(f"{name}: status {response.status}, but no JSON: {said}") from None
        if text := error_inside(answer):
            raise BazefieldError(f"{name}: status {response.status}, but {self._clean(text)}")
        return answer

    def _clean(self, text: str) -> str:
        """Return `text` on one line without the key, whoever put it there."""
        return " ".join(text.replace(self.settings.key, "***").split())[:300]

    # What the jobs ask for, in their own words.

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


class _Again(Exception):
    """Another try may help."""

    def __init__(self, text: str, status: int = 0, retry_after: float = 0) -> None:
        self.text, self.status, self.retry_after = text, status, retry_after


# ------------------------------------------------------------------------------------------ small things


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


def error_inside(answer: Any) -> str:
    """Return the error that an answer with status 200 holds, or ''."""
    if not isinstance(answer, dict):
        return ""
    status = answer.get("responseStatus") or {}
    if status.get("errorCode"):
        return f"{status['errorCode']}: {status.get('message') or 'no message'}"
    return str((answer.get("replyInfo") or {}).get("error") or "")


def first_line(content: bytes) -> str:
    """Return what an error answer says: its message if it is JSON, else its first line without tags."""
    text = content[:4000].decode("utf-8", "replace")
    try:
        status = json.loads(text)["responseStatus"]
        return f"{status['errorCode']}: {status.get('message', '')}"
    except (ValueError, KeyError, TypeError):
        lines = [line.strip() for line in re.sub("<[^>]*>", " ", text).splitlines()]
        return next((line for line in lines if line), "(empty answer)")


def hint(status: int) -> str:
    return {401: "; check the API key", 403: "; the key's user lacks the right (write access to the tag's data "
            "is separate from access to the object)"}.get(status, "")


def retry_after(response: http.client.HTTPResponse) -> float:
    """Return the seconds the server asks us to wait, as a number or a date; 0 if it does not."""
    text = response.getheader("Retry-After", "")
    if text.isdecimal():
        return float(text)
    from email.utils import parsedate_to_datetime
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


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
