"""Alarm Calculation: when did which alarm stand on which object?

parameters: {"object_names": ["LAN-01"], "alarm_ids": [111, 112], "start": "2026-03-01 00:00:00",
             "end": "2026-04-01 00:00:00"}; alarm_ids are the manufacturer's numbers
steps:      one per object and alarm, the more important alarms of an object first
result:     {"periods": 3, "seconds": 5400}: periods that lie in the window or reach into it, their
            time inside the window

The sample at T stands for (T - sample_interval, T]; the window is [start, end). Time is continuous
here, so which end of a range is closed does not matter; all ranges are written [ ). What a more
important alarm covers (alarms.non_overlapping_alarms) is taken out. The result replaces the history
of this object and alarm inside the window and nothing outside, and periods that touch are one row:
so a year in one job, or cut in any way, in any order, or twice, leaves the same rows.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable
from typing import Any

from jobs import (
    TIME,
    JobInstance,
    JobRequestError,
    JobStepError,
    parse_time,
    schema_problems,
)

#: JSON Schema of alarms.trigger
TRIGGER_SCHEMA = {
    "type": "object",
    "required": ["trigger_type", "threshold_type", "feature_name", "threshold_value"],
    "properties": {
        "trigger_type": {"const": "threshold"},
        "threshold_type": {"enum": ["high", "low"]},
        "feature_name": {"type": "string", "minLength": 1},
        "threshold_value": {"type": "number", "minimum": -1e300, "maximum": 1e300},
    },
}

OBJECTS_SQL = """
SELECT id, name, object_model_id
  FROM objects
 WHERE name = ANY(%(names)s)
"""

# All alarms of the models involved, not only those asked for: a cycle among the others matters too.
ALARMS_SQL = """
SELECT a.id, a.object_model_id, a.manufacturer_id, a.non_overlapping_alarms, f.id AS feature_id, m.name AS model
  FROM alarms a
  JOIN object_models m ON m.id = a.object_model_id
  LEFT JOIN features f ON f.object_model_id = a.object_model_id AND f.name = a.trigger->>'feature_name'::text
 WHERE a.object_model_id = ANY(%(models)s)
"""

# Before the calculation and as a statement of its own: the calculation must see what another job
# that was at the same object and alarm has committed, so its snapshot has to be taken after the wait.
# The plan of the calculation is made once and kept; made on an empty history it would read the whole
# table in every step from then on, however it grows. So it may only be made of index scans.
TAKE_TURNS_SQL = """
SELECT pg_advisory_xact_lock('alarms_history'::regclass::oid::int,
                             hashint8(object_id::bigint << 32 | alarm_id::bigint)),
       set_config('enable_seqscan', 'off', true)
  FROM job_steps
 WHERE id = %(step_id)s
