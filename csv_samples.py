"""The samples of a CSV file, piece by piece, once its layout is known.

The loops over rows and cells are written for speed: ten million samples go through them. A piece
holds each sample once, the last one of those with the same time; memory does not grow with the
file.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from csv_layout import NUMBER, THOUSANDS, Layout, LayoutError
from csv_names import Feature, Object, Park
from csv_times import Interval, Stamps

PIECE = 100_000  # samples that are written at once
MOST_REFUSED = 10  # lines shown

Key = tuple[int, int]  # object, feature


class Piece(NamedTuple):
    samples: dict[Key, dict[int, float | None]]  # of each signal by microseconds since 2000 UTC
    read: int                                    # samples read for it, duplicates included
    position: int                                # bytes of the file read so far


class Signal:
    """One feature of one object, and its samples in the piece being read."""

    def __init__(self, object_: Object, feature: Feature, stamps: Stamps) -> None:
        self.object, self.feature, self.stamps = object_, feature, stamps
        self.samples: dict[int, float | None] = {}


class Refused:
    """Lines that were refused in whole or in part: how many, and the first of them with why."""

    def __init__(self) -> None:
        self.lines, self._last = 0, 0
        self.shown: list[tuple[int, str]] = []

    def add(self, line: int, reason: object, lines: int = 1) -> None:
        """Count a row of so many lines, the last of them `line`, once for all its reasons."""
        self.lines += lines * (line != self._last)
        self._last = line
        if lines > 1:
            reason = f"with the {lines - 1} lines before it one row, by a quotation mark: {reason}"
        if len(self.shown) < MOST_REFUSED:
            self.shown.append((line, str(reason)))


class Reader:
    """Reads the samples of one file; `refused` and `skipped` tell afterwards what was not taken.

    Raise `LayoutError` if the columns are no features of the objects in the first rows.
    """

    def __init__(self, layout: Layout, park: Park) -> None:
        self.layout, self.park = layout, park
        self.refused = Refused()
        self.skipped: Counter[str] = Counter()  # columns, or the signals of a long file, by name
        self.signals: dict[Key, Signal] = {}
        self._line = self._before = 0  # last line of this row and of the one before
        self._number = number_reader(layout.decimal, layout.none)
        self._stamps: dict[Interval, Stamps] = {}
        self._objects: dict[str, list[tuple[Stamps, list[tuple[int, Signal]]]]] = {}
        self._named: dict[tuple[str, str], Signal | None] = {}
        self._take = self._wide if layout.feature_column is None else self._long
        self._check()

    def _check(self) -> None:
        problems: dict[str, None] = {}
        for row in self.layout.first_rows:
            try:
                if self.layout.feature_column is None:
                    self._columns_of(self._object_text(row))
                else:
                    self._signal_named(self._object_text(row), row[self.layout.feature_column])
            except LayoutError as exc:
                problems |= dict.fromkeys(exc.problems)
            except (ValueError, IndexError):
                continue  # that row will be refused
        if problems:
            raise LayoutError(list(problems))
        if not self.signals:
            names = [*self.skipped, *dict.fromkeys(name for _, name in self._named)]
            raise LayoutError(["none of " + ", ".join(map(repr, names[:20])) + " is known as a "
                               "feature of the object: --column NAME=FEATURE says which one is"])

    def pieces(self) -> Iterator[Piece]:
        """Yield the file's samples in pieces of some PIECE samples."""
        with self.layout.path.open("rb") as raw, io.TextIOWrapper(
                raw, self.layout.encoding, errors="replace", newline="") as text:
            rows = csv.reader(text, delimiter=self.layout.delimiter, skipinitialspace=True)
            more = True
            while more:
                read, more = self._fill(rows)
                samples = {key: s.samples for key, s in self.signals.items() if s.samples}
                for signal in self.signals.values():
                    signal.samples = {}
                yield Piece(samples, read, raw.tell())

    def _fill(self, rows: Any) -> tuple[int, bool]:
        """Read a piece; return how many samples it has and whether there may be more."""
        read, width, skip, take = 0, len(self.layout.names), self.layout.skip, self._take
        while True:
            try:
                for row in rows:
                    self._before, self._line = self._line, rows.line_num
                    if ((len(row) != width or self._line <= skip)
                            and not self._is_usable(row, width, skip)):
                        continue
                    try:
                        read += take(row)
                    except ValueError as exc:
                        self._refuse(exc)
                    if read >= PIECE:
                        return read, True
                return read, False
            except csv.Error as exc:
                self._before, self._line = self._line, rows.line_num
                self._refuse(exc)

    def _refuse(self, reason: object) -> None:
        self.refused.add(self._line, reason, self._line - self._before)

    def _is_usable(self, row: list[str], width: int, skip: int) -> bool:
        """Return whether a row of unusual length is one of data; refuse it if it should be."""
        if self._line <= skip or not any(row):
            return False
        if len(row) == width + 1 and not row[-1]:
            return True
        self._refuse(f"{len(row)} columns instead of {width}")
        return False

    def _wide(self, row: list[str]) -> int:
        """Take the samples of a row with one column per signal; return how many."""
        number, count = self._number, 0
        text = self._object_text(row)
        when = self._when(row)
        if (groups := self._objects.get(text)) is None:
            groups = self._columns_of(text)
        for stamps, columns in groups:
            end = stamps.at(when, text)
            for column, signal in columns:
                try:
                    signal.samples[end] = number(row[column])
                except ValueError as exc:
                    name = self.layout.names[column]
                    self._refuse(f"column {name!r}: {exc}")
                    count -= 1
            count += len(columns)
        return count

    def _long(self, row: list[str]) -> int:
        """Take the sample of a row that names its signal; return 1, or 0 if it is none of ours."""
        text, name = self._object_text(row), row[self.layout.feature_column]
        signal = self._named.get((text, name)) or self._signal_named(text, name)
        if signal is None:
            self.skipped[name] += 1
            return 0
        end = signal.stamps.at(self._when(row), (text, name))
        signal.samples[end] = self._number(row[self.layout.value_column])
        return 1

    def _when(self, row: list[str]) -> str:
        columns = self.layout.time
        return row[columns[0]] if len(columns) == 1 else f"{row[columns[0]]} {row[columns[1]]}"

    def _object_text(self, row: list[str]) -> str:
        column = self.layout.object_column
        return "" if column is None else row[column]

    def _object(self, text: str) -> Object | None:
        """Return the object of a row, None if heads name it; `ValueError` if it is unknown."""
        given, column = self.layout.object, self.layout.object_column
        found = self.park.object(text.strip()) if column is not None else None
        if given and found not in (None, given):
            raise ValueError(f"{self.layout.names[column]!r} says {text!r}, "
                             f"--object {given.name!r}")
        if not (given or found) and column is not None:
            raise ValueError(f"unknown object {text!r}")
        return given or found

    def _columns_of(self, text: str) -> list[tuple[Stamps, list[tuple[int, Signal]]]]:
        """Return the columns that are features of the object, those of equal interval together.

        Raise `LayoutError` if one has another unit, or two are the same feature.
        """
        object_, layout = self._object(text), self.layout
        found: dict[int, Signal] = {}
        problems = []
        for column, name in enumerate(layout.names):
            if column not in layout.time and column != layout.object_column:
                try:
                    if signal := self._signal_of(name, object_, found):
                        found[column] = signal
                except ValueError as exc:
                    problems.append(str(exc))
        if problems:
            raise LayoutError(problems)
        groups: dict[Stamps, list[tuple[int, Signal]]] = {}
        for column, signal in found.items():
            groups.setdefault(signal.stamps, []).append((column, signal))
        self._objects[text] = list(groups.items())
        return self._objects[text]

    def _signal_of(self, name: str, object_: Object | None,
                   found: dict[int, Signal]) -> Signal | None:
        """Return the signal of a column; `ValueError` if an earlier column is `found` to be it."""
        if (named := self.park.signal(name, object_)) is None:
            self.skipped[name] += 1
            return None
        if (signal := self._signal(*named)) in found.values():
            first = next(column for column, one in found.items() if one is signal)
            remedy = (f"the second is {name!r}: --column {name!r}= leaves it out"
                      if self.layout.names[first] != name else "both are called so: with --header "
                      f"0 columns go by number, --column {first + 1}={named[1].name} is the first")
            raise ValueError(f"two columns are the feature {named[1].name!r} of {named[0].name}; "
                             + remedy)
        return signal

    def _signal_named(self, text: str, name: str) -> Signal | None:
        """Return the signal of a long file's row, None if no feature has this name."""
        if (text, name) in self._named:
            return self._named[text, name]
        named = self.park.signal(name, self._object(text))
        signal = self._signal(*named) if named else None
        self._named[text, name] = signal
        return signal

    def _signal(self, object_: Object, feature: Feature) -> Signal:
        key = object_.id, feature.id
        if key not in self.signals:
            self.signals[key] = Signal(object_, feature, self._stamps_of(feature.interval))
        return self.signals[key]

    def _stamps_of(self, interval: Interval) -> Stamps:
        layout = self.layout
        if interval not in self._stamps:
            self._stamps[interval] = Stamps(layout.kind, layout.zone, interval,
                                            layout.stamps == "start", layout.descending)
        return self._stamps[interval]


