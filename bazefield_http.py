"""One request to Bazefield and its answer: settings, TLS, careful repeats, nothing secret in any text.

    BAZEFIELD_URL            https://HOST or https://HOST/BazeField.Services
    BAZEFIELD_API_KEY        sent as Bearer token; or BAZEFIELD_API_KEY_FILE, a file that holds it
    BAZEFIELD_CA_BUNDLE      certificates to trust beside none else; default: the system's
    BAZEFIELD_TIMEOUT        seconds a call may be silent (60)
    BAZEFIELD_OPERATIONS     a JSON file that overrides routes and field names, see OPERATIONS
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from jobs import JobRequestError, JobStepError

TRIES = 5                      # of a call that may be repeated
BUDGET_SECONDS = 120.0         # no further try after so long
LONGEST_WAIT_SECONDS = 30.0    # between two tries, unless the server asks for longer
BUSY = {429, 502, 503, 504}    # worth another try
MAX_ANSWER_BYTES = 64_000_000


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


class _Again(Exception):
    """Another try may help."""

    def __init__(self, text: str, status: int = 0, retry_after: float = 0) -> None:
        self.text, self.status, self.retry_after = text, status, retry_after


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
