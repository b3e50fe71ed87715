"""The park in the database: reading it, comparing it with a file, making it as the file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from csv_times import Interval
from perfdb import query
from plant_toml import Alarm, Feature, Model, Object, Plant

# Two that apply files at once take turns; the second one then sees what the first has changed.
TAKE_TURNS_SQL = """
SELECT pg_advisory_xact_lock('objects'::regclass::oid::int, hashtext('plant'::text))
"""

TYPES_SQL = "SELECT name FROM object_types ORDER BY name"

MODELS_SQL = """
SELECT m.name, t.name
  FROM object_models m
  JOIN object_types t ON t.id = m.object_type_id
 ORDER BY m.name
"""

# An interval in calendar units: a month is no number of days.
FEATURES_SQL = """
SELECT m.name, f.name, f.unit,
       (extract(year FROM sample_interval) * 12::numeric
        + extract(month FROM sample_interval))::int,
       extract(day FROM sample_interval)::int,
       (extract(epoch FROM sample_interval - date_trunc('day'::text, sample_interval))
        * 1000000::numeric)::bigint
  FROM features f
  JOIN object_models m ON m.id = f.object_model_id
 ORDER BY m.name, f.name
"""

ALARMS_SQL = """
SELECT m.name, a.manufacturer_id, a.name, a.trigger,
       ARRAY(SELECT n FROM pg_catalog.unnest(a.non_overlapping_alarms) AS n
              WHERE n IS NOT NULL)
  FROM alarms a
  JOIN object_models m ON m.id = a.object_model_id
 ORDER BY m.name, a.manufacturer_id
"""

OBJECTS_SQL = """
SELECT o.name, m.name, parent.name, o.bazefield_id
  FROM objects o
  JOIN object_models m     ON m.id = o.object_model_id
  LEFT JOIN objects parent ON parent.id = o.parent_id
 ORDER BY o.name
"""

# One statement per kind, for one row or for thousands; `rows` is an array of JSON objects.
ADD_SQL = {
    "types": """
INSERT INTO object_types (name)
SELECT r.name
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(name text)
""",
    "models": """
INSERT INTO object_models (object_type_id, name)
SELECT t.id, r.name
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(name text, type text)
  JOIN object_types t ON t.name = r.type
""",
    "features": """
INSERT INTO features (object_model_id, name, unit, sample_interval)
SELECT m.id, r.name, r.unit, make_interval(months => r.months, days => r.days, secs => r.seconds)
  FROM jsonb_to_recordset(%(rows)s::jsonb)
       AS r(model text, name text, unit text, months int, days int, seconds float8)
  JOIN object_models m ON m.name = r.model
""",
    "alarms": """
INSERT INTO alarms (object_model_id, manufacturer_id, name, trigger, non_overlapping_alarms)
SELECT m.id, r.number, r.name, r.trigger, r.gives_way_to
  FROM jsonb_to_recordset(%(rows)s::jsonb)
       AS r(model text, number int, name text, trigger jsonb, gives_way_to int[])
  JOIN object_models m ON m.name = r.model
""",
    "objects": """
INSERT INTO objects (object_model_id, name, bazefield_id)
SELECT m.id, r.name, r.bazefield_id
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(name text, model text, bazefield_id text)
  JOIN object_models m ON m.name = r.model
 ORDER BY r.name
""",
}

CHANGE_SQL = {
    "models": """
UPDATE object_models m
   SET object_type_id = t.id
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(name text, type text)
  JOIN object_types t ON t.name = r.type
 WHERE m.name = r.name
""",
    "features": """
UPDATE features f
   SET unit = r.unit,
       sample_interval = make_interval(months => r.months, days => r.days, secs => r.seconds)
  FROM jsonb_to_recordset(%(rows)s::jsonb)
       AS r(model text, name text, unit text, months int, days int, seconds float8)
  JOIN object_models m ON m.name = r.model
 WHERE f.object_model_id = m.id AND f.name = r.name
""",
    "alarms": """
