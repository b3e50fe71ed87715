"""The two layers of alarms, as SQL: what was detected, and the history that follows from it.

alarms_detected is what an alarm's own trigger found in the samples: DETECT_SQL replaces it inside
a window and nowhere else. alarms_history is a function of it, which SETTLE_SQL brings up to date:
detected periods with at most max_gap between them joined, then those shorter than min_duration
left out, then less what the history of more important alarms covers.

All of it is set algebra on multiranges, one object and one alarm at a time, and nothing but counts
and bounds leaves the database. The sample at T stands for (T - sample_interval, T]; time is
continuous here, so which end of a range is closed does not matter: all are written [ ).
"""

from __future__ import annotations


def last_before(table: str, moment: str) -> str:
    """Return SQL: when the alarm's last period that began before `moment` began.

    The periods of an alarm do not overlap, so no other one before can reach over it: a night costs
    the same behind ten years of history.
    """
    return f"""COALESCE((SELECT max(start_time)
                                     FROM {table}
                                    WHERE object_id = %(object_id)s
                                      AND alarm_id = %(alarm_id)s
                                      AND start_time < {moment}), '-infinity')"""  # noqa: S608


# A layer's rows `old` become `period`, with as few changes as possible: a row that stays the same
# is not touched, so computing again changes nothing, not even ids. No joins: the planner knows
# nothing of the number of periods, and a nested loop over 263,001 of them does not end. Grouping
# hashes or sorts, membership in a multirange is a binary search, whatever was expected. ON
# CONFLICT only for rows that keep their start: it costs half as much again as a plain INSERT.
REPLACE_CTES = """
change AS MATERIALIZED (
    SELECT start_time,
           max(end_time) FILTER (WHERE is_new) AS end_time,
           max(end_time) FILTER (WHERE NOT is_new) AS old_end_time
      FROM (SELECT start_time, end_time, true AS is_new FROM period
             UNION ALL
            SELECT start_time, end_time, false FROM old) AS row
     GROUP BY start_time
), doomed AS MATERIALIZED (
    SELECT pg_catalog.range_agg(tstzrange(start_time, start_time, '[]')) AS starts
      FROM change
     WHERE end_time IS NULL
), gone AS (
    DELETE FROM {table}
     WHERE object_id = %(object_id)s
       AND alarm_id = %(alarm_id)s
       AND start_time BETWEEN (SELECT pg_catalog.lower(starts) FROM doomed)
                          AND (SELECT pg_catalog.upper(starts) FROM doomed)
       AND (SELECT starts FROM doomed) OPERATOR(pg_catalog.@>) start_time
), added AS (
    INSERT INTO {table} (object_id, alarm_id, start_time, end_time)
    SELECT %(object_id)s, %(alarm_id)s, start_time, end_time
      FROM change
     WHERE old_end_time IS NULL
), changed AS (
    INSERT INTO {table} (object_id, alarm_id, start_time, end_time)
    SELECT %(object_id)s, %(alarm_id)s, start_time, end_time
      FROM change
     WHERE end_time <> old_end_time
    ON CONFLICT (object_id, alarm_id, start_time) DO UPDATE SET end_time = EXCLUDED.end_time
)"""

# The samples that count in the window: with a value, which NULL and NaN are not (NaN is greater
# than any number in PostgreSQL). They are read from the index alone (primary key of
# feature_values), in its order. Months and days differ in length, so the last sample that still
# reaches into the window is looked up, no further than twice the interval behind it.
SAMPLE_CONDITION = """v.object_id = %(object_id)s
       AND v.feature_id = %(feature_id)s
       AND v.timestamp > %(start)s
       AND v.timestamp <= COALESCE(
               (SELECT max(last.timestamp)
                  FROM feature_values last
                 WHERE last.object_id = %(object_id)s
                   AND last.feature_id = %(feature_id)s
                   AND last.timestamp > %(end)s
                   AND last.timestamp < %(end)s::timestamptz + %(interval)s::interval
                                          + %(interval)s::interval
                   AND last.timestamp - %(interval)s::interval < %(end)s), %(end)s)
       AND v.value < 'NaN'"""

WINDOW = "pg_catalog.tstzmultirange(pg_catalog.tstzrange(%(start)s, %(end)s))"


def detecting(compares: str) -> str:
    """Return SQL: detect one alarm of one object in one window.

    As set algebra on multiranges: the sample intervals that trigger, cut to the window, and what
    was detected outside of it, joined where they touch. Where all samples lie on the grid of the
    window they do not overlap, and need only be counted to know what they cover; else they are
    read once more. A row: samples, coverage, whether anything was detected in the window before.
    """
    return f"""
WITH sample AS MATERIALIZED (
    SELECT count(*) AS samples,
           bool_and(v.timestamp = date_bin(%(grid)s::interval, v.timestamp, %(start)s))
           AND %(end)s = date_bin(%(grid)s::interval, %(end)s, %(start)s) AS on_grid,
           pg_catalog.range_agg(tstzrange(v.timestamp - %(interval)s::interval, v.timestamp))
               FILTER (WHERE v.value {compares} %(threshold)s) AS triggering
      FROM feature_values v
     WHERE {SAMPLE_CONDITION}
), old AS MATERIALIZED (
    SELECT start_time, end_time
      FROM alarms_detected
     WHERE object_id = %(object_id)s
       AND alarm_id = %(alarm_id)s
       AND start_time >= {last_before("alarms_detected", "%(start)s")}
       AND start_time <= %(end)s
       AND end_time >= %(start)s
), period AS MATERIALIZED (
    SELECT pg_catalog.lower(p) AS start_time, pg_catalog.upper(p) AS end_time
      FROM sample,
           (SELECT COALESCE(pg_catalog.range_agg(tstzrange(start_time, end_time)),
                            '{{}}') AS before
              FROM old) AS o,
           pg_catalog.unnest(
               (COALESCE(triggering, '{{}}') OPERATOR(pg_catalog.*) {WINDOW})
               OPERATOR(pg_catalog.+) (before OPERATOR(pg_catalog.-) {WINDOW})) AS p
), {REPLACE_CTES.format(table="alarms_detected")}
SELECT samples,
       round((CASE WHEN on_grid THEN samples::numeric * extract(epoch FROM %(interval)s::interval)
                   ELSE (SELECT sum(extract(epoch FROM pg_catalog.upper(r) - pg_catalog.lower(r)))
                           FROM pg_catalog.unnest({WINDOW} OPERATOR(pg_catalog.*) (
                                    SELECT pg_catalog.range_agg(tstzrange(
                                               v.timestamp - %(interval)s::interval, v.timestamp))
                                      FROM feature_values v
                                     WHERE {SAMPLE_CONDITION})) AS r)
              END / extract(epoch FROM %(end)s::timestamptz - %(start)s))::numeric, 6)::float8,
       EXISTS (SELECT FROM old WHERE start_time < %(end)s AND end_time > %(start)s)
  FROM sample
"""  # noqa: S608


