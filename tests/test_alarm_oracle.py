"""The oracle itself, minute by minute, and its calendar against PostgreSQL's."""

import itertools
import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from alarm_oracle import Alarm, Interval, Oracle

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LENGTH = 60  # minutes that are looked at


def minutes(periods):
    """Return whether something stands in each of the minutes."""
    return [any(start <= MIDNIGHT + n * MINUTE < end for start, end in periods)
            for n in range(LENGTH)]


def runs(stands, value):
    """Return the runs of `value` in a list, as ranges of its indices."""
    edges = [n for n in range(LENGTH + 1)
             if n in (0, LENGTH) or stands[n] != stands[n - 1]]
    return [range(low, high) for low, high in itertools.pairwise(edges)
            if stands[low] == value]


def settle(stands, max_gap, min_duration, covered):
    """The same by minutes: fill the gaps between two periods, drop what is short, take out."""
    stands = list(stands)
    for gap in runs(stands, False):
        if gap.start > 0 and gap.stop < LENGTH and len(gap) <= max_gap:
            for n in gap:
                stands[n] = True
    for period in runs(stands, True):
        if len(period) < min_duration:
            for n in period:
                stands[n] = False
    return [stand and not cover for stand, cover in zip(stands, covered, strict=True)]


@pytest.mark.parametrize("seed", range(60))
def test_the_oracle_minute_by_minute(seed):
    rng = random.Random(seed)
    width = rng.choice([1, 3, 10])
    alarms, samples, detected, expected = {}, {}, {}, {}
    for number in (1, 2, 3):
        alarms[number] = Alarm(number, max_gap=rng.choice([0, 2, 5]) * MINUTE,
                               min_duration=rng.choice([0, 3, 12]) * MINUTE,
                               important=tuple(n for n in alarms if rng.random() < 0.6))
        samples[number] = {MIDNIGHT + n * MINUTE: rng.choice([-1, 1, None, float("nan")])
                           for n in rng.sample(range(LENGTH + width), 25)}
        detected[number] = [False] * LENGTH
    oracle = Oracle(Interval(rest=width * MINUTE), alarms, samples)

    for _ in range(4):
        number, (low, high) = rng.choice([1, 2, 3]), sorted(rng.sample(range(LENGTH + 1), 2))
        result = oracle.detect(number, MIDNIGHT + low * MINUTE, MIDNIGHT + high * MINUTE)

        def ends(n, only, number=number, width=width):  # of the samples whose interval holds it
            return [value for m in range(n + 1, n + width + 1)
                    if (value := samples[number].get(MIDNIGHT + m * MINUTE)) in only]
        for n in range(low, high):
            detected[number][n] = bool(ends(n, {1}))
        covered = sum(bool(ends(n, {1, -1})) for n in range(low, high))
        assert result[1] == pytest.approx(covered / (high - low))
    for number, alarm in alarms.items():
        covers = [any(expected[n][m] for n in alarm.important) for m in range(LENGTH)]
        expected[number] = settle(detected[number], alarm.max_gap / MINUTE,
                                  alarm.min_duration / MINUTE, covers)
        assert minutes(oracle.detected.get(number, [])) == detected[number]
        assert minutes(oracle.history(number)) == expected[number]


def test_the_calendar_is_postgresqls(conn):
    conn.execute("SET TimeZone = 'Europe/Madrid'")
    rng = random.Random(1)
    for _ in range(300):
        interval = Interval(rng.randrange(3), rng.randrange(3), rng.randrange(100) * MINUTE,
                            ZoneInfo("Europe/Madrid"))
        stamp = datetime(2026, rng.choice([3, 4, 10, 11]), rng.choice([1, 24, 25, 26, 28, 29, 30]),
                         rng.randrange(5), rng.randrange(0, 60, 15), tzinfo=UTC)
        (begin,) = conn.execute("SELECT %s - %s::interval AS begin",
                                [stamp, str(interval)]).fetchone().values()
        assert interval.begin(stamp) == begin.astimezone(UTC), (stamp, str(interval))
