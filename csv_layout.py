"""What a CSV file of samples means: encoding, delimiter, header, which column is what.

`understand` looks at the first rows. What they tell beyond doubt is taken, what is given in the
settings (options of samples.py, or the table [csv] of a park's file) is believed, and what nobody
can tell is asked for: all of it at once, each with the option that says it.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import tzinfo
from itertools import islice
from pathlib import Path
from typing import Any

import csv_times
from csv_names import Object, Park, key, split_unit

TEXT = {"type": "string", "minLength": 1}
#: JSON Schema of the table [csv]; the same names as the options of samples.py
SETTINGS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "encoding": TEXT, "delimiter": {"type": "string", "minLength": 1, "maxLength": 1},
        "decimal": {"enum": [".", ","]}, "header": {"type": "integer", "minimum": 0},
        "time": {"type": ["string", "array"], "items": TEXT, "minItems": 1, "maxItems": 2},
        "time_format": TEXT, "zone": TEXT, "stamps": {"enum": ["start", "end"]},
        "object": TEXT, "object_column": TEXT, "feature_column": TEXT, "value_column": TEXT,
        "none": {"type": "array", "items": {"type": ["string", "number"]}},
        "columns": {"type": "object", "additionalProperties": {"type": "string"}},
        "objects": {"type": "object", "additionalProperties": TEXT},
    },
}

SAMPLE_ROWS = 1000  # looked at to find out what the columns are
DELIMITERS = ";\t|,"
OBJECT_HEADS = {"object", "objectname", "turbine", "turbinename", "wtg", "device", "asset"}
TIME_HEAD = re.compile("time|stamp|date|epoch|unix", re.IGNORECASE)
NO_CSV = {b"PK\3\4": "an Excel workbook or a ZIP archive; save or unpack it as CSV first",
          b"\xd0\xcf\x11\xe0": "an Excel workbook; save it as CSV first",
          b"\x1f\x8b": "compressed by gzip; gunzip it first"}
NONE_TEXTS = {"", "nan", "null"}
NUMBER = re.compile(r"[+-]?(?=[.,]?\d)\d*(?:([.,])\d*)?(?:[eE][+-]?\d+)?", re.ASCII)
#: numbers in groups of three digits, by their decimal sign
THOUSANDS = {".": re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?", re.ASCII),
             ",": re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+(,\d*)?", re.ASCII)}


class LayoutError(ValueError):
    """The file cannot be understood; `problems` says why, all of it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass
class Layout:
    """What a file means; columns are counted from 0."""

    path: Path
    encoding: str
    delimiter: str
    decimal: str | None          # None: no number seen so far has any
    header: int                  # line of the header, 0: none
    skip: int                    # lines before the first row of data
    names: list[str]
    time: list[int]
    kind: str
    zone: tzinfo | None          # None: every time has its offset
    stamps: str
    descending: bool
    none: set[str]
    object: Object | None = None
    object_column: int | None = None
    feature_column: int | None = None
    value_column: int | None = None
    first_rows: list[list[str]] = field(default_factory=list)


# ------------------------------------------------------------------------------- reading the rows


