"""The page `alarms`: what stood when on which object, which alarms cost most, and why one stood.

Each part is a function of the connection and of a `Scope` that runs one query and returns HTML.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg

from perfdb import rows_of
from report_page import (
    cell,
    cells,
    escape,
    grid,
    heat,
    line,
    rect,
    section,
    short_name,
    shorten,
    svg,
    table,
)
from tables import duration, elapsed

MOST = {"objects": 200, "periods": 50_000, "lanes": 60, "bars": 900, "alarms": 30}
HEAT_CELLS = 1000  # at some 80 bytes
COLUMNS = 32       # of the heat map: a month, also one that begins at 23:00
SIGNAL_DAYS = 7    # a longer window shows its signal around the longest period
POINTS = 700       # of the signal
LARGEST = 1e300    # and the smallest: beyond, a difference is infinite


@dataclass(frozen=True)
class Scope:
    """What the page is about: a half-open window, and names of objects (None: the first ones)."""

    start: datetime
    end: datetime
    objects: Sequence[str] | None = None

    @property
    def seconds(self) -> float:
        return elapsed(self.start, self.end).total_seconds()

    def params(self, **more: Any) -> dict[str, Any]:
        names = None if self.objects is None else list(self.objects)
        return MOST | {"start": self.start, "end": self.end, "names": names} | more

    def x(self, moment: datetime) -> float:
        """Return where a moment lies in a picture 1000 units wide."""
        return 1000 * elapsed(self.start, moment).total_seconds() / self.seconds


OBJECTS_SQL = """
SELECT count(*) AS objects,
       (SELECT pg_catalog.array_agg(n ORDER BY n)
          FROM pg_catalog.unnest(%(names)s::text[]) AS n
         WHERE n NOT IN (SELECT name FROM objects)) AS unknown
  FROM objects
"""

# The periods of the window. Those of one object and alarm do not overlap, so at most one that
# began before the window reaches into it: the last. With that as a lower bound each object and
# alarm is one range of an index, however long the history is.
PERIODS = """
WITH object AS MATERIALIZED (
    SELECT id, name, object_model_id
      FROM objects
     WHERE %(names)s::text[] IS NULL OR name = ANY(%(names)s)
     ORDER BY name
     LIMIT %(objects)s
), pair AS MATERIALIZED (
    SELECT o.id AS object_id, o.name AS object, a.id AS alarm_id, a.manufacturer_id AS number,
           a.name AS alarm,
           COALESCE((SELECT max(h.start_time)
                       FROM alarms_history h
                      WHERE h.object_id = o.id
                        AND h.alarm_id = a.id
                        AND h.start_time <= %(start)s), %(start)s) AS first_start
      FROM object o
      JOIN alarms a ON a.object_model_id = o.object_model_id
), period AS MATERIALIZED (
    SELECT p.object_id, p.object, p.alarm_id, p.number, p.alarm,
           h.start_time AS began, h.end_time AS ended,
           GREATEST(h.start_time, %(start)s) AS start_time,
           LEAST(h.end_time, %(end)s) AS end_time
      FROM pair p
      JOIN alarms_history h ON h.object_id = p.object_id
                           AND h.alarm_id = p.alarm_id
                           AND h.start_time >= p.first_start
                           AND h.start_time < %(end)s
                           AND h.end_time > %(start)s
     LIMIT %(periods)s
)
"""

# Only so many bars fit on the page: the widest gaps between periods are drawn, and none that is
# narrower than can be seen (a bar is at least one unit wide); what lies closer becomes one bar.
TIMELINE_SQL = PERIODS + """
, lane AS MATERIALIZED (
    SELECT object_id, alarm_id, sum(end_time - start_time) AS total
      FROM period
     GROUP BY 1, 2
     ORDER BY total DESC, object_id, alarm_id
     LIMIT %(lanes)s
), gap AS (
    SELECT p.*, start_time - pg_catalog.lag(end_time) OVER (
               PARTITION BY object_id, alarm_id ORDER BY start_time) AS gap
      FROM period p
      JOIN lane USING (object_id, alarm_id)
), cut AS (
    SELECT g.*, COALESCE(gap > %(unit)s::float8 * interval '1 second', true)
                AND row_number() OVER (ORDER BY gap DESC NULLS FIRST) <= %(bars)s AS is_new
      FROM gap g
), bar AS (
    SELECT c.*, sum(is_new::int) OVER (PARTITION BY object_id, alarm_id ORDER BY start_time) AS bar
      FROM cut c
)
SELECT object, number, alarm, min(start_time) AS start_time, max(end_time) AS end_time,
       min(began) AS began, max(ended) AS ended, count(*) AS periods,
       (SELECT count(*) FROM (SELECT DISTINCT object_id, alarm_id FROM period) AS l) AS lanes,
       (SELECT count(*) FROM period) AS all_periods
  FROM bar
 GROUP BY object, number, alarm, bar
 ORDER BY object, number, min(start_time)
