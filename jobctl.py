"""Ask for jobs, look at them, stop them, run them again.

    python jobctl.py init
    python jobctl.py create "Alarm Calculation" -d "March" '{"object_names": ["LAN-01"], ...}'
    python jobctl.py list --state Failed --since 24h
    python jobctl.py show 42
    python jobctl.py retry --state Failed --since 24h --dry-run
    python jobctl.py doctor

The database is $PERFDB_DSN (or libpq's PG* variables), times are in $PERFDB_TIMEZONE (UTC).
Exit status: 0 done; 1 refused, failed, or doctor found something that needs somebody;
2 wrong usage; 3 no database or no tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg

import control
import doctor
import handler
import schedules
import upgrade
from job_lists import Refused, filters, list_jobs, log, show, stats, watch
from option_values import (
    due,
    interval,
    moment,
    parameter,
    positive,
    priority,
    seconds,
    since,
)
from parameters import parse as parse_parameters
from perfdb import (
    BadSetting,
    UnfitDatabase,
    connect,
    connect_plainly,
    explain,
    is_passing,
    query,
    refuse_unfit,
    rows_of,
)
from tables import hush, print_json, ready_streams, table, visible

OK, FAILED, USAGE, NO_DATABASE = 0, 1, 2, 3  # exit status; 2 is argparse's


# ---------------------------------------------------------------------------------------- commands


def init(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Make or upgrade the tables (schema.sql), and write the job types with their schemas."""
    refuse_unfit(connection, args.dsn)
    left = upgrade.upgrade(connection)
    control.write_types(connection)
    for one in left:
        complain(f"{one}", FAILED)
    return FAILED if left else OK