def number_reader(decimal: str | None, none: set[str]) -> Callable[[str], float | None]:
    """Return the function that reads a value: None if it stands for no value.

    It raises `ValueError` saying what is wrong. With `decimal` None no sign is known.
    """
    none_numbers = {number for text in none if (number := as_float(text)) is not None}

    def with_point(text: str) -> float | None:
        try:
            value = float(text)
        except ValueError:
            return unusual(text, decimal, none)
        if value - value != 0 or "_" in text:  # inf, nan; 1_000 is a number to Python only
            return unusual(text, decimal, none)
        return None if value in none_numbers else value

    def without_point(text: str) -> float | None:
        if "." in text:
            return unusual(text, decimal, none)
        return with_point(text.replace(",", ".") if decimal else text)

    return with_point if decimal == "." else without_point


def unusual(text: str, decimal: str | None, none: set[str]) -> float | None:
    """Return what a text that is no plain number means, as `number_reader` says."""
    text = text.strip()
    if text.casefold() in none:
        return None
    if decimal and THOUSANDS[decimal].fullmatch(text):
        return float(text.replace("," if decimal == "." else ".", "").replace(decimal, "."))
    found = NUMBER.fullmatch(text)
    if (found and found[1] not in (None, decimal)) or THOUSANDS[","].fullmatch(text):
        raise ValueError(f"{text!r} has another decimal sign; --decimal says which is right")
    raise ValueError(f"{text!r} is no number; --none {text!r} if it stands for no value")


def as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None