def encoding_of(path: Path) -> str:
    """Return the encoding: by its mark, else UTF-8, else UTF-16, else the western single bytes."""
    with path.open("rb") as file:
        start = file.read(1_000_000)
    for mark, what in NO_CSV.items():
        if start.startswith(mark):
            raise LayoutError([f"this is no CSV but {what}"])
    for mark, name in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
                       (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if start.startswith(mark):
            return name
    even, odd = (start[n:1000:2].count(0) for n in (0, 1))
    if max(even, odd) > 4 * min(even, odd):  # else a logger has left zeros behind
        return "utf-16-be" if even > odd else "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def rows(path: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of each row that is one and not empty; the line is its last."""
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                continue  # the load will refuse it
            if any(row):
                yield reader.line_num, row


def sample(path: Path, encoding: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the first rows. Raise `LayoutError` if they cannot be read in this encoding."""
    try:
        return list(islice(rows(path, encoding, delimiter), SAMPLE_ROWS))
    except (LookupError, UnicodeError) as exc:
        raise LayoutError([f"cannot be read as {encoding}: {exc}; --encoding says "
                           "another, e.g. utf-8, latin-1"]) from None


def cells(row: list[str]) -> int:
    """Return how many cells a row has, a last empty one not counted."""
    return len(row) - (row[-1] == "")


def width_of(found: list[tuple[int, list[str]]]) -> int:
    """Return the number of columns that most rows have."""
    return Counter(cells(row) for _, row in found).most_common(1)[0][0]


def first_data(found: list[tuple[int, list[str]]], column: int) -> int | None:
    """Return the index of the row from which on `column` holds times, None if there is none."""
    holds = [column < len(row) and bool(csv_times.kinds(row[column])) for _, row in found]
    if True not in holds:
        return None
    first = holds.index(True)
    return first if sum(holds[first:]) >= 0.5 * len(holds[first:]) else None


def time_columns(found: list[tuple[int, list[str]]]) -> list[int]:
    """Return the columns that hold dates; counters of ten digits only where the head says time."""
    firsts = {c: first for c in range(width_of(found))
              if (first := first_data(found, c)) is not None}
    plain = [c for c, first in firsts.items() if found[first][1][c].strip().isdigit()]
    named = [c for c in plain if any(
        c < len(row) and TIME_HEAD.search(row[c]) for _, row in found[:firsts[c]])]
    return [c for c in firsts if c not in plain] or named


def tells(cell: str) -> bool:
    """Return whether a cell is a number or a time, as no name is."""
    return bool(NUMBER.fullmatch(cell) or csv_times.kinds(cell))


def understand(path: Path, settings: dict[str, Any], park: Park,
               default_zone: str | None = None) -> Layout:
    """Return what the file means.

    `default_zone`: of times without an offset, if the settings say none. Raise `LayoutError` with
    everything that cannot be told, `OSError` if the file cannot be read.
    """
    return _Look(path, settings, park, default_zone).layout()


class _Look:
    """One look at one file: finds, and collects what it cannot find."""

    def __init__(self, path: Path, settings: dict[str, Any], park: Park,
                 default_zone: str | None) -> None:
        self.path, self.settings, self.park = path, settings, park
        time = settings.get("time", [])
        self.time_names: list[str] = [time] if isinstance(time, str) else time
        self.default_zone = default_zone
        self.problems: list[str] = []
        if path.exists() and not path.is_file() and not path.is_dir():
            raise LayoutError(["it can be read only once; write it to a file first"])
        self.encoding = settings.get("encoding") or encoding_of(path)
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise LayoutError([f"--encoding {self.encoding!r}: there is no such encoding; e.g. "
                               "utf-8, utf-16, latin-1, cp1252"]) from None
        self.delimiter = settings.get("delimiter") or self._delimiter()
        self.found = sample(path, self.encoding, self.delimiter)
        if not self.found:
            raise LayoutError([f"there is no row in it (encoding {self.encoding})"])
        if len(self.found) == 1 and not any(map(tells, self.found[0][1])):
            raise LayoutError(["there is no sample in it, only the row "
                               + ", ".join(map(repr, self.found[0][1][:10]))])

    def layout(self) -> Layout:
        """Ask all questions whose own questions have been answered."""
        self._header_and_time()
        if self.problems:
            raise LayoutError(self.problems)
        kind = self._kind()
        layout = Layout(
            path=self.path, encoding=self.encoding, delimiter=self.delimiter, decimal=None,
            header=self.header, skip=self.skip, names=self.names, time=self.time, kind=kind,
            zone=self._zone(kind), stamps=self._stamps(), descending=self._descending(kind),
            none={str(one).casefold() for one in self.settings.get("none", [])} | NONE_TEXTS,
            first_rows=[row for _, row in self.data])
        self._columns(layout)
        layout.decimal = self._decimal(layout)
        if self.problems:
            raise LayoutError(self.problems)
        return layout

    def _delimiter(self) -> str:
        """Return the delimiter that gives equal rows, with a time in them if any does."""
        shares: dict[str, float] = {}
        with_time = set()
        if not sample(self.path, self.encoding, ","):
            return ","  # nothing in it
        for delimiter in DELIMITERS:
            found = sample(self.path, self.encoding, delimiter)
            if found and (width := width_of(found)) > 1:
                shares[delimiter] = sum(cells(row) == width for _, row in found) / len(found)
                with_time |= {delimiter} if time_columns(found) else set()
        if not shares:
            raise LayoutError(["there is one column only, if ; or | or , or a tab stands between "
                               "them; --delimiter says another sign"])
        shares = {d: share for d, share in shares.items() if d in with_time or not with_time}
        best = [d for d, share in shares.items() if share == max(shares.values())]
        if len(best) != 1:
            raise LayoutError(["which sign stands between the columns? --delimiter says it"])
        return best[0]

    # ------------------------------------------------------------ rows, header, time

    def _header_and_time(self) -> None:
        width = width_of(self.found)
        dates = time_columns(self.found)
        first = min((first_data(self.found, c) for c in dates), default=self._below_names())
        self.header = self.settings.get("header", -1)
        self.names = [str(n + 1) for n in range(width)]
        if self.header < 0:
            self.header = self._header(first, width)
        if self.header:
            head = next((row for line, row in self.found if line == self.header), None)
            if head is None:
                self.problems.append(f"--header {self.header}: there is no such row at the top")
                return
            self.names = [name.strip() for name in head[:width]]
            self.names += [str(n + 1) for n in range(len(self.names), width)]
        self.data = [(line, row) for line, row in self.found if line > self.header]
        self.skip = self._skip()
        self.time = self._time(dates)

    def _skip(self) -> int:
        """Return the last line before the data: a row of units may follow the header."""
        first = next((n for n, (_, row) in enumerate(self.data) if any(map(tells, row))), 0)
        if first and "%" not in self.settings.get("time_format", ""):  # no kind knows a pattern
            self.data = self.data[first:]
            return self.data[0][0] - 1
        return self.header

    def _below_names(self) -> int:
        """Return the index of the row below the one that has the names of --time in it."""
        names = set(self.time_names)
        return next((n for n, (_, row) in enumerate(self.found, 1)
                     if names <= {cell.strip() for cell in row}), 0)

    def _header(self, first: int, width: int) -> int:
        """Return the line of the row with the most names, right before the data."""
        block = []
        while first > 0 and cells(self.found[first - 1][1]) in (width, width - 1):
            first -= 1
            block.insert(0, self.found[first])
        return max(block, key=lambda found: len(set(filter(None, found[1]))))[0] if block else 0

    def _time(self, dates: list[int]) -> list[int]:
        if self.time_names:
            return [c for c in map(self.column, self.time_names) if c is not None]
        if len(dates) != 1:
            self.problems.append(
                (f"which column is the time, {self._listed(dates)}?" if dates else
                 "which column is the time? None looks like one")
                + f" --time COLUMN says it; the columns are {self._listed()}"
                + ("" if dates else "; --time-format PATTERN says how it is written"))
            return []
        clocks = [c for c in range(len(self.names)) if c not in dates and self.data and all(
            c < len(row) and csv_times.CLOCK.fullmatch(row[c].strip()) for _, row in self.data)]
        if len(clocks) == 1 and all(csv_times.is_date_only(row[dates[0]]) for _, row in self.data):
            return [dates[0], clocks[0]]
        return dates

    def _times(self) -> Iterator[str]:
        """Yield the times of the whole file, as long as somebody asks."""
        for line, row in rows(self.path, self.encoding, self.delimiter):
            if line > self.header and max(self.time) < len(row):
                yield " ".join(row[c].strip() for c in self.time)

    def _kind(self) -> str:
        """Return how times are written; of 03/04/2026 the first later date that tells decides."""
        if given := self.settings.get("time_format"):
            problem = csv_times.pattern_problem(given) if "%" in given else ""
            if given in csv_times.FORMATS or ("%" in given and not problem):
                return given
            self.problems.append(f"--time-format {given!r}: {problem}" if problem else
                                 f"--time-format {given!r}: there are "
                                 f"{', '.join(csv_times.FORMATS)} and patterns like %d.%m.%y")
            return "YMD"
        left: set[str] = set()
        for text in self._times():
            found = csv_times.kinds(text)
            if len(found) == 1:
                return found.pop()
            left |= found
        example = next(self._times(), "")
        self.problems.append(
            f"is {example!r} day first or month first? No date in the file tells: --time-format "
            "DMY or MDY" if left else
            f"how is the time {example!r} written? --time-format says it, e.g. %d.%m.%y %H:%M")
        return "YMD"

    def _zone(self, kind: str) -> tzinfo | None:
        name = self.settings.get("zone") or self.default_zone
        if name:
            try:
                return csv_times.zone_named(name)
            except ValueError as exc:
                self.problems.append(f"--zone: {exc}")
                return None
        texts = [" ".join(row[c] for c in self.time) for _, row in self.data
                 if max(self.time) < len(row)]
        pattern = kind not in csv_times.FORMATS and "%z" not in kind
        if pattern or any(map(csv_times.is_local, texts)):
            self.problems.append("in which zone are the times? They have no UTC offset, and "
                                 "PERFDB_TIMEZONE is not set: --zone Europe/Madrid, --zone UTC "
                                 "or --zone +03:00, say")
        return None

    def _stamps(self) -> str:
        if not self.settings.get("stamps"):
            self.problems.append("do the times mark the start or the end of their interval? "
                                 "No file tells: --stamps start or --stamps end")
        return self.settings.get("stamps") or "end"

    def _descending(self, kind: str) -> bool:
        """Return whether the newest samples come first, by rows alike but for time and numbers."""
        def alike(row: list[str]) -> list[str]:
            return [cell for c, cell in enumerate(row) if c not in self.time
                    and not NUMBER.fullmatch(cell)]
        times = []
        for _, row in self.data:
            if max(self.time) < len(row) and alike(row) == alike(self.data[0][1]):
                try:
                    times.append(csv_times.read(" ".join(row[c].strip() for c in self.time), kind))
                except ValueError:
                    continue
        return len(times) > 1 and times[0].replace(tzinfo=None) > times[-1].replace(tzinfo=None)

    # ------------------------------------------------------------ columns, numbers

    def column(self, name: str) -> int | None:
        """Return the column of a header or of a number counted from 1; None is a problem noted."""
        if name in self.names:
            return self.names.index(name)
        alike = [c for c, head in enumerate(self.names) if key(split_unit(head)[0]) == key(name)]
        if len(alike) == 1:
            return alike[0]
        if name.isdecimal() and 1 <= int(name) <= len(self.names):
            return int(name) - 1
        self.problems.append(f"there is no column {name!r}; the columns are {self._listed()}")
        return None

    def _listed(self, columns: list[int] | None = None) -> str:
        return ", ".join(repr(self.names[c]) for c in (columns or range(len(self.names)))[:30])

    def _columns(self, layout: Layout) -> None:
        """Find what names the object and, in a long file, the feature and its value."""
        for name in ("object_column", "feature_column", "value_column"):
            if self.settings.get(name):
                setattr(layout, name, self.column(self.settings[name]))
        if layout.feature_column is not None and layout.value_column is None:
            layout.value_column = self.column("value")
        for name in self.park.columns:
            if layout.feature_column is None and name not in self.names:
                self.column(name)
        self._object(layout)

    def _object(self, layout: Layout) -> None:
        """Find whose samples these are."""
        heads = [c for c, name in enumerate(self.names) if key(name) in OBJECT_HEADS]
        if layout.object_column is None and len(heads) == 1:
            layout.object_column = heads[0]  # beside --object to see that it says nothing else
        named = self.park.named_in(self.path.stem)
        if given := self.settings.get("object"):
            layout.object = self._given_object(given, named)
        elif layout.object_column is not None or self.settings.get("object_column"):
            return
        elif not any(map(self._names_object, self._signal_names(layout))):
            layout.object = named[0] if len(named) == 1 else None
            if not layout.object:
                self.problems.append(
                    "whose samples are these? --object NAME or --object-column COLUMN says it, "
                    "or the file's name if an object's name stands in it")

    def _given_object(self, name: str, named: list[Object]) -> Object | None:
        found = self.park.object(name)
        if not found:
            self.problems.append(f"--object {name!r}: there is no such object")
        elif named and found not in named:
            self.problems.append(f"--object {name!r}, but the file's name says {named[0].name}; "
                                 "load it apart")
        return found

    def _signal_names(self, layout: Layout) -> set[str]:
        """Return the heads, or the names in a long file's column of signals."""
        column = layout.feature_column
        return set(self.names) if column is None else {
            row[column] for _, row in self.data if column < len(row)}

    def _names_object(self, name: str) -> bool:
        try:
            return self.park.signal(name, None) is not None
        except ValueError:
            return True  # found, but in another unit: said later

    def _decimal(self, layout: Layout) -> str | None:
        """Return the decimal sign that the first rows prove, None if they have none."""
        if given := self.settings.get("decimal"):
            return given
        skip = {*self.time, layout.object_column, layout.feature_column}
        signs = {sign for _, row in self.data for c, cell in enumerate(row)
                 if c not in skip and (sign := decimal_sign(cell.strip()))}
        proven = signs & {".", ","}
        if len(proven) == 1:
            return proven.pop()
        if proven or "?," in signs or ("?." in signs and self.delimiter != ","):
            self.problems.append("is 1.234 or 1,234 a thousand or a bit more than one? "
                                 "The numbers do not tell: --decimal . or --decimal ,")
        return "." if self.delimiter == "," else None


def decimal_sign(cell: str) -> str | None:
    """Return the decimal sign a number proves; '?.' or '?,' if its sign may part thousands."""
    if THOUSANDS["."].fullmatch(cell):
        return "." if "." in cell or cell.count(",") > 1 else "?,"
    if THOUSANDS[","].fullmatch(cell):
        return "," if "," in cell or cell.count(".") > 1 else "?."
    found = NUMBER.fullmatch(cell)
    return found[1] if found else None
