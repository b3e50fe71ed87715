"""What is wrong with the database around the job system? One line per finding (jobctl doctor)."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg

from perfdb import HIDDEN_SQL, READ_ONLY, query
from worker import HELD_CTE


class Note(str):
    """A finding that needs nobody: good to know, but no reason to wake anyone."""


def row_security(connection: psycopg.Connection) -> Iterator[str]:
    """Tables that look empty: PostgreSQL hides rows from a role without a word."""
    for table, is_ours in query(connection, HIDDEN_SQL):
        whom = "this role" if is_ours else "everybody but the owner"
        yield (f"row security: it is on for {table} without a policy and hides every row from "
               f"{whom}: ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, or "
               f"CREATE POLICY perf ON {table} USING (true)")


# Whoever holds the lock of a worker's id keeps that worker from coming back, and its job from
# being found to be an orphan. A worker that recovers another's jobs does so for a moment.
STRANGERS_SQL = f"""
WITH {HELD_CTE}
SELECT a.pid, a.usename, a.application_name, w.id
  FROM held
  JOIN job_workers w      ON w.id = held.id
  JOIN pg_stat_activity a ON a.pid = held.pid
 WHERE held.pid NOT IN (SELECT backend_pid FROM job_workers)
 ORDER BY a.pid
"""  # noqa: S608


def strangers(connection: psycopg.Connection) -> Iterator[str]:
    """Sessions that hold a worker's advisory lock and are not that worker."""
    for pid, user, application, worker_id in query(connection, STRANGERS_SQL):
        yield (f"locks: session {pid} ({user}, {application!r}) holds the advisory lock of worker "
               f"{worker_id} and is not that worker, so its job is not found to be an orphan: "
               f"SELECT pg_terminate_backend({pid}), and let it use other keys")


MANY_DEAD = 100

DEAD_WORKERS_SQL = f"""
WITH {HELD_CTE}
SELECT count(*)
  FROM job_workers w
 WHERE NOT EXISTS (SELECT FROM held WHERE held.id = w.id)
"""  # noqa: S608


def dead_workers(connection: psycopg.Connection) -> Iterator[str]:
    """Rows of dead workers, which every handler removes at its start and later on."""
    count = query(connection, DEAD_WORKERS_SQL)[0][0]
    if count > MANY_DEAD:
        yield (f"workers: {count} rows of dead workers are in job_workers: "
               "python handler.py --once removes some of them; if they stay, no handler runs")


MANY_DEAD_ROWS = 100_000  # autovacuum comes at a fraction of that; see the tables' settings

DEAD_ROWS_SQL = """
SELECT name, s.n_dead_tup, s.n_live_tup
  FROM pg_catalog.unnest('{job_instances,job_steps,job_workers}'::text[]) AS t(name)
  JOIN pg_stat_all_tables s ON s.relid = to_regclass(name)::oid
 WHERE s.n_dead_tup > GREATEST(%(many)s::bigint, s.n_live_tup)
 ORDER BY name
"""


def dead_rows(connection: psycopg.Connection) -> Iterator[str]:
    """Tables of the jobs that autovacuum does not keep up with: every claim gets slower."""
    for table, dead, live in query(connection, DEAD_ROWS_SQL, {"many": MANY_DEAD_ROWS}):
        yield (f"dead rows: {table} has {dead} of them beside {live} live ones, so every claim is "
               "slow: autovacuum is off, or an old transaction keeps it from cleaning: "
               f"VACUUM {table}")


# Set for all: no handler can work. For this role alone: perhaps it is only to look.
READ_ONLY_SQL = """
SELECT source
  FROM pg_settings
 WHERE name = 'default_transaction_read_only'
   AND setting = 'on'
   AND NOT pg_is_in_recovery()
"""


def read_only(connection: psycopg.Connection) -> Iterator[str]:
    """Whether anybody can write."""
    for (source,) in query(connection, READ_ONLY_SQL):
        note = Note if source in ("user", "database user", "client") else str
        yield note(f"read only: {READ_ONLY} (it comes from: {source})")


CHECKS = [read_only, row_security, strangers, dead_workers, dead_rows]
