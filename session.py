"""A session that is lent to jobs, and is as it was when it is next used for ourselves.

A job may set search_path, open cursors, take locks: its steps find their settings as `connect`
made them, the next job finds nothing of it. What was not lent costs no round trip more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from perfdb import settlement

PLANS_SECONDS = 1.0  # how long plans are kept
MANY_STEPS = 1000    # of a job: it is not run by plans made for a small table

# What a job has changed in the session, undone: before our own next statement, what those rest on;
# before the next job the rest as well. RESET ALL returns to what `connect` has asked for, except
# for who we are (the role with it), which NULL does, in the statement that we need for the name.
RESTORE = "RESET ALL"
NAME_SQL = """
SELECT set_config('session_authorization', NULL, false),
       set_config('application_name', %(name)s, false)
"""
RESTORE_ALL = ("CLOSE ALL", "DISCARD TEMP", """
SELECT CASE l.objsubid WHEN 1 THEN pg_advisory_unlock(l.classid::bigint << 32 | l.objid::bigint)
                       ELSE pg_advisory_unlock(l.classid::int, l.objid::int) END
  FROM pg_locks l
 WHERE l.pid = pg_backend_pid()
   AND l.locktype = 'advisory'
   AND NOT (l.objsubid = 1 AND l.classid::bigint << 32 | l.objid::bigint = %(worker_id)s)
 UNION ALL
SELECT pg_try_advisory_lock(%(worker_id)s::bigint)  -- a job has freed all of its session
 WHERE NOT EXISTS (
         SELECT FROM pg_locks l
          WHERE l.pid = pg_backend_pid()
            AND l.locktype = 'advisory'
            AND l.objsubid = 1
            AND l.classid::bigint << 32 | l.objid::bigint = %(worker_id)s)
""")


OPEN_TRANSACTION = ("left a transaction open; it was rolled back. "
                    "Use `with self.connection.transaction():`")

# What a step may make of the transaction that it runs in.
LEFT_TRANSACTION = {
    TransactionStatus.IDLE:
        "ended the transaction it runs in (_step_in_transaction); leave out COMMIT and ROLLBACK",
    TransactionStatus.INERROR:
        "went on after a statement that failed, so all it wrote was rolled back; use "
        "`with self.connection.transaction():` around what may fail",
}


class Session:
    """Our statements on one connection, which jobs use as well."""

    id: int              # of the worker: its lock is not a job's to leave behind
    name: str            # application_name: what runs
    settled: bool = True  # whether RESET ALL returns to what `connect` has asked for

    def __init__(self, connection: psycopg.Connection) -> None:
        self._planned = time.monotonic()
        self.open(connection)

    def open(self, connection: psycopg.Connection) -> None:
        """Go on with a new connection."""
        self.connection = connection
        # A new cursor costs a tenth of a round trip, so all our statements share these two.
        self._cursor, self._second = (connection.cursor(row_factory=tuple_row) for _ in "12")
        self._lent = self._lent_to_job = False

    def execute(self, sql: str, params: Mapping[str, Any],
                over: bool = False) -> psycopg.Cursor[tuple[Any, ...]]:
        """Run one statement; return the cursor all have in common, so read it at once.

        `over`: it stands between two jobs.
        """
        if not (self._lent or (over and (self._lent_to_job or self._plans_are_old()))):
            return self._cursor.execute(sql, params)
        self._restore_client()
        with self.connection.pipeline() as pipeline:
            self._restore(over)
            pipeline.sync()  # what is read only by default is so to the end of the transaction
            self._cursor.execute(sql, params)
        return self._cursor

    def lend(self) -> psycopg.Connection:
        """Return the connection for a job to use; what it changes there is undone afterwards."""
        self._lent = self._lent_to_job = True
        return self.connection

    def left(self, in_transaction: bool = False) -> str:
        """Return how a job has left the connection, as a sentence; '' if all is well.

        `in_transaction`: we have begun one for it, which is to be there still.
        """
        status = self.connection.info.transaction_status
        if self.connection.broken:
            return "lost the worker's connection"
        if self.connection.closed:
            return ("closed the worker's connection; use `with self.connection.transaction():`, "
                    "not `with self.connection:`, which closes it")
        if status == TransactionStatus.ACTIVE:
            return "left a statement running, or its rows half read"
        if in_transaction:
            return LEFT_TRANSACTION.get(status, "")
        return OPEN_TRANSACTION if status else ""

    def _restore_client(self) -> None:
        """Undo what psycopg itself may have been told."""
        self.connection.row_factory = tuple_row
        self.connection.cursor_factory = psycopg.Cursor
        if not self.connection.autocommit:
            self.connection.autocommit = True
        for name in ("isolation_level", "read_only", "deferrable"):
            if getattr(self.connection, name) is not None:
                setattr(self.connection, name, None)

    def _restore(self, over: bool) -> None:
        """Undo what a job has changed in the session; `over`: all of it, and old plans go, too."""
        if self._lent:
            self._lent = False
            self._second.execute(RESTORE)
            if not self.settled:
                self._second.execute(*settlement())
            self._second.execute(NAME_SQL, {"name": self.name})
        if over and self._lent_to_job:
            self._lent_to_job = False
            for sql in RESTORE_ALL[:2]:
                self._second.execute(sql)
            self._second.execute(RESTORE_ALL[2], {"worker_id": self.id})
        if over and self._plans_are_old():
            self.forget_plans()

    def forget_plans(self) -> None:
        """Plan all statements anew: before a job of many steps, and between jobs once a second.

        PostgreSQL keeps the plans of a session's statements. Made while a table was small they
        read it from end to end, and go on doing so for a minute or more after it has grown.
        """
        self._second.execute("DISCARD PLANS")
        self._planned = time.monotonic()

    def _plans_are_old(self) -> bool:
        return time.monotonic() - self._planned > PLANS_SECONDS
