"""Ask for jobs, look at them, stop them, run them again.

    python jobctl.py init
    python jobctl.py create "Alarm Calculation" -d "March" '{"object_names": ["LAN-01"], ...}'
    python jobctl.py list --state Failed
    python jobctl.py show 42

The database is $PERFDB_DSN (or libpq's PG* variables), times are in $PERFDB_TIMEZONE (UTC).
Exit status: 0 done; 1 refused or failed; 2 wrong usage; 3 no database or no tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

import handler
import jobs

OK, FAILED, USAGE, NO_DATABASE = 0, 1, 2, 3  # exit status; 2 is argparse's
SCHEMA = Path(__file__).with_name("schema.sql")


class Refused(Exception):
    """What was asked for cannot be done; the text says why and what can."""


# ---------------------------------------------------------------------------------------- output


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
    return "\n".join("  " + line(row) for row in [list(heads), ["-" * w for w in widths], *cells])


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
        return " ".join(f"{k}={json.dumps(v) if isinstance(v, dict | list) else text(v)}" for k, v in value.items())
    return str(value).replace("\n", " ")


def duration(seconds: float) -> str:
    """Return seconds as 12 ms, 3.4 s or 1:02:03."""
    if seconds < 60:
        return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def print_json(value: Any) -> None:
    print(json.dumps(value, default=as_json, indent=2, ensure_ascii=False))


def as_json(value: Any) -> Any:
    """Times in ISO 8601 with offset, intervals in seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()


def rows_of(connection: psycopg.Connection, sql: str, params: Any = None) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql, params).fetchall()


# -------------------------------------------------------------------------------------- commands


