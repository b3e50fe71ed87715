"""Who owns a job: the worker's session, its lock, and what dead and hanging workers leave."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from life import CLAIM_SQL, as_job
from perfdb import connect, query

log = logging.getLogger(__name__)


# The lock is taken before the row can be seen, so nobody takes a new worker for a dead one.
REGISTER_SQL = """
WITH worker AS (
    INSERT INTO job_workers (host, pid, backend_pid)
    VALUES (%(host)s, %(pid)s, pg_backend_pid())
    RETURNING id
)
SELECT id,
       pg_advisory_lock('job_workers'::regclass::oid::int, id::int),
       set_config('application_name', 'performance server worker ' || id, false) AS idle_name,
       set_config('synchronous_commit', 'off', true)
  FROM worker
"""

# Our own former session may still hold the lock, if the server has not noticed that its client is
# gone. It must be both the holder and our backend_pid: process ids are used again, and somebody who
# recovers our jobs holds the lock for a moment too.
END_FORMER_SESSION_SQL = """
SELECT pg_terminate_backend(l.pid)
  FROM pg_locks l
  JOIN job_workers w ON w.id = l.objid::bigint AND w.backend_pid = l.pid
 WHERE w.id = %(worker_id)s
   AND l.locktype = 'advisory'
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = 'job_workers'::regclass::oid
   AND l.objsubid = 2
   AND l.pid <> pg_backend_pid()
"""

LOCK_SQL = "SELECT pg_advisory_lock('job_workers'::regclass::oid::int, %(worker_id)s::bigint::int)"

REGISTER_AGAIN_SQL = """
INSERT INTO job_workers (id, host, pid, backend_pid)
VALUES (%(worker_id)s, %(host)s, %(pid)s, pg_backend_pid())
ON CONFLICT (id) DO UPDATE
   SET backend_pid = EXCLUDED.backend_pid,
       started     = EXCLUDED.started
"""

# A job that was claimed and not begun is given back with the id.
LEAVE_SQL = """
WITH job AS (
    UPDATE job_instances SET worker_id = NULL WHERE id = %(claimed_id)s AND worker_id = %(worker_id)s
), gone AS (
    DELETE FROM job_workers WHERE id = %(worker_id)s RETURNING id
)
SELECT set_config('synchronous_commit', 'off', true) FROM gone
"""


class Worker:
    """A session that can own jobs: one connection, one row in job_workers, one lock.

    The lock is the lease: PostgreSQL frees it when the connection dies, and then every other worker
    knows at once that the jobs with this `id` in worker_id are orphans.
    """

    def __init__(self, dsn: str | None = None) -> None:
        self.dsn = dsn
        #: asked before each further step; true: hand the job back instead
        self.stopping: Callable[[], bool] = lambda: False
        #: parameters of a claim to be made in the statement that ends a job; None: make none
        self.claim_at_end: dict[str, Any] | None = None
        #: the job that claim got, until somebody takes it
        self.claimed: dict[str, Any] | None = None
        #: true: a job's first step begins in the statement that creates its steps
        self.begin_at_once = False
        self._cursor: psycopg.Cursor[tuple[Any, ...]] | None = None
        self.connection = connect(dsn)
        self.id: int
        self.idle_name: str
        self.id, _, self.idle_name, _ = self.execute(REGISTER_SQL, self._process()).fetchone()

    def _process(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def execute(self, sql: str, params: Mapping[str, Any]) -> psycopg.Cursor[tuple[Any, ...]]:
        """Run one statement; return the cursor it has in common with all others, so read it at once."""
        if self._cursor is None or self._cursor.connection is not self.connection:
            self._cursor = self.connection.cursor(row_factory=tuple_row)  # a new one costs a tenth of a round trip
        return self._cursor.execute(sql, params)

    def forget_plans(self) -> None:
        """Have all statements planned anew when they are next run.

        PostgreSQL keeps the plans of a session's statements. Made while a table was small they read
        it from end to end, and go on doing so for a minute or more after it has grown.
        """
        self.connection.execute("DISCARD PLANS")

    def claim(self, types: Sequence[str], with_tests: bool = False) -> dict[str, Any] | None:
        """Take the most urgent due job of `types` and return it (`as_job`), None if there is none."""
        row = self.execute(CLAIM_SQL, self.claim_params(types, with_tests)).fetchone()
        return as_job(row) if row else None

    def claim_params(self, types: Sequence[str], with_tests: bool) -> dict[str, Any]:
        return {"types": json.dumps(list(types)), "with_tests": with_tests, "worker_id": self.id}

    def reconnect(self) -> None:
        """Connect again under the same id, and so still own what nobody has taken meanwhile.

        What was running is put back to be resumed (`recover`). Raise `psycopg.OperationalError` if
        the server cannot be reached.
        """
        self.connection.close()
        self.claimed = None
        self.connection = connect(self.dsn, self.idle_name)
        me = self._process() | {"worker_id": self.id}
        self.connection.execute(END_FORMER_SESSION_SQL, me)
        self.connection.execute(LOCK_SQL, me)
        recover(self, own=True)  # before started is set anew: it tells a restart from a crash
        self.connection.execute(REGISTER_AGAIN_SQL, me)

    def close(self) -> None:
        """Give up the id, the lock and the connection."""
        with contextlib.suppress(psycopg.Error):
            claimed_id = self.claimed["id"] if self.claimed else None
            self.connection.execute(LEAVE_SQL, {"worker_id": self.id, "claimed_id": claimed_id})
        self.connection.close()


_current: list[Worker] = []  # this process's worker, if it has one


def use_worker(worker: Worker | None) -> None:
    """Make `worker` the one that job instances of this process belong to."""
    _current[:] = [worker] if worker else []


def current_worker() -> Worker:
    """Return this process's worker; the first call makes one, from $PERFDB_DSN."""
    if not _current or _current[0].connection.closed:
        use_worker(Worker())
    return _current[0]


