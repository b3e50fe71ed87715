"""What is wrong with the job system? One line per finding, each with what to do (jobctl doctor).

A finding reads `kind: what is wrong: what mends it`, the last part a command where there is one.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psycopg

from control import TYPE_NAMES_SQL
from doctor_database import CHECKS as DATABASE_CHECKS
from doctor_database import Note
from doctor_plant import CHECKS as PLANT_CHECKS
from doctor_schema import schema
from jobs import JOB_TYPES, parameter_problems
from parameters import schema_problems
from perfdb import SHARED, query, rows_of, sessions_are_shared
from tables import age, visible

Findings = Iterator[str]
Check = Callable[[psycopg.Connection], Findings]

CLOCK_SECONDS = 5       # this host's clock may differ from the server's by so much
MOST_CONNECTIONS = 0.9  # of max_connections
MOST_FAILURES = 20      # kinds of them, the latest
LONGEST_WAIT = "30 minutes"  # of a due job while workers live


def types(connection: psycopg.Connection) -> Findings:
    there = {name for (name,) in query(connection, TYPE_NAMES_SQL)}
    if missing := set(JOB_TYPES) - there:
        yield f"types: {listed(missing)} not in job_types: python jobctl.py init"
    if unknown := there - set(JOB_TYPES):
        yield (f"types: no file here provides {listed(unknown)}: give --module NAME, or nobody "
               "asks for them any more and the rows of job_types can go")


# A worker is alive while its lock is held; see schema.sql on job_workers.
ORPHANS_SQL = """
SELECT j.id
  FROM job_instances j
 WHERE (j.worker_id IS NOT NULL OR j.state = 'Running')
   AND NOT EXISTS (
         SELECT FROM pg_locks l
          WHERE l.locktype = 'advisory'
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND l.objsubid = 1  -- a key of one bigint: its halves
            AND l.classid::bigint << 32 | l.objid::bigint = j.worker_id)
 ORDER BY j.id
"""


def orphans(connection: psycopg.Connection) -> Findings:
    if ids := [job_id for (job_id,) in query(connection, ORPHANS_SQL)]:
        yield (f"orphans: the workers of jobs {listed(ids)} are dead; the next handler takes them "
               "up: python handler.py --once")


# Failed jobs of the last day by what their steps (or they themselves) say. What somebody has
# cancelled is as it should be. The newest only, so that a flood of failures does not hold us up.
FAILURES_SQL = """
WITH failed AS MATERIALIZED (
    SELECT id, job_type_id, comment, finished
      FROM job_instances
     WHERE state = 'Failed'
       AND finished > now() - interval '1 day'
       AND COALESCE(comment, '') NOT LIKE 'Cancelled: %%'
     ORDER BY finished DESC
     LIMIT 2000
), reason AS (
    SELECT f.id, f.job_type_id, f.finished, o.name AS object,
           left(COALESCE(s.comment, f.comment, ''), 1000) AS comment
      FROM failed f
      LEFT JOIN LATERAL (
            SELECT comment, object_id
              FROM job_steps
             WHERE job_instance_id = f.id
               AND state = 'Failed'
             LIMIT 100) s ON true
      LEFT JOIN objects o ON o.id = s.object_id
)
SELECT t.name AS job_type, r.comment, pg_catalog.count(DISTINCT r.id) AS jobs,
       min(r.finished) AS first, max(r.finished) AS last,
       (pg_catalog.array_agg(DISTINCT r.id))[1:20] AS ids,
       COALESCE(pg_catalog.array_agg(DISTINCT r.object) FILTER (WHERE r.object IS NOT NULL),
                '{}') AS objects
  FROM reason r
  JOIN job_types t ON t.id = r.job_type_id
 GROUP BY 1, 2
 ORDER BY last DESC, jobs DESC
 LIMIT %(most)s
