"""The part of the page `jobs` that shows which samples are there: object by day, n of 144."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psycopg

from perfdb import rows_of
from report_page import cell, cells, escape, grid, heat, line, section, short_name

MOST = {"objects": 40, "features": 3, "days": 14}

# The objects that are silent the longest, by the features their alarms look at; each day of each
# is one range of the primary key. A sample stands for the time before it, so midnight's is of the
# day before.
COVERAGE_SQL = """
WITH signal AS MATERIALIZED (
    SELECT o.id AS object_id, o.name, f.id AS feature_id, f.name AS feature, f.sample_interval,
           (SELECT v.timestamp
              FROM feature_values v
             WHERE v.object_id = o.id
               AND v.feature_id = f.id
               AND v.timestamp <= now()
             ORDER BY v.timestamp DESC
             LIMIT 1) AS latest
      FROM (SELECT * FROM objects ORDER BY name LIMIT 1000) o
     CROSS JOIN LATERAL (
            SELECT *
              FROM (SELECT f.*, u.is_used, bool_or(u.is_used) OVER () AS any_used
                      FROM features f
                     CROSS JOIN LATERAL (
                            SELECT EXISTS (SELECT FROM alarms a
                                            WHERE a.object_model_id = f.object_model_id
                                              AND a.trigger->>'feature_name'::text = f.name)
                            ) u(is_used)
                     WHERE f.object_model_id = o.object_model_id) f
             WHERE f.is_used OR NOT f.any_used
             ORDER BY f.id
             LIMIT %(features)s) f
), object AS (
    SELECT object_id, name, min(COALESCE(latest, '-infinity')) AS latest
      FROM signal
     GROUP BY 1, 2
     ORDER BY 3, 2
     LIMIT %(objects)s
), last_day AS (
    SELECT date_trunc('day', CASE
               WHEN max(latest) >= date_trunc('day', now()) - %(days)s::float8 * interval '1 day'
               THEN now() ELSE max(latest) - interval '1 microsecond' END) AS day
      FROM signal
), day AS (
    SELECT d AS start_time, d + interval '1 day' AS end_time,
           LEAST(d + interval '1 day', now()) AS due
      FROM last_day,
           pg_catalog.generate_series(day - (%(days)s - 1)::float8 * interval '1 day', day,
                                      interval '1 day') AS d
)
SELECT s.name, s.feature, d.start_time AS day, c.samples,
       GREATEST(1, floor(extract(epoch FROM d.due - d.start_time)
                         / extract(epoch FROM s.sample_interval)))::int AS expected,
       max(s.latest) OVER () AS latest
  FROM object o
  JOIN signal s USING (object_id)
 CROSS JOIN day d
 CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE v.value < 'NaN') AS samples
          FROM feature_values v
         WHERE v.object_id = s.object_id
           AND v.feature_id = s.feature_id
           AND v.timestamp > d.start_time
           AND v.timestamp <= d.end_time) c
 ORDER BY s.name, d.start_time, s.feature
"""


def coverage(connection: psycopg.Connection, made: datetime) -> str:
    """Draw how many samples each object has of each day, of its poorest feature."""
    rows = rows_of(connection, COVERAGE_SQL, MOST)
    if not rows:
        return section("Samples", "<p>There are no samples yet, or no objects with features.</p>")
    days = sorted({row["day"] for row in rows})
    poorest: dict[str, dict[datetime, dict[str, Any]]] = {}
    for row in rows:
        of_object = poorest.setdefault(row["name"], {})
        if share_of(row) < share_of(of_object.setdefault(row["day"], row)):
            of_object[row["day"]] = row
    note = f"Samples with a value per day, of the feature with the fewest; {zone_of(made)}."
    if len(poorest) == MOST["objects"]:
        note += f" The {len(poorest)} objects that are silent the longest."
    if days[-1].date() < made.date():
        latest = rows[0]["latest"]
        note = f"No samples for {len(days)} days: the latest is of {latest:%Y-%m-%d %H:%M}. {note}"
    return section("Samples", grid("Samples by object and day", [
        line("", cells(f"<i>{day:%d}</i>" for day in days)),
        *(line(name, cells(coverage_cell(of_day[day]) for day in days))
          for name, of_day in poorest.items())]), note=escape(note))


def share_of(row: dict[str, Any]) -> float:
    return row["samples"] / row["expected"]


def coverage_cell(row: dict[str, Any]) -> str:
    """Return a cell that is the darker the more is missing."""
    missing = 1 - min(1.0, share_of(row))
    return cell(heat(missing), row["samples"],
                f"{short_name(row['name'])}, {row['day']:%Y-%m-%d}: {row['samples']} of "
                f"{row['expected']} samples of {short_name(row['feature'])}")


def zone_of(made: datetime) -> str:
    return f"times in {made.tzinfo}"
