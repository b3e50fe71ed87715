"""Pieces of samples into feature_values, with as little work and as few changes as possible.

Where nothing stands yet a piece is copied in as it is. Else it is staged, compared, and only what
differs is written, so that the same samples again change nothing. Each piece is a transaction of
its own: a load that is broken off and started again goes on harmlessly.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import psycopg
from psycopg import errors

from csv_samples import Key, Piece, Signal
from csv_times import HOUR, microseconds, moment
from perfdb import parse_time, query

DAY = 24 * HOUR
NEVER = -2**63
TRIES = 5  # of a piece that meets another load
MEETINGS = (errors.UniqueViolation, errors.DeadlockDetected, errors.SerializationFailure)

# A row of COPY's binary format: 4 columns, each after its length in bytes; a length of -1 is NULL.
HEADER, TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
VALUE_ROW = struct.Struct(">hiiiiiqid")
NULL_ROW = struct.Struct(">hiiiiiqi")

# Does anything stand already between a signal's first and last sample, and which is its latest?
# Two looks into the primary key per signal.
LOOK_SQL = """
SELECT s.object_id, s.feature_id,
       EXISTS (SELECT
                 FROM feature_values v
                WHERE v.object_id = s.object_id
                  AND v.feature_id = s.feature_id
                  AND v.timestamp BETWEEN s.first AND s.last) AS stands,
       (SELECT max(v.timestamp)
          FROM feature_values v
         WHERE v.object_id = s.object_id
           AND v.feature_id = s.feature_id
           AND v.timestamp < '3000-01-01Z'::timestamptz) AS latest
  FROM unnest(%(objects)s::int[], %(features)s::int[],
              %(first)s::timestamptz[], %(last)s::timestamptz[])
       AS s(object_id, feature_id, first, last)
"""

COPY_SQL = """
COPY feature_values (object_id, feature_id, timestamp, value) FROM STDIN (FORMAT binary)
"""
STAGE_SQL = """
COPY staged_samples FROM STDIN (FORMAT binary)
"""

STAGING_SQL = """
CREATE TEMPORARY TABLE IF NOT EXISTS staged_samples (
    object_id   int               NOT NULL,
    feature_id  int               NOT NULL,
    timestamp   timestamptz       NOT NULL,
    value       double precision      NULL
) ON COMMIT DELETE ROWS
"""

# The staging table has no statistics, and a plan may not read feature_values from end to end for
# each piece: only look-ups in its primary key.
LOOK_UPS_ONLY_SQL = """
SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)
"""

# No ON CONFLICT: it cannot tell new from changed where feature_values is partitioned or a view.
# Two loads of the same samples at once meet in a unique violation, and the later one tries again.
WRITE_SQL = """
WITH piece AS MATERIALIZED (
    SELECT s.object_id, s.feature_id, s.timestamp, s.value,
           v.object_id IS NULL AS added,
           v.value AS old_value
      FROM staged_samples s
      LEFT JOIN feature_values v USING (object_id, feature_id, timestamp)
), changed AS (
    UPDATE feature_values v
       SET value = piece.value
      FROM piece
     WHERE NOT piece.added
       AND piece.value IS DISTINCT FROM piece.old_value
       AND v.object_id = piece.object_id
       AND v.feature_id = piece.feature_id
       AND v.timestamp = piece.timestamp
), new AS (
    INSERT INTO feature_values (object_id, feature_id, timestamp, value)
    SELECT object_id, feature_id, timestamp, value
      FROM piece
     WHERE added
)
SELECT object_id, feature_id, min(timestamp) AS first, max(timestamp) AS last,
       count(*) FILTER (WHERE added) AS added,
       count(*) FILTER (WHERE NOT added) AS changed
  FROM piece
 WHERE added
    OR value IS DISTINCT FROM old_value
 GROUP BY object_id, feature_id, added,
       date_trunc('day'::text, timestamp - interval '1 microsecond')
 ORDER BY object_id, feature_id, first
"""

# Which alarm calculations have begun? A sample that comes into a period after that is late. Of the
# newest jobs only: in older periods it is late if it is not the newest sample. Looked at after
# each piece, for those that have begun since the last look (and a minute, for a slow commit).
CALCULATED_SQL = """
SELECT j.parameters->'object_names'::text AS names, j.parameters->>'start'::text AS start,
       j.parameters->>'end'::text AS "end"
  FROM (SELECT * FROM job_instances ORDER BY id DESC LIMIT 5000) j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE t.name = 'Alarm Calculation'
   AND j.started > now() - make_interval(secs => %(seconds)s)