def create(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Ask for a job and print its id."""
    print(control.create_job(
        connection, args.type, read_parameters(args), args.description, priority=args.priority,
        run_after=args.run_after, unique_key=args.unique_key))
    warn_test(args.description)
    return OK


def warn_test(description: str) -> None:
    if "test" in description.lower():
        print('jobctl: the description contains "test", so the handler passes such a job over '
              "(unless it runs --with-tests)", file=sys.stderr)


def read_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters from JSON, a file (@name), standard input (-) and -p options."""
    source = args.json or "{}"
    try:
        if source == "-":
            source = sys.stdin.read().removeprefix("\ufeff")  # some editors begin a file so
        elif source.startswith("@"):
            source = Path(source[1:]).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise Refused(f"cannot read the parameters: {exc}") from None
    parameters = parse_parameters(source)
    if args.parameter and not isinstance(parameters, dict):
        raise Refused(f"-p needs parameters that are a JSON object, not {source[:60]!r}")
    if args.parameter:
        parameters |= dict(args.parameter)
    return parse_parameters(json.dumps(parameters))


TYPES_SQL = "SELECT * FROM job_types ORDER BY name"


def types(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print the job types and their parameters."""
    rows = rows_of(connection, TYPES_SQL)
    if args.json:
        print_json(rows)
        return OK
    print(table(["id", "name", "attempts", "step limit", "at once", "parameters"], [
        (r["id"], r["name"], r["max_attempts"], r["step_timeout"], r["max_running"],
         ", ".join(sorted(r["parameters_schema"].get("properties", {})))) for r in rows]))
    return OK


def cancel(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Cancel jobs: at once, or before their next step."""
    def one(job_id: int) -> str:
        state = control.cancel_job(connection, job_id, args.reason)
        return "is cancelled" if state == "Failed" else "stops before its next step"
    return to_each(connection, args, one, "cancelled", ["Created", "Queued", "Running"])


def retry(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Have the failed steps of ended jobs run again."""
    def one(job_id: int) -> str:
        return f"is {control.retry_job(connection, job_id, args.all)} again"
    return to_each(connection, args, one, "retried", ["Failed"] + ["Finished"] * args.all)


def to_each(connection: psycopg.Connection, args: argparse.Namespace, change: Callable[[int], str],
            done: str, states: list[str]) -> int:
    """Change the jobs given by id or chosen by filters, one by one; a refusal stops no other.

    By filters only jobs in `states` are chosen, the ones that can be changed so.
    """
    chosen = list(dict.fromkeys(args.id)) or [job["id"] for job in control.matching_jobs(
        connection, **filters(connection, args) | {"states": args.state or states})]
    if args.dry_run:
        return foretell(connection, chosen, done, states)
    status = OK
    for job_id in chosen:
        try:
            status = max(status, say(f"job {job_id} {change(job_id)}"))
        except ValueError as exc:
            status = complain(str(exc), FAILED)
    if not chosen:
        print("no job fits these filters")
    return status


def say(done: str) -> int:
    """Print what was done to one of several jobs; that it cannot be read stops not the rest."""
    try:
        print(done, flush=True)
    except OSError as exc:
        hush()
        return OK if isinstance(exc, BrokenPipeError) else complain(str(exc), FAILED)
    return OK


def foretell(connection: psycopg.Connection, ids: list[int], done: str, states: list[str]) -> int:
    """Say of each job whether it would be changed."""
    jobs = {job["id"]: job for job in control.matching_jobs(connection, ids)}
    for job_id in ids:
        if job_id not in jobs:
            print(f"there is no job {job_id}")
            continue
        job = jobs[job_id]
        would = "would be" if job["state"] in states else "cannot be"
        print(f"job {job_id} {would} {done}: {job['state']}, {visible(job['job_type'])}"
              f"{', ' * bool(job['description'])}{visible(job['description'])}")
    can = sum(job["state"] in states for job in jobs.values())
    print(f"{can} jobs would be {done}; nothing was changed")
    return OK


def prune(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Delete jobs that ended long ago, and their steps."""
    if args.dry_run:
        print(f"{control.count_ended(connection, args.older_than)} jobs would be deleted")
    else:
        print(f"{control.delete_ended(connection, args.older_than)} jobs deleted")
    return OK


def examine(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Say what is wrong with the job system, a line per finding."""
    with contextlib.closing(connect_plainly(args.dsn)) as other:
        findings = doctor.examine(connection, other)
    urgent = doctor.needs_somebody(findings)
    if args.quiet:
        findings = urgent
    if args.json:
        print_json(findings)
    elif findings or not args.quiet:
        print(*(map(doctor.line, findings) if findings else ["all is well"]), sep="\n")
    return FAILED if urgent else OK


def add_schedule(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Owe a job for every window of time from now on, and print the schedule's id."""
    schedule_id = schedules.add_schedule(
        connection, args.type, read_parameters(args), description=args.description,
        every=args.every, start=args.start, delay=args.delay)
    print(schedule_id)
    warn_test(args.description)
    return OK


def list_schedules(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print the schedules and when their next window begins."""
    rows = rows_of(connection, schedules.SCHEDULES_SQL)
    if args.json:
        print_json(rows)
        return OK
    heads = ["id", "type", "enabled", "every", "counted from", "next window", "delay",
             "description", "parameters"]
    print(table(heads, [
        (r["id"], r["job_type"], "yes" if r["enabled"] else "no", r["every"], r["first_start"],
         r["next_start"], r["delay"], r["description"], r["parameters"]) for r in rows],
        give_way=["delay", "parameters", "counted from"],
        cut=["type", "description", "parameters"]))
    return OK


def change_schedule(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Enable, disable or remove a schedule; its jobs stay."""
    action = args.command.split()[-1]
    if not query(connection, schedules.CHANGE_SCHEDULE_SQL[action], {"id": args.id}):
        raise Refused(f"there is no schedule {args.id}; python jobctl.py schedule list shows them")
    print(f"schedule {args.id}: {action}d")
    return OK


def backfill(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Create jobs for windows of a schedule that lack one, and print their ids."""
    period = args.schedule, args.from_time, args.to_time, args.which
    if args.dry_run:
        print(table(["from", "to", "new job", "because it", "jobs"], [
            (w.start, w.end, "yes" if w.create else "no", w.why, w.jobs)
            for w in schedules.windows(connection, *period)]))
        return OK
    for job_id in schedules.backfill(connection, *period):
        print(job_id)
    return OK


# ----------------------------------------------------------------------------------------- options

def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


COMMON = [
    option("--dsn", help="where performance_db is (default: $PERFDB_DSN, else the PG* variables)"),
    option("--module", action="append", default=[], metavar="NAME",
           help="also load the job file NAME.py")]
JSON = option("--json", action="store_true", help="print everything, as JSON, for scripts")
DRY_RUN = option("--dry-run", action="store_true", help="only say what would be done")
EVERY = option("--interval", type=seconds, default=1.0, metavar="SECONDS",
               help="between two looks (default 1)")
STEPS = option("--steps", type=positive, default=100, metavar="N",
               help="at most N steps (default 100)")
FILTERS = [
    option("--state", action="append",
           choices=["Created", "Queued", "Running", "Finished", "Failed"],
           help="in this state; may be given again"),
    option("--type", metavar="NAME", help="of this job type"),
    option("--since", type=since, metavar="TIME",
           help="created in the last 24h, 7d ..., or at or after 'YYYY-MM-DD HH:MM:SS'"),
    option("--text", help="part of the description, the comment or a failed step's error")]
PARAMETERS = [
    option("type", help="name of the job type, e.g. 'Alarm Calculation'"),
    option("json", nargs="?",
           help="parameters as a JSON object, @FILE, or - for standard input"),
    option("-p", "--parameter", type=parameter, action="append", default=[], metavar="KEY=VALUE",
           help="a parameter as a string, or KEY:=JSON for any other value; may be given again"),
    option("-d", "--description", default="", help="for people")]
IDS = option("id", type=int, nargs="*", help="of the jobs; or choose them by the options below")
ID = option("id", type=int)

Option = tuple[tuple[str, ...], dict[str, Any]]
Run = Callable[[psycopg.Connection, argparse.Namespace], int]

COMMANDS: dict[str, tuple[Run, list[Option]]] = {
    "init": (init, []),
    "types": (types, [JSON]),
    "create": (create, [
        *PARAMETERS,
        option("--priority", type=priority, default=0, help="higher runs first (default 0)"),
        option("--run-after", type=due, metavar="TIME",
               help="not before 'YYYY-MM-DD HH:MM:SS'"),
        option("--unique-key", metavar="KEY", help="at most one unfinished job per key")]),
    "list": (list_jobs, [
        *FILTERS, JSON, EVERY,
        option("--watch", action="store_true", help="again and again, until Ctrl-C"),
        option("--limit", type=positive, default=20, metavar="N",
               help="at most N jobs (default 20)")]),
    "show": (show, [ID, STEPS, JSON]),
    "log": (log, [ID, STEPS, JSON]),
    "cancel": (cancel, [IDS, *FILTERS, DRY_RUN,
                        option("--reason", default="", help="for the job's comment")]),
    "retry": (retry, [IDS, *FILTERS, DRY_RUN,
                      option("--all", action="store_true",
                             help="every step, not only the failed ones")]),
    "watch": (watch, [option("id", type=int, nargs="?", help="(default: all that run or are due)"),
                      EVERY]),
    "stats": (stats, [
        JSON,
        option("--since", type=interval, default="24 hours", metavar="TIME", help="(default 24h)"),
        option("--prometheus", metavar="FILE",
               help="write them to FILE for node_exporter's textfile collector")]),
    "prune": (prune, [
        option("--older-than", type=interval, required=True, metavar="TIME", help="e.g. 90d"),
        DRY_RUN]),
    "backfill": (backfill, [
        option("schedule", type=int, metavar="SCHEDULE", help="its id, see schedule list"),
        option("--from", dest="from_time", type=moment, required=True, metavar="TIME",
               help="windows that begin at or after 'YYYY-MM-DD HH:MM:SS'"),
        option("--to", dest="to_time", type=moment, required=True, metavar="TIME",
               help="and before this"),
        option("--missing", action="store_const", dest="which", const="missing",
               default="missing", help="windows that have no job (default)"),
        option("--failed", action="store_const", dest="which", const="failed",
               help="also those whose jobs have all Failed"),
        option("--all", action="store_const", dest="which", const="all", help="every window"),
        DRY_RUN]),
    "doctor": (examine, [
        JSON, option("--quiet", action="store_true",
                     help="print nothing unless somebody is needed (for cron)")]),
    "schedule add": (add_schedule, [
        *PARAMETERS,
        option("--every", type=interval, required=True, metavar="INTERVAL",
               help="e.g. 1d or '1 month'"),
        option("--start", type=moment, required=True, metavar="TIME",
               help="of the first window; write the offset"),
        option("--delay", type=interval, default="0s", metavar="INTERVAL",
               help="after a window's end")]),
    "schedule list": (list_schedules, [JSON]),
    **{f"schedule {action}": (change_schedule, [ID]) for action in schedules.CHANGE_SCHEDULE_SQL},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command in `argv`; end with status 2 if they are wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(words[:2]) if words[:1] == ["schedule"] else "".join(words[:1])
    if name not in COMMANDS:
        return menu().parse_args(words[:1] if words[:1] != ["schedule"] else [name])
    run, options = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"jobctl.py {name}", description=run.__doc__)
    for names, settings in [*options, *COMMON]:
        parser.add_argument(*names, **settings)
    if broken := [word for word in words if re.search("[\ud800-\udfff]", word)]:
        parser.error(f"{broken[0]!a} is not UTF-8")
    args = parser.parse_intermixed_args(words[len(name.split()):])
    args.run, args.command = run, name
    if IDS in options and bool(args.id) == any((args.state, args.type, args.since, args.text)):
        parser.error("give the ids of the jobs, or some of --state --type --since --text")
    load_types(parser, args.module)
    return args


def menu() -> argparse.ArgumentParser:
    """Return the parser that knows the commands' names only, for help and wrong names."""
    lines = "\n".join(f"  {name:<16} {run.__doc__.partition(chr(10))[0]}"
                      for name, (run, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="jobctl.py", usage="jobctl.py COMMAND ...", description=__doc__,
        epilog=f"commands (each has --help):\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    return parser


def load_types(parser: argparse.ArgumentParser, modules: Sequence[str]) -> None:
    """Import the job files and those `modules`; end with status 2 if one cannot be imported."""
    try:
        handler.load_modules(modules)
    except ImportError as exc:
        parser.error(f"--module: {exc}{place_of(exc.__cause__)}")


def place_of(exc: BaseException | None) -> str:
    """Return where in a job file an import went wrong, or what to do if there is no such file."""
    if isinstance(exc, SyntaxError):
        return ""  # its text has the place
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__ if exc else None)
              if "importlib" not in frame.filename]
    if len(frames) > 1:  # the first one is our own
        return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})"
    return "; give the name of a .py file beside jobctl.py or on PYTHONPATH"


def main(argv: Sequence[str] | None = None) -> int:
    ready_streams()
    args = parse(argv)
    try:
        with connect(args.dsn, f"jobctl {args.command}") as connection:
            try:
                status = args.run(connection, args)
            except psycopg.errors.ReadOnlySqlTransaction:
                refuse_unfit(connection, args.dsn)  # says whether it is a standby or a setting
                raise
            sys.stdout.flush()  # a closed pipe shows here, not at exit
            return status
    except psycopg.errors.UndefinedTable:
        return complain("the tables are missing: run `python jobctl.py init`", NO_DATABASE)
    except (psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedFunction) as exc:
        return complain(explain(exc), NO_DATABASE)
    except UnfitDatabase as exc:
        return complain(str(exc), NO_DATABASE)
    except BadSetting as exc:
        return complain(str(exc), USAGE)
    except psycopg.Error as exc:
        if isinstance(exc, psycopg.OperationalError) and is_passing(exc):
            return complain(f"cannot reach the database: {str(exc).strip()}", NO_DATABASE)
        return complain(explain(exc), FAILED)
    except BrokenPipeError:  # | head
        hush()
        return OK
    except (Refused, ValueError, OverflowError, OSError) as exc:
        return complain(str(exc).strip(), FAILED)
    except KeyboardInterrupt:  # the way to end a watch
        return OK if args.command in ("watch", "list") else complain("interrupted", FAILED)


def complain(message: str, status: int) -> int:
    print(f"jobctl: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
