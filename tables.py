"""What commands write: tables on a terminal, values for a person or as JSON, whole files."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from perfdb import CONTROL, clean

LEAST_WIDTH = 24    # a column of text is cut to this, then what matters less gives way
NARROWEST = 8       # and where nothing is left to give way, to this
MOST_PADDING = 200  # nobody needs a column of a pipe filled up to the width of its longest text



def screen_width() -> int | None:
    """Return the columns of the terminal (or $COLUMNS), None in a pipe: nothing need be cut."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size((80, 24)).columns


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None,
          give_way: Sequence[str] = (), cut: Sequence[str] | None = None) -> str:
    """Return the rows as an aligned table that fits `width`, the terminal's unless given.

    Where it does not fit, the columns `cut` (the last one unless given) are shortened, then the
    columns `give_way` left out in that order, then the line is cut. In a pipe nothing is.
    """
    width = width or screen_width()
    lines = [list(heads), *([text(value) for value in row] for row in rows)]
    columns = list(map(list, zip(*lines, strict=True)))
    cut = heads[-1:] if cut is None else cut
    if width:
        columns = fit(columns, width - 2, give_way, cut)
    widths = [min(max(map(len, column)), MOST_PADDING) for column in columns]
    columns = [[column[0], "-" * size, *column[1:]] for column, size in
               zip(columns, widths, strict=True)]
    aligned = [[cell.rjust(size) if is_number(column[2:]) else cell.ljust(size) for cell in column]
               for column, size in zip(columns, widths, strict=True)]
    joined = [f"  {'  '.join(cells).rstrip()}" for cells in zip(*aligned, strict=True)]
    return paint("\n".join(shorten(line, width) for line in joined))


def fit(columns: list[list[str]], width: int, give_way: Sequence[str],
        cut: Sequence[str]) -> list[list[str]]:
    """Return the columns that have room side by side in `width`, those in `cut` shortened."""
    def room(columns: list[list[str]]) -> int:
        fixed = [max(map(len, c)) for c in columns if c[0] not in cut]
        return width - sum(fixed) - 2 * (len(columns) - 1)

    def least(columns: list[list[str]]) -> int:
        return sum(min(LEAST_WIDTH, max(map(len, c))) for c in columns if c[0] in cut)
    for name in give_way:
        if room(columns) >= least(columns):
            break
        columns = [column for column in columns if column[0] != name]
    share = sorted((c for c in columns if c[0] in cut), key=lambda c: max(map(len, c)))
    left = max(room(columns), NARROWEST * len(share))
    for n, column in enumerate(share):  # the narrow ones take less than their share
        size = min(max(map(len, column)), left // (len(share) - n))
        left -= size
        column[:] = [shorten(cell, size) for cell in column]
    return columns


def is_number(cells: Sequence[str]) -> bool:
    return bool(cells) and all(not c or c.replace(".", "").isdecimal() for c in cells)


def shorten(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else line[:max(width - 1, 0)] + "…"


COLOURS = {"Failed": 31, "Running": 36, "Finished": 32}


def paint(text_: str) -> str:
    """Colour the states, on a terminal only and not with $NO_COLOR."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text_
    return re.sub(r"\b(Failed|Running|Finished)\b",
                  lambda m: f"\x1b[{COLOURS[m[0]]}m{m[0]}\x1b[0m", text_)


def visible(text_: str) -> str:
    """Return `text_` on one line, its control characters written out so that none is obeyed."""
    return clean(text_).replace("\n", " ").replace("\t", " ")


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
        return visible(" ".join(
            f"{k}={json.dumps(v) if isinstance(v, dict | list) else text(v)}"
            for k, v in value.items()))
    return visible(str(value))


def duration(seconds: float) -> str:
    """Return seconds as 12 ms, 3.4 s or 1:02:03."""
    if seconds < 0:  # somebody has set a clock back
        return f"-{duration(-seconds)}"
    if seconds < 60:
        return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def elapsed(start: datetime, end: datetime) -> timedelta:
    """Return the time that passed between two moments, the hour of a clock change included.

    Python subtracts the wall clocks of two datetimes of one zone.
    """
    return end.astimezone(UTC) - start.astimezone(UTC)


def age(span: timedelta | None) -> str:
    """Return a length of time in one word for people: 12 s, 5 min, 3 h, 12 d; "" for None."""
    seconds = span.total_seconds() if span is not None else 0
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "" if span is None else f"{seconds:.0f} s"


def print_json(value: Any) -> None:
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    shown = json.dumps(value, default=as_json, indent=2, ensure_ascii=not unicode)
    # json leaves C1 and the like as they are; its own newlines stay.
    print(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", shown))


def as_json(value: Any) -> Any:
    """Times in ISO 8601 with offset, intervals in seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()


def ready_streams() -> None:
    """Have all three standard streams there, and no character that standard output refuses.

    One that was closed by the shell (>&-) is None; some terminals know no "…".
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115, stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def hush() -> None:
    """Write what is still to come to nowhere: nobody reads it any more, or the disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_file(path: str, content: str) -> None:
    """Write a file beside `path` and rename it, so that nobody ever reads half of it.

    A device or pipe (/dev/stdout) is written to as it is, a link stays one. Raise `OSError` if
    that cannot be done; `path` is left as it was.
    """
    if not path:
        raise FileNotFoundError(errno.ENOENT, "the name of the file to write is empty", path)
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        if not os.path.exists(path) or target.is_file():
            _write_and_rename(target, content)
        else:
            Path(path).write_text(content, encoding="utf-8")
    except OSError as exc:  # which may name the file beside it
        raise OSError(exc.errno, exc.strerror, path) from None


def _write_and_rename(target: Path, content: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(name, 0o644)  # a web server or node_exporter may read it
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
