"""What is wrong with the job system? One line per finding, each with what to do (jobctl doctor)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psycopg

from control import TYPE_NAMES_SQL
from doctor_database import CHECKS as DATABASE_CHECKS
from doctor_schema import schema
from jobs import JOB_TYPES, parameter_problems
from parameters import schema_problems
from perfdb import SHARED, query, sessions_are_shared

Findings = Iterator[str]

CLOCK_SECONDS = 5       # this host's clock may differ from the server's by so much
MOST_CONNECTIONS = 0.9  # of max_connections


def types(connection: psycopg.Connection) -> Findings:
    there = {name for (name,) in query(connection, TYPE_NAMES_SQL)}
    if missing := set(JOB_TYPES) - there:
        yield f"types: {listed(missing)} not in job_types: python jobctl.py init"
    if unknown := there - set(JOB_TYPES):
        yield (f"types: no file here provides {listed(unknown)}: give --module NAME, or nobody asks for them any "
               "more and the rows of job_types can go")


# A worker is alive while its lock is held; see schema.sql on job_workers.
ORPHANS_SQL = """
SELECT j.id
  FROM job_instances j
 WHERE (j.worker_id IS NOT NULL OR j.state = 'Running')
   AND NOT EXISTS (
         SELECT FROM pg_locks l
          WHERE l.locktype = 'advisory'
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND l.classid = 'job_workers'::regclass::oid
            AND l.objid::bigint = j.worker_id
            AND l.objsubid = 2)
 ORDER BY j.id
"""


def orphans(connection: psycopg.Connection) -> Findings:
    if ids := [job_id for (job_id,) in query(connection, ORPHANS_SQL)]:
        yield f"orphans: the workers of jobs {listed(ids)} are dead: python handler.py --once takes the jobs up again"


WAITING_SQL = """
SELECT t.name, t.max_running, j.description ILIKE '%%test%%' AS is_test, count(*),
       min(GREATEST(j.created, j.run_after)) < now() - interval '10 minutes' AS is_old,
       EXISTS (SELECT FROM job_workers) AS has_workers
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.state IN ('Created', 'Queued')
   AND j.worker_id IS NULL
   AND j.run_after <= now()
 GROUP BY 1, 2, 3
 ORDER BY 1, 3
"""


def waiting(connection: psycopg.Connection) -> Findings:
    for name, most, is_test, count, is_old, has_workers in query(connection, WAITING_SQL, {}):
        if is_test:
            yield (f'waiting: {count} jobs of {name!r} have "test" in their description and are passed over: '
                   "run handler.py --with-tests, or change the description")
        elif name not in JOB_TYPES:
            yield f"waiting: {count} jobs are of type {name!r}, which no file here provides: handler.py --module NAME"
        elif most == 0:
            yield f"waiting: {count} jobs of {name!r}, which is paused (job_types.max_running is 0)"
        elif is_old and not has_workers:
            yield f"waiting: {count} jobs of {name!r} for over 10 minutes, and no handler runs: start one"


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
    for schedule_id, name, parameters, schema_, start, end, is_late in query(connection, SCHEDULES_SQL):
        full = parameters | {"start": start, "end": end}
        problems = (parameter_problems(JOB_TYPES[name], full) if name in JOB_TYPES
                    else schema_problems(full, schema_))
        if problems:
            yield (f"schedules: the parameters of schedule {schedule_id} do not fit {name!r}: {'; '.join(problems)}: "
                   "remove it and add it anew")
        if is_late:
            yield f"schedules: schedule {schedule_id} is behind, its next window began {start}: does a handler run?"


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
        yield (f"steps: step {name!r} of job {job_id} runs since {started:%Y-%m-%d %H:%M:%S%z}, longer than its limit "
               f"of {limit}: a handler ends it one minute after the limit; does one run?")


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
        yield (f"transactions: session {pid} ({user}, {application!r}) has one open since {since:%Y-%m-%d %H:%M:%S%z} "
               f"and keeps dead rows from being cleaned: SELECT pg_terminate_backend({pid})")


VACUUM_SQL = """
SELECT relpages, relallvisible
  FROM pg_class
 WHERE oid = 'feature_values'::regclass::oid
   AND relpages > 1000
   AND relallvisible < relpages / 2
"""


def vacuum(connection: psycopg.Connection) -> Findings:
    for pages, visible in query(connection, VACUUM_SQL):
        yield (f"feature_values: only {100 * visible // pages}% of {pages} pages are known to be visible, so samples "
               "are read many times slower than need be: VACUUM feature_values")


CONNECTIONS_SQL = """
SELECT count(*), current_setting('max_connections')::int
  FROM pg_stat_activity
 WHERE datid IS NOT NULL
"""


def connections(connection: psycopg.Connection) -> Findings:
    used, most = query(connection, CONNECTIONS_SQL)[0]
    if used > MOST_CONNECTIONS * most:
        yield f"connections: {used} of {most} are in use: run fewer workers or raise max_connections"


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
        yield (f"zone: the database shows times in {theirs}, jobs mean {ours} (PERFDB_TIMEZONE): set PERFDB_TIMEZONE "
               f"to {theirs} everywhere, or ALTER DATABASE ... SET TimeZone = '{ours}'")


def pooler(connection: psycopg.Connection, other: psycopg.Connection) -> Findings:
    if sessions_are_shared(connection, other):
        yield f"pooler: {SHARED}"


CHECKS: list[Callable[[psycopg.Connection], Findings]] = [
    schema, types, orphans, waiting, schedules, long_steps, old_transactions, vacuum, connections, clock,
    *DATABASE_CHECKS]


def examine(connection: psycopg.Connection, other: psycopg.Connection) -> list[str]:
    """Return all findings, [] if all is well; `other` is a plain second connection by the same string."""
    return [*(finding for check in CHECKS for finding in check(connection)),
            *zone(connection, other), *pooler(connection, other)]


def listed(things: set[str] | list[int]) -> str:
    """Return up to five of them, and how many more there are."""
    several = sorted(things)
    return ", ".join(map(repr, several[:5])) + (f" and {len(several) - 5} more" if len(several) > 5 else "")
