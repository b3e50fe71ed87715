"""Jobs as jobctl shows them: lists, one job and its steps, its log, a live bar, figures."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import psycopg

import metrics
from control import FILTER_SQL, TYPE_SQL, unknown_type
from jobs import JOB_TYPES
from perfdb import query, rows_of
from tables import (
    age,
    duration,
    elapsed,
    paint,
    print_json,
    screen_width,
    shorten,
    table,
    text,
    visible,
)

OK, FAILED = 0, 1  # exit status
ENDED = ("Finished", "Failed")


class Refused(Exception):
    """What was asked for cannot be done; the text says why and what can."""


# -------------------------------------------------------------------------------------------- list

# The newest ids first, and only then the counting of steps: for the jobs shown, not for all.
LIST_SQL = """
WITH latest AS MATERIALIZED (
    SELECT j.id
      FROM job_instances j
     WHERE """ + FILTER_SQL + """
     ORDER BY j.id DESC
     LIMIT %(limit)s
)
SELECT v.*, now() - v.created AS age
  FROM v_job_instances v
 WHERE v.id = ANY(ARRAY(SELECT id FROM latest))
 ORDER BY v.id DESC
"""  # noqa: S608, constants only


def filters(connection: psycopg.Connection, args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of FILTER_SQL that --state --type --since --text ask for."""
    if args.type is not None and not query(connection, TYPE_SQL, [args.type]):
        raise Refused(unknown_type(connection, args.type))
    return {"states": args.state, "type": args.type, "text": args.text,
            "since": None, "within": None, **(args.since or {})}


