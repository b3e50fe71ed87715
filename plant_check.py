"""What is wrong with a park's file? Everything at once, each with its line."""

from __future__ import annotations

import contextlib
import graphlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from csv_layout import SETTINGS
from plant_toml import (
    TEN_MINUTES,
    Alarm,
    Feature,
    Model,
    Object,
    Plant,
    expand,
    is_threshold,
    parse_interval,
    read_trigger,
)

NO_NUL = "^[^\0]*$"  # which PostgreSQL cannot store
NAME = {"type": "string", "minLength": 1, "pattern": NO_NUL}
#: JSON Schema of the file; what it cannot say is checked in _Check
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "models": {"type": "object", "propertyNames": NAME, "additionalProperties": {
            "type": "object",
            "required": ["type"],
            "additionalProperties": False,
            "properties": {
                "type": NAME,
                "features": {"type": "object", "propertyNames": NAME, "additionalProperties": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"unit": NAME, "interval": NAME}}},
                "alarms": {"type": "object", "additionalProperties": {
                    "type": "object",
                    "required": ["trigger"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "pattern": NO_NUL},
                        "trigger": {"type": ["string", "object"]},
                        "gives_way_to": {"type": "array", "items": {"type": "integer"}}}}},
            }}},
        "objects": {"type": "object", "propertyNames": NAME, "additionalProperties": {
            "type": "object",
            "required": ["model"],
            "additionalProperties": False,
            "properties": {"model": NAME, "parent": NAME, "bazefield_id": {
                "type": ["string", "array"], "items": {"type": "string"}}}}},
        "csv": SETTINGS,
    },
}

KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
PATH = rf"{KEY}(?:\s*\.\s*{KEY})*"
HEADER_LINE = re.compile(rf"\s*\[\s*({PATH})\s*\]\s*(?:#.*)?")
KEY_LINE = re.compile(rf"\s*({PATH})\s*=.*")

Path_ = tuple[str, ...]


class PlantError(ValueError):
    """The file is wrong; the text says all that is, each with its line."""


def read(path: Path) -> Plant:
    """Return what the file says. Raise `PlantError` with all its problems, `OSError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise PlantError(f"{path}: not UTF-8, as TOML must be: {exc}") from None
    check = _Check(text)
    if check.problems:
        raise PlantError("\n".join(f"{path}:{line}: {problem}" for line, problem in
                                   sorted(dict.fromkeys(check.problems))))
    return check.plant


def places(text: str) -> Iterator[tuple[Path_, int, bool]]:
    """Yield (path, line, is it a header?) of a TOML text's keys, for tomllib tells no lines."""
    header: Path_ = ()
    for number, line in enumerate(text.split("\n"), 1):
        with contextlib.suppress(tomllib.TOMLDecodeError):  # it will say so itself
            if found := HEADER_LINE.fullmatch(line.rstrip()):
                header = _keys(found[1])
                yield header, number, True
            elif found := KEY_LINE.fullmatch(line.rstrip()):
                yield header + _keys(found[1]), number, False


def _keys(text: str) -> Path_:
    keys, inside = [], tomllib.loads(f"{text} = 0")
    while isinstance(inside, dict):
        (key, inside), = inside.items()
        keys.append(key)
    return tuple(keys)


