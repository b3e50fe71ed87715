"""What was understood of a CSV file, told before anything is loaded (load --dry-run)."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from itertools import islice

from csv_samples import Key, Piece, Reader
from csv_times import FORMATS, SECOND, Interval, moment, usual_step
from perfdb import time_zone
from tables import duration, table

ROWS = 3  # shown of the samples
SIGNALS = 4  # shown of them


class Summary:
    """What a signal's samples look like."""

    def __init__(self) -> None:
        self.samples = self.values = 0
        self.first: int | None = None
        self.last: int | None = None
        self.steps: Counter[int | None] = Counter()

    def add(self, samples: dict[int, float | None]) -> None:
        self.samples += len(samples)
        self.values += sum(value is not None for value in samples.values())
        low, high = min(samples), max(samples)
        self.first = low if self.first is None else min(self.first, low)
        self.last = high if self.last is None else max(self.last, high)
        self.steps[usual_step(samples)] += len(samples)

    def coverage(self, interval: Interval) -> float:
        """Return the share of the time from the first to the last sample that has a value."""
        length = interval.mean()
        return self.values * length / (self.last - self.first + length)


def explain(reader: Reader) -> None:
    """Read a whole file and print what it means."""
    summaries: dict[Key, Summary] = {}
    read, first = 0, None
    for piece in reader.pieces():
        first, read = first or piece, read + piece.read
        for key, samples in piece.samples.items():
            summaries.setdefault(key, Summary()).add(samples)
    print(f"\n{reader.layout.path}\n\n  {describe(reader)}")
    print("\n  The first samples, as understood\n")
    print(first_samples(reader, first))
    print("\n  What there is\n")
    print(table(["object", "feature", "unit", "samples", "with value", "first", "last", "interval",
                 "coverage"], [line(reader, key, one) for key, one in summaries.items()]))
    if duplicates := read - sum(one.samples for one in summaries.values()):
        print(f"\n  {duplicates:,} duplicates: the last one counts")
    print()


def describe(reader: Reader) -> str:
    """Return encoding, signs, and what the times are."""
    layout = reader.layout
    time = " + ".join(repr(layout.names[c]) for c in layout.time)
    return (f"encoding {layout.encoding}, delimiter {layout.delimiter!r}, decimal sign "
            f"{layout.decimal or 'none'!r}, "
            + (f"header in line {layout.header}" if layout.header else "no header")
            + f"\n  time {time}, written as {FORMATS.get(layout.kind, layout.kind)}, "
            + (f"in {layout.zone}, " if layout.zone else "with an offset, ")
            + f"marks the {layout.stamps} of its interval"
            + (", newest first" if layout.descending else ""))


def first_samples(reader: Reader, piece: Piece) -> str:
    """Return a table of the first samples of the first signals."""
    keys = list(islice(piece.samples, SIGNALS))
    times = sorted({at for key in keys for at in islice(piece.samples[key], ROWS)})[:ROWS]
    heads = [f"{reader.signals[key].object.name} {reader.signals[key].feature.name}"
             for key in keys]
    return table(["end of interval", *heads], [
        (at_zone(at), *(str(piece.samples[key].get(at)) for key in keys)) for at in times])


def line(reader: Reader, key: Key, one: Summary) -> tuple[object, ...]:
    signal = reader.signals[key]
    step = one.steps.most_common(1)[0][0]
    return (signal.object.name, signal.feature.name, signal.feature.unit or "", f"{one.samples:,}",
            f"{one.values:,}", at_zone(one.first), at_zone(one.last),
            duration(step / SECOND) if step else "irregular",
            f"{100 * one.coverage(signal.feature.interval):.1f} %")


def at_zone(at: int) -> datetime:
    """Return a moment in the zone of the sessions, as a table shows it."""
    return moment(at).astimezone(time_zone())
