"""What the values of options on the command line mean: lengths of time, moments, parameters.

Each function reads one for argparse, and raises `ArgumentTypeError` saying what is accepted.
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import datetime
from typing import Any

from perfdb import parse_time

INTERVAL = re.compile(
    r"\s*(\d{1,12})\s*(s|sec|min|h|d|w|mon|y|second|minute|hour|day|week|month|year)s?\s*",
    re.ASCII)
PER_YEAR = {"s": 31_622_400, "mi": 527_040, "h": 8784, "d": 366, "w": 53, "mo": 12, "y": 1}
MOST_YEARS = 1000  # PostgreSQL's calendar goes on, Python's ends


def interval(text: str) -> str:
    """Return a length of time as PostgreSQL reads it: 90d, 24h, 15min, '1 month'."""
    if not (found := INTERVAL.fullmatch(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no length of time; write 90d, 24h, 15min or '1 month'")
    unit = found[2][:2] if found[2][0] == "m" else found[2][0]
    if int(found[1]) > MOST_YEARS * PER_YEAR[unit]:
        raise argparse.ArgumentTypeError(f"{text!r} is longer than {MOST_YEARS} years")
    return text


def moment(text: str) -> datetime:
    """Return the moment that `text` means, for argparse."""
    try:
        return parse_time(text)
    except (ValueError, OverflowError) as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: {exc}") from None


def due(text: str) -> datetime:
    """Return the moment of job_instances.run_after."""
    if not 1900 <= (when := moment(text)).year < 3000:
        raise argparse.ArgumentTypeError(f"{text!r} is not in the years 1900 to 2999")
    return when


def priority(text: str) -> int:
    """Return a value of job_instances.priority."""
    if not re.fullmatch(r"[+-]?\d{1,5}", text, re.ASCII) or not -2**15 <= int(text) < 2**15:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from -32768 to 32767")
    return int(text)


def since(text: str) -> dict[str, Any]:
    """Return the condition of FILTER_SQL that `text` means: so long ago (24h), or a moment."""
    return {"within": interval(text)} if INTERVAL.fullmatch(text) else {"since": moment(text)}


def parameter(text: str) -> tuple[str, Any]:
    """Return key and value of KEY=VALUE, a string, or of KEY:=JSON."""
    name, typed, value = re.fullmatch(r"(.*?)(:?=|$)(.*)", text, re.DOTALL).groups()
    if not typed:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write key=value for a string or key:=json for any other value")
    try:
        return name, json.loads(value) if typed == ":=" else value
    except ValueError as exc:
        raise argparse.ArgumentTypeError(
            f"{text!r}: what follows := is not JSON: {exc}") from None


def positive(text: str) -> int:
    """Return a whole number from 1 that fits a bigint."""
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {2**63 - 1}")
    return int(text)


def seconds(text: str) -> float:
    """Return a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and "
                                         "below 1000000")
    return value
