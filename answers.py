"""What a job file may answer: steps, results and errors, checked and put into words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from parameters import JobRequestError, shorten

MOST_PROBLEMS = 10
MOST_VALUES = 1_000_000  # in one result: lists that hold one list twice, and so on, never end
MOST_TEXT = 50_000       # characters of one error: it may quote whatever went wrong

#: key of a step -> the types it may have (None, or leaving it out, is always allowed), in words
STEP_KEYS = {"name": (str, "text"), "object_id": (int, "an int"), "alarm_id": (int, "an int"),
             "feature_id": (int, "an int"), "parameters": (dict, "a dict")}


def checked_steps(steps: Any, who: str) -> str:
    """Return what `_create_steps` answered as JSON text.

    Raise `JobRequestError` saying what is wrong with it and what is accepted.
    """
    if not isinstance(steps, list | tuple):
        problems = [f"{type(steps).__name__}, not a list: {shown(steps)}"]
    else:
        problems = list(islice(_step_problems(steps), MOST_PROBLEMS))
    if problems:
        raise JobRequestError("\n  ".join([
            f"{who}._create_steps answered what is no list of steps; nothing was done:", *problems,
            "a step is a dict of " + ", ".join(f"{key} ({word})" for key, (_, word)
                                               in STEP_KEYS.items()) + "; all may be left out"]))
    return json.dumps(steps)


def checked_result(result: Any) -> str | None:
    """Return a step's result as JSON text, None if it has none.

    Raise `JobRequestError` saying which key has which type, and what is accepted.
    """
    if result is None:
        return None
    if isinstance(result, Mapping):
        result = dict(result)
        problems = list(islice(json_problems(result, "$"), MOST_PROBLEMS))
    else:
        problems = [f"{type(result).__name__}, not a dict: {shown(result)}"]
    if problems:
        raise JobRequestError("\n  ".join([
            "The step's result is no JSON object, so it is not stored:", *problems,
            "accepted: None, or a dict with text keys whose values are text, int, float, bool, "
            "None, lists and such dicts"]))
    return json.dumps(result)


def checked_definition(who: str, name: Any, schema: Any) -> None:
    """Raise `ValueError` if a class's name or parameters schema cannot be written to job_types."""
    problems = []
    if not isinstance(name, str) or not name or _scalar_problem(name):
        problems.append(f"_name is {shown(name)}, not text that PostgreSQL can store")
    if isinstance(schema, Mapping):
        problems += islice(json_problems(dict(schema), "_parameters_schema"), MOST_PROBLEMS)
    else:
        problems.append(f"_parameters_schema is {shown(schema)}, not a dict")
    if problems:
        raise ValueError("\n  ".join([f"{who} is no job type:", *problems]))


def _step_problems(steps: list[Any]) -> Iterator[str]:
    for number, step in enumerate(steps, 1):
        if not isinstance(step, dict):
            yield f"step {number}: {type(step).__name__}, not a dict: {shown(step)}"
            continue
        for key, value in step.items():
            if key not in STEP_KEYS:
                yield f"step {number}: {shown(key)} is no key of a step"
            elif value is not None and not _is(value, STEP_KEYS[key][0]):
                yield f"step {number}: {key} is {shown(value)}, not {STEP_KEYS[key][1]}"
            elif value is not None:
                yield from json_problems(value, f"step {number}: {key}")


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(value, kind)


def json_problems(value: Any, path: str, depth: int = 0,
                  left: Iterator[int] | None = None) -> Iterator[str]:
    """Yield what of `value` JSON cannot hold, each as 'path: what'; `left`: values to look at."""
    left = iter(range(MOST_VALUES)) if left is None else left
    if next(left, None) is None:
        yield f"more than {MOST_VALUES:,} values"
    elif depth > 100:
        yield f"{path}: nested more than 100 deep"
    elif isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str):
                yield f"{path}: the key {shown(key)} is {type(key).__name__}, not text"
            elif problem := _scalar_problem(key):
                yield f"{path}: the key {problem}"
            else:
                yield from json_problems(one, f"{path}.{key}", depth + 1, left)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from json_problems(one, f"{path}[{number}]", depth + 1, left)
    elif problem := _scalar_problem(value):
        yield f"{path}: {problem}"


def _scalar_problem(value: Any) -> str:
    if isinstance(value, str):
        if "\0" in value or value.encode("utf-8", "replace").decode() != value:
            return f"{shown(value)} has characters PostgreSQL cannot store"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no number in JSON; use None"
    elif isinstance(value, int) and value.bit_length() > 4000:
        return "an int of more than 1,200 digits"
    elif value is not None and not isinstance(value, int | float):
        return f"{type(value).__name__} {shown(value)}"
    return ""


def shown(value: Any) -> str:
    """Return `repr(value)`, shortened to what fits on a line."""
    try:
        return shorten(repr(value), 80)
    except Exception as exc:
        return f"(its repr() raises {type(exc).__name__})"


def said(exc: BaseException) -> str:
    """Return the text of an exception, shortened; its type's name if it has none to give."""
    try:
        return shorten(str(exc), MOST_TEXT) or type(exc).__name__
    except Exception as failed:
        return f"{type(exc).__name__} (its str() raises {type(failed).__name__})"
