"""Alarm Calculation: when did which alarm stand on which object?

parameters: {"object_names": ["LAN-01"], "alarm_ids": [111, 112], "start": "2026-03-01 00:00:00",
             "end": "2026-04-01 00:00:00", "no_samples": "fail"}; alarm_ids are the manufacturer's
             numbers; no_samples says what a window without any sample does to periods that are
             known there: "fail" (nothing, the step fails) or "clear" (they go)
steps:      one per object and alarm, the more important alarms of an object first
result:     {"periods": 3, "seconds": 5400, "samples": 144, "coverage": 1.0}: periods that lie in
            the window or reach into it, their time inside, the samples with a value that count
            there, and the share of the window that these stand for

A step replaces what its alarm's trigger found (alarms_detected) inside the window [start, end) and
nowhere else, then settles: it brings alarms_history up to date, of its alarm and of every alarm of
the object that gives way to it (alarms.non_overlapping_alarms), directly or through others. So a
year in one job, or cut in any way, in any order, or twice, leaves the same rows. See alarm_layers.
"""

from __future__ import annotations

import functools
import graphlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from alarm_layers import CALCULATE, COVERAGE, SETTLE
from jobs import (
    TIME,
    JobInstance,
    JobRequestError,
    JobStepError,
    parse_time,
    schema_problems,
)

SECONDS = {"type": "number", "minimum": 0, "maximum": 1e9}

#: JSON Schema of alarms.trigger
TRIGGER_SCHEMA = {
    "type": "object",
    "required": ["trigger_type", "threshold_type", "feature_name", "threshold_value"],
    "additionalProperties": False,
    "properties": {
        "trigger_type": {"const": "threshold"},
        "threshold_type": {"enum": ["high", "low"]},
        "feature_name": {"type": "string", "minLength": 1},
        "threshold_value": {"type": "number", "minimum": -1e300, "maximum": 1e300},
        "min_duration": SECONDS,
        "max_gap": SECONDS,
    },
}

OBJECTS_SQL = """
SELECT id, name, object_model_id
  FROM objects
 WHERE name = ANY(%(names)s)
"""

# All alarms of the models involved, not only those asked for: a cycle among the others matters.
ALARMS_SQL = """
SELECT a.object_model_id, a.manufacturer_id, a.id,
       ARRAY(SELECT n FROM pg_catalog.unnest(a.non_overlapping_alarms) AS n), f.id
  FROM alarms a
  LEFT JOIN features f ON f.object_model_id = a.object_model_id
                      AND f.name = a.trigger->>'feature_name'::text
 WHERE a.object_model_id = ANY(%(models)s)
"""

# A statement of its own, before all others: they must see what another job that was at the same
# object has committed, so their snapshots have to be taken after the wait. Their plans are made
# once and kept. Made on empty tables they would read them whole in every step from then on,
# however they grow; so they may be made of index scans only, whatever the values. What a step sets
# ends before the statement that records its end.
TAKE_TURNS_SQL = """
SELECT pg_advisory_xact_lock('alarms_history'::regclass::oid::int, %(object_id)s::int),
       set_config('enable_seqscan', 'off', true),
       set_config('plan_cache_mode', 'force_generic_plan', true)
"""

RULE_SQL = """
SELECT a.trigger::text, a.manufacturer_id, a.object_model_id,
       o.object_model_id = a.object_model_id, f.id, f.sample_interval::text,
       ARRAY(SELECT i.id
               FROM alarms i
              WHERE i.object_model_id = a.object_model_id
                AND i.manufacturer_id = ANY(a.non_overlapping_alarms))
  FROM alarms a
  JOIN objects o       ON o.id = %(object_id)s
  LEFT JOIN features f ON f.object_model_id = a.object_model_id
                      AND f.name = a.trigger->>'feature_name'::text
 WHERE a.id = %(alarm_id)s
"""

MODEL_SQL = """
SELECT name, ARRAY(SELECT name FROM features WHERE object_model_id = m.id ORDER BY name)
  FROM object_models m
 WHERE id = %(model_id)s
"""

OTHERS_SQL = """
SELECT manufacturer_id, id, ARRAY(SELECT n FROM pg_catalog.unnest(non_overlapping_alarms) AS n),
       trigger::text
  FROM alarms
 WHERE object_model_id = %(model_id)s
"""


@dataclass(frozen=True)
class Rule:
    """The step's alarm as it is defined now, a row of RULE_SQL."""

    trigger: str
    number: int
    model_id: int
    is_its_models: bool  # the object is of the model the alarm belongs to
    feature_id: int | None
    interval: str
    important_ids: list[int]

    @property
    def grid(self) -> str | None:
        """The interval, unless it has days or months ('1 mon 2 days'), which differ in length."""
        return None if re.search("[a-z]", self.interval) else self.interval