def init(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Apply schema.sql, in one transaction, and write the job types with their schemas."""
    with connection.transaction():
        connection.execute(SCHEMA.read_text())
        jobs.write_types(connection)
    return OK


def create(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Ask for a job and print its id."""
    run_after = jobs.parse_time(args.run_after) if args.run_after else None
    print(jobs.create_job(connection, args.type, read_parameters(args), args.description, priority=args.priority,
                          run_after=run_after, unique_key=args.unique_key))
    if "test" in args.description.lower():
        print('jobctl: the description contains "test", so the handler passes this job over '
              "(unless it runs --with-tests)", file=sys.stderr)
    return OK


def read_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters from JSON, a file (@name), standard input (-) and -p options."""
    source = args.json or "{}"
    try:
        if source == "-":
            source = sys.stdin.read()
        elif source.startswith("@"):
            source = Path(source[1:]).read_text()
        parameters = json.loads(source)
    except OSError as exc:
        raise Refused(f"cannot read the parameters: {exc}") from None
    except ValueError as exc:
        raise Refused(f"the parameters are not JSON: {exc}") from None
    for option in args.parameter:
        name, typed, value = option.partition(":=") if ":=" in option.split("=")[0] + "=" else option.partition("=")
        if not typed:
            raise Refused(f"-p {option!r}: write key=value for a string or key:=json for any other value")
        try:
            parameters[name] = json.loads(value) if typed == ":=" else value
        except ValueError as exc:
            raise Refused(f"-p {option!r}: what follows := is not JSON: {exc}") from None
    return parameters


# The newest ids first, and only then the counting of steps: for the jobs shown, not for all.
LIST_SQL = """
WITH latest AS MATERIALIZED (
    SELECT j.id
      FROM job_instances j
     WHERE (%(states)s::text[] IS NULL OR j.state = ANY(%(states)s))
       AND (%(type)s::text IS NULL OR j.job_type_id = (SELECT id FROM job_types WHERE name = %(type)s))
       AND (%(since)s::timestamptz IS NULL OR j.created >= %(since)s)
       AND (%(text)s::text IS NULL OR j.description ILIKE '%%' || %(text)s || '%%'
                                   OR j.comment ILIKE '%%' || %(text)s || '%%')
     ORDER BY j.id DESC
     LIMIT %(limit)s
)
SELECT v.* FROM v_job_instances v WHERE v.id = ANY(ARRAY(SELECT id FROM latest)) ORDER BY v.id DESC
"""


def list_jobs(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print the latest jobs, newest first."""
    rows = rows_of(connection, LIST_SQL, {
        "states": args.state, "type": args.type, "text": args.text, "limit": args.limit,
        "since": jobs.parse_time(args.since) if args.since else None})
    if args.json:
        print_json(rows)
        return OK
    print(table(["id", "type", "state", "steps", "failed", "created", "ran", "description", "comment"], [
        (r["id"], r["job_type"], r["state"], f"{r['steps_done']}/{r['steps_total']}", r["steps_failed"],
         r["created"], r["running_time"], mark_test(r), r["comment"]) for r in rows]))
    return OK


def mark_test(row: dict[str, Any]) -> str:
    """Return the description, marked if the handler will not take the job for it."""
    waits = row["state"] in ("Created", "Queued") and "test" in row["description"].lower()
    return f"(not taken: \"test\") {row['description']}" if waits else row["description"]


JOB_SQL = "SELECT * FROM v_job_instances WHERE id = %(id)s"
STEPS_SQL = "SELECT * FROM v_job_steps WHERE job_instance_id = %(id)s ORDER BY position"


def show(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print a job and its steps."""
    if not (found := rows_of(connection, JOB_SQL, {"id": args.id})):
        raise Refused(f"there is no job {args.id}; python jobctl.py list shows the latest")
    job, steps = found[0], rows_of(connection, STEPS_SQL, {"id": args.id})
    if args.json:
        print_json({"job": job, "steps": steps})
        return OK
    print(f"\n  Job {job['id']}  {job['job_type']}  {job['state']}  {mark_test(job)}\n")
    for name in ("comment", "parameters", "priority", "run_after", "created", "started", "finished", "waiting_time",
                 "running_time", "attempts", "unique_key", "schedule_id", "cancel_requested", "worker_host"):
        if job[name]:
            print(f"  {name:<13} {text(job[name])}")
    print(f"  {'steps':<13} {job['steps_done']} of {job['steps_total']} done, {job['steps_failed']} failed\n")
    print(table(["step", "name", "state", "ran", "tries", "result", "comment"], [
        (s["position"], s["name"], s["state"], s["running_time"], s["attempts"], s["result"], s["comment"])
        for s in steps]))
    return OK


TYPES_SQL = "SELECT * FROM job_types ORDER BY name"


def types(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print the job types and their parameters."""
    rows = rows_of(connection, TYPES_SQL)
    if args.json:
        print_json(rows)
        return OK
    print(table(["id", "name", "parameters", "attempts", "step limit", "at once"], [
        (r["id"], r["name"], ", ".join(r["parameters_schema"].get("properties", {})), r["max_attempts"],
         r["step_timeout"], r["max_running"]) for r in rows]))
    return OK


def cancel(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Cancel jobs: at once, or before their next step."""
    for job_id in args.id:
        state = jobs.cancel_job(connection, job_id, args.reason)
        print(f"job {job_id} is cancelled" if state == "Failed" else f"job {job_id} stops before its next step")
    return OK


def retry(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Have the failed steps of ended jobs run again."""
    for job_id in args.id:
        print(f"job {job_id} is {jobs.retry_job(connection, job_id, args.all)} again")
    return OK


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dsn", help="where performance_db is (default: $PERFDB_DSN, else the PG* variables)")
    common.add_argument("--module", action="append", default=[], metavar="NAME", help="also load the job file NAME.py")
    printing = argparse.ArgumentParser(add_help=False)
    printing.add_argument("--json", action="store_true", help="print everything, as JSON, for scripts")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        help_ = run.__doc__.partition("\n")[0]
        command = commands.add_parser(name, help=help_, description=help_, parents=[common, *parents])
        command.set_defaults(run=run)
        return command

    add("init", init)
    add("types", types, printing)
    command = add("create", create)
    command.add_argument("type", help="name of the job type, e.g. 'Alarm Calculation'")
    command.add_argument("json", nargs="?", help="parameters as a JSON object, @FILE, or - for standard input")
    command.add_argument("-p", "--parameter", action="append", default=[], metavar="KEY=VALUE",
                         help="a parameter as a string, or KEY:=JSON for any other value; may be given again")
    command.add_argument("-d", "--description", default="", help="for people")
    command.add_argument("--priority", type=int, default=0, help="higher runs first (default 0)")
    command.add_argument("--run-after", metavar="TIME", help="not before 'YYYY-MM-DD HH:MM:SS'")
    command.add_argument("--unique-key", metavar="KEY", help="at most one unfinished job per key")
    command = add("list", list_jobs, printing)
    command.add_argument("--state", action="append", choices=["Created", "Queued", "Running", "Finished", "Failed"])
    command.add_argument("--type", metavar="NAME")
    command.add_argument("--since", metavar="TIME", help="created at or after 'YYYY-MM-DD HH:MM:SS'")
    command.add_argument("--text", help="part of the description or the comment")
    command.add_argument("--limit", type=handler.positive, default=20, metavar="N", help="at most N jobs (default 20)")
    command = add("show", show, printing)
    command.add_argument("id", type=int)
    command = add("cancel", cancel)
    command.add_argument("id", type=int, nargs="+")
    command.add_argument("--reason", default="", help="for the job's comment")
    command = add("retry", retry)
    command.add_argument("id", type=int, nargs="+")
    command.add_argument("--all", action="store_true", help="every step, not only the failed ones")
    args = parser.parse_args(argv)
    try:
        handler.load_modules([*handler.JOB_MODULES, *args.module])
    except ImportError as exc:
        parser.error(f"--module: {exc}; give the name of a .py file beside jobctl.py or on PYTHONPATH")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with jobs.connect(args.dsn, f"jobctl {args.command}") as connection:
            return args.run(connection, args)
    except psycopg.errors.UndefinedTable:
        return complain("the tables are missing: run `python jobctl.py init`", NO_DATABASE)
    except psycopg.OperationalError as exc:
        return complain(f"cannot reach the database: {str(exc).strip()}", NO_DATABASE)
    except (Refused, ValueError, OverflowError, psycopg.Error) as exc:
        return complain(str(exc).strip(), FAILED)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def complain(message: str, status: int) -> int:
    print(f"jobctl: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
