"""The two layers of alarms once more, in plain Python, to compare with.

Written apart from the SQL and in another way: periods are sorted lists of (start, end) that
neither overlap nor touch, and the whole history is computed from all that was detected, every
time. Its parts are checked minute by minute in test_alarm_oracle.py.
"""

from __future__ import annotations

import calendar
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TypeAlias

Periods: TypeAlias = list[tuple[datetime, datetime]]
Samples: TypeAlias = Mapping[datetime, float | None]

NOTHING = timedelta(0)


def union(*several: Periods) -> Periods:
    """Return all periods, joined where they overlap or touch."""
    return joined(sorted(period for periods in several for period in periods), NOTHING)


def joined(periods: Periods, gap: timedelta) -> Periods:
    """Return sorted periods with at most `gap` between them joined."""
    found: Periods = []
    for start, end in periods:
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif start < end:
            found.append((start, end))
    return found


def inside(periods: Periods, start: datetime, end: datetime) -> Periods:
    return [(max(low, start), min(high, end))
            for low, high in periods if low < end and high > start]


def without(periods: Periods, taken: Periods) -> Periods:
    for low, high in taken:
        periods = [piece for start, end in periods
                   for piece in ((start, min(end, low)), (max(start, high), end))
                   if piece[0] < piece[1]]
    return periods


def seconds(periods: Periods) -> float:
    return sum((end - start).total_seconds() for start, end in periods)


@dataclass(frozen=True)
class Interval:
    """A sample interval as PostgreSQL counts: months, then days, in the zone; then the rest."""

    months: int = 0
    days: int = 0
    rest: timedelta = NOTHING
    zone: tzinfo = UTC

    def begin(self, stamp: datetime) -> datetime:
        """Return when the interval begins that ends at `stamp`."""
        local = stamp.astimezone(self.zone).replace(tzinfo=None)
        if self.months:
            month = local.year * 12 + local.month - 1 - self.months
            year, month = month // 12, month % 12 + 1
            day = min(local.day, calendar.monthrange(year, month)[1])
            local = self._from_utc(local.replace(year=year, month=month, day=day))
        if self.days:
            local = self._from_utc(local - timedelta(days=self.days))
        moment = self._to_utc(local) if self.months or self.days else stamp
        return moment - self.rest

    def _from_utc(self, local: datetime) -> datetime:
        return self._to_utc(local).astimezone(self.zone).replace(tzinfo=None)

    def _to_utc(self, local: datetime) -> datetime:
        """An hour that comes twice is the second, one that never comes is counted from before."""
        first, second = (local.replace(tzinfo=self.zone, fold=fold) for fold in (0, 1))
        is_twice = first.utcoffset() > second.utcoffset()
        return (second if is_twice else first).astimezone(UTC)

    def __str__(self) -> str:
        return f"{self.months} months {self.days} days {self.rest.total_seconds()} seconds"


@dataclass(frozen=True)
class Alarm:
    """An alarm; `feature` None: not calculated here, its history is given."""

    feature: int | None
    is_high: bool = True
    threshold: float = 0
    max_gap: timedelta = NOTHING
    min_duration: timedelta = NOTHING
    important: tuple[int, ...] = ()

    def fires(self, value: float) -> bool:
        return value > self.threshold if self.is_high else value < self.threshold


@dataclass
class Oracle:
    """One object: its alarms by number, its samples by feature, and what is known of it."""

    interval: Interval
    alarms: dict[int, Alarm]
    samples: dict[int, dict[datetime, float | None]]
    given: dict[int, Periods] = field(default_factory=dict)
    detected: dict[int, Periods] = field(default_factory=dict)

    def counted(self, feature: int, start: datetime, end: datetime) -> dict[datetime, float]:
        """Return the samples with a value that count in the window."""
        return {at: value for at, value in self.samples[feature].items()
                if value is not None and not math.isnan(value)
                and at > start and self.interval.begin(at) < end}

    def stand(self, samples: Samples, start: datetime, end: datetime,
              fires: Callable[[float], bool] = lambda value: True) -> Periods:
        return inside(union([(self.interval.begin(at), at) for at, value in samples.items()
                             if fires(value)]), start, end)

    def detect(self, number: int, start: datetime, end: datetime) -> tuple[int, float]:
        """Replace what is detected in the window; return samples and coverage."""
        alarm = self.alarms[number]
        samples = self.counted(alarm.feature, start, end)
        before = self.detected.get(number, [])
        self.detected[number] = union(
            without(before, [(start, end)]), self.stand(samples, start, end, alarm.fires))
        covered = seconds(self.stand(samples, start, end))
        return len(samples), covered / (end - start).total_seconds()

    def history(self, number: int) -> Periods:
        """Return when the alarm stood, all of it, as a function of what is detected now."""
        alarm = self.alarms[number]
        if alarm.feature is None:
            return self.given.get(number, [])
        found = joined(self.detected.get(number, []), alarm.max_gap)
        found = [(start, end) for start, end in found if end - start >= alarm.min_duration]
        for other in alarm.important:
            if other in self.alarms:
                found = without(found, self.history(other))
        return found

    def change(self, number: int, **changes: object) -> None:
        self.alarms[number] = replace(self.alarms[number], **changes)
