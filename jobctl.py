"""Ask for jobs, look at them, stop them, run them again.

    python jobctl.py init
    python jobctl.py create "Alarm Calculation" -d "March" '{"object_names": ["LAN-01"], ...}'
    python jobctl.py list --state Failed
    python jobctl.py show 42
    python jobctl.py doctor

The database is $PERFDB_DSN (or libpq's PG* variables), times are in $PERFDB_TIMEZONE (UTC).
Exit status: 0 done; 1 refused, failed, or doctor found something; 2 wrong usage; 3 no database or no tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

import control
import handler
import schedules
import upgrade
from parameters import parse as parse_parameters
from perfdb import UnfitDatabase, connect, connect_plainly, parse_time, query, refuse_unfit
from tables import duration, print_json, table, text

OK, FAILED, USAGE, NO_DATABASE = 0, 1, 2, 3  # exit status; 2 is argparse's


class Refused(Exception):
    """What was asked for cannot be done; the text says why and what can."""


def rows_of(connection: psycopg.Connection, sql: str, params: Any = None) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql, params).fetchall()


# -------------------------------------------------------------------------------------- commands


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
    run_after = parse_time(args.run_after) if args.run_after else None
    print(control.create_job(connection, args.type, read_parameters(args), args.description, priority=args.priority,
                          run_after=run_after, unique_key=args.unique_key))
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
            source = sys.stdin.read()
        elif source.startswith("@"):
            source = Path(source[1:]).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise Refused(f"cannot read the parameters: {exc}") from None
    parameters = parse_parameters(source)
    for option in args.parameter:
        name, typed, value = option.partition(":=") if ":=" in option.split("=")[0] + "=" else option.partition("=")
        if not typed:
            raise Refused(f"-p {option!r}: write key=value for a string or key:=json for any other value")
        try:
            parameters[name] = json.loads(value) if typed == ":=" else value
        except ValueError as exc:
            raise Refused(f"-p {option!r}: what follows := is not JSON: {exc}") from None
    return parse_parameters(json.dumps(parameters))


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
        "since": parse_time(args.since) if args.since else None})
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
STEPS_SQL = """
SELECT * FROM (
    SELECT *
      FROM v_job_steps
     WHERE job_instance_id = %(id)s
     ORDER BY state = 'Failed' DESC, state = 'Running' DESC, position
     LIMIT %(limit)s) AS shown
 ORDER BY position
"""


def show(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print a job and its steps."""
    if not (found := rows_of(connection, JOB_SQL, {"id": args.id})):
        raise Refused(f"there is no job {args.id}; python jobctl.py list shows the latest")
    job = found[0]
    steps = rows_of(connection, STEPS_SQL, {"id": args.id, "limit": None if args.json else args.steps})
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
    if more := job["steps_total"] - len(steps):
        print(f"\n  {more} more steps are not shown; --steps {job['steps_total']} shows all, failed ones come first")
    return OK


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
    for job_id in args.id:
        state = control.cancel_job(connection, job_id, args.reason)
        print(f"job {job_id} is cancelled" if state == "Failed" else f"job {job_id} stops before its next step")
    return OK