# -------------------------------------------------------------------------------------- recovery

MAX_DEATHS = 3  # a step is given up when so many workers have died in it

# Put back what dead workers left. Dead is whose lock we can take; we hold it to the end of the
# transaction, so a worker that is just coming back waits for us and then sees what is left to it,
# and no second worker recovers the same job. A step is put back to run again unless it was being
# ended as overrun (its comment says so since END_OVERRUN_SQL), or has killed its workers too often.
# If the server was restarted since the worker took its lock, the step is not to blame: not counted.
# Jobs are locked before their steps, in order of id, as everywhere.
RECOVER_SQL = """
WITH dead AS MATERIALIZED (
    SELECT owner.id, COALESCE(w.started < pg_postmaster_start_time(), false) AS by_restart
      FROM (SELECT worker_id AS id FROM job_instances
             WHERE (worker_id IS NOT NULL OR state = 'Running') AND worker_id IS NOT NULL
             UNION
            SELECT id FROM job_workers) AS owner
      LEFT JOIN job_workers w ON w.id = owner.id
     WHERE (%(own)s OR owner.id <> %(worker_id)s)
       AND pg_try_advisory_xact_lock('job_workers'::regclass::oid::int, owner.id::int)
), orphan AS MATERIALIZED (
    SELECT j.id, COALESCE(dead.by_restart, false) AS by_restart
      FROM job_instances j
      LEFT JOIN dead ON dead.id = j.worker_id
     WHERE (j.worker_id IS NOT NULL OR j.state = 'Running')
       AND (dead.id IS NOT NULL OR j.worker_id IS NULL)
     ORDER BY j.id
       FOR UPDATE OF j
), interrupted AS (
    SELECT s.id, s.attempts - orphan.by_restart::int AS attempts,
           CASE WHEN s.comment IS NOT NULL THEN s.comment
                WHEN s.attempts - orphan.by_restart::int >= %(max_deaths)s
                THEN format('Its worker died in this step %%s times; it is not run again by itself. '
                            'See the handler''s log, then jobctl retry %%s.', s.attempts, orphan.id)
            END AS comment
      FROM orphan
      JOIN job_steps s ON s.job_instance_id = orphan.id AND s.state = 'Running'
), step AS (
    UPDATE job_steps s
       SET state    = CASE WHEN i.comment IS NULL THEN 'Created' ELSE 'Failed' END,
           finished = CASE WHEN i.comment IS NULL THEN NULL ELSE clock_timestamp() END,
           attempts = i.attempts,
           comment  = i.comment
      FROM interrupted i
     WHERE s.id = i.id
), job AS (
    UPDATE job_instances j
       SET state     = CASE WHEN j.state = 'Running' THEN 'Queued' ELSE j.state END,
           worker_id = NULL
      FROM orphan
     WHERE j.id = orphan.id
    RETURNING j.id
), gone AS (
    DELETE FROM job_workers w
     USING dead
     WHERE w.id = dead.id
       AND w.id <> %(worker_id)s
)
SELECT id FROM job ORDER BY id
"""


def recover(worker: Worker, own: bool = False) -> list[int]:
    """Free the jobs of dead workers (with `own`, ours too) and return their ids.

    Finished steps stay finished; the interrupted one will run again, at most `MAX_DEATHS` times.
    """
    params = {"own": own, "worker_id": worker.id, "max_deaths": MAX_DEATHS}
    ids = [job_id for (job_id,) in query(worker.connection, RECOVER_SQL, params)]
    for job_id in ids:
        log.warning("job=%d recovered: its worker is gone, the job goes on where it was", job_id)
    return ids


# A lock cannot tell a hung worker from a busy one, but no step may run a minute past its limit: the
# worker itself ends it long before. The comment tells recovery why; a step that ends at this very
# moment is no longer Running, and then nothing is terminated.
END_OVERRUN_SQL = """
UPDATE job_steps s
   SET comment = format('Overrun: longer than the step limit of %%s (job_types.step_timeout) and its '
                        'worker did not react; its connection was ended.', t.step_timeout)
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
  JOIN job_workers w ON w.id = j.worker_id
  JOIN pg_locks l ON l.locktype = 'advisory'
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND l.classid = 'job_workers'::regclass::oid
                 AND l.objid::bigint = w.id
                 AND l.objsubid = 2
                 AND l.granted
                 AND l.pid = w.backend_pid  -- not somebody who recovers it at this moment
 WHERE j.worker_id <> %(worker_id)s
   AND s.job_instance_id = j.id
   AND s.state = 'Running'
   AND s.started + t.step_timeout + interval '1 minute' < clock_timestamp()
RETURNING j.id, s.id, pg_terminate_backend(l.pid)
"""


def end_overrun(worker: Worker) -> None:
    """End the sessions of workers that hang in a step, so that `recover` can go on with the job."""
    for job_id, step_id, _ in query(worker.connection, END_OVERRUN_SQL, {"worker_id": worker.id}):
        log.warning("job=%d step=%d ended: a minute past its limit and no sign of life", job_id, step_id)
