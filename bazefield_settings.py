"""Where Bazefield is and how to talk to it: the environment, and the table of all operations.

    BAZEFIELD_URL            https://HOST or https://HOST/BazeField.Services
    BAZEFIELD_API_KEY        sent as Bearer token; or BAZEFIELD_API_KEY_FILE, a file that holds it
    BAZEFIELD_CA_BUNDLE      certificates to trust beside none else; default: the system's
    BAZEFIELD_TIMEOUT        seconds for a whole call, from connecting to the last byte (60)
    BAZEFIELD_OPERATIONS     a JSON file that overrides routes and field names, see OPERATIONS
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any
from urllib.parse import urlsplit

from bazefield_answer import BazefieldError
from jobs import JobRequestError

log = logging.getLogger(__name__)


class SettingsError(BazefieldError, JobRequestError):
    """The environment does not say, or wrongly, how to reach Bazefield."""


@dataclass(frozen=True)
class Operation:
    """One call: verb, route with {placeholders}, what the metadata pages call it, how sure we are.

    `fields` maps our names of body fields to the server's; `required` ones must never go out
    empty: the server treats every field as optional, and a delete without bounds is a disaster.
    """

    verb: str
    route: str
    metadata: str
    known: str
    fields: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()


#: All that is called. BAZEFIELD_OPERATIONS may override verb, route, metadata and fields.
OPERATIONS = {
    "metadata": Operation("GET", "/api/metadata", "", "[D]"),
    "find_objects": Operation("GET", "/api/objects", "ObjectsByKeyGetRequest", "[D]"),
    "list_objects": Operation("POST", "/api/objects/structure",
                              "ObjectStructureGetRequest", "[D]"),
    "points": Operation("POST", "/api/objects/getschemas", "ObjectDomainSchemasGetRequest", "[D]",
                        required=("objectIds",)),
    "read": Operation("POST", "/api/objects/timeseries", "GetDomainPointTimeSeries", "[D]",
                      required=("objectIds", "points", "from", "to")),
    "delete": Operation("POST", "/api/objects/points/delete", "DeleteObjectPointValues", "[D]",
                        required=("objectIds", "points", "from", "to")),
    "allocation_types": Operation("GET", "/api/allocationTypes",
                                  "AllocationTypesGetRequest", "[C]"),
    "allocation_categories": Operation("GET", "/api/allocationCategories",
                                       "AllocationCategoriesGetRequest", "[A]"),
    "allocations": Operation("GET", "/api/allocations/{type_name}/from/{from}/to/{to}",
                             "AllocationsGetRequest", "[C]"),
    "allocation": Operation("GET", "/api/allocations/{id}", "GetAllocation", "[D]"),
    "insert_allocation": Operation(
        "POST", "/api/allocations/insert", "AllocationInsertRequest", "[A]",
        {n: n for n in ("objectId", "allocationTypeId", "categoryId", "start", "end", "manual")},
        required=("objectId", "allocationTypeId", "categoryId", "start", "end")),
    "delete_allocation": Operation("POST", "/api/allocations/delete", "AllocationDeleteRequest",
                                   "[A]", {"id": "id"}, required=("id",)),
}


# ---------------------------------------------------------------------------------------- settings


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
    operations: Mapping[str, Operation] = field(repr=False, hash=False, default_factory=dict)


def read_settings(env: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of the environment; raise `SettingsError` naming all that is wrong."""
    problems: list[str] = []
    url = _read_url(env.get("BAZEFIELD_URL", ""), problems)
    key = _read_key(env, problems)
    ca_bundle = env.get("BAZEFIELD_CA_BUNDLE") or None
    if ca_bundle and not os.path.isfile(ca_bundle):
        problems.append(f"BAZEFIELD_CA_BUNDLE={ca_bundle!r} is no file")
    timeout = _read_timeout(env, problems)
    operations = _read_operations(env, problems)
    if problems:
        raise SettingsError("\n  ".join(
            ["Bazefield cannot be reached from here; nothing was sent:", *problems]))
    path = url.path.rstrip("/") or "/BazeField.Services"
    return Settings(url.scheme, url.hostname, url.port, path, key, ca_bundle, timeout, operations)


def _read_url(text: str, problems: list[str]) -> Any:
    try:
        url = urlsplit(text.strip())
        url.port  # noqa: B018  raises if it is no number
    except ValueError:
        url = urlsplit("")
    local = url.hostname in ("localhost", "127.0.0.1", "::1")
    spelled = re.fullmatch(r"[\w.:-]+", url.hostname or "") and re.fullmatch("[!-~]*", url.path)
    if "@" in text:
        problems.append("BAZEFIELD_URL must not hold a user or password")
    elif not spelled or url.query or url.fragment or not (
            url.scheme == "https" or (url.scheme == "http" and local)):
        problems.append(f"BAZEFIELD_URL{_shown_url(text)}: write https://HOST (plain http is "
                        "taken for localhost only), without user, query, fragment or blank")
    return url