"""


@dataclass
class Window:
    """Samples of a signal, near to each other, that came late or differ from those that stood."""

    first: int
    last: int
    late: int
    changed: int


class Store:
    """Writes pieces, counts what came of them, and remembers the late and changed ones."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        self.counts: Counter[str] = Counter()  # stored, and of these new and changed
        self.windows: dict[Key, list[Window]] = {}
        self._latest: dict[Key, int] = {}
        self._calculated: dict[str, list[tuple[int, int]]] = {}
        self._looked = -1e9
        connection.execute(STAGING_SQL)

    def write(self, piece: Piece, signals: Mapping[Key, Signal]) -> None:
        """Write a piece of these signals. Raise `psycopg.Error` if it cannot be written."""
        if not piece.samples:
            return
        rows = self._merge(piece) if self._look(piece) or not self._copy(piece) else None
        self._look_at_calculations()
        if rows is None:
            rows = [row for key, samples in piece.samples.items()
                    if self._may_be_late(signals[key], min(samples), max(samples))
                    for row in days(key, samples)]
            self.counts["new"] += size(piece)
        self.counts["stored"] += size(piece)
        for object_id, feature_id, first, last, added, changed in rows:
            key = object_id, feature_id
            if changed or self._may_be_late(signals[key], first, last):
                self._remember(key, Window(first, last, added, changed))

    def _look(self, piece: Piece) -> bool:
        """Return whether anything stands in the piece's time already."""
        keys = list(piece.samples)
        rows = query(self.connection, LOOK_SQL, {
            "objects": [key[0] for key in keys], "features": [key[1] for key in keys],
            "first": [moment(min(piece.samples[key])) for key in keys],
            "last": [moment(max(piece.samples[key])) for key in keys]})
        for object_id, feature_id, _, latest in rows:
            self._latest.setdefault((object_id, feature_id),
                                    microseconds(latest) if latest else NEVER)
        return any(stands for _, _, stands, _ in rows)

    def _look_at_calculations(self) -> None:
        """Take note of the periods of alarm calculations that have begun since the last look."""
        now = time.monotonic()
        jobs = query(self.connection, CALCULATED_SQL, {"seconds": now - self._looked + 60})
        self._looked = now
        for name, periods in calculated(jobs).items():
            self._calculated[name] = joined([*self._calculated.get(name, ()), *periods])

    def _copy(self, piece: Piece) -> bool:
        """Copy a piece in as it is; return whether that was possible."""
        try:
            with self.connection.cursor() as cursor:
                copy(cursor, COPY_SQL, piece)
        except (*MEETINGS, errors.WrongObjectType, errors.FeatureNotSupported):
            return False  # another load; a view; row security
        return True

    def _merge(self, piece: Piece) -> list[tuple[Any, ...]]:
        """Write what differs; return (object, feature, first, last, added, changed) per day."""
        for _ in range(TRIES - 1):
            with contextlib.suppress(*MEETINGS):
                return self._merge_once(piece)
        return self._merge_once(piece)

    def _merge_once(self, piece: Piece) -> list[tuple[Any, ...]]:
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.execute(LOOK_UPS_ONLY_SQL)
            copy(cursor, STAGE_SQL, piece)
            rows = cursor.execute(WRITE_SQL).fetchall()
        self.counts["new"] += sum(row[4] for row in rows)
        self.counts["changed"] += sum(row[5] for row in rows)
        return [(o, f, microseconds(first), microseconds(last), added, changed)
                for o, f, first, last, added, changed in rows]

    def _may_be_late(self, signal: Signal, first: int, last: int) -> bool:
        """Return whether new samples come before one that stood, or into a calculated period."""
        begin = first - signal.feature.interval.longest()  # of the first sample's interval
        return first <= self._latest[signal.object.id, signal.feature.id] or any(
            begin < end and last > start
            for start, end in self._calculated.get(signal.object.name, ()))

    def _remember(self, key: Key, new: Window) -> None:
        """Add a window to those of its signal; windows less than a day apart are one."""
        windows = self.windows.setdefault(key, [])
        if windows and windows[-1].first - DAY <= new.last and new.first <= windows[-1].last + DAY:
            last = windows[-1]
            last.first, last.last = min(last.first, new.first), max(last.last, new.last)
            last.late, last.changed = last.late + new.late, last.changed + new.changed
        else:
            windows.append(new)


def copy(cursor: psycopg.Cursor, statement: str, piece: Piece) -> None:
    """Run a COPY of the piece, each signal in the order of time."""
    with cursor.copy(statement) as target:
        target.write(HEADER)
        for (object_id, feature_id), samples in piece.samples.items():
            target.write(b"".join(
                [NULL_ROW.pack(4, 4, object_id, 4, feature_id, 8, at, -1) if value is None else
                 VALUE_ROW.pack(4, 4, object_id, 4, feature_id, 8, at, 8, value)
                 for at, value in sorted(samples.items())]))
        target.write(TRAILER)


def size(piece: Piece) -> int:
    return sum(map(len, piece.samples.values()))


def days(key: Key, samples: Iterable[int]) -> list[tuple[Any, ...]]:
    """Return (object, feature, first, last, how many, 0) of each day with new samples.

    A sample at midnight is the day's that it ends, as in WRITE_SQL.
    """
    groups = (list(group) for _, group in groupby(sorted(samples), lambda at: (at - 1) // DAY))
    return [(*key, group[0], group[-1], len(group), 0) for group in groups]


def calculated(jobs: Iterable[tuple[Any, ...]]) -> dict[str, list[tuple[int, int]]]:
    """Return the periods of alarm calculations by object, those that touch joined."""
    periods: dict[str, list[tuple[int, int]]] = {}
    for names, start, end in jobs:
        try:
            period = microseconds(parse_time(start)), microseconds(parse_time(end))
            names = dict.fromkeys(names)
        except (TypeError, ValueError, OverflowError):
            continue  # a job that never calculated
        for name in names:
            periods.setdefault(name, []).append(period)
    return {name: joined(found) for name, found in periods.items()}


def joined(periods: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the periods in order, those that touch or overlap as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(periods):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found
