"""What is wrong with a job's parameters? JSON Schema, and all problems at once."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from perfdb import parse_time

MAX_DEPTH = 100    # nested deeper nobody means it, and Python's recursion has an end
MAX_DIGITS = 300   # of a number
MAX_PROBLEMS = 10  # in one explanation
MAX_MESSAGE = 300  # characters of one problem: it quotes the value, whatever its size


class JobRequestError(ValueError):
    """The request cannot be turned into steps; the text becomes the job's comment."""


# ----------------------------------------------------------------------------------- reading them


def parse(text: str) -> dict[str, Any]:
    """Return the parameters that a JSON text holds.

    Raise `JobRequestError` if it is no JSON object, or one that Python or PostgreSQL cannot take:
    numbers of more than `MAX_DIGITS`, NaN, nesting deeper than `MAX_DEPTH`, NUL characters.
    """
    try:
        value = json.loads(text, parse_int=_parse_int, parse_float=_parse_float,
                           parse_constant=_refuse_number)
    except RecursionError:
        raise JobRequestError(TOO_DEEP) from None
    except json.JSONDecodeError as exc:
        raise JobRequestError(f"the parameters are not JSON: {exc}") from None
    if not isinstance(value, dict):
        raise JobRequestError(f"the parameters are {shorten(repr(value), 80)}; write a JSON "
                              'object, {"name": value, ...}')
    if _is_too_deep(value):
        raise JobRequestError(TOO_DEEP)
    if "\\u" in text and not _is_storable(value):
        raise JobRequestError("the parameters hold \\u0000 or one half of a surrogate pair, which "
                              "PostgreSQL cannot store; leave it out")
    return value


TOO_DEEP = f"the parameters are nested deeper than {MAX_DEPTH} levels; no job type takes that"


def _parse_int(digits: str) -> int:
    return int(digits) if len(digits) <= MAX_DIGITS else _refuse_number(digits)


def _parse_float(digits: str) -> float:
    return value if math.isfinite(value := float(digits)) else _refuse_number(digits)


def _refuse_number(digits: str) -> Any:
    raise JobRequestError(f"the parameters hold {shorten(digits, 40)}, which is no number of at "
                          f"most {MAX_DIGITS} digits")


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = [child for parent in level if isinstance(parent, dict | list)
                 for child in (parent.values() if isinstance(parent, dict) else parent)]
    return bool(level)


def _is_storable(value: Any) -> bool:
    try:
        text = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return b"\\u0000" not in text.replace(b"\\\\", b"")


# ---------------------------------------------------------------------------------- checking them


def schema_problems(parameters: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `parameters`, each as '$.path: what'; [] if they fit."""
    try:
        errors = sorted(_validator(schema).iter_errors(parameters), key=_place)
    except Exception as exc:  # a schema that somebody wrote to job_types: anything may be in it
        return [f"$: cannot be checked by the type's schema: {shorten(str(exc) or repr(exc))}"]
    return [f"{shorten(error.json_path, 100)}: {shorten(error.message)}"
            + (f" ({error.cause})" if error.cause else "") for error in errors]


def _validator(schema: Mapping[str, Any]) -> Any:
    from referencing.jsonschema import EMPTY_REGISTRY  # knows no other document, and fetches none
    return _validator_class()(schema, format_checker=_format_checker(), registry=EMPTY_REGISTRY)


@functools.cache
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    return extend(Draft202012Validator, {"uniqueItems": _unique_items})


def _place(error: Any) -> tuple[list[tuple[bool, str | int]], str]:
    """Return what errors are sorted by: item 2 before item 10, then the message."""
    return [(isinstance(part, int), part) for part in error.absolute_path], error.message


@functools.cache
def _format_checker() -> Any:
    from jsonschema import FormatChecker
    checker = FormatChecker(formats=())
    checker.checks("timestamp", raises=(ValueError, OverflowError))(
        lambda value: not isinstance(value, str) or bool(parse_time(value)))
    return checker


def _unique_items(_validator: Any, wanted: bool, items: Any, _schema: Any) -> Iterator[Any]:
    """The keyword uniqueItems, in linear time: 8,000 names of mixed types took 20 s to compare."""
    from jsonschema import ValidationError
    seen: dict[Hashable, int] = {}
    for number, item in enumerate(items if wanted and isinstance(items, list) else ()):
        first = seen.setdefault(_as_key(item), number)
        if first != number:
            yield ValidationError(f"{shorten(repr(item), 80)} is there twice, as items {first} "
                                  f"and {number}")


def _as_key(item: Any) -> Hashable:
    """Return what is equal for two items if JSON Schema says they are: 1 is 1.0 but not true."""
    if isinstance(item, list):
        return "list", tuple(map(_as_key, item))
    if isinstance(item, dict):
        return "dict", frozenset((key, _as_key(value)) for key, value in item.items())
    return "number" if type(item) in (int, float) else type(item).__name__, item


def check_schema(schema: Mapping[str, Any], name: str) -> None:
    """Raise `ValueError` saying what is wrong with the parameters schema of job type `name`."""
    from jsonschema import Draft202012Validator, SchemaError
    refuse_foreign_refs(schema, name)
    try:
        Draft202012Validator.check_schema(dict(schema))
    except SchemaError as exc:
        raise ValueError(f"the parameters schema of job type {name!r} is no JSON Schema "
                         f"(2020-12): {exc.json_path}: {shorten(exc.message)}") from None


def refuse_foreign_refs(schema: Any, name: str) -> None:
    """Raise `ValueError` if a schema refers to anything outside itself; needs no package."""
    if isinstance(schema, Mapping):
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(target := schema.get(keyword), str) and not target.startswith("#"):
                raise ValueError(f"the parameters schema of job type {name!r} refers to "
                                 f"{target!r}: nothing is fetched; write it into it, under $defs")
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        refuse_foreign_refs(part, name)


def period_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `start` and `end`, where both are there and are times."""
    try:
        start, end = parse_time(parameters["start"]), parse_time(parameters["end"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return []  # missing or malformed: the schema's business
    if start < end:
        return []
    return [f"$.end: {parameters['end']!r} is not after $.start {parameters['start']!r}"]


# -------------------------------------------------------------------------------- explaining them


def explain_parameters(problems: Sequence[str], schema: Mapping[str, Any]) -> str:
    """Return the text for whoever asked: at most `MAX_PROBLEMS`, and what is accepted."""
    known = ", ".join(schema.get("properties", {})) or "any"
    return "\n  ".join(["The parameters do not fit the job type; nothing was done",
                        *first_few(problems), f"known parameters: {known}"])


def first_few(problems: Sequence[str]) -> list[str]:
    """Return the first `MAX_PROBLEMS` problems, and a line that says how many more there are."""
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def shorten(text: str, most: int = MAX_MESSAGE) -> str:
    """Return `text` with its middle left out if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[:most * 2 // 3]} ... {text[-(most // 3):]}"
