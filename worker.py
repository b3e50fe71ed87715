"""Who owns a job: the worker's session, its lock, and what dead and hanging workers leave.

A worker's row in job_workers and every job it has in hand carry its random id, and its session
holds pg_advisory_lock(id). The lock is the lease: PostgreSQL frees it when the connection dies,
and then every other worker knows at once that its jobs are orphans. No heartbeat, no clock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from contextvars import ContextVar
from typing import Any

import psycopg

import claims
import life
from perfdb import GONE_BY, UnfitDatabase, connect, query, refuse_unfit
from session import Session

log = logging.getLogger(__name__)

LOCK_WAIT = "5s"      # for our own lock, which a former session of ours may still hold
HANG_WAIT = "1min"    # for the next statement of a worker that puts somebody's job back
MAX_DEATHS = 3        # a step, or taking a job up, is given up when so many workers died in it


class Alone:
    """What a worker does that no handler directs: it runs on, and takes no further job."""

    def stopping(self) -> bool:
        """Whether to hand the job back instead of beginning its next step."""
        return False

    def wanted(self) -> claims.Wanted | None:
        """Which job to claim together with the end of this one, None for none."""
        return None


# The lock is taken before the row can be seen, so nobody takes a new worker for a dead one.
REGISTER_SQL = """
WITH worker AS (
    INSERT INTO job_workers (id, host, pid, backend_pid)
    VALUES (%(worker_id)s, %(host)s, %(pid)s, pg_backend_pid())
    RETURNING id
)
SELECT current_setting('perfdb.settled', true) = 'on', pg_advisory_lock(id),
       set_config('application_name', %(idle_name)s, false),
       set_config('synchronous_commit', 'off', true)
  FROM worker
"""

# Who holds a worker's lock: its 64 bits stand in two columns of pg_locks.
HELD_CTE = """
held AS MATERIALIZED (
    SELECT l.classid::bigint << 32 | l.objid::bigint AS id, l.pid
      FROM pg_locks l
     WHERE l.locktype = 'advisory'
       AND l.objsubid = 1
       AND l.granted
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
)"""

# Former sessions of ours that the server has not noticed to be gone still hold the lock. Only
# those this process knows of: somebody who recovers our jobs holds it for a moment, too. This
# session does not hold it yet.
END_FORMER_SESSIONS_SQL = f"""
WITH {HELD_CTE}
SELECT pg_terminate_backend(pid)
  FROM held
 WHERE id = %(worker_id)s
   AND pid = ANY(%(former)s)
"""  # noqa: S608

LOCK_SQL = """
SELECT current_setting('perfdb.settled', true) = 'on',
       set_config('lock_timeout', %(wait)s, true), pg_advisory_lock(%(worker_id)s::bigint)
"""
UNLOCK_SQL = "SELECT pg_advisory_unlock(%(worker_id)s::bigint)"

# No row: somebody has recovered our jobs meanwhile, or the server was a standby that had not heard
# of us. `started` tells a restart from a crash, so our jobs are put back before it is set anew.
REGISTER_AGAIN_SQL = """
UPDATE job_workers
   SET backend_pid = pg_backend_pid(),
       started     = now()
 WHERE id = %(worker_id)s