"""

# One object, one alarm, one window, as set algebra on multiranges:
#   sample intervals that trigger, cut to the window  (found)
#   minus what more important alarms cover            (important)
#   plus the history outside the window               (outside)
# joined where they touch (period), then written with as few changes as possible: a row that stays
# the same is not touched, so computing again changes nothing, not even ids.
# rule is empty if the trigger is malformed or an important alarm's step failed in this job: nothing
# is changed then, and explain() finds out why.
# A sample triggers if above < value < below, where above NULL is no bound. NaN is greater than any
# number in PostgreSQL, so `value < 'NaN'` keeps NaN out of an alarm that has no upper bound. The lower
# bound is looked at first, because it turns most samples of most alarms away.
# Samples are read from the index alone (primary key of feature_values), in its order. The columns of
# rule stand in scalar subqueries: a join would hand every sample through one more node, twice the time,
# and would let PostgreSQL read the history from end to end if it was small when the plan was made.
CALCULATE_SQL = """
WITH rule AS MATERIALIZED (
    SELECT s.object_id, a.id AS alarm_id, f.id AS feature_id, f.sample_interval,
           CASE a.trigger->>'threshold_type'::text
                WHEN 'high' THEN (a.trigger->>'threshold_value'::text)::float8 END AS above,
           CASE a.trigger->>'threshold_type'::text
                WHEN 'low'  THEN (a.trigger->>'threshold_value'::text)::float8 ELSE 'NaN' END AS below,
           ARRAY(SELECT i.id
                   FROM alarms i
                  WHERE i.object_model_id = a.object_model_id
                    AND i.manufacturer_id = ANY(a.non_overlapping_alarms)) AS important_ids
      FROM job_steps s
      JOIN alarms a   ON a.id = s.alarm_id
      JOIN features f ON f.object_model_id = a.object_model_id
                     AND f.name = a.trigger->>'feature_name'::text
     WHERE s.id = %(step_id)s
       AND a.trigger->>'trigger_type'::text = 'threshold'
       AND a.trigger->>'threshold_type'::text IN ('high', 'low')
       AND CASE WHEN jsonb_typeof(a.trigger->'threshold_value'::text) = 'number'
                THEN abs((a.trigger->>'threshold_value'::text)::numeric) <= 1e300 END
       AND NOT EXISTS (
             SELECT FROM job_steps other
              WHERE other.job_instance_id = s.job_instance_id
                AND other.position BETWEEN s.position - %(alarms)s AND s.position - 1
                AND other.object_id = s.object_id
                AND other.state = 'Failed'
                AND other.parameters->'manufacturer_id'::text <@ pg_catalog.to_jsonb(a.non_overlapping_alarms))
), sample AS (
    SELECT pg_catalog.range_agg(tstzrange(v.timestamp - (SELECT sample_interval FROM rule), v.timestamp)) AS triggering
      FROM feature_values v
     WHERE v.object_id = (SELECT object_id FROM rule)
       AND v.feature_id = (SELECT feature_id FROM rule)
       AND v.timestamp > %(start)s
       AND v.timestamp < %(end)s::timestamptz + (SELECT sample_interval FROM rule)
       AND (v.value > (SELECT above FROM rule)) IS NOT FALSE
       AND v.value < (SELECT below FROM rule)
), important AS (
    SELECT pg_catalog.range_agg(tstzrange(h.start_time, h.end_time)) AS covered
      FROM alarms_history h
     WHERE h.object_id = (SELECT object_id FROM rule)
       AND h.alarm_id = ANY((SELECT important_ids FROM rule)::int[])
       AND h.start_time < %(end)s
       AND h.end_time > %(start)s
), found AS (
    SELECT COALESCE(triggering, '{}')
           OPERATOR(pg_catalog.*) pg_catalog.tstzmultirange(pg_catalog.tstzrange(%(start)s, %(end)s))
           OPERATOR(pg_catalog.-) COALESCE(covered, '{}') AS inside
      FROM sample, important
), old AS MATERIALIZED (
    SELECT h.id, h.start_time, h.end_time
      FROM alarms_history h
     WHERE h.object_id = (SELECT object_id FROM rule)
       AND h.alarm_id = (SELECT alarm_id FROM rule)
       AND h.start_time <= %(end)s
       AND h.end_time >= %(start)s
), outside AS (
    SELECT COALESCE(pg_catalog.range_agg(tstzrange(start_time, end_time)), '{}')
           OPERATOR(pg_catalog.-) pg_catalog.tstzmultirange(pg_catalog.tstzrange(%(start)s, %(end)s)) AS kept
      FROM old
), period AS MATERIALIZED (
    SELECT pg_catalog.lower(p) AS start_time, pg_catalog.upper(p) AS end_time
      FROM found, outside, pg_catalog.unnest(found.inside OPERATOR(pg_catalog.+) outside.kept) AS p
), gone AS (
    DELETE FROM alarms_history
     WHERE id = ANY(ARRAY(SELECT id FROM old WHERE start_time NOT IN (SELECT start_time FROM period)))
), changed AS (
    UPDATE alarms_history h
       SET end_time = period.end_time
      FROM period
     WHERE h.id = ANY(ARRAY(SELECT old.id
                              FROM old
                              JOIN period p ON p.start_time = old.start_time AND p.end_time <> old.end_time))
       AND period.start_time = h.start_time
), added AS (
    INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time)
    SELECT rule.object_id, rule.alarm_id, period.start_time, period.end_time
      FROM rule, period
     WHERE period.start_time NOT IN (SELECT start_time FROM old)
)
SELECT (SELECT count(*) FROM period WHERE start_time < %(end)s AND end_time > %(start)s) AS periods,
       (SELECT COALESCE(sum(extract(epoch FROM pg_catalog.upper(r) - pg_catalog.lower(r))), 0)::float8
          FROM found, pg_catalog.unnest(found.inside) AS r) AS seconds
  FROM rule
"""

EXPLAIN_SQL = """
SELECT a.trigger, a.manufacturer_id, m.name AS model,
       ARRAY(SELECT f.name FROM features f WHERE f.object_model_id = m.id ORDER BY f.name) AS features
  FROM job_steps s
  JOIN alarms a        ON a.id = s.alarm_id
  JOIN object_models m ON m.id = a.object_model_id
 WHERE s.id = %(step_id)s
