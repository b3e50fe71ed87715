"""What a time in a CSV file means: how it is written, in which zone, which end of its interval.

    kinds("13.03.2026 00:10")      {"DMY"}: the ways of writing a date this text may follow
    kinds("03/04/2026 00:10")      {"DMY", "MDY"}: nobody can tell
    Stamps("DMY", zone, ...).at(text)   microseconds since 2000-01-01 UTC, as PostgreSQL counts
"""

from __future__ import annotations

import calendar
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from itertools import pairwise
from typing import NamedTuple

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's
SECOND = 1_000_000
HOUR = 3600 * SECOND
MOST_KNOWN = 200_000  # distinct texts remembered: four years of ten minutes; bounds the memory

#: ways of writing a date, and how a person would call them; else a pattern of strptime
FORMATS = {"YMD": "YYYY-MM-DD HH:MM:SS", "DMY": "DD.MM.YYYY HH:MM", "MDY": "MM/DD/YYYY HH:MM",
           "unix": "seconds since 1970", "unix_ms": "milliseconds since 1970"}

WRITTEN = re.compile(r"""
    (?: (?P<y>\d{4}) (?P<s>[-/.\ ]?) (?P<m>\d\d?) (?P=s) (?P<d>\d\d?)
      | (?P<first>\d\d?) (?P<t>[-/.\ ]) (?P<second>\d\d?) (?P=t) (?P<year>\d{4})
      | (?P<day>\d\d?) [-/.\ ] (?P<month>[A-Z]{3})[A-Z]* [-/.\ ] (?P<of>\d{4}) )
    (?: (?:T|,?\s+) (?P<hour>\d\d?) :? (?P<minute>\d\d)
        (?: :? (?P<sec>\d\d) (?:[.,](?P<fraction>\d{1,9}))? )?
        (?: \s*(?P<half>[AP])\.?M\.? )? )?
    \s* (?P<offset>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?""", re.VERBOSE | re.ASCII | re.IGNORECASE)
CLOCK = re.compile(r"\d\d?:\d\d(:\d\d([.,]\d+)?)?(\s*[AP]\.?M\.?)?", re.ASCII | re.IGNORECASE)
OFFSET = re.compile(r"(?:UTC|GMT)?([+-])(\d\d?)(?::?(\d\d))?", re.ASCII | re.IGNORECASE)
MONTHS = [name.lower() for name in calendar.month_abbr]


class Interval(NamedTuple):
    """Time a sample stands for, in calendar units as PostgreSQL's interval has them."""

    months: int = 0
    days: int = 0
    microseconds: int = 0

    def longest(self) -> int:
        """Return its length in microseconds, where it is longest in the calendar."""
        return (self.months * 31 * 24 + self.days * 25) * HOUR + self.microseconds

    def mean(self) -> float:
        """Return its length in microseconds, on the average of the calendar."""
        return (self.months * 30.436875 + self.days) * 24 * HOUR + self.microseconds


def kinds(text: str) -> set[str]:
    """Return the FORMATS that `text` may follow; empty if it is no time, or one with two digits
    for the year, of which nobody can tell which is the year."""
    if re.fullmatch(r"\d{10}(\.\d+)?", text, re.ASCII):
        return {"unix"}
    if re.fullmatch(r"\d{13}", text, re.ASCII):
        return {"unix_ms"}
    if not (found := WRITTEN.fullmatch(text.strip())):
        return set()
    if found["y"]:
        return {"YMD"} if found["s"] or len(found["m"] + found["d"]) == 4 else set()
    if found["day"] or found["t"] == ".":  # nobody writes the month first with dots
        return {"DMY"}
    first, second = int(found["first"]), int(found["second"])
    return {kind for kind, month in (("DMY", second), ("MDY", first)) if month <= 12}


def is_local(text: str) -> bool:
    """Return whether a time of a kind has no UTC offset, so that its zone must be known."""
    found = WRITTEN.fullmatch(text.strip())
    return bool(found) and not found["offset"]


def is_date_only(text: str) -> bool:
    found = WRITTEN.fullmatch(text.strip())
    return bool(found) and not found["hour"]


def zone_named(name: str) -> tzinfo:
    """Return the zone of a name like Europe/Madrid, or of an offset like +03:00.

    Raise `ValueError` if there is no such zone.
    """
    if name.upper() in ("UTC", "GMT", "Z"):
        return UTC
    if found := OFFSET.fullmatch(name):
        ahead = timedelta(hours=int(found[2]), minutes=int(found[3] or 0))
        if ahead < timedelta(hours=24):
            return timezone(ahead if found[1] == "+" else -ahead)
    from zoneinfo import ZoneInfo
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone this host knows; use a name like "
                         "Europe/Madrid, or an offset like +03:00") from None


def read(text: str, kind: str) -> datetime:
    """Return the time, without a zone if the text has none.

    Raise `ValueError` saying why if it is not written as `kind` says or there is no such time.
    """
    if kind.startswith("unix") or kind not in FORMATS:
        return _counted_or_patterned(text, kind)
    found = WRITTEN.fullmatch(text.strip())
    if not found or kind not in (possible := kinds(text)):
        raise ValueError(f"{text!r} is no time written as {FORMATS[kind]}"
                         + (f" but as {FORMATS[possible.pop()]}" if found and possible else ""))
    try:
        return _moment(found, kind)
    except (ValueError, OverflowError) as exc:
        raise ValueError(f"{text!r} is no time: {exc}") from None


def pattern_problem(pattern: str) -> str:
    """Return why strptime cannot read times by a pattern, "" if it can."""
    try:
        datetime.strptime(EPOCH.strftime(pattern), pattern)
    except (ValueError, re.error) as exc:
        return f"no pattern of a time: {exc}"
    return ""