def list_jobs(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print the latest jobs, newest first."""
    params = filters(connection, args) | {"limit": args.limit}

    def show() -> str:
        return jobs_table(rows_of(connection, LIST_SQL, params))
    if args.json:
        print_json(rows_of(connection, LIST_SQL, params))
    elif args.watch:
        repeat(show, args.interval)
    else:
        print(show())
    return OK


def jobs_table(rows: list[dict[str, Any]]) -> str:
    """Return the jobs as a table; where it is narrow, what matters less gives way."""
    created = f"created ({zone(rows[0]['created'])})" if rows else "created"
    heads = ["id", "state", "steps", "failed", "age", created, "ran", "type", "description",
             "comment"]
    return table(heads, [
        (row["id"], row["state"], f"{row['steps_done']}/{row['steps_total']}",
         row["steps_failed"], age(row["age"]), row["created"], row["running_time"],
         row["job_type"], mark_test(row), row["comment"]) for row in rows],
        give_way=["ran", created, "failed", "type", "steps"], cut=["description", "comment"])


def zone(moment: datetime) -> str:
    return f"{moment:%Z}"


def mark_test(row: dict[str, Any]) -> str:
    """Return the description, marked if the handler will not take the job for it."""
    waits = row["state"] in ("Created", "Queued") and "test" in row["description"].lower()
    return f"(not taken: \"test\") {row['description']}" if waits else row["description"]


def repeat(show: Callable[[], str], interval: float) -> None:
    """Print what `show` returns whenever it has changed, on a terminal in the same place."""
    before = ""
    while True:
        if (now := show()) != before:
            print("\x1b[H\x1b[J" * sys.stdout.isatty() + now, flush=True)
        before = now
        time.sleep(interval)


# -------------------------------------------------------------------------------------------- show

JOB_SQL = """
SELECT v.*, now() AS now, t.max_running, v.run_after > now() AS is_future,
       (SELECT count(*) FROM job_workers) AS workers,
       (SELECT count(*)
          FROM job_instances r
         WHERE r.job_type_id = t.id
           AND r.worker_id IS NOT NULL) AS type_running
  FROM v_job_instances v
  JOIN job_types t ON t.name = v.job_type
 WHERE v.id = ANY(%(ids)s)
 ORDER BY v.id
"""

STEPS_SQL = """
SELECT *
  FROM (SELECT *
          FROM v_job_steps
         WHERE job_instance_id = %(id)s
         ORDER BY state = 'Failed' DESC, state = 'Running' DESC, position
         LIMIT %(limit)s) AS shown
 ORDER BY position
"""

FACTS = ("parameters", "priority", "run_after", "created", "started", "finished",
         "waiting_time", "running_time", "attempts", "unique_key", "schedule_id",
         "cancel_requested", "worker_host")


def find_job(connection: psycopg.Connection, job_id: int) -> dict[str, Any]:
    if found := rows_of(connection, JOB_SQL, {"ids": [job_id]}):
        return found[0]
    raise Refused(f"there is no job {job_id}; python jobctl.py list shows the latest")


def show(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print a job and its steps, what failed first."""
    job = find_job(connection, args.id)
    steps = rows_of(connection, STEPS_SQL,
                    {"id": args.id, "limit": None if args.json else args.steps})
    if args.json:
        print_json({"job": job, "steps": steps})
        return OK
    title = (f"Job {job['id']}  {visible(job['job_type'])}  {job['state']}  "
             f"{visible(mark_test(job))}")
    print("", *(paint(line) for line in fold(title, 2)), "", sep="\n")
    print(*errors(job, steps), sep="\n", end="")
    print(*facts(job), sep="\n")
    print(table(["step", "name", "state", "ran", "tries", "result", "comment"], [
        (s["position"], s["name"], s["state"], s["running_time"], s["attempts"], s["result"],
         s["comment"]) for s in steps], give_way=["tries", "result", "ran"],
        cut=["name", "result", "comment"]))
    if more := job["steps_total"] - len(steps):
        print(f"\n  {more} more steps are not shown; --steps {job['steps_total']} shows all, "
              "failed ones come first")
    return OK


def errors(job: dict[str, Any], steps: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the job's comment and the whole error of each failed step, wrapped."""
    said = [("comment", job["comment"])] if job["comment"] else []
    said += [(f"step {s['position']}", f"{s['name']}: {s['comment']}")
             for s in steps if s["state"] == "Failed" and s["comment"]]
    for name, comment in said:
        yield from wrap(name, comment)
    if said:
        yield "\n"


def wrap(name: str, value: str) -> Iterator[str]:
    """Yield a name and a text of any length, its lines kept, wrapped on a terminal only."""
    for line in value.splitlines() or [""]:
        for part in fold(visible(line), 16):
            yield f"  {name:<13} {part[16:]}"
            name = ""


def fold(line: str, indent: int) -> list[str]:
    """Return `line` indented, in as many lines as a terminal needs, in one elsewhere."""
    width = screen_width()
    parts = textwrap.wrap(line, max(width - indent, 20)) if width else [line]
    return [" " * indent + part for part in parts or [""]]


def facts(job: dict[str, Any]) -> Iterator[str]:
    """Yield the rest that there is to know of a job, ages beside times."""
    if why := why_waiting(job):
        yield from wrap("waits", why)
    for name in FACTS:
        value = job[name]
        if isinstance(value, datetime):
            ago = elapsed(value, job["now"])
            when = f"in {age(-ago)}" if ago.total_seconds() < 0 else f"{age(ago)} ago"
            yield from wrap(name, f"{text(value)} {zone(value)} ({when})")
        elif value:
            yield from wrap(name, text(value))
    yield f"  {'steps':<13} {job['steps_done']} of {job['steps_total']} done, " \
          f"{job['steps_failed']} failed\n"


def why_waiting(job: dict[str, Any]) -> str:
    """Return why nobody has the job in hand and what would change that; "" if somebody has."""
    if job["state"] in ENDED or job["worker_id"] is not None:
        return ""
    if stuck := why_stuck(job):
        return stuck
    if job["is_future"]:
        return f"not due before {text(job['run_after'])} {zone(job['run_after'])}"
    if job["job_type"] not in JOB_TYPES:
        return "no file here provides its type: a handler needs --module NAME"
    if job["max_running"] is not None and job["type_running"] >= job["max_running"]:
        return f"max_running is {job['max_running']}, and {job['type_running']} of its type run"
    return "for its turn" if job["workers"] else "no handler runs just now"


def why_stuck(job: dict[str, Any]) -> str:
    """Return why no handler will take the job until somebody changes something; "" if one may."""
    if job["state"] in ENDED or job["worker_id"] is not None:
        return ""
    if "test" in job["description"].lower():
        return '"test" in its description: only a handler with --with-tests takes it'
    if job["max_running"] == 0:
        return "its type is paused: job_types.max_running is 0"
    return ""


# --------------------------------------------------------------------------------------------- log

LOG_SQL = """
SELECT at, what
  FROM (SELECT created AS at, 1 AS n, 'asked for' || CASE
                   WHEN schedule_id IS NOT NULL THEN ' by schedule ' || schedule_id::text
                   ELSE '' END AS what
          FROM job_instances WHERE id = %(id)s
         UNION ALL
        SELECT run_after, 2, CASE WHEN attempts > 0 THEN 'to be tried again' ELSE 'due' END
          FROM job_instances WHERE id = %(id)s AND run_after > created
         UNION ALL
        SELECT started, 3, 'begun' || CASE
                   WHEN attempts > 1 THEN ', attempt ' || attempts::text ELSE '' END
          FROM job_instances WHERE id = %(id)s AND started IS NOT NULL
         UNION ALL
        SELECT cancel_requested, 5, 'asked to stop before its next step'
          FROM job_instances WHERE id = %(id)s AND cancel_requested IS NOT NULL
         UNION ALL
        SELECT finished, 6, state || COALESCE(': ' || comment, '')
          FROM job_instances WHERE id = %(id)s AND finished IS NOT NULL
         UNION ALL
        SELECT last_state_change, 7, state || COALESCE(': ' || comment, '')
          FROM job_instances WHERE id = %(id)s AND finished IS NULL AND state <> 'Created'
         UNION ALL
        (SELECT COALESCE(finished, started), 4,
                'step ' || position::text || ' ' || name || ': ' || state
                || CASE WHEN attempts > 1 THEN ', begun ' || attempts::text || ' times' ELSE '' END
                || COALESCE(' after ' || round(extract(epoch FROM finished - started), 3)::text
                            || ' s', '')
                || COALESCE(': ' || comment, '')
           FROM job_steps
          WHERE job_instance_id = %(id)s AND started IS NOT NULL
          ORDER BY COALESCE(finished, started) DESC
          LIMIT %(limit)s)) AS event
 ORDER BY at, n
"""


def log(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print what became of a job, in the order of time, as its rows tell."""
    job = find_job(connection, args.id)
    rows = rows_of(connection, LOG_SQL, {"id": args.id, "limit": args.steps})
    if args.json:
        print_json(rows)
        return OK
    title = f"job {job['id']}, {visible(job['job_type'])}"
    print(table([f"time ({zone(job['created'])})", "age", title], [
        (row["at"], age(elapsed(row["at"], job["now"])), row["what"])
        for row in rows]))
    if why := why_waiting(job):
        print(f"\n  now waits: {why}")
    return OK


# ------------------------------------------------------------------------------------------- watch

UNFINISHED_SQL = """
SELECT j.id
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.worker_id IS NOT NULL
    OR (    j.state IN ('Created', 'Queued')
        AND j.worker_id IS NULL
        AND j.run_after <= now()
        AND t.max_running IS DISTINCT FROM 0
        AND NOT j.description ILIKE '%%test%%')
 ORDER BY j.worker_id NULLS LAST, j.priority DESC, j.id
 LIMIT 10
"""

STUCK_SQL = """
SELECT id
  FROM job_instances
 WHERE state IN ('Created', 'Queued')
   AND worker_id IS NULL
 ORDER BY priority DESC, id
 LIMIT 10
"""


def watch(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Show a bar per running job until nothing can move any more, and say why a job waits."""
    if args.id:
        find_job(connection, args.id)
    screen = Screen()
    while True:
        ids = [args.id] if args.id else [row[0] for row in query(connection, UNFINISHED_SQL, {})]
        rows = rows_of(connection, JOB_SQL, {"ids": ids})
        screen.show([bar(row) for row in rows], [progress(row) for row in rows])
        if not rows or (args.id and (rows[0]["state"] in ENDED or why_stuck(rows[0]))):
            return end_of_watch(connection, rows)
        time.sleep(args.interval)


def end_of_watch(connection: psycopg.Connection, rows: list[dict[str, Any]]) -> int:
    """Return the exit status of the job that was watched, or say what waits for somebody."""
    if rows:
        return OK if rows[0]["state"] == "Finished" else FAILED
    ids = [job_id for (job_id,) in query(connection, STUCK_SQL)]
    for row in rows_of(connection, JOB_SQL, {"ids": ids}):
        print(bar(row))
    return OK


class Screen:
    """Lines that are written over on a terminal, and printed elsewhere when they have changed."""

    def __init__(self) -> None:
        self.live, self.height, self.before = sys.stdout.isatty(), 0, None

    def show(self, lines: list[str], state: Any) -> None:
        if self.live and self.height:
            print(f"\x1b[{self.height}F\x1b[J", end="")
        if lines and (self.live or state != self.before):
            print(*lines, sep="\n", flush=True)
        self.height, self.before = len(lines), state


def progress(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what of a bar is worth a line of its own: all but the clock."""
    return (row["id"], row["state"], row["steps_done"], row["steps_failed"], row["running_step"],
            why_waiting(row))


def bar(row: dict[str, Any], width: int = 24) -> str:
    """Return a job's progress on one line: bar, steps, rate, remaining time, step or reason."""
    filled = round(width * row["progress"])
    done, total = row["steps_done"] + row["steps_failed"], row["steps_total"]
    line = (f"  job {row['id']}  [{'#' * filled}{'.' * (width - filled)}] {done}/{total} "
            f"{row['state']}")
    if row["steps_failed"]:
        line += f", {row['steps_failed']} failed"
    seconds = row["running_time"].total_seconds() if row["running_time"] else 0
    if row["state"] == "Running" and done and seconds:
        rate = done / seconds
        line += f"  {rate:.3g}/s  {duration((total - done) / rate)} left"
    why = why_waiting(row)
    line += f"  {visible(row['running_step'] or row['comment'] or row['description'])}"
    line += f"  (waits: {why})" if why else ""
    return shorten(line, shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else None)


# ------------------------------------------------------------------------------------------- stats

def stats(connection: psycopg.Connection, args: argparse.Namespace) -> int:
    """Print per type how many jobs wait, run, ended and failed."""
    if args.prometheus is not None:
        metrics.write(connection, args.prometheus)
        return OK
    rows = rows_of(connection, metrics.STATS_SQL, {"since": args.since})
    if args.json:
        print_json(rows)
        return OK
    print(table(["type", "waiting", "oldest", "running", "ended", "failed", "failed %", "per hour",
                 "mean time"], [
        (r["job_type"], r["waiting"], age(r["oldest_waiting"]), r["running"], r["ended"],
         r["failed"], None if r["failure_rate"] is None else f"{100 * r['failure_rate']:.1f}",
         f"{r['per_hour']:.1f}", r["mean_running_time"]) for r in rows],
        give_way=["per hour", "failed", "mean time"], cut=["type"]))
    return OK
