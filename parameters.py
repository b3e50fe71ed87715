"""What is wrong with a job's parameters? JSON Schema, and all problems at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from perfdb import parse_time


class JobRequestError(ValueError):
    """The request cannot be turned into steps; the text becomes the job's comment."""


@functools.cache
def _format_checker() -> Any:
    from jsonschema import FormatChecker
    checker = FormatChecker(formats=())
    checker.checks("timestamp", raises=(ValueError, OverflowError))(
        lambda value: not isinstance(value, str) or bool(parse_time(value)))
    return checker


def schema_problems(parameters: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `parameters`, each as '$.path: what'; [] if they fit."""
    from jsonschema import Draft202012Validator
    errors = Draft202012Validator(schema, format_checker=_format_checker()).iter_errors(parameters)
    return sorted(f"{error.json_path}: {error.message}"
                  + (f" ({error.cause})" if error.cause else "") for error in errors)


def period_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `start` and `end`, where both are there and are times."""
    try:
        start, end = parse_time(parameters["start"]), parse_time(parameters["end"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return []  # missing or malformed: the schema's business
    if start < end:
        return []
    return [f"$.end: {parameters['end']!r} is not after $.start {parameters['start']!r}"]


def explain_parameters(problems: Sequence[str], schema: Mapping[str, Any]) -> str:
    known = ", ".join(schema.get("properties", {})) or "any"
    return "\n  ".join(["The parameters do not fit the job type; nothing was done", *problems,
                        f"known parameters: {known}"])