def _counted_or_patterned(text: str, kind: str) -> datetime:
    try:
        if kind not in FORMATS:
            return datetime.strptime(text.strip(), kind)
        seconds = float(text) / (1000 if kind == "unix_ms" else 1)
        return datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time written as {FORMATS.get(kind, kind)}") from None


def _moment(found: re.Match[str], kind: str) -> datetime:
    """Return the time of a match of WRITTEN; `ValueError` if there is no such date or hour."""
    if found["y"]:
        year, month, day = found["y"], found["m"], found["d"]
    elif found["day"]:
        name = found["month"].lower()
        if name not in MONTHS:
            raise ValueError(f"there is no month {found['month']!r}")
        year, month, day = found["of"], MONTHS.index(name), found["day"]
    else:
        day, month = ((found["first"], found["second"]) if kind == "DMY"
                      else (found["second"], found["first"]))
        year = found["year"]
    hour, next_day = _hour(found)
    fraction = int((found["fraction"] or "").ljust(6, "0")[:6])
    moment = datetime(int(year), int(month), int(day), hour, int(found["minute"] or 0),
                      int(found["sec"] or 0), fraction) + timedelta(days=next_day)
    return moment.replace(tzinfo=_offset(found["offset"])) if found["offset"] else moment


def _hour(found: re.Match[str]) -> tuple[int, int]:
    """Return hour and days to add: 24:00 is midnight at the end of the day."""
    hour = int(found["hour"] or 0)
    if found["half"]:
        if not 1 <= hour <= 12:
            raise ValueError("the hour before AM or PM is 1 to 12")
        return hour % 12 + (12 if found["half"] in "pP" else 0), 0
    if hour == 24 and not int(found["minute"]) and not int(found["sec"] or 0):
        return 0, 1
    return hour, 0


def _offset(text: str) -> tzinfo:
    return UTC if text.upper() in ("Z", "UTC", "GMT") else zone_named(text)


class Stamps:
    """The times of one file, read one after the other.

    An hour that comes twice because the clocks are set back is told by its order: the first pass
    is daylight saving time, the second standard time (`descending`: the newest come first, so the
    other way round). Where the times mark the start of their interval (`starts`) it is added, in
    the calendar: a day that starts at midnight ends at midnight, be it 23 or 25 hours long.
    """

    def __init__(self, kind: str, zone: tzinfo | None, interval: Interval,
                 starts: bool = False, descending: bool = False) -> None:
        self.kind, self.zone, self.descending = kind, zone or UTC, descending
        self.shift = interval if starts else Interval()
        # Of samples an hour or more apart the same time twice is the second pass, not a duplicate.
        self.hourly = interval.longest() >= HOUR
        self._known: dict[str, int] = {}
        self._passes: dict[Hashable, tuple[datetime, int]] = {}

    def at(self, text: str, series: Hashable = None) -> int:
        """Return the end of the interval in microseconds since 2000 UTC.

        `series`: whose samples come in order. Raise `ValueError` saying why it is no time.
        """
        moment = self._known.get(text)
        return self._read(text, series) if moment is None else moment

    def _read(self, text: str, series: Hashable) -> int:
        local, twice = read(text, self.kind), False
        if not 1900 <= local.year < 3000:
            raise ValueError(f"{text!r} is no time: the year is not within 1900 to 2999")
        if local.tzinfo is None:
            local, twice = self._in_zone(local, text, series)
        end = microseconds(self._end(local))
        if not twice:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[text] = end
        return end

    def _in_zone(self, local: datetime, text: str, series: Hashable) -> tuple[datetime, bool]:
        """Return the time in the zone and whether the clocks show it twice."""
        first, second = (local.replace(tzinfo=self.zone, fold=fold) for fold in (0, 1))
        if first.utcoffset() == second.utcoffset():
            return first, False
        if first.utcoffset() < second.utcoffset():
            raise ValueError(f"{text!r}: the clocks of {self.zone} skip this hour; if they are "
                             "not set forward there, give the fixed offset, e.g. --zone +01:00")
        return (second if self._pass(local, series) else first), True

    def _pass(self, local: datetime, series: Hashable) -> int:
        """Return 0 in the first pass of an hour that comes twice, 1 in the second."""
        fold = int(self.descending)
        last, last_fold = self._passes.get(series, (None, fold))
        if last and last.date() == local.date():
            back = local > last if self.descending else local < last
            fold = 1 - fold if back or (local == last and self.hourly) else last_fold
        self._passes[series] = local, fold
        return fold

    def _end(self, moment: datetime) -> datetime:
        """Return the end, in UTC, of the interval that `moment` marks."""
        months, days, microseconds = self.shift
        if months or days:
            local = moment.astimezone(self.zone)
            year, month = divmod(local.year * 12 + local.month - 1 + months, 12)
            last_day = calendar.monthrange(year, month + 1)[1]
            moment = local.replace(year=year, month=month + 1, day=min(local.day, last_day))
            moment += timedelta(days=days)
        return moment.astimezone(UTC) + timedelta(microseconds=microseconds)


def moment(at: int) -> datetime:
    """Return microseconds since 2000 UTC as a time."""
    return EPOCH + timedelta(microseconds=at)


def microseconds(at: datetime) -> int:
    """Return a time in microseconds since 2000 UTC."""
    return (at - EPOCH) // timedelta(microseconds=1)


def usual_step(times: Iterable[int]) -> int | None:
    """Return the usual time between samples in microseconds, None if there is none."""
    steps = Counter(after - before for before, after in pairwise(sorted(times)))
    step, count = steps.most_common(1)[0] if steps else (None, 0)
    return step if count >= 5 and count > 0.5 * steps.total() else None
