"""The two layers of alarms, as SQL: what was detected, and the history that follows from it.

alarms_detected is what an alarm's own trigger found in the samples; a calculation replaces it
inside its window and nowhere else. alarms_history is a function of it: detected periods with at
most max_gap between them joined, then those shorter than min_duration left out, then less what the
history of more important alarms covers.

CALCULATE_SQL does both for the alarm of a step, SETTLE_SQL the second for an alarm that gives way
to it. All of it is set algebra on multiranges, one object and one alarm at a time, and nothing but
counts and bounds leaves the database. The sample at T stands for (T - sample_interval, T]; time is
continuous here, so which end of a range is closed does not matter: all are written [ ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.types.numeric import Int4


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement whose placeholders are numbered already.

    psycopg translates %(name)s anew each time in statements of more than 4,096 characters, which
    takes longer than a quiet night's calculation does in the server.
    """

    text: bytes
    names: tuple[str, ...]

    @classmethod
    def of(cls, sql: str) -> Statement:
        names = tuple(dict.fromkeys(re.findall(r"%\((\w+)\)s", sql)))
        text = re.sub(r"%\((\w+)\)s", lambda m: f"${names.index(m[1]) + 1}", sql)
        return cls(text.encode(), names)

    def run(self, connection: psycopg.Connection, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return its one row; ints are of one type whatever their size: it is prepared once."""
        given = [Int4(value) if isinstance(value, int) else value
                 for value in map(values.__getitem__, self.names)]
        return psycopg.RawCursor(connection).execute(self.text, given, prepare=True).fetchone()


def reaching(table: str, low: str, high: str) -> str:
    """Return SQL: the alarm's periods in `table` that lie in [low, high], reach into it or touch.

    The periods of an alarm do not overlap, so of those that begin before only the last can: a
    night costs the same behind ten years of history.
    """
    return f"""
    SELECT start_time, end_time
      FROM {table}
     WHERE object_id = %(object_id)s
       AND alarm_id = %(alarm_id)s
       AND start_time >= COALESCE((SELECT max(start_time)
                                     FROM {table}
                                    WHERE object_id = %(object_id)s
                                      AND alarm_id = %(alarm_id)s
                                      AND start_time < {low}), '-infinity')
       AND start_time <= {high}
       AND end_time >= {low}"""  # noqa: S608


def union(rows: str) -> str:
    """Return SQL: the union of the periods in `rows`."""
    return f"""COALESCE((SELECT pg_catalog.range_agg(tstzrange(start_time, end_time))
                           FROM {rows}), '{{}}')"""  # noqa: S608


def replacing(layer: str) -> str:
    """Return CTEs: the rows `{layer}_old` of a layer become the periods `{layer}_new`.

    With as few changes as possible: a row that stays the same is not touched, so computing again
    changes nothing, not even ids. No joins: the planner knows nothing of the number of periods,
    and a nested loop over 263,001 of them does not end. Grouping hashes or sorts, membership in a
    multirange is a binary search, whatever was expected; = ANY(ARRAY(...)) is none before
    PostgreSQL 17, and 44 times slower with as many. ON CONFLICT only for rows that keep their
    start: it costs half as much again as a plain INSERT.
    """
    keys = f"INTO alarms_{layer} (object_id, alarm_id, start_time, end_time)"
    return f"""
{layer}_change AS MATERIALIZED (
    SELECT start_time,
           max(end_time) FILTER (WHERE is_new) AS end_time,
           max(end_time) FILTER (WHERE NOT is_new) AS old_end_time
      FROM (SELECT pg_catalog.lower(p) AS start_time, pg_catalog.upper(p) AS end_time,
                   true AS is_new
              FROM {layer}_new, pg_catalog.unnest(periods) AS p
             UNION ALL
            SELECT start_time, end_time, false FROM {layer}_old) AS row
     GROUP BY start_time
), {layer}_doomed AS MATERIALIZED (
    SELECT pg_catalog.range_agg(tstzrange(start_time, start_time, '[]')) AS starts
      FROM {layer}_change
     WHERE end_time IS NULL
), {layer}_gone AS (
    DELETE FROM alarms_{layer}
     WHERE object_id = %(object_id)s
       AND alarm_id = %(alarm_id)s
       AND start_time BETWEEN (SELECT pg_catalog.lower(starts) FROM {layer}_doomed)
                          AND (SELECT pg_catalog.upper(starts) FROM {layer}_doomed)
       AND (SELECT starts FROM {layer}_doomed) OPERATOR(pg_catalog.@>) start_time
), {layer}_added AS (
    INSERT {keys}
    SELECT %(object_id)s, %(alarm_id)s, start_time, end_time
      FROM {layer}_change
     WHERE old_end_time IS NULL
), {layer}_moved AS (
    INSERT {keys}
    SELECT %(object_id)s, %(alarm_id)s, start_time, end_time
      FROM {layer}_change
     WHERE end_time <> old_end_time
    ON CONFLICT (object_id, alarm_id, start_time) DO UPDATE SET end_time = EXCLUDED.end_time
)"""  # noqa: S608


WINDOW = "pg_catalog.tstzmultirange(pg_catalog.tstzrange(%(start)s, %(end)s))"

# What Python can read: a period may have been put in by hand as one that never ends.
READABLE = """pg_catalog.tstzmultirange(pg_catalog.tstzrange(
                       '0001-01-03Z'::timestamptz, '9999-12-30Z'::timestamptz))"""

# The samples of the window. They are read from the index alone (primary key of feature_values),
# in its order. Months and days differ in length, so the last sample that still reaches into the
# window is looked up, no further than twice the interval behind it.
SAMPLES = """feature_values
     WHERE object_id = %(object_id)s
       AND feature_id = %(feature_id)s
       AND timestamp > %(start)s
       AND timestamp <= COALESCE(
               (SELECT max(last.timestamp)
                  FROM feature_values last
                 WHERE last.object_id = %(object_id)s
                   AND last.feature_id = %(feature_id)s
                   AND last.timestamp > %(end)s
                   AND last.timestamp < %(end)s::timestamptz + %(interval)s::interval
                                          + %(interval)s::interval
                   AND last.timestamp - %(interval)s::interval < %(end)s), %(end)s)"""


def stood_for(ends: str) -> str:
    """Return SQL: the union of the intervals that samples at `ends`, an ordered array, stand for.

    All of the time less the gaps between neighbours: range_agg takes three times as long for a
    sample. Intervals with days or months differ in length, and about a change of the clocks a
    later sample's may begin earlier: those are added up one by one.
    """
    return f"""CASE WHEN {ends} IS NULL THEN '{{}}'
                WHEN %(grid)s::interval IS NULL
                THEN (SELECT pg_catalog.range_agg(tstzrange(t - %(interval)s::interval, t))
                        FROM pg_catalog.unnest({ends}) AS t)
                ELSE pg_catalog.tstzmultirange(tstzrange(
                         {ends}[1] - %(grid)s::interval,
                         {ends}[pg_catalog.array_upper({ends}, 1)]))
                     OPERATOR(pg_catalog.-) COALESCE((
                         SELECT pg_catalog.range_agg(tstzrange(a, b - %(grid)s::interval))
                           FROM (SELECT pg_catalog.unnest({ends}) AS a,
                                        pg_catalog.unnest({ends}[2:]) AS b) AS neighbours
                          WHERE a < b - %(grid)s::interval), '{{}}')
           END"""  # noqa: S608


# What the history of more important alarms covers between low and high. Periods of alarms that are
# not calculated here may overlap, so any of them may reach over low; of the others only the last.
# OFFSET 0: alarm by alarm, else the whole history of the object is read and joined.
IMPORTANT = union("""alarms i
                          CROSS JOIN LATERAL (
                                SELECT h.start_time, h.end_time
                                  FROM alarms_history h
                                 WHERE h.object_id = %(object_id)s
                                   AND h.alarm_id = i.id
                                   AND h.start_time < high
                                   AND h.end_time > low
                                   AND h.start_time >= COALESCE((
                                       SELECT max(last.start_time)
                                         FROM alarms_history last
                                        WHERE last.object_id = %(object_id)s
                                          AND last.alarm_id = i.id
                                          AND last.start_time < low
                                          AND i.trigger->>'trigger_type'::text = 'threshold'),
                                       '-infinity')
                                OFFSET 0) AS h
                          WHERE i.id = ANY(%(important_ids)s)""")

# What was detected before, as far beyond the window as SETTLING needs it.
DETECTED_NEAR = reaching("alarms_detected", "%(start)s::timestamptz - %(reach)s::interval",
                         "%(end)s::timestamptz + %(reach)s::interval")

# The history of one alarm inside a span of time, from its periods `detected_new`, which are known
# so far beyond (reach: min_duration and two gaps) that what is not known can neither be joined to
# what matters here nor decide whether that is long enough. The span is the window and, as far as
# it goes, what is joined to something in it or was until now: what lies within max_gap of it.
SETTLING = f"""
joined AS MATERIALIZED (
    SELECT pg_catalog.lower(r) AS start_time,
           pg_catalog.upper(r) - %(max_gap)s::interval AS end_time
      FROM pg_catalog.unnest((
               SELECT pg_catalog.range_agg(tstzrange(pg_catalog.lower(p),
                                                     pg_catalog.upper(p) + %(max_gap)s::interval))
                 FROM detected_new, pg_catalog.unnest(periods) AS p
                WHERE %(reach)s::interval > '0')) AS r
), span AS MATERIALIZED (
    SELECT LEAST(%(start)s, min(start_time)) AS low, GREATEST(%(end)s, max(end_time)) AS high
      FROM joined
     WHERE start_time <= %(end)s::timestamptz + %(max_gap)s::interval
       AND end_time >= %(start)s::timestamptz - %(max_gap)s::interval
), history_old AS MATERIALIZED ({reaching(
    "alarms_history", "(SELECT low FROM span)", "(SELECT high FROM span)")}
), layer AS MATERIALIZED (
    SELECT pg_catalog.tstzmultirange(tstzrange(low, high)) AS span,
           CASE WHEN %(reach)s::interval > '0'
                THEN {union("joined WHERE end_time >= start_time + %(min_duration)s::interval")}
                ELSE (SELECT periods FROM detected_new) END AS shaped,
           {IMPORTANT} AS important,
           {union("history_old")} AS before
      FROM span
), history_new AS MATERIALIZED (
    SELECT ((shaped OPERATOR(pg_catalog.-) important) OPERATOR(pg_catalog.*) span)
           OPERATOR(pg_catalog.+) (before OPERATOR(pg_catalog.-) span) AS periods, before
      FROM layer
), {replacing("history")}, differs AS MATERIALIZED (
    SELECT pg_catalog.lower(d) AS low, pg_catalog.upper(d) AS high
      FROM (SELECT ((periods OPERATOR(pg_catalog.-) before)
                    OPERATOR(pg_catalog.+) (before OPERATOR(pg_catalog.-) periods))
                   OPERATOR(pg_catalog.*) {READABLE} AS d
              FROM history_new) AS h
)"""  # noqa: S608

# One alarm's history brought up to date with what was detected and with the history of more
# important alarms. Returns from when to when it changed.
SETTLE_SQL = f"""
WITH detected_old AS MATERIALIZED ({DETECTED_NEAR}
), detected_new AS MATERIALIZED (
    SELECT {union("detected_old")} AS periods
), {SETTLING}
SELECT low, high FROM differs
"""  # noqa: S608


def last_end(table: str) -> str:
    """Return SQL: the end of the last period of alarm `d`."""
    return f"""(SELECT end_time
                  FROM {table}
                 WHERE object_id = %(object_id)s AND alarm_id = d.id
                 ORDER BY start_time DESC
                 LIMIT 1)"""  # noqa: S608


def calculating(compares: str) -> str:
    """Return SQL: detect one alarm of one object in one window, and settle its history.

    Detected is what triggers, cut to the window, and what was detected outside of it, joined where
    they touch. A value is what is neither NULL nor NaN (NaN is greater than any number in
    PostgreSQL). Samples that all lie on the grid of the window do not overlap, and need only be
    counted to know what they cover; else they are read once more.

    A row: samples with a value, coverage, periods, their seconds inside, whether anything stood or
    was detected there before, from when to when the history changed, and whether what gives way to
    it may have to be settled: not if all that is known of those alarms is over by then, so that
    a night costs nothing where those come later in the job.
    """
    return f"""
WITH sample AS MATERIALIZED (
    SELECT count(*) FILTER (WHERE value < 'NaN') AS samples,
           pg_catalog.count(NULLIF(timestamp, date_bin((SELECT %(grid)s::interval), timestamp,
                                                       (SELECT %(start)s::timestamptz))))
               AS off_grid,
           pg_catalog.array_agg(timestamp ORDER BY timestamp)
               FILTER (WHERE value {compares} (SELECT %(threshold)s::float8)
                         AND value < 'NaN') AS triggering
      FROM {SAMPLES}
), detected_old AS MATERIALIZED ({DETECTED_NEAR}
), detected_new AS MATERIALIZED (
    SELECT (triggers OPERATOR(pg_catalog.*) {WINDOW})
           OPERATOR(pg_catalog.+) (before OPERATOR(pg_catalog.-) {WINDOW}) AS periods, before
      FROM (SELECT {stood_for("triggering")} AS triggers, {union("detected_old")} AS before
              FROM sample) AS s
), {replacing("detected")}, {SETTLING}, inside AS (
    SELECT count(*) AS periods,
           extract(epoch FROM sum(pg_catalog.upper(p) - pg_catalog.lower(p))) AS seconds
      FROM history_new, pg_catalog.unnest(periods OPERATOR(pg_catalog.*) {WINDOW}) AS p
)
SELECT samples,
       CASE WHEN off_grid = 0 AND %(end)s = date_bin(%(grid)s::interval, %(end)s, %(start)s)
            THEN round(samples::numeric * extract(epoch FROM %(grid)s::interval)
                       / extract(epoch FROM %(end)s::timestamptz - %(start)s), 6)::float8 END,
       inside.periods, COALESCE(inside.seconds, 0)::float8,
       (detected_new.before OPERATOR(pg_catalog.+) history_new.before)
           OPERATOR(pg_catalog.&&) {WINDOW},
       low, high,
       low < (SELECT max(GREATEST({last_end("alarms_detected")},
                                  {last_end("alarms_history")}))
                FROM alarms d
               WHERE low IS NOT NULL
                 AND d.object_model_id = %(model_id)s
                 AND %(number)s = ANY(d.non_overlapping_alarms))
  FROM sample, detected_new, history_new, inside, differs
"""  # noqa: S608


CALCULATE_SQL = {"high": calculating(">"), "low": calculating("<")}

# How many samples with a value count in the window and the share of it that they cover, where they
# are not on its grid. One before the last that reaches in may not: a month before 29 March at 8:00
# is 28 February at 8:00, a month before 28 March at 9:00 is later.
COVERAGE_SQL = f"""
WITH sample AS MATERIALIZED (
    SELECT count(*) AS samples, pg_catalog.array_agg(timestamp ORDER BY timestamp) AS ends
      FROM {SAMPLES}
       AND (timestamp <= %(end)s OR timestamp - %(interval)s::interval < %(end)s)
       AND value < 'NaN'
)
SELECT samples, COALESCE((
           SELECT round(extract(epoch FROM sum(pg_catalog.upper(p) - pg_catalog.lower(p)))
                        / extract(epoch FROM %(end)s::timestamptz - %(start)s), 6)
             FROM pg_catalog.unnest({stood_for("ends")} OPERATOR(pg_catalog.*) {WINDOW}) AS p
       ), 0)::float8
  FROM sample
"""  # noqa: S608

CALCULATE = {kind: Statement.of(sql) for kind, sql in CALCULATE_SQL.items()}
COVERAGE = Statement.of(COVERAGE_SQL)
SETTLE = Statement.of(SETTLE_SQL)