"""  # noqa: S608, constants only


def timeline(connection: psycopg.Connection, scope: Scope) -> str:
    """Draw a bar per period, a line per object and alarm."""
    rows = rows_of(connection, TIMELINE_SQL, scope.params(unit=scope.seconds / 1000))
    if not rows:
        return section("When it stood", "<p>No alarm stood in this window.</p>")
    lines = [line("", day_marks(scope))]
    for (name, number), bars in itertools.groupby(rows, key=lambda r: (r["object"], r["number"])):
        lines.append(lane(scope, name, number, list(bars)))
    note = f"{len(lines) - 1} lines"
    if rows[0]["lanes"] > len(lines) - 1:
        note += f" of {rows[0]['lanes']}, those with the most hours"
    note += f"; {rows[0]['all_periods']:,} periods. Point at a bar for its times."
    if rows[0]["all_periods"] == MOST["periods"]:
        note += " More are left out: narrow --from, --to or --object."
    return section("When it stood", grid("Alarm periods by object and time", lines),
                   note=escape(note))


def lane(scope: Scope, name: str, number: int, bars: list[dict[str, Any]]) -> str:
    title = f"{name}, alarm {number} {bars[0]['alarm']}".strip()

    def tip(bar: dict[str, Any]) -> str:
        took = duration(elapsed(bar["began"], bar["ended"]).total_seconds())
        several = f"{bar['periods']} periods, " if bar["periods"] > 1 else ""
        return f"{short_name(name)} {number} {several}{from_to(scope, bar)} ({took})"
    return line(f"{name} {number} {bars[0]['alarm']}", svg(title, [*day_lines(scope), *(
        rect("mark", scope.x(b["start_time"]), scope.x(b["end_time"]) - scope.x(b["start_time"]),
             tip(b)) for b in bars)]))


def from_to(scope: Scope, period: dict[str, Any]) -> str:
    """Return when a period began and ended, with the year where more than one comes into it."""
    began, ended = period["began"], period["ended"]
    is_one_year = scope.start.year == scope.end.year == began.year == ended.year
    form = "%d %b %H:%M" if is_one_year else "%d %b %Y %H:%M"
    return f"{began:{form}} to {ended:{form}}"


def days_of(scope: Scope, most: int) -> list[datetime]:
    """Return the beginnings of at most `most` stretches of whole days that cover the window."""
    first = scope.start.replace(hour=0, minute=0, second=0, microsecond=0)
    count = -(-(scope.end - first) // timedelta(days=1))
    step = -(-count // most)
    return [first + timedelta(days=n) for n in range(0, count, step)]


def day_marks(scope: Scope) -> str:
    """Return the names of the days, each as wide as its days are."""
    days = days_of(scope, 8)
    rest = "%b" if days[0].year == days[-1].year else "%b %Y"
    ends = [*days[1:], scope.end]
    widths = " ".join(f"minmax(0,{elapsed(max(day, scope.start), end).total_seconds():.0f}fr)"
                      for day, end in zip(days, ends, strict=True))
    return (f'<div class="days dim" style="grid-template-columns:{widths}">'
            + "".join(f'<span>{day:%d}<span class="wide"> {day:{rest}}</span></span>'
                      for day in days) + "</div>")


def day_lines(scope: Scope, height: int = 14) -> list[str]:
    return [f'<path class="axis" d="M{scope.x(day):.1f} 0V{height}"/>'
            for day in days_of(scope, 8) if day > scope.start]


PARETO_SQL = PERIODS + """
SELECT number, max(alarm) AS alarm, count(*) AS periods,
       pg_catalog.count(DISTINCT object_id) AS objects,
       extract(epoch FROM sum(end_time - start_time))::float8 / 3600::float8 AS hours,
       extract(epoch FROM max(end_time - start_time))::float8 / 3600::float8 AS longest
  FROM period
 GROUP BY number
 ORDER BY hours DESC, number
 LIMIT %(alarms)s
