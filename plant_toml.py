"""The park's words: what a file or a database says, and how TOML writes it.

    [models.G97]
    type = "wind_turbine"

    [models.G97.features]
    wind_speed   = { unit = "m/s" }               # interval = "10 minutes" unless it is said
    active_power = { unit = "kW", interval = "10 minutes" }

    [models.G97.alarms]
    111 = { name = "storm", trigger = "wind_speed > 19" }
    112 = { name = "low output", trigger = "active_power < 40", gives_way_to = [111] }

    [objects]
    LAN = { model = "park" }
    "LAN-{01..50}" = { model = "G97", parent = "LAN" }   # fifty turbines
    LAN-51 = { model = "G97", parent = "LAN", bazefield_id = "0123456789ABCDEF" }

A trigger may also be a table, as alarms.trigger in the database. A range may have a list of
Bazefield ids, one for each object.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from csv_times import HOUR, SECOND, Interval

NUMBER = r"-?\d+(?:\.\d+)?"
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}", re.ASCII)
MOST_OBJECTS = 100_000
SHORT_TRIGGER = re.compile(
    r"\s*(.*\S)\s*([<>])\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*", re.ASCII)
THRESHOLDS = {">": "high", "<": "low"}

UNITS = {"second": Interval(0, 0, SECOND), "minute": Interval(0, 0, 60 * SECOND),
         "hour": Interval(0, 0, HOUR), "day": Interval(0, 1), "week": Interval(0, 7),
         "month": Interval(1), "year": Interval(12)}
TEN_MINUTES = Interval(0, 0, 600 * SECOND)


@dataclass(frozen=True)
class Model:
    type: str


@dataclass(frozen=True)
class Feature:
    unit: str | None
    interval: Interval


@dataclass(frozen=True)
class Alarm:
    name: str
    trigger: dict[str, Any]
    gives_way_to: tuple[int, ...]


@dataclass(frozen=True)
class Object:
    model: str
    parent: str | None
    bazefield_id: str | None


@dataclass
class Plant:
    """Types, models, features, alarms and objects by name, as a file or a database has them."""

    types: dict[str, None] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    features: dict[tuple[str, str], Feature] = field(default_factory=dict)  # by model and name
    alarms: dict[tuple[str, int], Alarm] = field(default_factory=dict)      # by model and number
    objects: dict[str, Object] = field(default_factory=dict)


def expand(text: str) -> list[str]:
    """Return the names that 'LAN-{01..50}' stands for. Raise `ValueError` if there are none."""
    parts, pieces, end = [], 1, 0
    for found in RANGE.finditer(text):
        first, last = int(found[1]), int(found[2])
        if first > last:
            raise ValueError(f"the range {found[0]} is empty")
        if (pieces := pieces * (last - first + 1)) > MOST_OBJECTS:
            raise ValueError(f"the range {found[0]} makes more than {MOST_OBJECTS:,} objects")
        parts += [[text[end:found.start()]],
                  [str(n).zfill(len(found[1])) for n in range(first, last + 1)]]
        end = found.end()
    return ["".join(name) for name in itertools.product(*parts, [text[end:]])]


def parse_interval(text: str) -> Interval:
    """Return what '10 minutes' or '1 hour 30 minutes' is. Raise `ValueError` if it is nothing."""
    found = re.findall(rf"({NUMBER}) *([a-z]+?)s?(?: +|$)", text)
    known = all(unit in UNITS for _, unit in found)
    if not re.fullmatch(rf"({NUMBER} *[a-z]+(?: +|$))+", text, re.ASCII) or not known:
        raise ValueError(f"{text!r} is no length of time; write '10 minutes', '1 hour', '1 day'")
    parts = [sum(Fraction(n) * UNITS[unit][i] for n, unit in found) for i in range(3)]
    if any(part.denominator > 1 for part in parts):
        raise ValueError(f"{text!r}: write whole months, days and microseconds")
    interval = Interval(*map(int, parts))
    if not 0 < interval.longest() < 100 * 366 * 24 * HOUR:
        raise ValueError(f"{text!r} is not more than 0 and less than 100 years")
    return interval


def write_interval(interval: Interval) -> str:
    """Return the interval so that parse_interval reads it, e.g. '1 hour 30 minutes'."""
    minutes, rest = divmod(interval.microseconds, 60 * SECOND)
    seconds = rest // SECOND if rest % SECOND == 0 else f"{rest / SECOND:.6f}".rstrip("0")
    parts = {"month": interval.months, "day": interval.days, "hour": minutes // 60,
             "minute": minutes % 60, "second": seconds}
    return " ".join(f"{n} {unit}{'s' * (n != 1)}" for unit, n in parts.items() if n)


def is_threshold(trigger: Mapping[str, Any]) -> bool:
    """Return whether Alarm Calculation is to calculate it; other triggers are kept as they are."""
    kind = trigger.get("trigger_type")
    return not isinstance(kind, str) or kind == "threshold"


def read_trigger(text: str) -> dict[str, Any] | None:
    """Return the trigger that 'wind_speed > 19' means, None if it is not written so."""
    if not (found := SHORT_TRIGGER.fullmatch(text)):
        return None
    value = float(found[3])
    return {"trigger_type": "threshold", "threshold_type": THRESHOLDS[found[2]],
            "feature_name": found[1],
            "threshold_value": int(value) if value.is_integer() else value}


def write_trigger(trigger: Any) -> Any:
    """Return a threshold as 'wind_speed > 19' if that says all of it, else the trigger itself."""
    for sign, kind in THRESHOLDS.items():
        if isinstance(trigger, dict) and trigger.get("threshold_type") == kind:
            text = f"{trigger.get('feature_name')} {sign} {trigger.get('threshold_value')}"
            if read_trigger(text) == trigger:
                return text
    return trigger


def write(plant: Plant) -> str:
    """Return the file that says what `plant` is. Raise `ValueError` if TOML cannot say it."""
    lines = []
    for name, model in sorted(plant.models.items()):
        head = f"models.{toml_key(name)}"
        lines += ["", f"[{head}]", f"type = {toml(model.type)}"]
        features = {k[1]: f for k, f in sorted(plant.features.items()) if k[0] == name}
        lines += ["", f"[{head}.features]"] if features else []
        lines += [f"{toml_key(k)} = {toml(feature_table(f))}" for k, f in features.items()]
        alarms = {k[1]: a for k, a in sorted(plant.alarms.items()) if k[0] == name}
        lines += ["", f"[{head}.alarms]"] if alarms else []
        lines += [alarm_line(name, number, a) for number, a in alarms.items()]
    lines += ["", "[objects]"]
    lines += [f"{toml_key(name)} = " + toml({k: v for k, v in vars(one).items() if v is not None})
              for name, one in sorted(plant.objects.items())]
    return "\n".join(lines[1:]) + "\n"


def feature_table(feature: Feature) -> dict[str, Any]:
    table = {"unit": feature.unit} if feature.unit else {}
    return table | ({} if feature.interval == TEN_MINUTES
                    else {"interval": write_interval(feature.interval)})


def alarm_line(model: str, number: int, alarm: Alarm) -> str:
    try:
        return f"{number} = {toml(alarm_table(alarm))}"
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"alarm {number} of model {model!r}: {exc}") from None


def alarm_table(alarm: Alarm) -> dict[str, Any]:
    table = {"name": alarm.name} if alarm.name else {}
    table |= {"trigger": write_trigger(alarm.trigger)}
    return table | ({"gives_way_to": list(alarm.gives_way_to)} if alarm.gives_way_to else {})


def toml_key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else toml(name)


def toml(value: Any) -> str:
    """Return a value as TOML writes it on one line. Raise `ValueError` for what it has not."""
    if value == {}:
        return "{}"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if value is None:
        raise ValueError("a trigger holds null, which TOML cannot say")
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
