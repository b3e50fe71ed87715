"""The park in one file that people keep in git: types, models, features, alarms, objects.

    python plant.py check park.toml              # what is wrong with it? needs no database
    python plant.py apply park.toml --dry-run    # what would change?
    python plant.py apply park.toml              # change it, in one transaction
    python plant.py export > park.toml           # the file that says what the database has

What the database has and the file has not stays, unless --remove is given; nothing is removed that
samples or alarm history belong to. How the file is written: plant_toml.py, examples/park.toml.

The database is $PERFDB_DSN (or libpq's PG* variables). Exit status: 0 done or nothing to do; 1
refused; 2 wrong usage; 3 no database or no tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import psycopg

import plant_check
from csv_times import Interval
from perfdb import BadSetting, clean, connect
from plant_tables import KINDS, TAKE_TURNS_SQL, Plan, compare, orphans, read_database, write_plan
from plant_toml import Plant, write, write_interval, write_trigger
from tables import hush, ready_streams

OK, REFUSED, USAGE, NO_DATABASE = range(4)  # exit status
MOST_SHOWN = 10  # of what would be orphaned
SEQUENCE_BEHIND = """\
  If that is the id: {table} has rows whose ids its sequence did not give. Set it right:
  SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}"""


class Refused(Exception):
    """What was asked for cannot be done; the text says why and what can."""


# -------------------------------------------------------------------------------------- commands


def check(args: argparse.Namespace) -> int:
    """Say what is wrong with a park's file."""
    plant = plant_check.read(args.file)
    print(f"{args.file}: " + counted(plant))
    return OK


def counted(plant: Plant) -> str:
    return ", ".join(how_many(len(getattr(plant, kind)), kind) for kind in KINDS)


def how_many(count: int, kind: str) -> str:
    return f"{count} {kind if count != 1 else kind[:-1]}"


def apply(args: argparse.Namespace) -> int:
    """Make the database say what a park's file says."""
    want = plant_check.read(args.file)
    with connect(args.dsn, "plant apply") as connection, connection.transaction():
        connection.execute(TAKE_TURNS_SQL)
        plan = compare(read_database(connection), want)
        problems = orphans(connection, plan, args.remove)
        if not problems and not args.dry_run:
            write_plan(connection, plan, args.remove)
    lines = [clean(line) for line in told(plan, args.remove)]
    print(*lines or ["nothing to do"], sep="\n")  # not before: a closed pipe may stop us here
    if problems:
        refuse(problems)
    if lines:
        print(f"\n{summary(plan, args.remove)}{'; nothing was done' if args.dry_run else ''}")
    tell_rest(plan, args.remove)
    return OK


def refuse(orphaned: Sequence[str]) -> None:
    more = [f"and {len(orphaned) - MOST_SHOWN} more"] if orphaned[MOST_SHOWN:] else []
    raise Refused("\n  ".join([
        "Nothing was changed. These would leave samples or history behind that belong to nothing "
        "any more; if they are to go, delete them first:", *orphaned[:MOST_SHOWN], *more]))


def told(plan: Plan, remove: bool) -> Iterator[str]:
    """Yield a line for each thing that is added, changed or removed."""
    for kind in KINDS:
        for key in plan.add[kind]:
            yield f"+ {label(kind, key)}{detail(getattr(plan.want, kind)[key])}"
        for key in plan.change[kind]:
            old, new = getattr(plan.have, kind)[key], getattr(plan.want, kind)[key]
            for name in (f.name for f in fields(new)):
                if getattr(old, name) != getattr(new, name):
                    yield (f"~ {label(kind, key)}: {name} {shown(getattr(old, name))} -> "
                           f"{shown(getattr(new, name))}")
    for kind in reversed(KINDS):
        for key in plan.remove[kind] if remove else ():
            yield f"- {label(kind, key)}"


def label(kind: str, key: Any) -> str:
    name = " / ".join(map(str, key)) if isinstance(key, tuple) else key
    return f"{kind[:-1]:<7} {name}"


def detail(value: Any) -> str:
    """Return what a new thing is, in brackets."""
    said = [f"{name} {shown(part)}" for name, part in (vars(value) if value else {}).items()
            if part not in (None, "", ())]
    return f" ({', '.join(said)})" if said else ""


def shown(value: Any) -> str:
    if isinstance(value, Interval):
        return write_interval(value)
    if isinstance(value, dict):
        return str(write_trigger(value))
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value not in (None, "") else "none"


def summary(plan: Plan, remove: bool) -> str:
    numbers = {"added": plan.add, "changed": plan.change, "removed": plan.remove if remove else {}}
    return ", ".join(f"{sum(map(len, of.values()))} {what}" for what, of in numbers.items())


def tell_rest(plan: Plan, remove: bool) -> None:
    """Say what stays although the file has it not, and which history is of former definitions."""
    left = {kind: len(keys) for kind, keys in plan.remove.items() if keys}
    if left and not remove:
        print("not in the file and left as they are (--remove removes them): "
              + ", ".join(how_many(count, kind) for kind, count in left.items()))
    numbers = [str(number) for model, number in plan.change["alarms"]
               if plan.have.alarms[model, number].name == plan.want.alarms[model, number].name]
    if numbers:
        print(f"what alarms_history has of the alarms {', '.join(numbers)} follows their former "
              "definition: ask for an Alarm Calculation of its time")


def export(args: argparse.Namespace) -> int:
    """Print the file that says what the database has."""
    with connect(args.dsn, "plant export") as connection, connection.transaction():
        plant = read_database(connection)
    try:
        print(write(plant), end="")
    except ValueError as exc:
        raise Refused(f"cannot be exported: {exc}") from None
    return OK


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run in (check, apply, export):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if run is not export:
            command.add_argument("file", type=Path, metavar="PARK.toml")
        if run is apply:
            command.add_argument("--dry-run", action="store_true", help="only print the plan")
            command.add_argument("--remove", action="store_true",
                                 help="remove what the database has and the file has not")
        if run is not check:
            command.add_argument("--dsn", help="where performance_db is (default: $PERFDB_DSN, "
                                               "else the PG* variables)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    ready_streams()
    args = parse(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except psycopg.errors.UndefinedTable:
        return complain("the tables are missing: run `python jobctl.py init`", NO_DATABASE)
    except psycopg.OperationalError as exc:
        return complain(f"cannot reach the database: {str(exc).strip()}", NO_DATABASE)
    except BadSetting as exc:
        return complain(str(exc), USAGE)
    except plant_check.PlantError as exc:
        print(clean(str(exc)), file=sys.stderr)
        return REFUSED
    except psycopg.errors.UniqueViolation as exc:  # the file has each name once: it is the id
        return complain(f"{str(exc).strip()}\n"
                        + SEQUENCE_BEHIND.format(table=exc.diag.table_name), REFUSED)
    except BrokenPipeError:  # | head
        hush()
        return OK
    except (Refused, ValueError, OSError, psycopg.Error) as exc:
        return complain(str(exc).strip(), REFUSED)


def complain(message: str, status: int) -> int:
    print(f"plant: {clean(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
