"""Samples from CSV files into feature_values.

    python samples.py load LAN-01.csv --zone Europe/Madrid --stamps start --dry-run
    python samples.py load *.csv --layout park.toml
    python samples.py load pi.csv --feature-column Tag --column 'LAN01.WS=LAN-01.wind_speed' ...

What the first rows of a file tell beyond doubt is found out: encoding, delimiter, decimal sign,
the time's column and format, columns named like features. What nobody can tell is asked for.
The same settings may stand in the table [csv] of a TOML file (--layout), with _ for -, with
columns = { NAME = "FEATURE" } for --column, and with objects = { T01 = "LAN-01" } for what files
call the objects. --dry-run says what was understood. The same file again changes nothing.

The database is $PERFDB_DSN (or libpq's PG* variables). Exit status: 0 done; 1 something was
refused; 2 wrong usage; 3 no database or no tables.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

import control
import csv_layout
import csv_samples
from csv_explain import at_zone, explain
from csv_names import Feature, Object, Park
from csv_times import FORMATS, SECOND, Interval, usual_step
from parameters import schema_problems
from perfdb import BadSetting, connect, query
from samples_store import Store, joined
from tables import duration, hush, ready_streams, table

OK, REFUSED, USAGE, NO_DATABASE = range(4)  # exit status
MOST_SHOWN = 20  # windows
MINUTE = 60 * SECOND

PARK_SQL = """
SELECT o.id, o.name, o.object_model_id
  FROM objects o
 ORDER BY o.name
"""

# In calendar units, as an interval is added to a time: a month is no number of seconds.
FEATURES_SQL = """
SELECT id, object_model_id, name, unit,
       (extract(year FROM sample_interval) * 12::numeric
        + extract(month FROM sample_interval))::int,
       extract(day FROM sample_interval)::int,
       (extract(epoch FROM sample_interval - date_trunc('day'::text, sample_interval))
        * 1000000::numeric)::bigint
  FROM features
"""

# Which alarms have to be calculated anew when samples of a feature were late or changed?
ALARMS_SQL = """
SELECT o.id, f.id, a.manufacturer_id
  FROM objects o
  JOIN alarms a   ON a.object_model_id = o.object_model_id
  JOIN features f ON f.object_model_id = o.object_model_id
                 AND f.name = a.trigger->>'feature_name'::text
 WHERE o.id = ANY(%(objects)s)
   AND a.trigger->>'trigger_type'::text = 'threshold'
"""


class Refused(Exception):
    """What was asked for cannot be done; the text says why and what can."""


def load(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Load CSV files of samples; with --dry-run only say what they mean."""
    settings = settings_of(args)
    park = read_park(connection, settings)
    readers, problems = understand(args.file, settings, park)
    if args.dry_run:
        for reader in readers:
            explain(reader)
            tell_skipped(reader)
    elif readers:
        load_files(connection, park, readers, args.recalculate)
    if problems:
        complain("\n  ".join(["Not loaded:", *problems]), REFUSED)
    return REFUSED if problems or any(reader.refused.lines for reader in readers) else OK