UPDATE alarms a
   SET name = r.name, trigger = r.trigger, non_overlapping_alarms = r.gives_way_to
  FROM jsonb_to_recordset(%(rows)s::jsonb)
       AS r(model text, number int, name text, trigger jsonb, gives_way_to int[])
  JOIN object_models m ON m.name = r.model
 WHERE a.object_model_id = m.id AND a.manufacturer_id = r.number
""",
    # Of new objects too: a parent may be new itself.
    "objects": """
UPDATE objects o
   SET object_model_id = m.id, parent_id = parent.id, bazefield_id = r.bazefield_id
  FROM jsonb_to_recordset(%(rows)s::jsonb)
       AS r(name text, model text, parent text, bazefield_id text)
  JOIN object_models m     ON m.name = r.model
  LEFT JOIN objects parent ON parent.name = r.parent
 WHERE o.name = r.name
""",
}

# From the leaves up. A parent goes in the same statement as its children: foreign keys are checked
# at its end.
REMOVE_SQL = {
    "objects": """
DELETE FROM objects o
 USING jsonb_to_recordset(%(rows)s::jsonb) AS r(name text)
 WHERE o.name = r.name
""",
    "alarms": """
DELETE FROM alarms a
 USING jsonb_to_recordset(%(rows)s::jsonb) AS r(model text, number int), object_models m
 WHERE m.name = r.model AND a.object_model_id = m.id AND a.manufacturer_id = r.number
""",
    "features": """
DELETE FROM features f
 USING jsonb_to_recordset(%(rows)s::jsonb) AS r(model text, name text), object_models m
 WHERE m.name = r.model AND f.object_model_id = m.id AND f.name = r.name
""",
    "models": """
DELETE FROM object_models m
 USING jsonb_to_recordset(%(rows)s::jsonb) AS r(name text)
 WHERE m.name = r.name
""",
    "types": """
DELETE FROM object_types t
 USING jsonb_to_recordset(%(rows)s::jsonb) AS r(name text)
 WHERE t.name = r.name
""",
}

# Samples and history have no foreign keys: what they belong to could go and leave them behind.
ORPHANS_SQL = {
    "objects": """
SELECT 'object ' || o.name, o.id,
       (SELECT count(*) FROM feature_values v WHERE v.object_id = o.id) AS samples,
       GREATEST((SELECT count(*) FROM alarms_history h WHERE h.object_id = o.id),
                (SELECT count(*) FROM alarms_detected d WHERE d.object_id = o.id)) AS periods
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(name text)
  JOIN objects o ON o.name = r.name
 ORDER BY o.name
""",
    "alarms": """
SELECT 'alarm ' || m.name || ' / ' || a.manufacturer_id::text, a.id, 0 AS samples,
       GREATEST((SELECT count(*) FROM alarms_history h WHERE h.alarm_id = a.id),
                (SELECT count(*) FROM alarms_detected d WHERE d.alarm_id = a.id)) AS periods
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(model text, number int)
  JOIN object_models m ON m.name = r.model
  JOIN alarms a        ON a.object_model_id = m.id AND a.manufacturer_id = r.number
 ORDER BY m.name, a.manufacturer_id
""",
    "features": """
SELECT 'feature ' || m.name || ' / ' || f.name, f.id,
       (SELECT count(*)
          FROM objects o
          JOIN feature_values v ON v.object_id = o.id AND v.feature_id = f.id
         WHERE o.object_model_id = m.id) AS samples, 0 AS periods
  FROM jsonb_to_recordset(%(rows)s::jsonb) AS r(model text, name text)
  JOIN object_models m ON m.name = r.model
  JOIN features f      ON f.object_model_id = m.id AND f.name = r.name
 ORDER BY m.name, f.name