RETURNING id
"""

LEAVE_SQL = """
WITH gone AS (DELETE FROM job_workers WHERE id = %(worker_id)s RETURNING id)
SELECT set_config('synchronous_commit', 'off', true) FROM gone
"""

class Worker(Session):
    """A session that can own jobs: one connection, one row in job_workers, one lock."""

    def __init__(self, dsn: str | None = None, directions: Alone | None = None) -> None:
        super().__init__(connect(dsn))
        refuse_unfit(self.connection, dsn)
        self.dsn = dsn
        self.directions = directions or Alone()
        self._take_id()

    def _take_id(self) -> None:
        self.id = secrets.randbits(62) + 1
        self.idle_name = self.name = f"performance server worker {self.id}"
        self._former: list[int] = []  # server processes of our sessions under this id
        self._former.append(self.connection.info.backend_pid)
        if (row := self.execute(REGISTER_SQL, self._me()).fetchone()) is None:
            raise UnfitDatabase("the database took no worker"
                                + GONE_BY.format(table="job_workers"))
        self.settled = row[0]

    def _me(self) -> dict[str, Any]:
        return {"worker_id": self.id, "idle_name": self.idle_name, "host": socket.gethostname(),
                "pid": os.getpid(), "former": self._former, "wait": LOCK_WAIT}

    # Losing the connection, and leaving.

    def reconnect(self, go_on: bool = False) -> None:
        """Connect again, under the same id if it is still ours, and put back what was running.

        With `go_on` that is kept in hand: a job has closed the connection and can tell of it.
        Raise `psycopg.OperationalError` if the server cannot be reached, or if what was running
        cannot be put back yet.
        """
        with contextlib.closing(self.connection):  # at last: a thread of a job may wait in it
            self.open(connect(self.dsn, self.name if go_on else self.idle_name))
            self._former.append(self.connection.info.backend_pid)
            self.execute(END_FORMER_SESSIONS_SQL, self._me())
        try:
            self.settled = self.execute(LOCK_SQL, self._me()).fetchone()[0]
        except psycopg.errors.LockNotAvailable:  # by whom ever: our jobs are orphans when it goes
            self._take_id()
            return
        if not go_on:
            put_back(self)
        if not self.execute(REGISTER_AGAIN_SQL, self._me()).fetchone():
            self.execute(UNLOCK_SQL, self._me())
            self._take_id()

    def close(self) -> None:
        """Give up the id, the lock and the connection."""
        with contextlib.suppress(psycopg.Error):
            self.execute(LEAVE_SQL, self._me())
        self.connection.close()


_WORKER: ContextVar[Worker | None] = ContextVar("worker", default=None)


def use_worker(worker: Worker | None) -> None:
    """Make `worker` the one that job instances of this thread belong to."""
    _WORKER.set(worker)


def current_worker() -> Worker:
    """Return this thread's worker; the first call makes one, from $PERFDB_DSN."""
    worker = _WORKER.get()
    if worker is None or worker.connection.closed:
        use_worker(worker := Worker())
    return worker


# ------------------------------------------------------------------------------------ recovery

# Whether there is anything to recover, for the look that a worker takes once a second.
ANY_DEAD = """EXISTS (
    SELECT FROM job_instances j
     WHERE (j.worker_id IS NOT NULL OR j.state = 'Running')
       AND NOT EXISTS (SELECT FROM held WHERE held.id = j.worker_id)
) OR EXISTS (
    SELECT FROM job_workers w
     WHERE NOT EXISTS (SELECT FROM held WHERE held.id = w.id))"""

ORPHANS_SQL = f"""
WITH {HELD_CTE}
SELECT j.id, j.worker_id
  FROM job_instances j
 WHERE (j.worker_id IS NOT NULL OR j.state = 'Running')
   AND NOT EXISTS (SELECT FROM held WHERE held.id = j.worker_id)
 ORDER BY j.id
 LIMIT 1000
"""  # noqa: S608

OWN_SQL = "SELECT id, worker_id FROM job_instances WHERE worker_id = %(worker_id)s"

# Dead is whose lock we can take; we hold it to the end of the transaction, so a worker that is
# just coming back waits for us and then sees what is left to it. SKIP LOCKED: a job that somebody
# is at is left for the next look; whoever hangs there is ended by the server: no overrun finds one
# that has no job. Restarted since the worker took its lock: the job is not to blame.
LOCK_ORPHAN_SQL = """
SELECT j.state, j.cancel_requested IS NOT NULL, j.attempts,
       COALESCE(w.started < pg_postmaster_start_time(), false) AS by_restart,
       set_config('idle_in_transaction_session_timeout', %(wait)s, true)
  FROM job_instances j
  LEFT JOIN job_workers w ON w.id = j.worker_id
 WHERE j.id = %(job_id)s
   AND j.worker_id IS NOT DISTINCT FROM %(owner)s
   AND (j.worker_id IS NOT NULL OR j.state = 'Running')
   AND (%(own)s OR j.worker_id IS NULL OR pg_try_advisory_xact_lock(j.worker_id))
   FOR UPDATE OF j SKIP LOCKED
"""