"""


def fetch_failures(connection: psycopg.Connection) -> list[dict[str, Any]]:
    """Return the failed jobs of the last day, a row per type and comment, the latest first."""
    return rows_of(connection, FAILURES_SQL, {"most": MOST_FAILURES})


def failures(connection: psycopg.Connection) -> Findings:
    for group in fetch_failures(connection):
        yield (f"failed: {failure_facts(group)}: {visible(group['comment'])[:200]}: "
               f"mend the cause, then {retry_command(group)}")


def failure_facts(group: dict[str, Any]) -> str:
    """Return how many jobs failed so, when, and at which objects."""
    jobs = "1 job" if group["jobs"] == 1 else f"{group['jobs']} jobs"
    when = f"at {group['last']:%Y-%m-%d %H:%M:%S%z}"
    if group["jobs"] > 1:
        when = f"from {group['first']:%Y-%m-%d %H:%M:%S%z} to {group['last']:%Y-%m-%d %H:%M:%S%z}"
    where = f", objects {listed(set(group['objects']))}" if group["objects"] else ""
    return f"{jobs} of {group['job_type']!r} failed {when}{where}"


def retry_command(group: dict[str, Any]) -> str:
    """Return the command that has the jobs of a group of failures run again."""
    if group["jobs"] <= len(group["ids"]):
        return f"python jobctl.py retry {' '.join(map(str, group['ids']))}"
    words = ["--type", group["job_type"], "--since", "30d"]
    if line := max(group["comment"].splitlines() or [""], key=len)[:60].strip():
        words += ["--text", line]
    return f"python jobctl.py retry --state Failed {shlex.join(words)}"


WAITING_SQL = """
SELECT t.name, t.max_running, j.description ILIKE '%%test%%' AS is_test, count(*),
       now() - min(GREATEST(j.created, j.run_after)) AS oldest,
       min(GREATEST(j.created, j.run_after)) < now() - interval '10 minutes' AS is_old,
       min(GREATEST(j.created, j.run_after)) < now() - %(longest)s::interval AS is_too_old,
       (SELECT count(*) FROM job_workers) AS workers
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.state IN ('Created', 'Queued')
   AND j.worker_id IS NULL
   AND j.run_after <= now()
 GROUP BY 1, 2, 3
 ORDER BY 1, 3
"""


def waiting(connection: psycopg.Connection) -> Findings:
    for row in rows_of(connection, WAITING_SQL, {"longest": LONGEST_WAIT}):
        if why := why_waiting(row):
            yield f"waiting: {row['count']} jobs {why}"


def why_waiting(row: dict[str, Any]) -> str | None:
    """Return what is wrong with jobs that wait, and what to do; None if nothing is."""
    name = repr(row["name"])
    if row["is_test"]:
        return (f'of {name} have "test" in their description and are passed over: '
                "python handler.py --once --with-tests, or change the description")
    if row["name"] not in JOB_TYPES:
        return f"are of type {name}, which no file here provides: python handler.py --module NAME"
    if row["max_running"] == 0:
        return f"of {name}, which is paused (job_types.max_running is 0): {unpause(row['name'])}"
    if row["is_old"] and not row["workers"]:
        return (f"of {name} for over 10 minutes, and no handler runs: start one, "
                "python handler.py --once")
    if row["is_too_old"]:
        limit = "" if row["max_running"] is None else (
            f", or raise job_types.max_running, now {row['max_running']}")
        return (f"of {name}, the oldest for {age(row['oldest'])}, though {row['workers']} workers "
                f"live: start more, python handler.py --workers N{limit}")
    return None


def unpause(name: str) -> str:
    quoted = name.replace("'", "''")
    return f"UPDATE job_types SET max_running = NULL WHERE name = '{quoted}'"  # noqa: S608, shown


SCHEDULES_SQL = """
SELECT s.id, t.name, s.parameters, t.parameters_schema,
       to_char(s.next_start, 'YYYY-MM-DD HH24:MI:SSTZH:TZM'),
       to_char(s.next_start + s.every, 'YYYY-MM-DD HH24:MI:SSTZH:TZM'),
       s.next_start + s.every * 2::float8 + s.delay < now() - interval '1 hour'
  FROM job_schedules s
  JOIN job_types t ON t.id = s.job_type_id
 WHERE s.enabled
 ORDER BY s.id
"""


def schedules(connection: psycopg.Connection) -> Findings:
    rows = query(connection, SCHEDULES_SQL)
    for schedule_id, name, parameters, schema_, start, end, is_late in rows:
        full = parameters | {"start": start, "end": end}
        problems = (parameter_problems(JOB_TYPES[name], full) if name in JOB_TYPES
                    else schema_problems(full, schema_))
        if problems:
            yield (f"schedules: the parameters of schedule {schedule_id} do not fit {name!r}: "
                   f"{'; '.join(problems)}: python jobctl.py schedule remove {schedule_id}, "
                   "and add it anew")
        if is_late:
            yield (f"schedules: schedule {schedule_id} is behind, its next window began {start}; "
                   "a handler makes up for it: python handler.py --once -v")


# The latest windows of each schedule whose jobs have ended; how many of them failed in a row.
FAILED_WINDOWS_SQL = """
SELECT s.id, s.description, t.name, j.ids
  FROM job_schedules s
  JOIN job_types t ON t.id = s.job_type_id
 CROSS JOIN LATERAL (
        SELECT pg_catalog.array_agg(id ORDER BY id) AS ids
          FROM (SELECT id, state,
                       bool_and(state = 'Failed')
                           OVER (ORDER BY window_start DESC, id DESC) AS in_a_row
                  FROM (SELECT id, state, window_start
                          FROM job_instances
                         WHERE schedule_id = s.id
                           AND window_start IS NOT NULL
                           AND window_start < s.next_start
                           AND state IN ('Finished', 'Failed')
                         ORDER BY window_start DESC, id DESC
                         LIMIT 10) AS latest) AS ended
         WHERE in_a_row) j
 WHERE s.enabled
   AND j.ids IS NOT NULL
 ORDER BY s.id