"""


class JobAlarmCalc(JobInstance):
    """Compute threshold alarms of a list of objects over a period."""

    _name = "Alarm Calculation"
    _step_in_transaction = True
    _parameters_schema = {
        "type": "object",
        "required": ["object_names", "alarm_ids", "start", "end"],
        "additionalProperties": False,
        "properties": {
            "object_names": {"type": "array", "minItems": 1, "uniqueItems": True,
                             "items": {"type": "string", "minLength": 1}},
            "alarm_ids": {"type": "array", "minItems": 1, "uniqueItems": True,
                          "items": {"type": "integer", "minimum": -2**31, "maximum": 2**31 - 1},
                          "description": "manufacturer ids"},
            "start": TIME,
            "end": TIME,
        },
    }

    def __init__(self, job_id: int, skip_test: bool = True) -> None:
        super().__init__(job_id, skip_test)

    def _create_steps(self) -> list[dict[str, Any]]:
        objects = self._objects()
        alarms = self._alarms({row[2] for row in objects})
        self._require(objects, alarms)
        order = {model: important_first(alarms[model], self.parameters["alarm_ids"]) for model in alarms}
        return [{"name": f"{name} / alarm {number}", "object_id": object_id,
                 "alarm_id": alarms[model][number]["id"], "feature_id": alarms[model][number]["feature_id"],
                 "parameters": {"manufacturer_id": number}}
                for object_id, name, model in objects for number in order[model]]

    def _objects(self) -> list[tuple[int, str, int]]:
        """Return (id, name, model) of the objects asked for that exist, in the order asked for."""
        names = self.parameters["object_names"]
        rows = self.connection.execute(OBJECTS_SQL, {"names": names}).fetchall()
        return sorted(rows, key=lambda row: names.index(row[1]))

    def _alarms(self, models: set[int]) -> dict[int, dict[int, dict[str, Any]]]:
        """Return the alarms of each model by manufacturer id."""
        alarms: dict[int, dict[int, dict[str, Any]]] = {model: {} for model in models}
        for alarm_id, model, number, important, feature_id, model_name in self.connection.execute(
                ALARMS_SQL, {"models": list(models)}):
            alarms[model][number] = {"id": alarm_id, "important": important, "feature_id": feature_id,
                                     "model": model_name}
        return alarms

    def _require(self, objects: list[tuple[int, str, int]], alarms: dict[int, dict[int, Any]]) -> None:
        """Raise `JobRequestError` naming every unknown object and every alarm a model lacks."""
        known = {name for _, name, _ in objects}
        problems = [f"unknown object {name!r}"
                    for name in self.parameters["object_names"] if name not in known]
        for model in alarms:
            if missing := [n for n in self.parameters["alarm_ids"] if n not in alarms[model]]:
                of = [name for _, name, m in objects if m == model]
                problems.append(f"alarms {missing} are not defined for the model of {', '.join(of[:5])}"
                                + (f" and {len(of) - 5} more" if len(of) > 5 else ""))
        if problems:
            raise JobRequestError("\n  ".join(["Nothing was calculated:", *problems,
                                               "see the tables objects and alarms; insert a corrected job"]))

    def _run_step(self, step_id: int) -> dict[str, Any]:
        window = {"start": parse_time(self.parameters["start"]), "end": parse_time(self.parameters["end"])}
        self.connection.execute(TAKE_TURNS_SQL, {"step_id": step_id})
        row = self.connection.execute(CALCULATE_SQL, window | {
            "step_id": step_id, "alarms": len(self.parameters["alarm_ids"])}).fetchone()
        if row is None:
            raise JobStepError(self._explain_refusal(step_id))
        return dict(zip(("periods", "seconds"), row, strict=True))

    def _explain_refusal(self, step_id: int) -> str:
        """Return why CALCULATE_SQL did not calculate."""
        row = self.connection.execute(EXPLAIN_SQL, {"step_id": step_id}).fetchone()
        if row is None:
            return "The alarm was deleted from the table alarms after the job was created"
        trigger, number, model, features = row
        if problems := trigger_problems(trigger, features):
            return "\n  ".join([f"Malformed trigger of alarm {number} of model {model!r}; nothing was changed:",
                                *problems, "mend alarms.trigger, then jobctl retry"])
        return ("Not calculated, because the step of a more important alarm of this object failed in this job; "
                "mend that one, then jobctl retry")


def important_first(alarms: dict[int, dict[str, Any]], numbers: Iterable[int]) -> list[int]:
    """Return `numbers` so that every alarm comes after those more important than it.

    Raise `JobRequestError` naming the cycle if alarms are more important than each other.
    """
    graph = {number: sorted(set(alarm["important"]) & set(alarms)) for number, alarm in sorted(alarms.items())}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as exc:
        cycle = " -> ".join(map(str, exc.args[1]))
        raise JobRequestError(f"Nothing was calculated: alarms.non_overlapping_alarms goes round in a circle: {cycle}; "
                              "take one of them out") from None
    wanted = set(numbers)
    return [number for number in order if number in wanted]


def trigger_problems(trigger: Any, features: list[str]) -> list[str]:
    """Return what is wrong with a trigger of a model with these `features`, [] if it can be used."""
    problems = schema_problems(trigger, TRIGGER_SCHEMA)
    name = trigger.get("feature_name") if isinstance(trigger, dict) else None
    if isinstance(name, str) and name not in features:
        problems.append(f"$.feature_name: the model has no feature {name!r}; it has {', '.join(features) or 'none'}")
    return problems