class _Check:
    """One look through a file: `plant` is what it says, `problems` are (line, what is wrong)."""

    def __init__(self, text: str) -> None:
        self.plant = Plant()
        self.problems: list[tuple[int, str]] = []
        self._places: dict[Path_, int] = {}
        self._ids: dict[str, str] = {}
        self._origins: dict[str, Path_] = {}
        document = self._parse(text)
        if document is None:
            return
        self._schema(document)
        for name, model in _tables(document.get("models")):
            self._model(name, model)
        for name, one in _tables(document.get("objects")):
            self._objects(name, one)
        self._relations()

    def _line(self, path: Path_) -> int:
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, 1)

    def _problem(self, path: Path_, text: str) -> None:
        self.problems.append((self._line(path), text))

    def _parse(self, text: str) -> dict[str, Any] | None:
        """Return the document, without keys that come a second time; None if it is no TOML."""
        for path, number, _ in places(text):
            self._places.setdefault(path, number)
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            return self._parse_once_each(text, exc)
        except (ValueError, RecursionError) as exc:  # a number or a depth beyond what Python reads
            self.problems.append((1, f"cannot be read: {exc}"))
            return None

    def _parse_once_each(self, text: str, error: ValueError) -> dict[str, Any] | None:
        """Return the document without the keys that come a second time, which are problems."""
        lines = text.split("\n")
        for path, number, is_header in places(text):
            if self._places[path] != number:
                self.problems.append((number, f"{'.'.join(path)} stands here for the second time; "
                                              f"first in line {self._places[path]}"))
                lines[number - 1] = lines[number - 1] if is_header else ""
        with contextlib.suppress(ValueError, RecursionError):
            if self.problems:
                return tomllib.loads("\n".join(lines))
        if not self.problems:
            found = re.search(r"line (\d+)", str(error))
            self.problems.append((int(found[1]) if found else len(lines), f"not TOML: {error}"))
        return None

    def _schema(self, document: dict[str, Any]) -> None:
        from jsonschema import Draft202012Validator
        for error in Draft202012Validator(SCHEMA).iter_errors(document):
            path = tuple(map(str, error.absolute_path))
            where = ".".join(path) or "the file"
            if "propertyNames" in error.absolute_schema_path:
                path = *path, error.instance
            if error.validator == "additionalProperties":
                for key in set(error.instance) - set(error.schema["properties"]):
                    self._problem((*path, key), f"{where}: unknown key {key!r}; known are "
                                                f"{', '.join(error.schema['properties'])}")
            else:
                self._problem(path, f"{where}: {error.message}")

    # ------------------------------------------------------------ one by one

    def _model(self, name: str, model: dict[str, Any]) -> None:
        if not isinstance(model.get("type"), str):
            return
        self.plant.types[model["type"]] = None
        self.plant.models[name] = Model(model["type"])
        for feature, one in _tables(model.get("features")):
            path = ("models", name, "features", feature)
            try:
                interval = (parse_interval(one["interval"]) if isinstance(one.get("interval"), str)
                            else TEN_MINUTES)
            except ValueError as exc:
                self._problem(path, f"feature {feature!r}: interval {exc}")
                interval = TEN_MINUTES
            self.plant.features[name, feature] = Feature(one.get("unit"), interval)
        for number, one in _tables(model.get("alarms")):
            self._alarm(name, number, one)

    def _alarm(self, model: str, text: str, one: dict[str, Any]) -> None:
        path = ("models", model, "alarms", text)
        if not re.fullmatch(r"-?\d{1,10}", text, re.ASCII) or not -2**31 <= int(text) < 2**31:
            self._problem(path, f"alarm {text!r}: the key is its number, like 111")
            return
        number = int(text)
        if (model, number) in self.plant.alarms:
            self._problem(path, f"alarm {number} of model {model!r} stands here a second time")
        features = [feature for of, feature in self.plant.features if of == model]
        trigger = self._trigger(path, number, one.get("trigger"), features)
        ways = one.get("gives_way_to", [])
        self.plant.alarms[model, number] = Alarm(
            one.get("name", ""), trigger,
            tuple(sorted({n for n in ways if isinstance(n, int)})) if isinstance(ways, list)
            else ())

    def _trigger(self, path: Path_, number: int, trigger: Any, features: list[str]) -> Any:
        """Return the trigger as the database keeps it; what is wrong with it is a problem."""
        path = (*path, "trigger")
        if isinstance(trigger, str):
            if (short := read_trigger(trigger)) is None:
                self._problem(path, f"alarm {number}: trigger {trigger!r} is not like "
                                    "\"wind_speed > 19\"; or write a table")
                return {}
            trigger = short
        if isinstance(trigger, dict) and is_threshold(trigger):
            from alarm_calc import trigger_problems
            for problem in trigger_problems(trigger, features):
                self._problem(path, f"alarm {number}: trigger{problem.removeprefix('$')}")
        try:
            text = json.dumps(trigger, allow_nan=False)
        except (TypeError, ValueError) as exc:
            self._problem(path, f"alarm {number}: trigger: no JSON can say it: {exc}")
        else:
            if "\\u0000" in text.replace("\\\\", ""):
                self._problem(path, f"alarm {number}: trigger: PostgreSQL cannot store \\u0000")
        return trigger

    def _objects(self, text: str, one: dict[str, Any]) -> None:
        """Add the objects of one line; a range of names is many."""
        path = ("objects", text)
        try:
            names = expand(text)
        except ValueError as exc:
            self._problem(path, f"objects {text!r}: {exc}")
            return
        ids = one.get("bazefield_id")
        ids = ids if isinstance(ids, list) else [ids]
        if len(ids) != len(names) and ids != [None]:
            self._problem(path, f"objects {text!r}: {len(ids)} Bazefield ids for {len(names)} "
                                "objects; write a list with one for each")
            ids = [None]
        for name, bazefield_id in zip(names, ids * len(names) if len(ids) == 1 else ids,
                                      strict=True):
            self._object(path, name, one, bazefield_id)

    def _object(self, path: Path_, name: str, one: dict[str, Any], bazefield_id: Any) -> None:
        if name in self.plant.objects:
            self._problem(path, f"object {name!r} stands here a second time")
        if isinstance(bazefield_id, str):
            if not re.fullmatch("[0-9A-Fa-f]{16}", bazefield_id):
                self._problem(path, f"object {name!r}: Bazefield id {bazefield_id!r} is not 16 "
                                    "hexadecimal digits")
            if (other := self._ids.setdefault(bazefield_id.upper(), name)) != name:
                self._problem(path, f"object {name!r} has the Bazefield id of {other!r}")
        self._origins[name] = path  # the line of its range
        self.plant.objects[name] = Object(one.get("model", ""), one.get("parent"), bazefield_id)

    # ------------------------------------------------------------ how they hang together

    def _relations(self) -> None:
        plant = self.plant
        for name, one in plant.objects.items():
            path = self._origins[name]
            if isinstance(one.model, str) and one.model and one.model not in plant.models:
                self._problem(path, f"object {name!r}: there is no model {one.model!r}; "
                                    f"there are {', '.join(plant.models) or 'none'}")
            if isinstance(one.parent, str) and one.parent not in plant.objects:
                self._problem(path, f"object {name!r}: there is no parent {one.parent!r}")
        for circle in circles({name: {one.parent} & plant.objects.keys()
                               for name, one in plant.objects.items()}):
            path = min((self._origins[name] for name in circle), key=self._line)
            self._problem(path, f"object {circle[0]!r} stands under itself: "
                                                  + " under ".join(reversed(circle)))
        for model in plant.models:
            self._priorities(model)

    def _priorities(self, model: str) -> None:
        alarms = {number: alarm for (of, number), alarm in self.plant.alarms.items()
                  if of == model}
        for number, alarm in alarms.items():
            for other in alarm.gives_way_to:
                if other not in alarms:
                    self._problem(("models", model, "alarms", str(number)),
                                  f"alarm {number} gives way to {other}, which model {model!r} "
                                  f"does not have; it has {', '.join(map(str, alarms))}")
        for circle in circles({number: set(alarm.gives_way_to) & alarms.keys()
                               for number, alarm in alarms.items()}):
            path = min((("models", model, "alarms", str(n)) for n in circle), key=self._line)
            self._problem(path, "alarms give way to each other in a circle: "
                          + " -> ".join(map(str, reversed(circle))) + "; take one out")


def _tables(value: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    """Return the tables inside a table; what is none is the schema's business."""
    items = value.items() if isinstance(value, dict) else ()
    return [(key, inside) for key, inside in items if isinstance(inside, dict)]


def circles(before: Mapping[Any, set[Any]]) -> Iterator[list[Any]]:
    """Yield the circles of a graph, each as a list that ends where it begins."""
    left = {node: set(others) for node, others in before.items()}
    while True:
        try:
            graphlib.TopologicalSorter(left).prepare()
            return
        except graphlib.CycleError as exc:
            circle = exc.args[1]
            left[circle[1]].discard(circle[0])
            yield circle
