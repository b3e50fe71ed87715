"""How a table looks on a terminal, and how a value is written for a person or as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from perfdb import CONTROL, clean


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None) -> str:
    """Return the rows as an aligned table that fits the terminal, the last column cut if need be."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    cells = [[text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = [bool(cells) and all(c[n].replace(".", "").isdecimal() or not c[n] for c in cells)
             for n in range(len(heads))]

    def line(values: Sequence[str]) -> str:
        joined = "  ".join(v.rjust(w) if r else v.ljust(w)
                           for v, w, r in zip(values, widths, right, strict=True)).rstrip()
        return joined if len(joined) + 2 <= width else joined[:width - 3] + "…"
    return paint("\n".join("  " + line(row) for row in [list(heads), ["-" * w for w in widths], *cells]))


COLOURS = {"Failed": 31, "Running": 36, "Finished": 32}


def paint(text_: str) -> str:
    """Colour the states, on a terminal only and not with $NO_COLOR."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text_
    return re.sub(r"\b(Failed|Running|Finished)\b", lambda m: f"\x1b[{COLOURS[m[0]]}m{m[0]}\x1b[0m", text_)


def text(value: Any) -> str:
    """Return a value as a person reads it, on one line."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, timedelta):
        return duration(value.total_seconds())
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict):
        return " ".join(f"{text(k)}={json.dumps(v) if isinstance(v, dict | list) else text(v)}"
                        for k, v in value.items())
    return clean(str(value)).replace("\n", " ").replace("\t", " ")


def duration(seconds: float) -> str:
    """Return seconds as 12 ms, 3.4 s or 1:02:03."""
    if seconds < 60:
        return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def print_json(value: Any) -> None:
    shown = json.dumps(value, default=as_json, indent=2, ensure_ascii=False)
    # json leaves C1 and the like as they are; its own newlines stay.
    print(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", shown))


def as_json(value: Any) -> Any:
    """Times in ISO 8601 with offset, intervals in seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()