# A statement of its own, because what it waited for would not be in the snapshot of the one above;
# and NOWAIT, because a worker from whom the job was taken by hand may be about to commit its step.
LOCK_STEP_SQL = """
SELECT id, attempts, comment
  FROM job_steps
 WHERE job_instance_id = %(job_id)s
   AND state = 'Running'
   FOR UPDATE NOWAIT
"""

# The worker died between claiming a Queued job and beginning its step: that one is to blame.
NEXT_STEP_SQL = """
SELECT id, attempts + 1, NULL
  FROM job_steps
 WHERE job_instance_id = %(job_id)s
   AND state = 'Created'
 ORDER BY position
 LIMIT 1
"""

STEP_BACK_SQL = """
UPDATE job_steps
   SET state    = CASE WHEN %(comment)s::text IS NULL THEN 'Created' ELSE 'Failed' END,
       finished = CASE WHEN %(comment)s::text IS NOT NULL THEN clock_timestamp() END,
       attempts = %(attempts)s,
       comment  = %(comment)s
 WHERE id = %(step_id)s
"""

JOB_BACK_SQL = """
UPDATE job_instances
   SET state     = CASE state WHEN 'Running' THEN 'Queued' ELSE state END,
       attempts  = %(attempts)s,
       worker_id = NULL
 WHERE id = %(job_id)s
RETURNING state
"""

JOB_POISON_SQL = """
UPDATE job_instances
   SET state     = 'Failed',
       finished  = clock_timestamp(),
       attempts  = %(attempts)s,
       comment   = %(comment)s,
       worker_id = NULL
 WHERE id = %(job_id)s
RETURNING state
"""

# Rows of dead workers that own nothing. A hundred at a time: each takes a place in the lock table.
# The LIMIT also keeps PostgreSQL from trying the locks of all rows before it looks who is dead.
CLEAN_WORKERS_SQL = f"""
WITH {HELD_CTE}, silent AS (
    SELECT w.id
      FROM job_workers w
     WHERE NOT EXISTS (SELECT FROM held WHERE held.id = w.id)
       AND NOT EXISTS (SELECT FROM job_instances j WHERE j.worker_id = w.id)
     LIMIT 100
), dead AS MATERIALIZED (
    SELECT id FROM silent WHERE pg_try_advisory_xact_lock(id)
)
DELETE FROM job_workers w USING dead WHERE w.id = dead.id
"""  # noqa: S608


def recover(worker: Worker) -> dict[int, str]:
    """Put back the jobs of dead workers; return id -> state: Created, Queued or Failed for good.

    Finished steps stay finished; the interrupted one will run again, at most `MAX_DEATHS` times.
    One job that cannot be put back does not keep the others; the first error is raised at the end.
    """
    states: dict[int, str] = {}
    errors: list[psycopg.Error] = []
    for job_id, owner in query(worker.connection, ORPHANS_SQL):
        try:
            if state := _put_back(worker, job_id, owner):
                states[job_id] = state
                log.warning("job=%d recovered: its worker is gone; it is %s now", job_id, state)
        except psycopg.Error as exc:
            if worker.connection.closed:
                raise
            errors.append(exc)
    worker.connection.execute(CLEAN_WORKERS_SQL)
    if errors:
        raise errors[0]
    return states


def put_back(worker: Worker, blame: bool = True) -> None:
    """Put back what this worker itself has in hand; without `blame` no attempt is counted.

    Raise `psycopg.OperationalError` if somebody else is at one of its jobs.
    """
    for job_id, owner in query(worker.connection, OWN_SQL, {"worker_id": worker.id}):
        if not _put_back(worker, job_id, owner, own=True, blame=blame):
            raise psycopg.OperationalError(
                f"job {job_id} cannot be put back now: its row is locked")