def retry(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Have the failed steps of ended jobs run again."""
    for job_id in args.id:
        print(f"job {job_id} is {control.retry_job(connection, job_id, args.all)} again")
    return OK


BATCH = 200  # jobs deleted per commit

# Oldest first, past what the last batch has seen; a job somebody has locked is left for the next time.
PRUNE_SQL = """
WITH doomed AS (
    SELECT id
      FROM job_instances
     WHERE id > %(after)s
       AND state IN ('Finished', 'Failed')
       AND finished < now() - %(age)s::interval
     ORDER BY id
     LIMIT %(batch)s
       FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM job_instances j USING doomed WHERE j.id = doomed.id
)
SELECT id FROM doomed
"""

COUNT_OLD_SQL = """
SELECT count(*)
  FROM job_instances
 WHERE state IN ('Finished', 'Failed')
   AND finished < now() - %(age)s::interval
"""


def prune(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Delete jobs that ended long ago, and their steps."""
    if args.dry_run:
        print(f"{query(connection, COUNT_OLD_SQL, {'age': args.older_than})[0][0]} jobs would be deleted")
        return OK
    after, count = 0, 0
    while ids := query(connection, PRUNE_SQL, {"after": after, "age": args.older_than, "batch": BATCH}):
        after, count = max(ids)[0], count + len(ids)
    print(f"{count} jobs deleted")
    return OK


# Waiting and running jobs come from the two partial indexes, ended ones from the BRIN index on finished.
STATS_SQL = """
SELECT t.name AS job_type, w.waiting, w.oldest_waiting, r.running, e.ended, e.failed,
       e.ended::float8 / GREATEST(extract(epoch FROM %(since)s::interval) / 3600.0, 1e-6)::float8 AS per_hour,
       e.failed::float8 / NULLIF(e.ended, 0)::float8 AS failure_rate, e.mean_running_time
  FROM job_types t
 CROSS JOIN LATERAL (
        SELECT count(*) AS waiting, now() - min(GREATEST(created, run_after)) AS oldest_waiting
          FROM job_instances
         WHERE state IN ('Created', 'Queued') AND worker_id IS NULL AND job_type_id = t.id AND run_after <= now()) w
 CROSS JOIN LATERAL (
        SELECT count(*) AS running
          FROM job_instances
         WHERE worker_id IS NOT NULL AND job_type_id = t.id) r
 CROSS JOIN LATERAL (
        SELECT count(*) AS ended, count(*) FILTER (WHERE state = 'Failed') AS failed,
               avg(finished - started) AS mean_running_time
          FROM job_instances
         WHERE finished > now() - %(since)s::interval AND job_type_id = t.id) e
 ORDER BY t.name
"""


def stats(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print per type how many jobs wait, run, ended and failed."""
    rows = rows_of(connection, STATS_SQL, {"since": args.since})
    if args.json:
        print_json(rows)
        return OK
    print(table(["type", "waiting", "oldest", "running", "ended", "failed", "failed %", "per hour", "mean time"], [
        (r["job_type"], r["waiting"], r["oldest_waiting"], r["running"], r["ended"], r["failed"],
         None if r["failure_rate"] is None else f"{100 * r['failure_rate']:.1f}", f"{r['per_hour']:.1f}",
         r["mean_running_time"]) for r in rows]))
    return OK


WATCH_SQL = """
SELECT *, extract(epoch FROM running_time)::float8 AS seconds
  FROM v_job_instances
 WHERE id = ANY(%(ids)s)
 ORDER BY id
"""

UNFINISHED_SQL = """
SELECT id
  FROM job_instances
 WHERE worker_id IS NOT NULL
    OR (state IN ('Created', 'Queued') AND worker_id IS NULL AND run_after <= now())
 ORDER BY worker_id NULLS LAST, priority DESC, id
 LIMIT 10
"""


def watch(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Show a bar per running job until it ends (without an id: until none runs or is due)."""
    live, height, before = sys.stdout.isatty(), 0, None
    while True:
        ids = [args.id] if args.id else [job_id for (job_id,) in query(connection, UNFINISHED_SQL)]
        rows = rows_of(connection, WATCH_SQL, {"ids": ids})
        if args.id and not rows:
            raise Refused(f"there is no job {args.id}; python jobctl.py list shows the latest")
        lines = [bar(row) for row in rows]
        if live and height:
            print(f"\x1b[{height}F\x1b[J", end="")
        if live or lines != before:
            print(*lines, sep="\n", flush=True)
        height, before = len(lines), lines
        if not rows or (args.id and rows[0]["state"] in ("Finished", "Failed")):
            return FAILED if args.id and rows[0]["state"] == "Failed" else OK
        time.sleep(args.interval)


def bar(row: dict[str, Any], width: int = 24) -> str:
    """Return a job's progress on one line: bar, steps, rate, remaining time, running step."""
    filled = round(width * row["progress"])
    done, total = row["steps_done"] + row["steps_failed"], row["steps_total"]
    line = f"  job {row['id']}  [{'#' * filled}{'.' * (width - filled)}] {done}/{total} {row['state']}"
    if row["steps_failed"]:
        line += f", {row['steps_failed']} failed"
    if row["state"] == "Running" and done and row["seconds"]:
        rate = done / row["seconds"]
        line += f"  {rate:.3g}/s  {duration((total - done) / rate)} left"
    line += f"  {row['running_step'] or row['comment'] or row['description']}".replace("\n", " ")
    return line[:shutil.get_terminal_size((120, 24)).columns - 1]


def examine(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Say what is wrong with the job system, a line per finding; exit status 1 if there is any."""
    import doctor
    with contextlib.closing(connect_plainly(args.dsn)) as other:
        findings = doctor.examine(connection, other)
    if args.json:
        print_json(findings)
    else:
        print(*(findings or ["all is well"]), sep="\n")
    return FAILED if findings else OK


def add_schedule(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Owe a job for every window of time from now on, and print the schedule's id."""
    schedule_id = schedules.add_schedule(
        connection, args.type, read_parameters(args), description=args.description,
        every=args.every, start=parse_time(args.start), delay=args.delay)
    print(schedule_id)
    warn_test(args.description)
    return OK


def list_schedules(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print the schedules and when their next window begins."""
    rows = rows_of(connection, schedules.SCHEDULES_SQL)
    if args.json:
        print_json(rows)
        return OK
    print(table(["id", "type", "enabled", "every", "counted from", "next window", "delay", "description",
                 "parameters"], [
        (r["id"], r["job_type"], "yes" if r["enabled"] else "no", r["every"], r["first_start"], r["next_start"],
         r["delay"], r["description"], r["parameters"]) for r in rows]))
    return OK


def change_schedule(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Enable, disable or remove a schedule; its jobs stay."""
    if not query(connection, schedules.CHANGE_SCHEDULE_SQL[args.action], {"id": args.id}):
        raise Refused(f"there is no schedule {args.id}; python jobctl.py schedule list shows them")
    print(f"schedule {args.id}: {args.action}d")
    return OK


def backfill(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Create jobs for windows of a schedule that lack one, and print their ids."""
    period = args.schedule, parse_time(args.from_time), parse_time(args.to_time), args.which
    if args.dry_run:
        print(table(["from", "to", "new job", "because it", "jobs"], [
            (w.start, w.end, "yes" if w.create else "no", w.why, w.jobs)
            for w in schedules.windows(connection, *period)]))
        return OK
    for job_id in schedules.backfill(connection, *period):
        print(job_id)
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
    command.add_argument("--steps", type=handler.positive, default=100, metavar="N",
                         help="at most N steps (default 100)")
    command = add("cancel", cancel)
    command.add_argument("id", type=int, nargs="+")
    command.add_argument("--reason", default="", help="for the job's comment")
    command = add("retry", retry)
    command.add_argument("id", type=int, nargs="+")
    command.add_argument("--all", action="store_true", help="every step, not only the failed ones")
    command = add("watch", watch)
    command.add_argument("id", type=int, nargs="?")
    command.add_argument("--interval", type=handler.seconds, default=1.0, metavar="SECONDS", help="(default 1)")
    command = add("stats", stats, printing)
    command.add_argument("--since", type=interval, default="24 hours", metavar="TIME", help="(default 24h)")
    command = add("prune", prune)
    command.add_argument("--older-than", type=interval, required=True, metavar="TIME", help="e.g. 90d")
    command.add_argument("--dry-run", action="store_true", help="only say how many")
    command = add("backfill", backfill)
    command.add_argument("schedule", type=int, metavar="SCHEDULE", help="its id, see schedule list")
    command.add_argument("--from", dest="from_time", required=True, metavar="TIME",
                         help="windows that begin at or after 'YYYY-MM-DD HH:MM:SS'")
    command.add_argument("--to", dest="to_time", required=True, metavar="TIME", help="and before this")
    which = command.add_mutually_exclusive_group()
    for name, help_ in (("missing", "windows that have no job (default)"),
                        ("failed", "also those whose jobs have all Failed"),
                        ("all", "every window")):
        which.add_argument(f"--{name}", action="store_const", dest="which", const=name, help=help_)
    command.set_defaults(which="missing")
    command.add_argument("--dry-run", action="store_true", help="only list the windows, and why")
    add("doctor", examine, printing)
    schedule(commands, common, printing)
    args, rest = parser.parse_known_args(argv)
    if len(rest) == 1 and getattr(args, "json", 0) is None and (rest == ["-"] or not rest[0].startswith("-")):
        args.json, rest = rest[0], []  # argparse does not see an optional word that stands behind options
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        handler.load_modules(args.module)
    except ImportError as exc:
        parser.error(f"--module: {exc}; give the name of a .py file beside jobctl.py or on PYTHONPATH")
    return args


def schedule(commands: Any, common: argparse.ArgumentParser, printing: argparse.ArgumentParser) -> None:
    """Add the command `schedule` with its actions."""
    help_ = "Create jobs by the calendar"
    actions = commands.add_parser("schedule", help=help_, description=help_).add_subparsers(
        dest="action", required=True, metavar="ACTION")

    def add(name: str, run: Any, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        help_ = run.__doc__.partition("\n")[0]
        action = actions.add_parser(name, help=help_, description=help_, parents=[common, *parents])
        action.set_defaults(run=run)
        return action

    action = add("add", add_schedule)
    action.add_argument("type", help="name of the job type")
    action.add_argument("json", nargs="?", help="parameters without start and end; JSON, @FILE or -")
    action.add_argument("-p", "--parameter", action="append", default=[], metavar="KEY=VALUE", help="or KEY:=JSON")
    action.add_argument("-d", "--description", default="", help="of each job")
    action.add_argument("--every", type=interval, required=True, metavar="INTERVAL", help="e.g. 1d or '1 month'")
    action.add_argument("--start", required=True, metavar="TIME", help="of the first window; write the offset")
    action.add_argument("--delay", type=interval, default="0s", metavar="INTERVAL", help="after a window's end")
    add("list", list_schedules, printing)
    for name in schedules.CHANGE_SCHEDULE_SQL:
        add(name, change_schedule).add_argument("id", type=int)


def interval(text_: str) -> str:
    """Return a length of time as PostgreSQL reads it: 90d, 24h, 15min, '1 month'."""
    if not re.fullmatch(r"\s*\d+\s*(s|sec|min|h|d|w|mon|y|second|minute|hour|day|week|month|year)s?\s*", text_):
        raise argparse.ArgumentTypeError(f"{text_!r} is no length of time; write 90d, 24h, 15min or '1 month'")
    return text_


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with connect(args.dsn, f"jobctl {args.command}") as connection:
            return args.run(connection, args)
    except psycopg.errors.UndefinedTable:
        return complain("the tables are missing: run `python jobctl.py init`", NO_DATABASE)
    except UnfitDatabase as exc:
        return complain(str(exc), NO_DATABASE)
    except psycopg.OperationalError as exc:
        return complain(f"cannot reach the database: {str(exc).strip()}", NO_DATABASE)
    except (Refused, ValueError, OverflowError, psycopg.Error) as exc:
        return complain(str(exc).strip(), FAILED)
    except KeyboardInterrupt:
        return OK
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def complain(message: str, status: int) -> int:
    print(f"jobctl: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