DETECT_SQL = {"high": detecting(">"), "low": detecting("<")}

# The history of one alarm inside a span of time, brought up to date with what was detected and
# with the history of more important alarms. The span is the window and, as far as it goes, what is
# joined to something in it or was until now: what lies within max_gap of it. near is read so far
# beyond (reach: min_duration and two gaps) that what is not read can neither be joined to what
# matters here nor decide whether that is long enough. Returns from when to when anything changed.
SETTLE_SQL = f"""
WITH near AS MATERIALIZED (
    SELECT start_time, end_time
      FROM alarms_detected
     WHERE object_id = %(object_id)s
       AND alarm_id = %(alarm_id)s
       AND start_time >= {last_before("alarms_detected",
                                      "%(start)s::timestamptz - %(reach)s::interval")}
       AND start_time <= %(end)s::timestamptz + %(reach)s::interval
       AND end_time >= %(start)s::timestamptz - %(reach)s::interval
), joined AS MATERIALIZED (
    SELECT pg_catalog.lower(r) AS start_time,
           pg_catalog.upper(r) - %(max_gap)s::interval AS end_time
      FROM pg_catalog.unnest((SELECT pg_catalog.range_agg(tstzrange(
                              start_time, end_time + %(max_gap)s::interval))
                     FROM near)) AS r
), span AS MATERIALIZED (
    SELECT LEAST(%(start)s, min(start_time)) AS low, GREATEST(%(end)s, max(end_time)) AS high
      FROM joined
     WHERE %(reach)s::interval > '0'
       AND start_time <= %(end)s::timestamptz + %(max_gap)s::interval
       AND end_time >= %(start)s::timestamptz - %(max_gap)s::interval
), old AS MATERIALIZED (
    SELECT start_time, end_time
      FROM alarms_history
     WHERE object_id = %(object_id)s
       AND alarm_id = %(alarm_id)s
       AND start_time >= {last_before("alarms_history", "(SELECT low FROM span)")}
       AND start_time <= (SELECT high FROM span)
       AND end_time >= (SELECT low FROM span)
), layer AS MATERIALIZED (
    SELECT pg_catalog.tstzmultirange(tstzrange(low, high)) AS span,
           (SELECT COALESCE(pg_catalog.range_agg(tstzrange(start_time, end_time)), '{{}}')
              FROM joined
             WHERE end_time - start_time >= %(min_duration)s::interval) AS shaped,
           (SELECT COALESCE(pg_catalog.range_agg(tstzrange(start_time, end_time)), '{{}}')
              FROM alarms_history
             WHERE object_id = %(object_id)s
               AND alarm_id = ANY(%(important_ids)s)
               AND start_time < high
               AND end_time > low) AS important,
           (SELECT COALESCE(pg_catalog.range_agg(tstzrange(start_time, end_time)), '{{}}')
              FROM old) AS before
      FROM span
), settled AS MATERIALIZED (
    SELECT ((shaped OPERATOR(pg_catalog.-) important) OPERATOR(pg_catalog.*) span)
           OPERATOR(pg_catalog.+) (before OPERATOR(pg_catalog.-) span) AS after, before
      FROM layer
), period AS MATERIALIZED (
    SELECT pg_catalog.lower(p) AS start_time, pg_catalog.upper(p) AS end_time
      FROM settled, pg_catalog.unnest(after) AS p
), {REPLACE_CTES.format(table="alarms_history")}
SELECT pg_catalog.lower(changed), pg_catalog.upper(changed)
  FROM (SELECT (after OPERATOR(pg_catalog.-) before)
               OPERATOR(pg_catalog.+) (before OPERATOR(pg_catalog.-) after) AS changed
          FROM settled) AS d
"""  # noqa: S608

# Also lets later statements be planned as usual again, see RULE_SQL.
RESULT_SQL = f"""
SELECT count(*),
       COALESCE(sum(extract(epoch FROM LEAST(end_time, %(end)s)
                                       - GREATEST(start_time, %(start)s))), 0)::float8,
       set_config('enable_seqscan', 'on', true)
  FROM alarms_history
 WHERE object_id = %(object_id)s
   AND alarm_id = %(alarm_id)s
   AND start_time >= {last_before("alarms_history", "%(start)s")}
   AND start_time < %(end)s
   AND end_time > %(start)s
"""  # noqa: S608