"""


def pareto(connection: psycopg.Connection, scope: Scope) -> str:
    """Show hours and number per alarm, the largest first, and the share they add up to."""
    rows = rows_of(connection, PARETO_SQL, scope.params())
    if not rows:
        return section("Which alarms", "<p>None.</p>")
    total, largest = sum(row["hours"] for row in rows), rows[0]["hours"]
    sums = itertools.accumulate(row["hours"] for row in rows)
    return section("Which alarms", table(
        ["#alarm", "name", "#hours", "share", "#up to here", "#periods", "-#objects",
         "-#longest h"],
        [[row["number"], shorten(row["alarm"], 80), f"{row['hours']:.1f}",
          share_bar(row, largest), f"{100 * added / total:.0f} %", row["periods"], row["objects"],
          f"{row['longest']:.1f}"] for row, added in zip(rows, sums, strict=True)]),
        note="Hours inside the window, summed over the objects; the largest first.")


def share_bar(row: dict[str, Any], largest: float) -> str:
    return svg(f"alarm {row['number']}: {row['hours']:.1f} h",
               [rect("mark", 0, 1000 * row["hours"] / largest)], 12)


# Hours in which at least one alarm stood: alarms that stand together count once.
HEAT_SQL = PERIODS + """
, stretch AS (
    SELECT n, tstzrange(s, pg_catalog.lead(s, 1, %(end)s) OVER (ORDER BY s)) AS span
      FROM pg_catalog.unnest(%(days)s::timestamptz[]) WITH ORDINALITY AS d(s, n)
), stood AS (
    SELECT object_id, object, pg_catalog.range_agg(tstzrange(start_time, end_time)) AS periods
      FROM period
     GROUP BY 1, 2
     ORDER BY sum(end_time - start_time) DESC, object
     LIMIT %(lines)s
)
SELECT s.object, d.n,
       (SELECT COALESCE(extract(epoch FROM sum(pg_catalog.upper(p) - pg_catalog.lower(p)))::float8,
                        0) / 3600::float8
          FROM pg_catalog.unnest(s.periods OPERATOR(pg_catalog.*)
                                 pg_catalog.tstzmultirange(d.span)) AS p) AS hours,
       extract(epoch FROM LEAST(pg_catalog.upper(d.span), %(end)s)
                          - GREATEST(pg_catalog.lower(d.span), %(start)s))::float8
       / 3600::float8 AS length
  FROM stood s
 CROSS JOIN stretch d
 ORDER BY s.object, d.n