"""


def failed_windows(connection: psycopg.Connection) -> Findings:
    for schedule_id, description, name, ids in query(connection, FAILED_WINDOWS_SQL):
        several = "the last window" if len(ids) == 1 else f"the last {len(ids)} windows"
        yield (f"schedules: {several} of schedule {schedule_id} ({description or name}) failed: "
               f"mend the cause, then python jobctl.py retry {' '.join(map(str, ids))}")


LONG_STEPS_SQL = """
SELECT j.id, s.name, s.started, t.step_timeout
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
  JOIN job_steps s ON s.job_instance_id = j.id
 WHERE (j.worker_id IS NOT NULL OR j.state = 'Running')
   AND s.state = 'Running'
   AND s.started + t.step_timeout < now()
 ORDER BY j.id
"""


def long_steps(connection: psycopg.Connection) -> Findings:
    for job_id, name, started, limit in query(connection, LONG_STEPS_SQL):
        yield (f"steps: step {name!r} of job {job_id} runs since {started:%Y-%m-%d %H:%M:%S%z}, "
               f"longer than its limit of {limit}; a handler ends it one minute after that: "
               "python handler.py --once -v")


# Rows die with every step; nothing older than the oldest snapshot can be cleaned away.
OLD_TRANSACTIONS_SQL = """
SELECT pid, usename, application_name, xact_start
  FROM pg_stat_activity
 WHERE datname = current_database()
   AND backend_type = 'client backend'
   AND xact_start < now() - interval '1 hour'
 ORDER BY xact_start
"""


def old_transactions(connection: psycopg.Connection) -> Findings:
    for pid, user, application, since in query(connection, OLD_TRANSACTIONS_SQL):
        yield (f"transactions: session {pid} ({user}, {application!r}) has one open since "
               f"{since:%Y-%m-%d %H:%M:%S%z} and keeps dead rows from being cleaned: "
               f"SELECT pg_terminate_backend({pid})")


SEES_ALL_SQL = """
SELECT current_user
 WHERE NOT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')
"""


def rights(connection: psycopg.Connection) -> Findings:
    for (user,) in query(connection, SEES_ALL_SQL):
        yield Note(f"rights: {user} does not see other roles' transactions, so none of them can "
                   f"be found here: GRANT pg_read_all_stats TO {user}")


# A process keeps the code it has loaded, whatever is copied over it.
WORKERS_SQL = "SELECT pid, started FROM job_workers WHERE host = %(host)s ORDER BY started"


def old_code(connection: psycopg.Connection) -> Findings:
    files = max(Path(__file__).parent.glob("*.py"), key=lambda path: path.stat().st_mtime)
    changed = datetime.fromtimestamp(files.stat().st_mtime, UTC)
    workers = query(connection, WORKERS_SQL, {"host": socket.gethostname()})
    if old := [pid for pid, started in workers if started < changed]:
        yield (f"workers: processes {listed(old)} on this host were started before {files.name} "
               f"was changed ({changed:%Y-%m-%d %H:%M:%S%z}) and run the old code: stop them with "
               "SIGTERM (systemctl restart perfserver), their jobs are handed on")


VACUUM_SQL = """
SELECT relpages, relallvisible
  FROM pg_class
 WHERE oid = 'feature_values'::regclass::oid
   AND relpages > 1000
   AND relallvisible < relpages / 2
"""


def vacuum(connection: psycopg.Connection) -> Findings:
    for pages, clean in query(connection, VACUUM_SQL):
        yield (f"feature_values: only {100 * clean // pages}% of {pages} pages are known to be "
               "visible, so samples are read many times slower than need be: "
               "VACUUM feature_values")


CONNECTIONS_SQL = """
SELECT count(*), current_setting('max_connections')::int
  FROM pg_stat_activity
 WHERE datid IS NOT NULL
