"""What an answer of Bazefield says: its shape, ids, moments and errors, however they are spelled.

Ids come as 16 hex digits in either case or as the same number in decimal, moments as ISO text,
/Date(ms)/ or a number, null members are left out. What cannot be understood raises
`BazefieldError` naming the operation and the member: nothing is guessed, nothing passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from jobs import JobStepError
from parameters import shorten

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HEX_ID = re.compile("[0-9A-Fa-f]{16}")
SLASH_DATE = re.compile(r"/Date\((-?\d{1,15})([+-]\d{4})?\)/")  # the number is UTC, offset or not
NO_DATA = re.compile(r"no (data|values|samples|rows|records)( (found|available|exists?))?"
                     r"( (for|in|within)\b.*)?[.!]?", re.IGNORECASE | re.DOTALL)


class BazefieldError(JobStepError):
    """Bazefield did not do what was asked; the text names the operation and what it said."""


# ----------------------------------------------------------------------------------------- moments


def to_ms(moment: datetime) -> int:
    """Return a moment as epoch milliseconds, Bazefield's "Javascript time"."""
    return (moment - EPOCH) // timedelta(milliseconds=1)


def from_ms(ms: int | None) -> str:
    """Return epoch ms as people read it, in UTC; 'open' for None."""
    if ms is None:
        return "open"
    moment = EPOCH + timedelta(milliseconds=ms)
    fraction = f".{ms % 1000:03}" if ms % 1000 else ""
    return f"{moment:%Y-%m-%d %H:%M:%S}{fraction}Z"


# A date that cannot be left out says "still open" by standing at an end of the calendar.
FIRST_MS = to_ms(datetime(2, 1, 1, tzinfo=UTC))
OPEN_MS = to_ms(datetime(9999, 1, 1, tzinfo=UTC))


def moment_ms(value: Any) -> int | None:
    """Return what stands for a moment as epoch ms; None for nothing and for the years 1 and 9999.

    ISO text without an offset is UTC. Raise `ValueError` if it is no moment.
    """
    if value is None or value == "":
        return None
    ms = _number(value) if isinstance(value, int | float) else _text(value)
    return ms if FIRST_MS <= ms < OPEN_MS else None


def _number(value: float) -> int:
    if isinstance(value, bool) or not 1e11 <= abs(value) <= 1e18:  # NaN, and seconds
        raise ValueError(value)
    return int(value)