"""  # noqa: S608, constants only


def heat_map(connection: psycopg.Connection, scope: Scope) -> str:
    """Draw the hours per object and day in which any alarm stood."""
    days = days_of(scope, COLUMNS)
    rows = rows_of(connection, HEAT_SQL, scope.params(days=days, lines=HEAT_CELLS // len(days)))
    if not rows:
        return section("Which objects, which days", "<p>None.</p>")
    step = (days[1] - days[0]).days if len(days) > 1 else 1
    head = line("", cells(f"<i>{day:%d}</i>" for day in days))

    def heat_cell(row: dict[str, Any]) -> str:
        shown = f"{row['hours']:.0f}" if row["hours"] >= 0.5 else "·" if row["hours"] else ""
        return cell(heat(row["hours"] / row["length"]), shown,
                    f"{short_name(row['object'])}, {days[row['n'] - 1]:%d %b %Y}: "
                    f"{row['hours']:.1f} h")
    lines = [line(name, cells(map(heat_cell, group)))
             for name, group in itertools.groupby(rows, key=lambda row: row["object"])]
    return section("Which objects, which days",
                   grid("Hours of alarms by object and day", [head, *lines]),
                   note=f"Hours with at least one alarm; a cell is {step} day{'s' * (step > 1)}.")


# The periods of the object and alarm with the most hours, and of what that alarm gives way to.
LONGEST_SQL = PERIODS + """
, worst AS MATERIALIZED (
    SELECT object_id, alarm_id
      FROM period
     GROUP BY 1, 2
     ORDER BY sum(end_time - start_time) DESC, object_id, alarm_id
     LIMIT 1
)
SELECT p.*, p.alarm_id = w.alarm_id AS is_own, a.trigger, a.non_overlapping_alarms AS gives_way_to,
       f.id AS feature_id, f.name AS feature, f.unit, f.sample_interval
  FROM worst w
  JOIN alarms a ON a.id = w.alarm_id
  JOIN period p ON p.object_id = w.object_id
               AND (p.alarm_id = w.alarm_id OR p.number = ANY(a.non_overlapping_alarms))
  LEFT JOIN features f ON f.object_model_id = a.object_model_id
                      AND f.name = a.trigger->>'feature_name'::text
 ORDER BY is_own DESC, p.end_time - p.start_time DESC, p.start_time
 LIMIT 2000
"""  # noqa: S608, constants only

# The lowest and the highest value of each of `points` slices, so that no peak is lost.
SIGNAL_SQL = """
SELECT slice, min(start_time) AS start_time, max(timestamp) AS end_time,
       min(value) AS low, max(value) AS high, count(*) AS samples
  FROM (SELECT timestamp, value, timestamp - %(interval)s::interval AS start_time,
               floor(extract(epoch FROM timestamp - %(start)s::timestamptz)
                     / %(slice)s::numeric) AS slice
          FROM feature_values
         WHERE object_id = %(object_id)s
           AND feature_id = %(feature_id)s
           AND timestamp > %(start)s
           AND timestamp < %(end)s::timestamptz + %(interval)s::interval
           AND value < 'Infinity'
           AND value > '-Infinity') AS v
 GROUP BY slice
 ORDER BY slice