def _put_back(worker: Worker, job_id: int, owner: int | None, own: bool = False,
              blame: bool = True) -> str:
    """Free one job, in a transaction; return its state, '' if it is no orphan or not to be had."""
    values = {"job_id": job_id, "owner": owner, "own": own, "wait": HANG_WAIT}
    try:
        with worker.connection.transaction():
            if not (found := query(worker.connection, LOCK_ORPHAN_SQL, values)):
                return ""
            state, cancelled, attempts, by_restart, _ = found[0]
            steps = query(worker.connection, LOCK_STEP_SQL, values)
            if cancelled:
                return life.end_cancelled(worker, job_id, owner).state
            if state == "Created":
                return _free_untaken(worker, job_id, attempts + (blame and not by_restart))
            for step in steps or query(worker.connection, NEXT_STEP_SQL, values):
                _free_step(worker, job_id, step, blame and not by_restart)
            return query(worker.connection, JOB_BACK_SQL, values | {"attempts": attempts})[0][0]
    except psycopg.errors.LockNotAvailable:
        return ""


def _free_untaken(worker: Worker, job_id: int, deaths: int) -> str:
    """Free a job that was claimed and got no steps, or fail it; return its state."""
    comment = (f"Its worker died {deaths} times while it took the job up; it is not taken up "
               f"again by itself. See the handler's log, then jobctl retry {job_id}.")
    sql = JOB_POISON_SQL if deaths >= MAX_DEATHS else JOB_BACK_SQL
    return query(worker.connection, sql, {
        "job_id": job_id, "attempts": deaths, "comment": comment})[0][0]


def _free_step(worker: Worker, job_id: int, step: tuple[int, int, str | None],
               blame: bool) -> None:
    """Put an interrupted step back, or fail it: it was ended as overrun, or kills its workers."""
    step_id, attempts, comment = step
    attempts -= not blame
    if comment is None and attempts >= MAX_DEATHS:
        comment = (f"Its worker died in this step {attempts} times; it is not run again by itself."
                   f" See the handler's log, then jobctl retry {job_id}.")
    worker.connection.execute(STEP_BACK_SQL, {
        "step_id": step_id, "attempts": attempts, "comment": comment})


# A lock cannot tell a hung worker from a busy one, but no step may run a minute past its limit,
# nor may taking a job up: the worker itself ends it long before. The comment tells recovery why.
# SKIP LOCKED: one that hangs at its COMMIT has locked the row of its step, and who waited for that
# would hang as well; its end is rolled back with its session, and the step runs again.
END_OVERRUN_SQL = f"""
WITH {HELD_CTE}, busy AS (
    SELECT j.id, j.state, j.last_state_change, t.step_timeout, held.pid
      FROM job_instances j
      JOIN job_types t   ON t.id = j.job_type_id
      JOIN job_workers w ON w.id = j.worker_id
      JOIN held          ON held.id = w.id AND held.pid = w.backend_pid  -- not who recovers it now
     WHERE j.worker_id <> %(worker_id)s
), late AS MATERIALIZED (
    SELECT s.id AS step_id, busy.id, busy.pid, busy.step_timeout
      FROM busy
      JOIN job_steps s ON s.job_instance_id = busy.id
     WHERE busy.state = 'Running'
       AND s.state = 'Running'
       AND s.started + busy.step_timeout + interval '1 minute' < clock_timestamp()
), free AS MATERIALIZED (
    SELECT id
      FROM job_steps
     WHERE id IN (SELECT step_id FROM late)
       AND state = 'Running'
       FOR UPDATE SKIP LOCKED
), step AS (
    UPDATE job_steps s
       SET comment = 'Overrun: longer than the step limit of ' || late.step_timeout::text
                  || ' (job_types.step_timeout) and its worker did not react; '
                  || 'its connection was ended.'
      FROM late, free
     WHERE late.step_id = free.id
       AND s.id = free.id
    RETURNING s.id
)
SELECT id, pg_terminate_backend(pid, 5000::bigint)
  FROM (SELECT id, pid
          FROM late, (SELECT count(*) FROM step) AS marked  -- before recovery can find it
         UNION
        SELECT id, pid
          FROM busy
         WHERE state <> 'Running'
           AND last_state_change + step_timeout + interval '1 minute' < clock_timestamp()) AS hung
"""  # noqa: S608


def end_overrun(worker: Worker) -> list[int]:
    """End the sessions of workers that hang, for `recover` to go on; return their jobs' ids."""
    ids = [job_id for job_id, _ in
           query(worker.connection, END_OVERRUN_SQL, {"worker_id": worker.id})]
    for job_id in ids:
        log.warning("job=%d ended: a minute past its step limit and no sign of life", job_id)
    return ids