def load_files(connection: psycopg.Connection, park: Park, readers: Sequence[csv_samples.Reader],
               recalculate: bool) -> None:
    """Load the files one after the other, and tell what came late or changed."""
    store = Store(connection)
    try:
        for reader in readers:
            load_file(store, reader)
    finally:  # what was written before an interruption is not late any more the next time
        settle(connection, store, park, recalculate)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of --layout, those of the options over them; `Refused` if malformed."""
    settings: dict[str, Any] = {}
    if args.layout:
        try:
            settings = tomllib.loads(args.layout.read_text(encoding="utf-8-sig")).get("csv", {})
        except (OSError, ValueError, RecursionError) as exc:
            raise Refused(f"--layout {args.layout}: {exc}") from None
        if problems := schema_problems(settings, csv_layout.SETTINGS):
            raise Refused("\n  ".join([f"--layout {args.layout}, table [csv]:", *problems,
                                       f"known: {', '.join(csv_layout.SETTINGS['properties'])}"]))
    given = {name: getattr(args, name) for name in csv_layout.SETTINGS["properties"]
             if getattr(args, name, None) not in (None, [])}
    columns = settings.get("columns", {}) | dict(args.column)
    return settings | given | {"columns": columns}


def read_park(connection: psycopg.Connection, settings: dict[str, Any]) -> Park:
    """Return the objects and features of the database, to be found by the names in files."""
    features: dict[int, dict[str, Feature]] = {}
    for id_, model, name, unit, *interval in query(connection, FEATURES_SQL):
        features.setdefault(model, {})[name] = Feature(id_, name, unit, Interval(*interval))
    objects = [Object(id_, name, features.get(model, {}))
               for id_, name, model in query(connection, PARK_SQL)]
    if not objects:
        raise Refused("there are no objects in the database: python plant.py apply PARK.toml")
    return Park(objects, settings)


def understand(files: Sequence[Path], settings: dict[str, Any],
               park: Park) -> tuple[list[csv_samples.Reader], list[str]]:
    """Return a reader for each file that is understood, and all that cannot be told of others.

    Raise `Refused` if the settings name what there is not.
    """
    if problems := park.problems():
        raise Refused("\n  ".join(["Nothing was loaded:", *problems]))
    readers, asked = [], {}
    for path in files:
        try:
            layout = csv_layout.understand(path, settings, park, os.environ.get("PERFDB_TIMEZONE"))
            readers.append(csv_samples.Reader(layout, park))
        except csv_layout.LayoutError as exc:
            for problem in exc.problems:
                asked.setdefault(problem, []).append(path.name)
        except OSError as exc:
            asked.setdefault(f"cannot be read: {exc.strerror}", []).append(str(path))
    return readers, [named(names) + problem for problem, names in asked.items()]


def named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: "


# ---------------------------------------------------------------------------------------- loading


def load_file(store: Store, reader: csv_samples.Reader) -> None:
    """Load one file and print what came of it; one piece is read while the last one is written."""
    before = Counter(store.counts)
    read, pending, bar = 0, None, Bar(reader.layout.path)
    with ThreadPoolExecutor(1) as writer:
        for number, piece in enumerate(reader.pieces()):
            if number == 0:
                warn_of_intervals(reader, piece)
            if pending:
                pending.result()
            pending = writer.submit(store.write, piece, reader.signals)
            read += piece.read
            bar.show(read, piece.position)
        pending.result()
    bar.clear()
    print(result(reader.layout.path.name, read, store.counts - before))
    tell_skipped(reader)


def result(name: str, read: int, counts: Counter[str]) -> str:
    same = counts["stored"] - counts["new"] - counts["changed"]
    line = (f"{name}: {count(read, 'sample')}: {counts['new']:,} new, "
            f"{counts['changed']:,} changed, {same:,} as they stood")
    if duplicates := read - counts["stored"]:
        line += f"; {count(duplicates, 'duplicate')}, the last one counts"
    return line


def tell_skipped(reader: csv_samples.Reader) -> None:
    """Print what was not loaded, and why; what was refused on stderr, so that cron mails it."""
    if reader.skipped:
        names = sorted(reader.skipped)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"  no feature has these names, so they were left out: "
              f"{', '.join(map(repr, names[:10]))}{more}")
    refused = reader.refused
    if refused.lines:
        lines = [f"{reader.layout.path.name}: {count(refused.lines, 'line')} refused:",
                 *(f"  line {line}: {reason}" for line, reason in refused.shown)]
        if (more := refused.lines - len({line for line, _ in refused.shown})) > 0:
            lines.append(f"  and {more:,} more")
        print(*lines, sep="\n", file=sys.stderr)


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


class Bar:
    """How far a file is, on a terminal only: on stderr, so that what is printed can be kept."""

    def __init__(self, path: Path) -> None:
        self.name, self.size = path.name, path.stat().st_size
        self.begun = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, read: int, position: int) -> None:
        now = time.monotonic()
        if not self.live or now - self.shown < 0.2:
            return
        self.shown, spent, done = now, now - self.begun, position / self.size
        filled = round(24 * done)
        print(f"\r\x1b[K  {self.name} [{'#' * filled}{'.' * (24 - filled)}] {100 * done:.0f}%  "
              f"{read / spent:,.0f} samples/s  {duration(spent / done - spent)} left",
              end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def warn_of_intervals(reader: csv_samples.Reader, piece: csv_samples.Piece) -> None:
    """Say where samples come at other intervals than their feature's."""
    found: dict[str, list[str]] = {}
    for key, samples in piece.samples.items():
        one, step = reader.signals[key], usual_step(samples)
        months, days, length = one.feature.interval
        if step and not months and not days and step != length:
            problem = (f"samples of {one.feature.name} come every {duration(step / SECOND)}, its "
                       f"interval is {duration(length / SECOND)}: one of them is wrong")
            found.setdefault(problem, []).append(one.object.name)
    for problem, names in found.items():
        print(f"samples: {named(names)}{problem}", file=sys.stderr)