"""


def signal(connection: psycopg.Connection, scope: Scope) -> str:
    """Draw signal, threshold and periods of the object and alarm with the most hours."""
    heading = "Why did it stand?"
    periods = rows_of(connection, LONGEST_SQL, scope.params())
    if not periods:
        return section(heading, "<p>No alarm stood in this window.</p>")
    first = periods[0]
    if first["feature_id"] is None or not isinstance(first["trigger"], dict):
        return section(heading, f"<p>{escape(first['object'])}, alarm {first['number']}: its "
                                "trigger names no feature of the model: no signal to show.</p>")
    near = around(scope, first)
    samples = rows_of(connection, SIGNAL_SQL, {
        "object_id": first["object_id"], "feature_id": first["feature_id"], "start": near.start,
        "end": near.end, "interval": first["sample_interval"],
        "slice": max(near.seconds / POINTS, 1)})
    title = f"{first['object']}, alarm {first['number']} {first['alarm']}".strip()
    return section(heading, f"<h3>{escape(title)}</h3>",
                   draw_signal(near, title, first, periods, samples),
                   note=escape(rule_text(first)))


def around(scope: Scope, period: dict[str, Any]) -> Scope:
    """Return the part of the window to draw: all of it, or some days around the longest period."""
    most = timedelta(days=SIGNAL_DAYS)
    if scope.end - scope.start <= most:
        return scope
    middle = period["start_time"] + min(period["end_time"] - period["start_time"], most / 2) / 2
    start = min(max(middle - most / 2, scope.start), scope.end - most)
    return Scope(start, start + most, scope.objects)


def rule_text(alarm: dict[str, Any]) -> str:
    """Return the rule of the alarm in words."""
    trigger = alarm["trigger"]
    side = {"high": "above", "low": "below"}.get(str(trigger.get("threshold_type")), "beyond")
    unit = f" {alarm['unit']}" if alarm["unit"] else ""
    said = f"It stands while {alarm['feature']} is {side} "
    said += f"{shorten(str(trigger.get('threshold_value')), 40)}{unit}"
    if trigger.get("max_gap"):
        said += f", joined over gaps of up to {trigger['max_gap']} s"
    if trigger.get("min_duration"):
        said += f", for at least {trigger['min_duration']} s"
    if alarm["gives_way_to"]:
        said += f" and none of {', '.join(map(str, alarm['gives_way_to']))} stands (dotted frames)"
    return said + ". The periods are shaded, the dashed line is the threshold."


def draw_signal(near: Scope, title: str, alarm: dict[str, Any], periods: list[dict[str, Any]],
                samples: list[dict[str, Any]], height: int = 200) -> str:
    limit = alarm["trigger"].get("threshold_value")
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    limits = [limit] if is_number and abs(limit) <= LARGEST else []
    values = [row[side] for row in samples for side in ("low", "high")] + limits
    low, high = max(min(values, default=0), -LARGEST), min(max(values, default=1), LARGEST)
    room = (high - low or abs(high) or 1) * 0.05

    def y(value: float) -> float:
        inside = min(max(value, low - room), high + room)
        return height * (high + room - inside) / (high - low + 2 * room)
    shapes = day_lines(near, height)
    shapes += [period_rect(near, period, height) for period in periods
               if period["start_time"] < near.end and period["end_time"] > near.start]
    shapes.append(f'<path class="signal" d="{signal_path(near, samples, y)}"/>')
    shapes += [f'<path class="limit" d="M0 {y(value):.1f}H1000"/>' for value in limits]
    unit = alarm["unit"] or ""
    scale = "".join(f"<span>{escape(shown)}</span>" for shown in (
        f"{high:g} {unit}", alarm["feature"], f"{low:g} {unit}"))
    return grid(title, [line("", day_marks(near)),
                        f'<div class="name scale">{scale}</div>{svg(title, shapes, height)}'])


def period_rect(near: Scope, period: dict[str, Any], height: int) -> str:
    left, right = near.x(period["start_time"]), near.x(period["end_time"])
    return rect("shade" if period["is_own"] else "other", left, right - left,
                f"alarm {period['number']} {from_to(near, period)}", 0, height)


def signal_path(near: Scope, samples: list[dict[str, Any]], y: Callable[[float], float]) -> str:
    """Return the path: a sample holds over its interval; where some are missing it breaks off."""
    parts, before = [], None
    for row in samples:
        left, right = near.x(row["start_time"]), near.x(row["end_time"])
        joins = before is not None and row["start_time"] <= before
        parts.append(f"{'L' if joins else 'M'}{left:.1f} {y(row['high']):.1f}")
        if row["low"] != row["high"]:
            parts.append(f"V{y(row['low']):.1f}V{y(row['high']):.1f}")
        parts.append(f"H{right:.1f}")
        before = row["end_time"]
    return "".join(parts)


def part_shown(connection: psycopg.Connection, scope: Scope) -> str:
    """Return a sentence if not all objects are shown, else "".

    Raise `ValueError` naming the names in `scope` that are no object's.
    """
    row = rows_of(connection, OBJECTS_SQL, scope.params())[0]
    if row["unknown"]:
        raise ValueError(f"--object: there is no object {', '.join(map(repr, row['unknown']))}: "
                         "see the table objects")
    if scope.objects is None and row["objects"] > MOST["objects"]:
        return (f"The first {MOST['objects']} of {row['objects']} objects by name; "
                "--object shows others.")
    return ""