"""


def connections(connection: psycopg.Connection) -> Findings:
    used, most = query(connection, CONNECTIONS_SQL)[0]
    if used > MOST_CONNECTIONS * most:
        yield (f"connections: {used} of {most} are in use: "
               "run fewer workers or raise max_connections")


CLOCK_SQL = "SELECT extract(epoch FROM clock_timestamp())::float8"


def clock(connection: psycopg.Connection) -> Findings:
    before = time.time()
    server = query(connection, CLOCK_SQL)[0][0]
    off = server - (before + time.time()) / 2
    if abs(off) > CLOCK_SECONDS:
        yield f"clock: the server's is {off:+.0f} s off this host's: run NTP on both"


# In some month of the year to come: names may differ and mean the same.
ZONE_SQL = """
SELECT current_setting('TimeZone')
  FROM generate_series(now(), now() + interval '1 year', '1 month') AS t
 WHERE t AT TIME ZONE %(theirs)s <> t AT TIME ZONE current_setting('TimeZone')
 LIMIT 1
"""


def zone(connection: psycopg.Connection, other: psycopg.Connection) -> Findings:
    """Whether psql and other tools show times in the zone that jobs mean."""
    theirs = other.info.parameter_status("TimeZone")
    for (ours,) in query(connection, ZONE_SQL, {"theirs": theirs}):
        adopt = f"set PERFDB_TIMEZONE to {theirs} everywhere, or " if knows_zone(theirs) else ""
        yield (f"zone: the database shows times in {theirs}, jobs mean {ours} (PERFDB_TIMEZONE): "
               f"{adopt}ALTER DATABASE ... SET TimeZone = '{ours}'")


def knows_zone(name: str) -> bool:
    """Whether PERFDB_TIMEZONE may be `name`: servers know zones such as <+05:45>-5:45, too."""
    try:
        return bool(ZoneInfo(name))
    except (KeyError, ValueError, OSError):
        return False


def pooler(connection: psycopg.Connection, other: psycopg.Connection) -> Findings:
    if sessions_are_shared(connection, other):
        yield f"pooler: {SHARED}"


CHECKS: list[Check] = [
    schema, types, failures, orphans, waiting, schedules, failed_windows, long_steps, rights,
    old_transactions, old_code, vacuum, connections, clock, *DATABASE_CHECKS,
    *PLANT_CHECKS]


def examine(connection: psycopg.Connection, other: psycopg.Connection,
            checks: Sequence[Check] = CHECKS) -> list[str]:
    """Return all findings, [] if all is well; `other` is a plain second connection.

    A `Note` among them needs nobody. Raise `psycopg.errors.UndefinedTable` where there are no
    tables at all.
    """
    last = [*zone(connection, other), *pooler(connection, other)]  # before it idles for too long
    return [*(finding for check in checks for finding in look(check, connection)), *last]


ANY_TABLE_SQL = "SELECT to_regclass('job_types') IS NOT NULL"


def look(check: Check, connection: psycopg.Connection) -> Findings:
    """Yield what `check` finds, or why it cannot look: no right to, an older schema, whatever.

    Raise `psycopg.Error` only if the connection is lost or there are no tables at all.
    """
    try:
        yield from check(connection)
    except psycopg.errors.InsufficientPrivilege as exc:
        yield Note(f"rights: cannot look for {check.__name__}: {exc.diag.message_primary}: "
                   "OPERATIONS.md, Roles, has the GRANTs")
    except psycopg.Error as exc:
        if connection.closed or not query(connection, ANY_TABLE_SQL)[0][0]:
            raise
        older = isinstance(exc, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn
                           | psycopg.errors.UndefinedFunction)
        yield (f"{'schema' if older else 'doctor'}: cannot look for {check.__name__}: "
               f"{exc.diag.message_primary or exc}{': python jobctl.py init' if older else ''}")


def needs_somebody(findings: Sequence[str]) -> list[str]:
    """Return those of the findings that are no `Note`."""
    return [finding for finding in findings if not isinstance(finding, Note)]


def line(finding: str) -> str:
    """Return a finding as it is printed."""
    return f"note: {finding}" if isinstance(finding, Note) else finding


def listed(things: set[str] | list[int]) -> str:
    """Return up to five of them, and how many more there are."""
    several = sorted(things)
    more = f" and {len(several) - 5} more" if len(several) > 5 else ""
    return ", ".join(map(repr, several[:5])) + more