@dataclass(frozen=True)
class Found:
    """What a calculation has found and done, a row of CALCULATE_SQL."""

    samples: int
    coverage: float | None     # None: not known yet, the samples are not on the window's grid
    periods: int
    seconds: float
    stood: bool                # something was known to have stood in the window before
    low: datetime | None       # from when to when the history changed
    high: datetime | None
    others: bool | None        # whether there may be something to settle beside this alarm


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
            "no_samples": {"enum": ["fail", "clear"], "default": "fail",
                           "description": "clear: such a window erases"},
        },
    }

    def __init__(self, job_id: int, skip_test: bool = True) -> None:
        super().__init__(job_id, skip_test)

    # The steps.

    def _create_steps(self) -> list[dict[str, Any]]:
        objects = self._objects()
        alarms = self._alarms({model_id for _, _, model_id in objects})
        self._require(objects, alarms)
        order = {model_id: important_first(of_model, self.parameters["alarm_ids"])
                 for model_id, of_model in alarms.items()}
        return [{"name": f"{name} / alarm {number}", "object_id": object_id,
                 "alarm_id": alarms[model_id][number]["id"],
                 "feature_id": alarms[model_id][number]["feature_id"]}
                for object_id, name, model_id in objects for number in order[model_id]]

    def _objects(self) -> list[tuple[int, str, int]]:
        """Return (id, name, model) of the objects asked for that exist, in the order asked for."""
        position = {name: n for n, name in enumerate(self.parameters["object_names"])}
        rows = self.connection.execute(OBJECTS_SQL, {"names": list(position)}).fetchall()
        return sorted(rows, key=lambda row: position[row[1]])

    def _alarms(self, models: set[int]) -> dict[int, dict[int, dict[str, Any]]]:
        """Return the alarms of each model by manufacturer id."""
        alarms: dict[int, dict[int, dict[str, Any]]] = {model_id: {} for model_id in models}
        for model_id, number, alarm_id, important, feature_id in self.connection.execute(
                ALARMS_SQL, {"models": list(models)}):
            alarms[model_id][number] = {"id": alarm_id, "important": important,
                                        "feature_id": feature_id}
        return alarms

    def _require(self, objects: list[tuple[int, str, int]],
                 alarms: dict[int, dict[int, Any]]) -> None:
        """Raise `JobRequestError` naming every unknown object and every alarm a model lacks."""
        known = {name for _, name, _ in objects}
        problems = [f"unknown object {name!r}"
                    for name in self.parameters["object_names"] if name not in known]
        for model_id in alarms:
            if missing := [n for n in self.parameters["alarm_ids"] if n not in alarms[model_id]]:
                of = [name for _, name, model in objects if model == model_id]
                problems.append(f"alarms {missing} are not defined for the model of "
                                + ", ".join(of[:5])
                                + (f" and {len(of) - 5} more" if len(of) > 5 else ""))
        if problems:
            raise JobRequestError("\n  ".join([
                "Nothing was calculated:", *problems,
                "see the tables objects and alarms; insert a corrected job"]))

    # One step.

    def _run_step(self, step_id: int) -> dict[str, Any]:
        self._execute(TAKE_TURNS_SQL)
        rule = self._rule()
        found = self._calculate(rule)
        if found.others:
            self._settle_others(rule, (found.low, found.high))
        return {"periods": found.periods, "seconds": found.seconds,
                "samples": found.samples, "coverage": found.coverage}

    def _execute(self, sql: str, **params: Any) -> tuple[Any, ...] | None:
        """Run a statement for the step's object and alarm; return its first row."""
        step = {"object_id": self.step["object_id"], "alarm_id": self.step["alarm_id"]}
        return self.connection.execute(sql, step | params, prepare=True).fetchone()

    def _rule(self) -> Rule:
        """Return what is to be calculated; raise `JobStepError` if it cannot be."""
        row = self._execute(RULE_SQL)
        if row is None:
            raise JobStepError("The object, or the alarm in the table alarms, was deleted after "
                               "the job was created; insert a new job")
        rule = Rule(*row)
        if self.step["alarm_id"] in rule.important_ids:
            self._model(rule)  # says that it is a circle
        if rule.is_its_models and rule.feature_id and not read_trigger(rule.trigger)[1]:
            return rule
        model, features = self._execute(MODEL_SQL, model_id=rule.model_id)
        if not rule.is_its_models:
            raise JobStepError(f"The object is no longer of the model {model!r}, whose alarm "
                               "this is; insert a new job")
        trigger, problems = read_trigger(rule.trigger)
        raise JobStepError("\n  ".join([
            f"Malformed trigger of alarm {rule.number} of model {model!r}; "
            "nothing was changed:", *problems, *feature_problems(trigger, features),
            "mend alarms.trigger, then jobctl retry"]))

    def _calculate(self, rule: Rule) -> Found:
        """Detect in the window and settle the alarm's history.

        Raise `JobStepError` if no sample counts there but something is known to have stood, which
        is not to be erased then.
        """
        trigger, _ = read_trigger(rule.trigger)
        values = shape(trigger) | {
            "object_id": self.step["object_id"], "alarm_id": self.step["alarm_id"],
            "start": parse_time(self.parameters["start"]),
            "end": parse_time(self.parameters["end"]),
            "model_id": rule.model_id, "number": rule.number, "important_ids": rule.important_ids,
            "feature_id": rule.feature_id, "interval": rule.interval, "grid": rule.grid,
            "threshold": float(trigger["threshold_value"])}
        found = Found(*CALCULATE[trigger["threshold_type"]].run(self.connection, values))
        if found.coverage is None:
            samples, coverage = COVERAGE.run(self.connection, values)
            found = replace(found, samples=samples, coverage=coverage)
        if found.stood and not found.samples and self.parameters.get("no_samples") != "clear":
            raise JobStepError(
                f"No sample of {trigger['feature_name']!r} in the window has a value, but "
                f"alarm {rule.number} is known to have stood there; nothing was changed. "
                "Load the samples, then jobctl retry; or ask with "
                '"no_samples": "clear" to erase it')
        return found

    def _settle_others(self, rule: Rule, span: tuple[datetime | None, datetime | None]) -> None:
        """Settle what gives way to the step's alarm, whose history changed within `span`."""
        changed = {rule.number: span}
        alarms = self._model(rule)
        for number, alarm in alarms.items():
            spans = [changed[n] for n in alarm["important"] if n in changed]
            if spans and is_calculated(alarm["trigger"]):
                low, high = SETTLE.run(self.connection, {
                    "object_id": self.step["object_id"], "alarm_id": alarm["id"],
                    "important_ids": [alarms[n]["id"] for n in alarm["important"] if n in alarms],
                    "start": min(low for low, _ in spans), "end": max(high for _, high in spans),
                    **shape(read_trigger(alarm["trigger"])[0])})
                if low:
                    changed[number] = low, high

    def _model(self, rule: Rule) -> dict[int, dict[str, Any]]:
        """Return the model's alarms by number, the more important ones first."""
        alarms = {number: {"id": alarm_id, "important": important, "trigger": trigger}
                  for number, alarm_id, important, trigger in self.connection.execute(
                      OTHERS_SQL, {"model_id": rule.model_id})}
        try:
            return {number: alarms[number] for number in important_first(alarms, alarms)}
        except JobRequestError as exc:
            raise JobStepError(str(exc)) from None