""",
}

# What the operator is told to run if they are not wanted any more.
DELETE_ORPHANS = {
    "objects": ("DELETE FROM feature_values WHERE object_id = {id};",
                "DELETE FROM alarms_history WHERE object_id = {id};",
                "DELETE FROM alarms_detected WHERE object_id = {id};"),
    "alarms": ("DELETE FROM alarms_history WHERE alarm_id = {id};",
               "DELETE FROM alarms_detected WHERE alarm_id = {id};"),
    "features": ("DELETE FROM feature_values WHERE feature_id = {id};",),
}

KINDS = ("types", "models", "features", "alarms", "objects")  # each needs those before it


@dataclass
class Plan:
    """The keys to be added, changed and removed, by kind, and those that only the database has."""

    have: Plant
    want: Plant
    add: dict[str, list[Any]]
    change: dict[str, list[Any]]
    remove: dict[str, list[Any]]

    def rows(self, kind: str, keys: Sequence[Any], of: Plant) -> dict[str, Jsonb]:
        return {"rows": Jsonb([row(kind, key, getattr(of, kind)[key]) for key in keys])}

    def moved(self) -> list[str]:
        """Return the objects that change their model, and with it their features and alarms."""
        return [name for name in self.change["objects"]
                if self.have.objects[name].model != self.want.objects[name].model]


def compare(have: Plant, want: Plant) -> Plan:
    """Return what makes `want` of `have`."""
    plan = Plan(have, want, {}, {}, {})
    for kind in KINDS:
        old, new = getattr(have, kind), getattr(want, kind)
        plan.add[kind] = [key for key in new if key not in old]
        plan.change[kind] = [key for key in new if key in old and new[key] != old[key]]
        plan.remove[kind] = [key for key in old if key not in new]
    return plan


def row(kind: str, key: Any, value: Any) -> dict[str, Any]:
    """Return a row as the statements expect it."""
    names = {"features": ("model", "name"), "alarms": ("model", "number")}.get(kind)
    found = dict(zip(names, key, strict=True)) if names else {"name": key}
    found |= vars(value) if value else {}
    if interval := found.pop("interval", None):
        found |= {"months": interval.months, "days": interval.days,
                  "seconds": interval.microseconds / 1e6}
    return found


def read_database(connection: psycopg.Connection) -> Plant:
    """Return what the database says."""
    return Plant(
        types={name: None for (name,) in query(connection, TYPES_SQL)},
        models={name: Model(type_) for name, type_ in query(connection, MODELS_SQL)},
        features={(model, name): Feature(unit, Interval(*interval))
                  for model, name, unit, *interval in query(connection, FEATURES_SQL)},
        alarms={(model, number): Alarm(name, trigger, tuple(sorted(ways)))
                for model, number, name, trigger, ways in query(connection, ALARMS_SQL)},
        objects={name: Object(*rest) for name, *rest in query(connection, OBJECTS_SQL)})


def write_plan(connection: psycopg.Connection, plan: Plan, remove: bool) -> None:
    """Do what the plan says, in the caller's transaction."""
    for kind in KINDS:
        if keys := plan.add[kind]:
            connection.execute(ADD_SQL[kind], plan.rows(kind, keys, plan.want))
        keys = plan.change[kind] + (plan.add[kind] if kind == "objects" else [])
        if keys:
            connection.execute(CHANGE_SQL[kind], plan.rows(kind, keys, plan.want))
    for kind in reversed(KINDS):
        if remove and (keys := plan.remove[kind]):
            connection.execute(REMOVE_SQL[kind], plan.rows(kind, keys, plan.have))


def orphans(connection: psycopg.Connection, plan: Plan, remove: bool) -> list[str]:
    """Return what would leave samples or history behind, and the statements that delete those."""
    gone = {kind: list(plan.remove[kind]) if remove else [] for kind in ORPHANS_SQL}
    gone["objects"] += plan.moved()
    return [f"{name}: {samples:,} samples, {periods:,} alarm periods\n    "
            + " ".join(DELETE_ORPHANS[kind]).format(id=id_)
            for kind, keys in gone.items()
            for name, id_, samples, periods in query(
                connection, ORPHANS_SQL[kind], plan.rows(kind, keys, plan.have))
            if samples or periods]
