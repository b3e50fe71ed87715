"""What bench.py has measured, and how: ways in turn, medians, ratios beside their bars."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 5
# what, ratio, must, aim, "<" or ">"
RESULTS: list[tuple[str, float, float | None, float | None, str]] = []
RAW: dict[str, Any] = {}


def report(what: str, ratio: float, must: float | None = None, aim: float | None = None,
           better: str = ">") -> None:
    RESULTS.append((what, ratio, must, aim, better))
    print(f"    {what}: {ratio:.3g}", flush=True)


def medians(rounds: int = ROUNDS, **ways: Callable[[], float]) -> dict[str, float]:
    """Do all `ways` in turn, `rounds` times; return the median of what each returned (seconds)."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    RAW.setdefault("seconds", []).append(found)
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def verdict(what: str, ratio: float, must: float | None, aim: float | None, better: str) -> tuple:
    """Return a line of the table."""
    def reached(bar: float) -> bool:
        return ratio >= bar if better == ">" else ratio <= bar
    said = "" if must is None else "aim" if reached(aim) else "met" if reached(must) else "MISSED"
    sign = "at least" if better == ">" else "at most"
    return (what, f"{ratio:.3g}", "" if must is None else f"{sign} {must:g}",
            "" if aim is None else f"{aim:g}", said)
