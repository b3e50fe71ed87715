"""Write a page to look at: one HTML file, no server, no library, readable without a script.

    python report.py jobs > jobs.html
    python report.py alarms --from "2026-03-01 00:00:00" --to "2026-04-01 00:00:00" > alarms.html

From cron, every five minutes, written beside the old page and renamed:

    */5 * * * *  cd /opt/perfserver && .venv/bin/python report.py jobs --out /var/www/jobs.html

The database is $PERFDB_DSN (or libpq's PG* variables), times are in $PERFDB_TIMEZONE (UTC).
Exit status: 0 written; 1 a part could not be shown (the page says which); 2 wrong usage;
3 no database or no tables.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg

import doctor
import report_alarms
import report_jobs
import report_samples
from jobctl import load_types
from option_values import moment, seconds
from perfdb import BadSetting, connect, connect_plainly, explain, query
from report_page import escape, page, section
from tables import hush, ready_streams, replace_file

OK, FAILED, USAGE, NO_DATABASE = 0, 1, 2, 3  # exit status; 2 is argparse's

# Of doctor's checks: failed jobs are shown apart; comparing the tables with schema.sql makes
# temporary ones, too much for every five minutes.
NOT_HERE = (doctor.failures, doctor.schema)

AS_OF_SQL = "SELECT now(), current_database()"


class Parts:
    """The parts of a page; one that fails says so in its place, and the others are shown."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        self.problems: list[str] = []

    def add(self, name: str, part: Callable[..., str], *args: Any) -> str:
        try:
            with self.connection.transaction():
                return part(self.connection, *args)
        except psycopg.OperationalError:
            raise
        except Exception as exc:  # one odd row must not cost the whole page
            said = explain(exc) if isinstance(exc, psycopg.Error) else f"{exc!r}"
            self.problems.append(f"{name}: {said}")
            return section(name, f"<p>This part cannot be shown: {escape(said)}</p>")


def jobs_page(connection: psycopg.Connection, args: argparse.Namespace, parts: Parts) -> str:
    """Return the page `jobs`."""
    with contextlib.closing(connect_plainly(args.dsn)) as other:
        findings = doctor.examine(connection, other, [
            check for check in doctor.CHECKS if check not in NOT_HERE])
    made, database = begin(connection)
    shown = [
        parts.add("Needs attention", report_jobs.attention, findings),
        parts.add("Schedules", report_jobs.schedules),
        parts.add("Running now", report_jobs.running),
        parts.add("Samples", report_samples.coverage, made),
        parts.add("Steps over time", report_jobs.gantt),
        parts.add("Job types", report_jobs.types),
        parts.add("Database", report_jobs.database)]
    lead = (f"As of <b>{made:%Y-%m-%d %H:%M:%S}</b> {escape(made.tzinfo)}; "
            f"the next is due at {made + args.every:%H:%M:%S}.")
    return page(f"Jobs of {database}", made, lead, shown, args.every)


def alarms_page(connection: psycopg.Connection, args: argparse.Namespace, parts: Parts) -> str:
    """Return the page `alarms`."""
    made, database = begin(connection)
    zone = made.tzinfo
    scope = report_alarms.Scope(args.start.astimezone(zone), args.end.astimezone(zone),
                                args.object)
    part = report_alarms.part_shown(connection, scope)
    shown = [parts.add("When it stood", report_alarms.timeline, scope),
             parts.add("Which alarms", report_alarms.pareto, scope),
             parts.add("Which objects, which days", report_alarms.heat_map, scope),
             parts.add("Why did it stand?", report_alarms.signal, scope)]
    lead = (f"<b>{scope.start:%Y-%m-%d %H:%M}</b> to <b>{scope.end:%Y-%m-%d %H:%M}</b> "
            f"{escape(zone)}; as of {made:%Y-%m-%d %H:%M:%S}. {part}")
    return page(f"Alarms of {database}", made, lead, shown)


def begin(connection: psycopg.Connection) -> tuple[datetime, str]:
    """Begin a transaction in which all parts see the same moment; return it and the database."""
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    return query(connection, AS_OF_SQL)[0]


def write(content: str, out: str | None) -> None:
    """Write the page to the file `out`, whole or not at all, or to standard output."""
    if out is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as the page says of itself
        sys.stdout.write(content)
        sys.stdout.flush()
    else:
        replace_file(out, content)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dsn", help="where performance_db is (default: $PERFDB_DSN)")
    common.add_argument("--out", metavar="FILE", help="write beside FILE and rename it "
                                                      "(default: standard output)")
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    pages = parser.add_subparsers(dest="page", required=True, metavar="PAGE")
    jobs = pages.add_parser("jobs", parents=[common], help=jobs_page.__doc__)
    jobs.add_argument("--every", type=minutes, default=timedelta(minutes=5), metavar="MINUTES",
                      help="how often cron makes it: the page tells when it is stale (default 5)")
    jobs.add_argument("--module", action="append", default=[], metavar="NAME",
                      help="also load the job file NAME.py")
    alarms = pages.add_parser("alarms", parents=[common], help=alarms_page.__doc__)
    for name, dest in (("--from", "start"), ("--to", "end")):
        alarms.add_argument(name, dest=dest, type=moment, required=True, metavar="TIME",
                            help="'YYYY-MM-DD HH:MM:SS'; the window is [from, to)")
    alarms.add_argument("--object", action="append", metavar="NAME",
                        help="only this object; may be given again (default: all)")
    args = parser.parse_args(argv)
    if args.page == "alarms" and args.start >= args.end:
        parser.error("--from must be before --to")
    load_types(parser, getattr(args, "module", []))
    return args


def minutes(text: str) -> timedelta:
    try:
        span = timedelta(minutes=seconds(text))
    except argparse.ArgumentTypeError as exc:
        raise argparse.ArgumentTypeError(str(exc).replace("seconds", "minutes")) from None
    if not span:
        raise argparse.ArgumentTypeError("0 minutes: give a number above 0")
    return span


def main(argv: Sequence[str] | None = None) -> int:
    ready_streams()
    args = parse(argv)
    try:
        with connect(args.dsn, f"report {args.page}") as connection:
            parts = Parts(connection)
            make = jobs_page if args.page == "jobs" else alarms_page
            write(make(connection, args, parts), args.out)
    except psycopg.errors.UndefinedTable:
        return complain("the tables are missing: run `python jobctl.py init`", NO_DATABASE)
    except BadSetting as exc:
        return complain(str(exc), USAGE)
    except psycopg.OperationalError as exc:
        return complain(f"cannot reach the database: {str(exc).strip()}", NO_DATABASE)
    except psycopg.Error as exc:
        return complain(explain(exc), FAILED)
    except BrokenPipeError:  # | head
        hush()
        return OK
    except (ValueError, OSError) as exc:
        return complain(str(exc).strip(), FAILED)
    for problem in parts.problems:
        complain(problem, FAILED)
    return FAILED if parts.problems else OK


def complain(message: str, status: int) -> int:
    print(f"report: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