# ------------------------------------------------------------------------ late and changed samples


class Period(NamedTuple):
    """A time in which samples of an object were late or changed."""

    object: Object
    start: int
    end: int
    late: int
    changed: int
    features: tuple[Feature, ...]


def periods(store: Store, park: Park) -> list[Period]:
    """Return the periods to be calculated again, by object and time; one that a sample of any
    feature stands for is in it as a whole."""
    found = []
    for object_ in park.objects.values():
        windows = [(feature, window, window.first - feature.interval.longest())
                   for feature in object_.features.values()
                   for window in store.windows.get((object_.id, feature.id), [])]
        for start, end in joined((start, window.last) for _, window, start in windows):
            inside = [(f, w) for f, w, first in windows if start <= first and w.last <= end]
            found.append(Period(
                object_, start // MINUTE * MINUTE, -(-end // MINUTE) * MINUTE,
                sum(w.late for _, w in inside), sum(w.changed for _, w in inside),
                tuple(dict.fromkeys(f for f, _ in inside))))
    return found


def tell_periods(found: Sequence[Period]) -> None:
    """Print where samples were late or changed, and how their alarms come right."""
    if not found:
        return
    print("\n  Samples that came late, or differ from those that stood\n")
    print(table(["object", "from", "to", "late", "changed", "features"], [
        (p.object.name, at_zone(p.start), at_zone(p.end), p.late, p.changed,
         ", ".join(f.name for f in p.features)) for p in found[:MOST_SHOWN]]))
    if len(found) > MOST_SHOWN:
        print(f"  and {len(found) - MOST_SHOWN} more periods")


def recalculate(connection: psycopg.Connection, found: Sequence[Period]) -> list[int]:
    """Ask for the alarms of these features on these objects; return the ids of the jobs."""
    alarms: dict[tuple[int, int], set[int]] = {}
    for object_id, feature_id, number in query(
            connection, ALARMS_SQL, {"objects": [p.object.id for p in found]}):
        alarms.setdefault((object_id, feature_id), set()).add(number)
    jobs: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for p in found:
        numbers = set().union(*(alarms.get((p.object.id, f.id), ()) for f in p.features))
        if numbers:
            jobs.setdefault((p.start, p.end, tuple(sorted(numbers))), []).append(p.object.name)
    return control.create_jobs(connection, "Alarm Calculation", [
        {"object_names": names, "alarm_ids": list(numbers),
         "start": at_zone(start).isoformat(" ", "seconds"),
         "end": at_zone(end).isoformat(" ", "seconds")}
        for (start, end, numbers), names in jobs.items()], "alarms anew after late samples")