def _shown_url(text: str) -> str:
    """Return what may be shown of a wrong URL: it may hold a key, or be one by mistake."""
    if text and "://" not in text:
        return " (not shown; it has no ://)"
    return "=" + repr(re.sub("[?#].*", "?...", text, flags=re.DOTALL))


def _read_key(env: Mapping[str, str], problems: list[str]) -> str:
    key, file = env.get("BAZEFIELD_API_KEY", ""), env.get("BAZEFIELD_API_KEY_FILE", "")
    if not key and file:
        try:
            key = _read_key_file(file)
        except (OSError, ValueError) as exc:
            # Without a / it may be the key itself, put into the wrong variable.
            shown = f"={file!r}" if "/" in file else " (not shown; write the path of a file)"
            problems.append(f"BAZEFIELD_API_KEY_FILE{shown}: {type(exc).__name__}, cannot be read")
            return ""
    key = key.strip("\ufeff \t\r\n")  # a byte order mark is no part of it
    if not key:
        problems.append("BAZEFIELD_API_KEY (or BAZEFIELD_API_KEY_FILE) is not set")
    elif not re.fullmatch(r"[\x21-\x7e]+", key):
        problems.append("the API key has characters a header cannot carry")
    return key


def _read_key_file(file: str) -> str:
    with open(file, "rb") as stream:
        if (mode := os.fstat(stream.fileno()).st_mode) & 0o077:
            _warn_of_open_file(file, mode & 0o777)
        content = stream.read(10_000)
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Windows' editors write "Unicode"
    return content.decode("utf-16" if wide else "utf-8")


@functools.cache  # once per process: settings are read for every step
def _warn_of_open_file(file: str, mode: int) -> None:
    log.warning("BAZEFIELD_API_KEY_FILE=%r may be read by others (mode %o): chmod 600 it",
                file, mode)


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
        with open(file, encoding="utf-8-sig") as stream:
            changes = json.load(stream)
        if not isinstance(changes, dict):
            raise ValueError('write an object, {"insert_allocation": {"route": ...}, ...}')
        for name, change in changes.items():
            operations[name] = changed(name, operations[name], change)
    except KeyError as exc:
        problems.append(f"BAZEFIELD_OPERATIONS={file!r}: no operation {exc}; "
                        f"known: {', '.join(OPERATIONS)}")
    except (OSError, ValueError, TypeError, RecursionError) as exc:
        problems.append(f"BAZEFIELD_OPERATIONS={file!r}: {exc}")
    return operations


def changed(name: str, operation: Operation, change: Any) -> Operation:
    """Return an operation as the file wants it; raise `ValueError` if that makes no sense."""
    fields = change.get("fields", {}) if isinstance(change, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: write an object of verb, route, metadata, fields")
    if unknown := set(change) - {"verb", "route", "metadata", "fields"}:
        raise ValueError(f"{name}: unknown {sorted(unknown)}")
    if unknown := set(fields) - set(operation.fields):
        raise ValueError(f"{name}: unknown fields {sorted(unknown)}; "
                         f"known: {sorted(operation.fields)}")
    return checked(name, replace(operation, **change | {"fields": {**operation.fields, **fields}}))


#: What a route may name, by operation; others name nothing.
PLACEHOLDERS = {"allocations": {"type_name", "type_id", "object_id", "from", "to"},
                "allocation": {"id"}}


def checked(name: str, operation: Operation) -> Operation:
    """Return an operation; raise `ValueError` if it cannot be called as it was changed."""
    if operation.verb not in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        raise ValueError(f"{name}: verb {operation.verb!r}; write GET, POST, PUT, PATCH or DELETE")
    if not re.fullmatch(r"/[\x21-\x7e]*", str(operation.route)):
        raise ValueError(f"{name}: route {operation.route!r}; write /api/...")
    known = PLACEHOLDERS.get(name, set())
    if unknown := {part for _, part, *_ in Formatter().parse(operation.route)} - known - {None}:
        raise ValueError(f"{name}: {{{unknown.pop()}}} in its route; known: {sorted(known)}")
    if wrong := [f for f in operation.fields.values() if not (f and isinstance(f, str))]:
        raise ValueError(f"{name}: {wrong[0]!r} is no name of a field")
    if len({f.lower() for f in operation.fields.values()}) < len(operation.fields):
        raise ValueError(f"{name}: two of its fields have the same name")
    return operation
