"""What is wrong with the alarms' definitions, rows and sample intervals? Checks for doctor.py.

Each check yields a line per finding, with the statement that mends it; nothing if all is well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import psycopg

from alarm_calc import feature_problems, important_first, read_trigger
from parameters import JobRequestError
from perfdb import query

Findings = Iterator[str]


ALARMS_SQL = """
SELECT m.name, a.manufacturer_id, a.id, a.trigger::text,
       ARRAY(SELECT n FROM pg_catalog.unnest(a.non_overlapping_alarms) AS n),
       ARRAY(SELECT f.name FROM features f WHERE f.object_model_id = m.id ORDER BY f.name)
  FROM alarms a
  JOIN object_models m ON m.id = a.object_model_id
 ORDER BY m.name, a.manufacturer_id
"""


def definitions(connection: psycopg.Connection) -> Findings:
    models: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for model, number, alarm_id, trigger, important, features in query(connection, ALARMS_SQL):
        models[model][number] = {"id": alarm_id, "trigger": trigger, "important": important,
                                 "features": features}
    for model, alarms in models.items():
        for number, alarm in alarms.items():
            yield from _definition(f"alarm {number} of model {model!r}", alarm, alarms)
        try:
            important_first(alarms, alarms)
        except JobRequestError as exc:
            yield f"alarms: model {model!r}: {exc}"


def _definition(which: str, alarm: dict[str, Any], alarms: dict[int, Any]) -> Findings:
    trigger, problems = read_trigger(alarm["trigger"])
    problems = [*problems, *feature_problems(trigger, alarm["features"])]
    if problems and not _is_foreign(trigger):
        yield (f"alarms: the trigger of {which} cannot be used: {'; '.join(problems)}: "
               f"mend the column trigger of alarms, row {alarm['id']}")
    if unknown := [n for n in alarm["important"] if n not in alarms]:
        known = ",".join(str(n) for n in alarm["important"] if n in alarms)
        mend = f"SET non_overlapping_alarms = '{{{known}}}' WHERE id = {alarm['id']}"
        named = ", ".join("NULL" if n is None else str(n) for n in unknown)
        yield (f"alarms: {which} gives way to {named}, which its model "
               f"does not have: UPDATE alarms {mend}")


def _is_foreign(trigger: Any) -> bool:
    """Whether the alarm is one that is not calculated here, by its own account."""
    kind = trigger.get("trigger_type") if isinstance(trigger, dict) else None
    return isinstance(kind, str) and kind != "threshold"


OWNED = """EXISTS (SELECT FROM objects o JOIN alarms a USING (object_model_id)
                WHERE o.id = {0}.object_id AND a.id = {0}.alarm_id)"""


def orphans(table: str) -> str:
    """Return SQL: the pairs of object and alarm in a layer that do not belong together.

    The condition is the one doctor prints, so what is counted is what it deletes. From one pair to
    the next through the index: there may be millions of periods.
    """
    return f"""
WITH RECURSIVE pair AS (
    (SELECT object_id, alarm_id FROM {table} ORDER BY object_id, alarm_id LIMIT 1)
     UNION ALL
    SELECT following.object_id, following.alarm_id
      FROM pair
     CROSS JOIN LATERAL (
            SELECT object_id, alarm_id
              FROM {table} h
             WHERE (h.object_id, h.alarm_id) > (pair.object_id, pair.alarm_id)
             ORDER BY object_id, alarm_id
             LIMIT 1) AS following
)
SELECT pg_catalog.format('object %s alarm %s', object_id, alarm_id)
  FROM pair
 WHERE NOT {OWNED.format("pair")}
 ORDER BY object_id, alarm_id
"""  # noqa: S608


ORPHANS_SQL = {table: orphans(table) for table in ("alarms_history", "alarms_detected")}


def owners(connection: psycopg.Connection) -> Findings:
    for table, sql in ORPHANS_SQL.items():
        if query(connection, "SELECT to_regclass(%s)", [table]) == [(None,)]:
            continue  # an older schema, which the check of the schema says
        pairs = [pair for (pair,) in query(connection, sql)]
        if pairs:
            more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
            mend = f"FROM {table} WHERE NOT {' '.join(OWNED.format(table).split())}"
            yield (f"{table}: rows by id of {', '.join(pairs[:5])}{more}: the object's model has "
                   "no such alarm (deleted, made anew, or the object has another model now): "
                   f"DELETE {mend}")


# How the latest samples of each feature follow each other, on the first three objects that have
# some. Half of them may be late or missing, and a month may have 31 days.
INTERVALS_SQL = """
SELECT m.name, f.name, f.id, f.sample_interval::text,
       (pg_catalog.percentile_disc(0.5::float8)
                   WITHIN GROUP (ORDER BY s.timestamp - s.previous))::text
  FROM features f
  JOIN object_models m ON m.id = f.object_model_id
 CROSS JOIN LATERAL (
        SELECT o.id
          FROM objects o
         WHERE o.object_model_id = m.id
           AND EXISTS (SELECT FROM feature_values v
                        WHERE v.object_id = o.id AND v.feature_id = f.id)
         ORDER BY o.id
         LIMIT 3) AS o
 CROSS JOIN LATERAL (
        SELECT latest.timestamp,
               pg_catalog.lag(latest.timestamp) OVER (ORDER BY latest.timestamp) AS previous
          FROM (SELECT v.timestamp
                  FROM feature_values v
                 WHERE v.object_id = o.id AND v.feature_id = f.id
                   AND pg_catalog.isfinite(v.timestamp)
                 ORDER BY v.timestamp DESC
                 LIMIT 100) AS latest) AS s
 WHERE s.previous IS NOT NULL
 GROUP BY m.name, f.name, f.id, f.sample_interval
HAVING count(*) >= 5
   AND abs(extract(epoch FROM pg_catalog.percentile_disc(0.5::float8)
                                  WITHIN GROUP (ORDER BY s.timestamp - s.previous))
           / extract(epoch FROM f.sample_interval) - 1::numeric) > 0.05
 ORDER BY m.name, f.name
"""


def intervals(connection: psycopg.Connection) -> Findings:
    for model, feature, feature_id, said, found in query(connection, INTERVALS_SQL):
        mend = f"SET sample_interval = '{found}' WHERE id = {feature_id}"
        yield (f"features: samples of {feature!r} of model {model!r} come every {found}, but "
               f"sample_interval is {said}, so periods fall to pieces or cover too much: "
               f"UPDATE features {mend}, then calculate its alarms again")


CHECKS: list[Callable[[psycopg.Connection], Findings]] = [definitions, owners, intervals]