def settle(connection: psycopg.Connection, store: Store, park: Park, ask: bool) -> None:
    """Tell what came late or changed and, if wanted, ask for its alarms."""
    tell_periods(found := periods(store, park))
    if not found or not ask:
        print("\n  load with --recalculate to have their alarms calculated again" * bool(found),
              end="\n" * bool(found))
        return
    ids = recalculate(connection, found)
    jobs = count(len(ids), "Alarm Calculation job")
    print(f"\n  asked for {jobs}: {', '.join(map(str, ids))}" if ids
          else "\n  no alarm depends on these features")


# --------------------------------------------------------------------------------------- options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("load", help="load CSV files", description=load.__doc__)
    command.set_defaults(run=load)
    add = command.add_argument
    add("file", nargs="+", type=Path, help="CSV files, in the order they are to be loaded")
    add("--layout", type=Path, metavar="FILE.toml", help="settings from its table [csv]")
    add("--time", action="append", metavar="COLUMN",
        help="column of the time, by head or number from 1; again for a clock beside the date")
    add("--time-format", metavar="FORMAT",
        help=f"how times are written: {', '.join(FORMATS)}, or a pattern: '%%d.%%m.%%y %%H:%%M'")
    add("--zone", metavar="NAME",
        help="zone of times without an offset (default: $PERFDB_TIMEZONE); of an hour that "
             "comes twice the first pass is taken for daylight saving time")
    add("--stamps", choices=["start", "end"],
        help="which end of its interval a time marks; the tables keep the end")
    add("--object", metavar="NAME", help="whose samples these are (default: the column 'object', "
        "heads like LAN-01.WindSpeed, or the file's name)")
    add("--object-column", metavar="COLUMN", help="column that names the object")
    add("--feature-column", metavar="COLUMN", help="one row per signal: column that names it")
    add("--value-column", metavar="COLUMN", help="... and column of its value (default: 'value')")
    add("--column", action="append", default=[], type=pair, metavar="NAME=FEATURE",
        help="column or signal NAME is this feature; nothing after = leaves it out")
    add("--none", action="append", metavar="VALUE",
        help="stands for no value, e.g. -999, as empty cells, NaN and null do")
    add("--decimal", choices=[".", ","], metavar="SIGN", help="decimal sign: . or ,")
    add("--delimiter", metavar="SIGN", type=sign, help="sign between the columns; a tab is $'\\t'")
    add("--encoding", metavar="NAME", help="e.g. utf-8, utf-16, latin-1")
    add("--header", type=int, metavar="LINE", help="line that names the columns, 0: none")
    add("--dry-run", action="store_true", help="only say what was understood")
    add("--recalculate", action="store_true",
        help="ask for the alarms of periods whose samples came late or changed")
    add("--dsn", help="where performance_db is (default: $PERFDB_DSN, else the PG* variables)")
    return parser.parse_args(argv)


def sign(text: str) -> str:
    text = "\t" if text == "\\t" else text
    if len(text) != 1 or text in '"\r\n':
        raise argparse.ArgumentTypeError(f"{text!r}: write one sign, like ; or a tab, $'\\t'")
    return text


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=FEATURE")
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    ready_streams()
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tell what was done, then stop
    try:
        with connect(args.dsn, "samples load") as connection:
            status = args.run(connection, args)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except psycopg.errors.UndefinedTable:
        return complain("the tables are missing: run `python jobctl.py init`", NO_DATABASE)
    except psycopg.OperationalError as exc:
        return complain(f"cannot reach the database: {str(exc).strip()}", NO_DATABASE)
    except BadSetting as exc:
        return complain(str(exc), USAGE)
    except BrokenPipeError:  # | head; perhaps before all was loaded
        hush()
        return REFUSED
    except (Refused, ValueError, psycopg.Error) as exc:
        return complain(str(exc).strip(), REFUSED)
    except KeyboardInterrupt:
        return complain("interrupted; start it again to load the rest", REFUSED)


def complain(message: str, status: int) -> int:
    print(f"samples: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