def shape(trigger: Mapping[str, Any]) -> dict[str, str]:
    """Return what the statements need of a trigger's min_duration and max_gap, as intervals."""
    min_duration, max_gap = trigger.get("min_duration", 0), trigger.get("max_gap", 0)
    lengths = {"min_duration": min_duration, "max_gap": max_gap,
               "reach": min_duration + 2 * max_gap}
    return {name: f"{length // 3600:.0f} h {length % 3600:.6f} s"  # PostgreSQL 14 reads no more
            for name, length in lengths.items()}                   # than 2**31 seconds


def important_first(alarms: Mapping[int, Mapping[str, Any]], numbers: Iterable[int]) -> list[int]:
    """Return `numbers` so that every alarm comes after those more important than it.

    `alarms`: for each number of the model "important", a list of numbers; unknown ones are left
    out. Raise `JobRequestError` naming the cycle if alarms are more important than each other.
    """
    graph = {number: sorted(set(alarm["important"]) & set(alarms))
             for number, alarm in sorted(alarms.items())}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as exc:
        cycle = " -> ".join(map(str, exc.args[1]))
        raise JobRequestError("Nothing was calculated: alarms.non_overlapping_alarms goes round "
                              f"in a circle: {cycle}; take one of them out") from None
    wanted = set(numbers)
    return [number for number in order if number in wanted]


@functools.lru_cache(1000)
def read_trigger(text: str) -> tuple[Any, tuple[str, ...]]:
    """Return a trigger and what is wrong with it whatever the model, each as '$.path: what'."""
    try:
        trigger = json.loads(text)
    except (ValueError, RecursionError) as exc:  # a number or a depth beyond what Python reads
        return None, (f"$: {exc}",)
    return trigger, tuple(shape_problems(trigger))


def shape_problems(trigger: Any) -> list[str]:
    """Return what TRIGGER_SCHEMA has against a trigger, with the keys there are if one is not."""
    known = TRIGGER_SCHEMA["properties"]
    unknown = isinstance(trigger, dict) and not trigger.keys() <= known.keys()
    return schema_problems(trigger, TRIGGER_SCHEMA) + (
        [f"$: the keys of a trigger are {', '.join(known)}"] if unknown else [])


def is_calculated(trigger_text: str) -> bool:
    """Whether such an alarm's history is ours to change: a threshold, and of a usable shape."""
    trigger, problems = read_trigger(trigger_text)
    return (isinstance(trigger, dict) and trigger.get("trigger_type") == "threshold"
            and not any(p.startswith(("$.min_duration", "$.max_gap")) for p in problems))


def feature_problems(trigger: Any, features: list[str]) -> list[str]:
    """Return what is wrong with a trigger's feature on a model that has these `features`."""
    name = trigger.get("feature_name") if isinstance(trigger, dict) else None
    if not isinstance(name, str) or name in features:
        return []
    return [f"$.feature_name: the model has no feature {name!r}; "
            f"it has {', '.join(features) or 'none'}"]


def trigger_problems(trigger: Any, features: list[str]) -> list[str]:
    """Return what is wrong with a trigger of a model with these `features`; [] if usable."""
    return shape_problems(trigger) + feature_problems(trigger, features)