def _text(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(value)
    if found := SLASH_DATE.fullmatch(value):
        return int(found[1])
    if re.fullmatch(r"-?\d{11,15}", value, re.ASCII):
        return int(value)
    moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", value))
    return to_ms(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


# --------------------------------------------------------------------------------------------- ids


def hex_id(value: Any) -> str | None:
    """Return an object's id as 16 upper-case hex digits; None if it is none."""
    if isinstance(value, str) and HEX_ID.fullmatch(value):
        return value.upper()
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value, re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -2**63 <= value < 2**64:
        return None
    return f"{value % 2**64:016X}"  # a signed 64-bit number may be negative


def is_object(value: Any, object_id: str) -> bool | None:
    """Whether an id, however it is spelled, is `object_id`; None if that cannot be told."""
    given = hex_id(value)
    if (isinstance(value, str) and re.fullmatch(r"\d{1,20}", value, re.ASCII)
            and int(value) == int(object_id, 16)):
        given = object_id.upper() if len(value) != 16 else None  # 16 digits: decimal or hex?
    return given if given is None else given == object_id.upper()


# ------------------------------------------------------------------------------------------- shape


KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number",
         bool: "true or false"}


class Answer:
    """A part of an answer that knows where it stands, so that what is wrong with it can be said.

    Members are found whatever the case of their names. One that is left out holds None, as null
    does: an empty list or object, no text, no moment.
    """

    def __init__(self, operation: str, value: Any, clean: Callable[[str], str] = str,
                 path: str = "") -> None:
        self.operation, self.value, self.clean, self.path = operation, value, clean, path

    def __getitem__(self, name: str) -> Answer:
        return self._part(member(self._is(dict) or {}, name), f"{self.path}.{name}".lstrip("."))

    def items(self) -> Iterator[tuple[str, Answer]]:
        for name, value in (self._is(dict) or {}).items():
            yield name, self._part(value, f"{self.path}.{name}".lstrip("."))

    def entries(self) -> list[Answer]:
        """Return the entries of a list, each an object."""
        parts = [self._part(value, f"{self.path}[{n}]") for n, value in enumerate(self.values())]
        for part in parts:
            part.whole(dict)
        return parts

    def values(self) -> list[Any]:
        return self._is(list) or []

    def whole(self, kind: type) -> Any:
        """Return the value, which must be there and of this kind."""
        if self.value is None:
            raise self.wrong("is missing")
        return self._is(kind)

    def text(self) -> str | None:
        return self._is(str)

    def flag(self) -> bool | None:
        return self._is(bool)

    def moment(self) -> int | None:
        """Return epoch ms, None for nothing or "still open"."""
        try:
            return moment_ms(self.value)
        except (ValueError, OverflowError):
            raise self.wrong(f"is {self.shown()}, not a moment") from None

    def wrong(self, what: str) -> BazefieldError:
        return BazefieldError(self.clean(f"{self.operation}: {self.path or 'the answer'} {what}"))

    def _part(self, value: Any, path: str) -> Answer:
        return Answer(self.operation, value, self.clean, path)

    def _is(self, kind: type) -> Any:
        """Return the value if it is of this kind or nothing."""
        fits = isinstance(self.value, kind) and (kind is bool or not isinstance(self.value, bool))
        if self.value is not None and not fits:
            raise self.wrong(f"is {self.shown()}, not {KINDS[kind]}")
        return self.value

    def shown(self) -> str:
        if isinstance(self.value, dict | list):
            return KINDS[type(self.value)]
        return shorten(repr(self.value), 80)


def as_object(pairs: list[tuple[str, Any]], shrink: Callable[[dict], Any] | None) -> Any:
    """Return an object of JSON, or what `shrink` makes of it.

    Raise `BazefieldError` if a member is there twice and differs: nobody can tell which is meant.
    """
    entry = dict(pairs)
    if len(entry) < len(pairs) and (twice := [key for key, value in pairs if entry[key] != value]):
        raise BazefieldError(f"{shorten(repr(twice[0]), 80)} is there twice in one object")
    return shrink(entry) if shrink else entry


def member(entry: Mapping[str, Any], name: str) -> Any:
    """Return a member whatever the case of its name, None if it is left out."""
    if name in entry:
        return entry[name]
    return next((value for key, value in entry.items() if key.lower() == name.lower()), None)


def error_inside(value: Any) -> str:
    """Return the error that an answer with status 200 holds, '' if it holds none.

    A text in replyInfo that says no more than that there is no data is none.
    """
    if not isinstance(value, dict):
        return ""
    if said := status_error(member(value, "responseStatus")):
        return said
    info = member(value, "replyInfo")
    said = member(info, "error") if isinstance(info, dict) else info
    return "" if not said or NO_DATA.fullmatch(str(said).strip()) else str(said)


def redirected_to(location: str, host: str) -> str:
    """Return the host an answer redirects to; if that is none or `host`, all but the query."""
    try:
        url = urlsplit(location)
        if url.hostname not in (None, host):
            return url.hostname
        return (f"{url.scheme}://{host}" if url.hostname else "") + url.path
    except ValueError:
        return ""


def status_error(status: Any) -> str:
    """Return what a responseStatus says, '' if that is nothing."""
    if not isinstance(status, dict):
        return str(status or "")
    code, message, more = (member(status, name) for name in ("errorCode", "message", "errors"))
    if not (code or message or more):
        return ""
    return f"{code or 'error'}: {message or more or 'no message'}"
