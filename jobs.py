"""What a job is: the worker's session, JobInstance, and asking for, cancelling and retrying jobs.

A job file subclasses `JobInstance`, names itself (`_name`), says which parameters it takes
(`_parameters_schema`), splits a job into steps (`_create_steps`) and runs one (`_run_step`).
Everything else, states, comments, time limits, who owns a job, is done here.

The life of a job and of a step stands at the top of schema.sql. Two rules hold everywhere:
- one state change is one statement; a step's end and the next one's begin, or the job's end and
  the claim of the next job, are the same statement, because commits decide the speed;
- every write to a job or its steps matches `worker_id`. A write that matches no row means that the
  job was taken over (`JobTakenOver`), and the worker leaves it alone from then on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, ClassVar

import psycopg
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1  # job_schema_version() of the schema.sql beside this file

# A vanished host or server is noticed within 30 s: 10 s of silence, then 3 probes 5 s apart.
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
              "tcp_user_timeout": 25_000, "connect_timeout": 10}
SERVER_SETTINGS = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5",
                   "tcp_keepalives_count": "3", "tcp_user_timeout": "25000",
                   "client_connection_check_interval": "10s"}

#: job type name -> class; filled by importing job files
JOB_TYPES: dict[str, type[JobInstance]] = {}


class JobStepError(Exception):
    """The step cannot succeed; the text becomes its comment."""


class JobRequestError(ValueError):
    """The request cannot be turned into steps; the text becomes the job's comment."""


class JobTakenOver(RuntimeError):
    """The job belongs to another worker by now; nothing more of it may be written here."""


class StepTimeout(KeyboardInterrupt):
    """The step has run for as long as it may.

    A KeyboardInterrupt, because psycopg cancels the running query on that one, and because
    `except Exception` in a step must not swallow it.
    """


# ------------------------------------------------------------------------------------------ time

#: JSON Schema of a moment in a job's parameters; see `parse_time`
TIME = {"type": "string", "format": "timestamp",
        "description": "YYYY-MM-DD HH:MM:SS, in the server's zone unless an offset (Z, -03:00) follows"}
TIME_PATTERN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)?", re.ASCII)


def time_zone() -> tzinfo:
    """Return the zone of times without an offset: $PERFDB_TIMEZONE, or UTC.

    Raise `ValueError` if there is no such zone.
    """
    name = os.environ.get("PERFDB_TIMEZONE") or "UTC"
    if name == "UTC":
        return UTC  # needs no time zone data
    from zoneinfo import ZoneInfo
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"PERFDB_TIMEZONE={name!r} is no time zone this host knows; "
                         "use a name like UTC or Europe/Madrid") from None


def parse_time(text: str) -> datetime:
    """Return the moment, in UTC, that `text` means in its own offset or in `time_zone()`.

    Raise `ValueError` saying why if it is not 'YYYY-MM-DD HH:MM:SS' with an optional UTC offset,
    if there is no such date, or if the clocks of the zone skip that hour; `OverflowError` at the
    ends of the calendar. Of an hour that comes twice the first is taken; write the offset to say which.
    """
    if not TIME_PATTERN.fullmatch(text):
        raise ValueError("write YYYY-MM-DD HH:MM:SS, with an offset like Z or -03:00 if need be")
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        local, moment = moment, moment.replace(tzinfo=time_zone())
        if moment.astimezone(UTC).astimezone(moment.tzinfo).replace(tzinfo=None) != local:
            raise ValueError(f"the clocks of {moment.tzinfo} skip this hour")
    return moment.astimezone(UTC)


# ------------------------------------------------------------------------------------ connection


def connect(dsn: str | None = None, application_name: str = "performance server") -> psycopg.Connection:
    """Return an autocommit connection to performance_db, its session in `time_zone()`.

    `dsn` overrides $PERFDB_DSN; with neither, libpq's own PG* variables count. Raise
    `psycopg.OperationalError` if the server cannot be reached or refuses, `ValueError` if the
    connection string or $PERFDB_TIMEZONE makes no sense.
    """
    zone = str(time_zone())
    dsn = dsn or os.environ.get("PERFDB_DSN") or ""
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:  # its text may quote a password
        raise ValueError("--dsn or PERFDB_DSN is no libpq connection string; write it as "
                         "'host=db1 dbname=performance_db user=perf' or "
                         "'postgresql://perf@db1/performance_db'") from None
    defaults = {name: value for name, value in KEEPALIVES.items() if name not in given}
    connection = psycopg.connect(dsn, autocommit=True, **defaults)
    try:
        _set_config(connection, {"TimeZone": zone, "application_name": application_name})
    except psycopg.DataError as exc:
        connection.close()
        raise ValueError(f"PERFDB_TIMEZONE: the server says {exc.diag.message_primary}") from None
    # Servers on systems without these refuse them; they are a help, not a need.
    with contextlib.suppress(psycopg.DataError, psycopg.NotSupportedError):
        _set_config(connection, SERVER_SETTINGS)
    return connection


def query(connection: psycopg.Connection, sql: str, params: Any = None) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows as tuples, whatever rows the connection makes."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


def _set_config(connection: psycopg.Connection, settings: Mapping[str, str]) -> None:
    connection.execute("SELECT set_config(name, value, false) FROM jsonb_each_text(%s) AS s(name, value)",
                       [Jsonb(settings)])


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

# The most urgent job that is due, of a type we know and that may have one more running.
# SKIP LOCKED: two workers asking at once get two different rows, neither waits; who then updates the
# row needs no second look, because it is locked and was checked again when the lock was granted.
# The types come first, as an array, so that the jobs are read in the order of job_instances_free_idx
# and reading stops at the first that fits: a join would sort them all.
CANDIDATE_CTE = """
candidate AS (
    SELECT id
      FROM job_instances
     WHERE state IN ('Created', 'Queued')
       AND worker_id IS NULL
       AND run_after <= now()
       AND job_type_id = ANY(ARRAY(
               SELECT id
                 FROM job_types
                WHERE %(types)s::jsonb ? name
                  AND (max_running IS NULL OR job_type_has_room(id, max_running))))
       AND (%(with_tests)s OR description NOT ILIKE '%%test%%')
     ORDER BY priority DESC, id
     LIMIT 1
       FOR UPDATE SKIP LOCKED
)"""

#: what a worker knows of the job it has (see `as_job`), of a job j and its type t
JOB_COLUMNS = """j.id, j.state, j.description, j.parameters, j.attempts, j.worker_id,
       t.name AS job_type, t.max_attempts, t.step_timeout"""

# Not waiting for the disk: a claim that a crash of the server forgets leaves the job free, as it was.
CLAIM_SQL = f"""
WITH {CANDIDATE_CTE}
UPDATE job_instances j
   SET worker_id = %(worker_id)s
  FROM candidate, job_types t
 WHERE j.id = candidate.id
   AND t.id = j.job_type_id
RETURNING {JOB_COLUMNS}, set_config('synchronous_commit', 'off', true)
"""  # noqa: S608


def as_job(row: tuple[Any, ...]) -> dict[str, Any]:
    """Return a row that begins with `JOB_COLUMNS` as a dict by their names."""
    names = ("id", "state", "description", "parameters", "attempts", "worker_id",
             "job_type", "max_attempts", "step_timeout")
    return dict(zip(names, row, strict=False))


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


# ------------------------------------------------------------------------------------ parameters


@functools.cache
def _format_checker() -> Any:
    from jsonschema import FormatChecker
    checker = FormatChecker(formats=())
    checker.checks("timestamp", raises=(ValueError, OverflowError))(
        lambda value: not isinstance(value, str) or bool(parse_time(value)))
    return checker


def schema_problems(parameters: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `parameters`, each as '$.path: what'; [] if they fit."""
    from jsonschema import Draft202012Validator
    errors = Draft202012Validator(schema, format_checker=_format_checker()).iter_errors(parameters)
    return sorted(f"{error.json_path}: {error.message}"
                  + (f" ({error.cause})" if error.cause else "") for error in errors)


def period_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `start` and `end`, where both are there and are times."""
    try:
        start, end = parse_time(parameters["start"]), parse_time(parameters["end"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return []  # missing or malformed: the schema's business
    if start < end:
        return []
    return [f"$.end: {parameters['end']!r} is not after $.start {parameters['start']!r}"]


# ----------------------------------------------------------------------------------- JobInstance

READ_SQL = f"""
SELECT {JOB_COLUMNS}
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.id = %(job_id)s
"""  # noqa: S608

#: what a step is told of itself, in the order of STEPS_SQL; the values of a step that says nothing
STEP = {"id": 0, "name": "", "object_id": None, "alarm_id": None, "feature_id": None, "parameters": {}, "attempts": 0}

MANY_STEPS = 1000  # of a job: NEXT_SQL must not be run by a plan for a small table

STEPS_SQL = """
SELECT id, name, object_id, alarm_id, feature_id, parameters, attempts, state
  FROM job_steps
 WHERE job_instance_id = %(job_id)s
 ORDER BY position
"""

# The steps and the state Queued in one statement; with begin, which the handler asks for, the job's and
# its first step's Running as well, since nothing would happen in between. Not waiting for the disk: if a
# crash of the server forgets it, the job is Created as before, and no work has been recorded without it.
QUEUE_SQL = """
WITH job AS (
    UPDATE job_instances
       SET state     = CASE WHEN %(begin)s AND cancel_requested IS NULL THEN 'Running' ELSE 'Queued' END,
           started   = CASE WHEN %(begin)s AND cancel_requested IS NULL THEN clock_timestamp() END,
           comment   = CASE WHEN %(begin)s AND cancel_requested IS NULL THEN NULL ELSE comment END,
           last_state_change = clock_timestamp(),
           worker_id = %(worker_id)s
     WHERE id = %(job_id)s
       AND state = 'Created'
       AND (worker_id IS NULL OR worker_id = %(worker_id)s)
    RETURNING id, state, started
), step AS (
    INSERT INTO job_steps (job_instance_id, position, name, object_id, alarm_id, feature_id, parameters,
                           state, started, attempts)
    SELECT job.id, position, COALESCE(s.name, 'step ' || position),
           s.object_id, s.alarm_id, s.feature_id, COALESCE(s.parameters, '{}'),
           CASE WHEN position = 1 AND job.state = 'Running' THEN 'Running' ELSE 'Created' END,
           CASE WHEN position = 1 THEN job.started END,
           CASE WHEN position = 1 AND job.state = 'Running' THEN 1 ELSE 0 END
      FROM job,
           ROWS FROM (jsonb_to_recordset(%(steps)s) AS (
               name text, object_id int, alarm_id int, feature_id int, parameters jsonb
           )) WITH ORDINALITY AS s(name, object_id, alarm_id, feature_id, parameters, position)
    RETURNING id
)
SELECT state, ARRAY(SELECT id FROM step),
       CASE WHEN state = 'Running' THEN set_config('application_name', %(application_name)s, false) END,
       set_config('synchronous_commit', 'off', true)
  FROM job
"""

# Usually a Created job whose request makes no sense; but whatever goes wrong in a job file, the job
# ends here and is not left Running in the hands of a worker that has given it up.
REFUSE_SQL = """
WITH job AS (
    UPDATE job_instances
       SET state = 'Failed', finished = clock_timestamp(), comment = %(comment)s, worker_id = NULL
     WHERE id = %(job_id)s
       AND state IN ('Created', 'Queued', 'Running')
       AND (worker_id = %(worker_id)s OR worker_id IS NULL AND state = 'Created')
    RETURNING id
), step AS (
    UPDATE job_steps s
       SET state = 'Failed', finished = clock_timestamp(), comment = %(comment)s
      FROM job
     WHERE s.job_instance_id = job.id
       AND s.state = 'Running'
)
SELECT id FROM job
"""

# Not waiting for the disk: whatever the first step does is recorded by a commit that does wait, and
# that one carries this one with it.
BEGIN_SQL = """
WITH job AS (
    UPDATE job_instances
       SET state   = 'Running',
           started = COALESCE(started, clock_timestamp()),
           comment = CASE WHEN cancel_requested IS NOT NULL THEN comment END,
           last_state_change = clock_timestamp()
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state = 'Queued'
    RETURNING id, cancel_requested
), step AS (
    UPDATE job_steps s
       SET state    = 'Running',
           started  = clock_timestamp(),
           finished = NULL,
           comment  = NULL,
           result   = NULL,
           attempts = s.attempts + 1
      FROM job
     WHERE s.id = %(next_id)s
       AND job.cancel_requested IS NULL
)
SELECT cancel_requested IS NOT NULL,
       set_config('application_name', %(application_name)s, false),
       set_config('synchronous_commit', 'off', true)
  FROM job
"""

# One step ends and the next begins: one statement, one commit, and at every moment the table says
# which step is running. One UPDATE for both rows, because each further one costs a tenth of the whole.
# Two rows written: go on; one: the job was cancelled; none: it was taken over.
# No row lock on the job is needed: while this session lives, nobody can take the job over, since that
# takes the lock this session holds; after a lost connection the new session looks at worker_id anew.
NEXT_SQL = """
UPDATE job_steps s
   SET state    = CASE s.id WHEN %(step_id)s THEN %(step_state)s ELSE 'Running' END,
       finished = CASE s.id WHEN %(step_id)s THEN clock_timestamp() END,
       comment  = CASE s.id WHEN %(step_id)s THEN %(step_comment)s END,
       result   = CASE s.id WHEN %(step_id)s THEN %(step_result)s::jsonb END,
       started  = CASE s.id WHEN %(step_id)s THEN s.started ELSE clock_timestamp() END,
       attempts = CASE s.id WHEN %(step_id)s THEN s.attempts ELSE s.attempts + 1 END
  FROM job_instances j
 WHERE j.id = %(job_id)s
   AND j.worker_id = %(worker_id)s
   AND j.state = 'Running'
   AND s.id IN (%(step_id)s, %(next_id)s)
   AND (s.id = %(step_id)s OR j.cancel_requested IS NULL)
"""

# Of the job whose row the CTE `job` has written: its last step ends (step_id NULL: none was running).
ENDED_CTE = """
ended AS (
    UPDATE job_steps s
       SET state    = %(step_state)s,
           finished = CASE WHEN %(step_state)s <> 'Created' THEN clock_timestamp() END,
           attempts = CASE WHEN %(step_state)s <> 'Created' THEN s.attempts ELSE 0 END,
           comment  = %(step_comment)s,
           result   = %(step_result)s
      FROM job
     WHERE job.id = %(job_id)s
       AND s.id = %(step_id)s
)"""

# The last step ends, and the job with it. again: the failed steps, and only they, wait for another
# attempt; with the one that just failed, whose row ENDED_CTE writes.
END_SQL = f"""
WITH job AS (
    UPDATE job_instances j
       SET state     = %(state)s,
           comment   = %(comment)s,
           attempts  = j.attempts + %(counted)s::int,
           run_after = CASE WHEN %(again)s
                            THEN now() + power(2, j.attempts) * (SELECT retry_delay FROM job_types t
                                                                  WHERE t.id = j.job_type_id)
                            ELSE j.run_after END,
           started   = CASE WHEN NOT %(again)s THEN j.started END,
           finished  = CASE WHEN %(state)s <> 'Queued' THEN clock_timestamp() END,
           last_state_change = clock_timestamp(),
           worker_id = NULL
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state = 'Running'
    RETURNING id
), {ENDED_CTE}, again AS (
    UPDATE job_steps s
       SET state = 'Created', finished = NULL, attempts = 0
      FROM job
     WHERE %(again)s
       AND s.job_instance_id = job.id
       AND s.state = 'Failed'
       AND s.id IS DISTINCT FROM %(step_id)s
)
SELECT id, set_config('application_name', %(application_name)s, false) FROM job
"""  # noqa: S608

# The same for a job that has ended for good, and the claim of the next one with it: one UPDATE for
# both rows, as in NEXT_SQL. Returns the ended job, if it was ours, and the claimed one, if there was any.
END_AND_CLAIM_SQL = f"""
WITH {CANDIDATE_CTE}, job AS (
    UPDATE job_instances j
       SET state     = CASE j.id WHEN %(job_id)s THEN %(state)s        ELSE j.state END,
           comment   = CASE j.id WHEN %(job_id)s THEN %(comment)s      ELSE j.comment END,
           attempts  = CASE j.id WHEN %(job_id)s THEN j.attempts + 1   ELSE j.attempts END,
           finished  = CASE j.id WHEN %(job_id)s THEN clock_timestamp() END,
           last_state_change = CASE j.id WHEN %(job_id)s THEN clock_timestamp() ELSE j.last_state_change END,
           worker_id = CASE j.id WHEN %(job_id)s THEN NULL ELSE %(worker_id)s::bigint END
     WHERE j.id IN (%(job_id)s, (SELECT id FROM candidate))
       AND (j.id <> %(job_id)s OR j.worker_id = %(worker_id)s AND j.state = 'Running')
    RETURNING j.id, j.state, j.description, CASE WHEN j.id <> %(job_id)s THEN j.parameters END AS parameters,
              j.attempts, j.worker_id, j.job_type_id
), {ENDED_CTE}
SELECT {JOB_COLUMNS}, (SELECT set_config('application_name', %(application_name)s, false))
  FROM job j
  LEFT JOIN job_types t ON t.id = j.job_type_id AND j.id <> %(job_id)s
"""  # noqa: S608

# How a job ends whose next step was not begun: it was cancelled, and CANCEL_SQL wrote why.
CANCELLED_SQL = """
SELECT format('%%s, %%s of %%s steps not run', COALESCE(j.comment, 'Stopped: its next step is gone from job_steps'),
              count(*) FILTER (WHERE s.state = 'Created'), count(s.id))
  FROM job_instances j
  LEFT JOIN job_steps s ON s.job_instance_id = j.id
 WHERE j.id = %(job_id)s
 GROUP BY j.id
"""


class JobInstance:
    """One job, taken up by this process's worker.

    Subclasses set `_name` and write `_create_steps` and `_run_step`; see README.md for a whole one.
    """

    _name: ClassVar[str]
    #: JSON Schema (2020-12) of the job's parameters
    _parameters_schema: ClassVar[Mapping[str, Any]] = {"type": "object"}
    #: true if steps touch this database only: a step's writes and its Finished mark then commit together
    _step_in_transaction: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (name := cls.__dict__.get("_name")) is None:
            return
        if name in JOB_TYPES:
            raise ValueError(f"job type {name!r} is defined twice: by {cls.__module__}.{cls.__qualname__} and by "
                             f"{JOB_TYPES[name].__module__}.{JOB_TYPES[name].__qualname__}; rename one")
        JOB_TYPES[name] = cls

    def __init__(self, job_id: int, skip_test: bool = True, delay_steps_creation: bool = False) -> None:
        """Take up job `job_id`: check its parameters, create its steps, state Queued.

        With `skip_test` a job with "test" in its description is left as it is and `run` returns [].
        With `delay_steps_creation` the subclass calls `_create_database_steps` itself.
        A Queued job that this worker owns is resumed: its steps are loaded.

        Raise `TypeError` if `job_id` is no int, `ValueError` if the class has no `_name`, there is no
        such job, its type is another, or its state is not Created. Raise `JobRequestError` if its
        parameters are wrong or cannot be turned into steps; the job is then Failed with that text.
        """
        if not isinstance(job_id, int) or isinstance(job_id, bool):
            raise TypeError(f"job_id must be an int, not {job_id!r}")
        if not getattr(self, "_name", None):
            raise ValueError(f"{type(self).__name__} has no _name: set it to the job type's name")
        self._worker = current_worker()
        self._job_id = job_id
        self._job_step_ids: list[int] | None = None
        self._failed: list[int] = []  # ids of the steps that failed in this attempt
        self._todo: Iterator[dict[str, Any]] = iter(())  # the steps still to run, in order
        self._step: dict[str, Any] = {}
        self._job = self._read()
        self._skipped = skip_test and "test" in self.description.lower()
        if self._skipped:
            return
        self._check_row()
        self._application_name = f"job {job_id} {self._name}"
        if self._job["state"] == "Queued":
            self._load_steps()
            return
        with self._refusing():
            self._check()
        if not delay_steps_creation:
            self._create_database_steps()

    # What a subclass writes.

    def _create_steps(self) -> list[dict[str, Any]]:
        """Return the steps in the order they are to run, [] if there is nothing to do.

        Each is a dict of columns of job_steps: name, object_id, alarm_id, feature_id, parameters; all
        may be left out. Raise `JobRequestError` if the request cannot be turned into steps.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to create its steps")

    def _run_step(self, step_id: int) -> Mapping[str, Any] | None:
        """Run one step, `self.step`; what is returned becomes its `result` (a JSON object or None).

        Raise `JobStepError` if it cannot be done; the other steps run all the same.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to run a step")

    @classmethod
    def _check_parameters(cls, parameters: dict[str, Any]) -> list[str]:
        """Return problems that a JSON Schema cannot say, each as '$.path: what'."""
        return []

    # What a subclass and its callers read.

    @property
    def job_id(self) -> int:
        return self._job_id

    @property
    def name(self) -> str:
        """The job type's name."""
        return self._name

    @property
    def description(self) -> str:
        return self._job["description"]

    @property
    def parameters(self) -> dict[str, Any]:
        return self._job["parameters"]

    @property
    def job_step_ids(self) -> list[int] | None:
        """The ids of all steps in order; None until they are created."""
        return self._job_step_ids

    @property
    def connection(self) -> psycopg.Connection:
        """The worker's connection, in autocommit mode; a step uses this one."""
        return self._worker.connection

    @property
    def step(self) -> dict[str, Any]:
        """The running step: id, name, object_id, alarm_id, feature_id, parameters, attempts.

        As it was created, or found when the job was resumed; not read again before it runs.
        """
        return self._step

    @property
    def state(self) -> str:
        """The job's state, as far as this worker knows it."""
        return self._job["state"]

    # Taking it up.

    def _read(self) -> dict[str, Any]:
        row, self._worker.claimed = self._worker.claimed, None
        if row is None or row["id"] != self._job_id:
            found = self._worker.execute(READ_SQL, {"job_id": self._job_id}).fetchone()
            if found is None:
                raise ValueError(f"there is no job {self._job_id} in job_instances")
            row = as_job(found)
        return row

    def _check_row(self) -> None:
        if self._job["job_type"] != self._name:
            raise ValueError(f"job {self._job_id} is of type {self._job['job_type']!r}, "
                             f"but {type(self).__name__} runs {self._name!r}")
        mine = self._job["worker_id"] == self._worker.id
        if not (self._job["state"] == "Created" or (self._job["state"] == "Queued" and mine)):
            raise ValueError(f"job {self._job_id} is in state {self._job['state']!r}, not 'Created'")

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Fail the job, with the explanation in its comment, if it cannot be turned into steps."""
        try:
            yield
        except JobTakenOver:
            raise
        except Exception as exc:
            if not self.connection.closed:
                refuse(self._worker, self._job_id, exc)
            raise

    def _check(self) -> None:
        if problems := parameter_problems(type(self), self.parameters):
            raise JobRequestError(explain_parameters(problems, self._parameters_schema)
                                  + "; insert a corrected job")

    def _create_database_steps(self) -> None:
        """Create the rows of `_create_steps` and set the job Queued, in one transaction."""
        with self._refusing():
            steps = json.dumps(self._create_steps())
            row = self._worker.execute(QUEUE_SQL, self._ids() | {
                "steps": steps, "begin": self._worker.begin_at_once,
                "application_name": self._application_name}).fetchone()
        if row is None:
            raise JobTakenOver(f"job {self._job_id} was taken by another worker")
        self._job["state"], step_ids, *_ = row
        self._job_step_ids = sorted(step_ids)
        # From JSON, so that a step is told the same whether the job is new or resumed.
        self._todo = (as_created(step_id, position, step) for position, (step_id, step) in
                      enumerate(zip(self._job_step_ids, json.loads(steps), strict=True), 1))

    def _load_steps(self) -> None:
        rows = query(self.connection, STEPS_SQL, {"job_id": self._job_id})
        self._job_step_ids = [step_id for step_id, *_ in rows]
        self._failed = [step_id for step_id, *_, state in rows if state == "Failed"]
        self._todo = (dict(zip(STEP, step, strict=True))
                      for *step, state in rows if state not in ("Finished", "Failed"))

    # Running it.

    def run(self) -> list[int]:
        """Run the steps that are left and return the ids of those that failed in this attempt.

        Raise `ValueError` if the steps are not created or the state is not Queued, `JobTakenOver` if
        the job belongs to another worker by now, `psycopg.OperationalError` if the connection is lost.
        """
        if self._skipped:
            return []
        if self._job_step_ids is None:
            raise ValueError(f"the steps of job {self._job_id} are not created: "
                             "call _create_database_steps first")
        if len(self._job_step_ids) >= MANY_STEPS:
            self._worker.forget_plans()
        todo, self._todo = self._todo, iter(())
        step = next(todo, None)
        cancelled = self.state != "Running" and self._begin(step)
        while step and not cancelled:
            self._step = step | {"attempts": step["attempts"] + 1}
            following = next(todo, None)
            cancelled = self._work(step["id"], following and following["id"])
            if self.state != "Running":
                return self._failed
            step = following
        self._end(cancelled)
        return self._failed

    def _begin(self, step: dict[str, Any] | None) -> bool:
        """Let the job and its first step be Running; return true if it was cancelled instead."""
        row = self._worker.execute(BEGIN_SQL, self._ids() | {
            "next_id": step and step["id"], "application_name": self._application_name}).fetchone()
        if row is None:
            state = self._read()["state"]
            if state == "Queued":
                raise JobTakenOver(f"job {self._job_id} belongs to another worker")
            raise ValueError(f"job {self._job_id} is in state {state!r}, not 'Queued'")
        self._job["state"] = "Running"
        return row[0]

    def _ids(self) -> dict[str, Any]:
        return {"job_id": self._job_id, "worker_id": self._worker.id}

    def _work(self, step_id: int, next_id: int | None) -> bool:
        """Run a step and record its end, and with it the next one's begin or the job's end.

        Return true if the job was cancelled and the next step therefore not begun.
        """
        in_transaction = (self.connection.transaction() if self._step_in_transaction
                          else contextlib.nullcontext())
        try:
            with in_transaction:
                result = self._run_limited(step_id)
                recorded = self._record({"step_id": step_id, "step_state": "Finished", "step_comment": None,
                                         "step_result": None if result is None else json.dumps(result)}, next_id)
            return self._believe(*recorded)
        except JobTakenOver:
            raise
        except (Exception, SystemExit, StepTimeout) as exc:
            if self.connection.closed:
                raise  # not the step's fault; whoever resumes the job runs it again
            if self.connection.info.transaction_status:  # not idle: left open by the step
                self.connection.rollback()
            comment = self._explain(step_id, exc)
        self._failed.append(step_id)
        mark = {"step_id": step_id, "step_state": "Failed", "step_comment": comment, "step_result": None}
        return self._believe(*self._record(mark, next_id))

    def _run_limited(self, step_id: int) -> Mapping[str, Any] | None:
        with time_limit(self._job["step_timeout"]):
            result = self._run_step(step_id)
        if self.connection.info.transaction_status and not self._step_in_transaction:
            raise JobStepError("The step left a transaction open; it was rolled back. "
                               "Use `with self.connection.transaction():`")
        log.debug("job=%d step=%d state=Finished name=%r", self._job_id, step_id, self._step["name"])
        return result

    def _explain(self, step_id: int, exc: BaseException) -> str:
        """Return the comment of a step that failed with `exc`, and write the log."""
        known = isinstance(exc, JobStepError | StepTimeout)
        log.error("job=%d step=%d state=Failed name=%r: %s", self._job_id, step_id, self._step["name"],
                  exc or type(exc).__name__, exc_info=None if known else exc)
        return clean(str(exc) if known else
                     f"Unknown error, please check the logs: {exc or type(exc).__name__}")

    def _record(self, mark: dict[str, Any], next_id: int | None) -> tuple[str, dict[str, Any] | None, bool]:
        """Write a step's end and what follows; return the job's state, the job claimed, whether it was cancelled."""
        if next_id is None:
            return self._write_end(mark, **self._outcome())
        if self._worker.stopping():
            return self._write_end(mark, state="Queued", counted=0)
        written = self._worker.execute(NEXT_SQL, self._ids() | mark | {"next_id": next_id}).rowcount
        if not written:
            raise JobTakenOver(f"job {self._job_id} was taken over; step {mark['step_id']} is not recorded")
        return "Running", None, written == 1

    def _believe(self, state: str, claimed: dict[str, Any] | None, cancelled: bool) -> bool:
        """Take note of what `_record` wrote, now that it is committed."""
        self._job["state"] = state
        if state != "Running":
            self._worker.claimed = claimed
        return cancelled

    def _end(self, cancelled: bool) -> None:
        """End a job of which no step is running."""
        outcome = self._outcome()
        if cancelled:
            (comment,) = self._worker.execute(CANCELLED_SQL, self._ids()).fetchone()
            outcome = {"state": "Failed", "comment": comment}
        mark = {"step_id": None, "step_state": None, "step_comment": None, "step_result": None}
        self._believe(*self._write_end(mark, **outcome))

    def _outcome(self) -> dict[str, Any]:
        """Return how the job ends when all steps have run."""
        failed, total = len(self._failed), len(self._job_step_ids)
        if not total:
            return {"state": "Finished", "comment": "No steps: there was nothing to do"}
        if not failed:
            return {"state": "Finished"}
        comment = f"{failed} ({100 * failed / total:.2f}%) steps failed"
        attempt, of = self._job["attempts"] + 1, self._job["max_attempts"]
        if attempt < of:
            return {"state": "Queued", "again": True,
                    "comment": f"{comment}, attempt {attempt} of {of}; they run again after run_after"}
        return {"state": "Failed", "comment": comment}

    def _write_end(self, mark: dict[str, Any], state: str, comment: str | None = None, again: bool = False,
                   counted: int = 1) -> tuple[str, dict[str, Any] | None, bool]:
        """End the job (state Queued: hand it back), and claim the next if the worker is to go on."""
        if again and mark["step_state"] == "Failed":
            mark = mark | {"step_state": "Created"}
        claim = self._worker.claim_at_end
        if state == "Queued" or self._worker.stopping():
            claim = None
        rows = self._worker.execute(END_AND_CLAIM_SQL if claim else END_SQL, self._ids() | mark | (claim or {}) | {
            "state": state, "comment": comment, "again": again, "counted": counted,
            "application_name": self._worker.idle_name}).fetchall()
        claimed = next((as_job(row) for row in rows if row[0] != self._job_id), None)
        if all(row[0] != self._job_id for row in rows):
            if not self.connection.info.transaction_status:  # else the claim is rolled back
                self._worker.claimed = claimed
            raise JobTakenOver(f"job {self._job_id} was taken over; its end is not recorded")
        return state, claimed, False


def as_created(step_id: int, position: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return a step that `_create_steps` gave as QUEUE_SQL has written it."""
    step = STEP | {"id": step_id, "name": f"step {position}"}
    return step | {column: value for column, value in given.items() if column in STEP and value is not None}


def refuse(worker: Worker, job_id: int, exc: Exception) -> None:
    """Fail a job that cannot be turned into steps, with the explanation as its comment; once."""
    known = isinstance(exc, JobRequestError)
    comment = str(exc) if known else f"Unknown error, please check the logs: {exc or type(exc).__name__}"
    if worker.connection.info.transaction_status:
        worker.connection.rollback()
    if worker.execute(REFUSE_SQL, {"job_id": job_id, "worker_id": worker.id, "comment": clean(comment)}).fetchone():
        log.error("job=%d state=Failed: %s", job_id, exc or type(exc).__name__, exc_info=None if known else exc)


def clean(text: str) -> str:
    """Return `text` as PostgreSQL can store it: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


@contextlib.contextmanager
def time_limit(limit: timedelta) -> Iterator[None]:
    """Raise `StepTimeout` in the block once `limit` is over, in a query, a socket or plain Python.

    Signals reach the main thread only: in another one there is no limit, and what hangs there is
    ended by a neighbour (`end_overrun`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    _limit[:] = [limit]
    if signal.getsignal(signal.SIGALRM) is not _stop:
        signal.signal(signal.SIGALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, limit.total_seconds())
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


_limit: list[timedelta] = []  # of the running step


def _stop(*_: Any) -> None:
    raise StepTimeout(f"Timed out: longer than the step limit of {_limit[0]} (job_types.step_timeout)")


def parameter_problems(job_type: type[JobInstance], parameters: Any) -> list[str]:
    """Return all that is wrong with `parameters`, each as '$.path: what'; [] if they fit."""
    problems = []
    if job_type._parameters_schema is not JobInstance._parameters_schema:
        problems = schema_problems(parameters, job_type._parameters_schema)
    if isinstance(parameters, dict):
        problems += period_problems(parameters)
        if not problems:  # what follows may rely on the schema
            problems = job_type._check_parameters(parameters)
    return problems


def explain_parameters(problems: Sequence[str], schema: Mapping[str, Any]) -> str:
    known = ", ".join(schema.get("properties", {})) or "any"
    return "\n  ".join(["The parameters do not fit the job type; nothing was done", *problems,
                        f"known parameters: {known}"])


# ------------------------------------------------------------- asking, cancelling, trying again

TYPE_SQL = "SELECT id, parameters_schema FROM job_types WHERE name = %s"
TYPE_NAMES_SQL = "SELECT name FROM job_types ORDER BY name"

# A schema is written by whoever knows the type; the limits are the operator's and are left alone.
# No ON CONFLICT alone: it would use up an id at every start of every handler.
WRITE_TYPES_SQL = """
WITH known AS (
    SELECT name, description, parameters_schema
      FROM jsonb_to_recordset(%(types)s) AS t(name text, description text, parameters_schema jsonb)
), changed AS (
    UPDATE job_types t
       SET description = known.description, parameters_schema = known.parameters_schema
      FROM known
     WHERE t.name = known.name
       AND (t.description, t.parameters_schema) IS DISTINCT FROM (known.description, known.parameters_schema)
)
INSERT INTO job_types (name, description, parameters_schema)
SELECT name, description, parameters_schema
  FROM known
 WHERE NOT EXISTS (SELECT FROM job_types t WHERE t.name = known.name)
 ORDER BY name
ON CONFLICT (name) DO NOTHING
"""

# One statement for one job or for ten thousand: the workers are woken once.
CREATE_SQL = """
INSERT INTO job_instances (job_type_id, description, parameters, priority, run_after, unique_key)
SELECT %(type_id)s, %(description)s, p.parameters, %(priority)s, COALESCE(%(run_after)s, now()), %(unique_key)s
  FROM jsonb_array_elements(%(parameters)s) WITH ORDINALITY AS p(parameters, n)
 ORDER BY n
ON CONFLICT (unique_key) WHERE unique_key IS NOT NULL AND state IN ('Created', 'Queued', 'Running')
   DO NOTHING
RETURNING id
"""

SAME_KEY_SQL = """
SELECT id
  FROM job_instances
 WHERE unique_key = %(unique_key)s
   AND state IN ('Created', 'Queued', 'Running')
"""


def write_types(connection: psycopg.Connection, names: Sequence[str] | None = None) -> None:
    """Write the job types this process knows (or those `names`), with their schemas, to job_types."""
    types = [{"name": name, "description": (JOB_TYPES[name].__doc__ or "").strip().partition("\n")[0],
              "parameters_schema": dict(JOB_TYPES[name]._parameters_schema)}
             for name in (JOB_TYPES if names is None else names)]
    connection.execute(WRITE_TYPES_SQL, {"types": Jsonb(types)})


def create_job(connection: psycopg.Connection, type_name: str, parameters: dict[str, Any],
               description: str = "", *, priority: int = 0, run_after: datetime | None = None,
               unique_key: str | None = None) -> int:
    """Ask for a job and return its id.

    With `unique_key` and an unfinished job of that key, nothing is created and that job's id is
    returned. Raise `JobRequestError` if the type is unknown or the parameters do not fit it.
    """
    while True:
        ids = create_jobs(connection, type_name, [parameters], description,
                          priority=priority, run_after=run_after, unique_key=unique_key)
        if ids:
            return ids[0]
        if rows := query(connection, SAME_KEY_SQL, {"unique_key": unique_key}):
            return rows[0][0]  # else that job has just ended: ask again


def create_jobs(connection: psycopg.Connection, type_name: str, parameters: Sequence[dict[str, Any]],
                description: str = "", *, priority: int = 0, run_after: datetime | None = None,
                unique_key: str | None = None) -> list[int]:
    """Ask for one job per element of `parameters`, all or none, and return the new ids in that order.

    Raise `JobRequestError` if the type is unknown or any parameters do not fit it.
    """
    type_id = check_request(connection, type_name, parameters)
    return [job_id for (job_id,) in query(connection, CREATE_SQL, {
        "type_id": type_id, "description": description, "parameters": Jsonb(list(parameters)),
        "priority": priority, "run_after": run_after, "unique_key": unique_key})]


def check_request(connection: psycopg.Connection, type_name: str, parameters: Sequence[dict[str, Any]]) -> int:
    """Return the id of the job type; `JobRequestError` if it is unknown or any `parameters` do not fit it."""
    if not (rows := query(connection, TYPE_SQL, [type_name])):
        raise JobRequestError(unknown_type(connection, type_name))
    type_id, schema = rows[0]
    if type_name in JOB_TYPES:
        schema = JOB_TYPES[type_name]._parameters_schema
    problems = []
    for number, one in enumerate(parameters):
        found = (parameter_problems(JOB_TYPES[type_name], one) if type_name in JOB_TYPES
                 else schema_problems(one, schema) or period_problems(one))
        problems += found if len(parameters) == 1 else [f"job {number}: {problem}" for problem in found]
    if problems:
        raise JobRequestError(explain_parameters(problems, schema))
    return type_id


def unknown_type(connection: psycopg.Connection, type_name: str) -> str:
    """Return the text that says which job types there are instead of `type_name`."""
    names = ", ".join(repr(name) for (name,) in query(connection, TYPE_NAMES_SQL)) or "none"
    return f"there is no job type {type_name!r}; known: {names} (a new one: jobctl.py init --module NAME)"


# A job nobody has in hand is Failed at once; one that runs sees the request before its next step,
# and adds to the comment how many steps were not run. The subquery counts them here likewise.
CANCEL_SQL = """
UPDATE job_instances j
   SET cancel_requested = now(),
       state    = CASE WHEN worker_id IS NULL THEN 'Failed' ELSE state END,
       finished = CASE WHEN worker_id IS NULL THEN clock_timestamp() END,
       comment  = %(comment)s || CASE WHEN worker_id IS NOT NULL THEN '' ELSE (
                      SELECT format(', %%s of %%s steps not run',
                                    count(*) FILTER (WHERE s.state = 'Created'), count(*))
                        FROM job_steps s
                       WHERE s.job_instance_id = j.id) END
 WHERE id = %(job_id)s
   AND state IN ('Created', 'Queued', 'Running')
RETURNING state
"""

# A job that never got steps is looked at anew from the start: its parameters may have been mended.
RETRY_SQL = """
WITH job AS (
    SELECT j.id, EXISTS (SELECT FROM job_steps s WHERE s.job_instance_id = j.id) AS has_steps
      FROM job_instances j
     WHERE j.id = %(job_id)s
       AND (j.state = 'Failed' OR j.state = 'Finished' AND %(all)s)
       FOR UPDATE
), step AS (
    UPDATE job_steps s
       SET state = 'Created', started = NULL, finished = NULL, attempts = 0
      FROM job
     WHERE s.job_instance_id = job.id
       AND (s.state = 'Failed' OR %(all)s)
)
UPDATE job_instances j
   SET state            = CASE WHEN job.has_steps THEN 'Queued' ELSE 'Created' END,
       comment          = NULL,
       started          = NULL,
       finished         = NULL,
       cancel_requested = NULL,
       worker_id        = NULL,
       run_after        = now()
  FROM job
 WHERE j.id = job.id
RETURNING j.state, pg_notify('job_instances', '')
"""

STATE_SQL = "SELECT state FROM job_instances WHERE id = %(job_id)s"


def cancel_job(connection: psycopg.Connection, job_id: int, reason: str = "") -> str:
    """Cancel an unfinished job and return its state: Failed at once, or what it is until its next step.

    Raise `ValueError` if there is no such job or it has ended.
    """
    params = {"job_id": job_id, "comment": clean(f"Cancelled: {reason or 'no reason given'}")}
    return _change(connection, CANCEL_SQL, params, "cancelled", "only an unfinished job can be")


def retry_job(connection: psycopg.Connection, job_id: int, every_step: bool = False) -> str:
    """Have the Failed steps of a job run again (or `every_step`) and return its new state.

    Raise `ValueError` if there is no such job, it has not ended, no step of it failed, or another
    unfinished job has its unique_key.
    """
    params = {"job_id": job_id, "all": every_step}
    try:
        return _change(connection, RETRY_SQL, params, "retried",
                       "only a Failed job can be, or with --all a Finished one")
    except psycopg.errors.UniqueViolation:
        raise ValueError(f"job {job_id} cannot be retried now: another unfinished job has its unique_key; "
                         "cancel that one or wait for it") from None


def _change(connection: psycopg.Connection, sql: str, params: dict[str, Any], done: str, rule: str) -> str:
    if rows := query(connection, sql, params):
        return rows[0][0]
    if rows := query(connection, STATE_SQL, params):
        raise ValueError(f"job {params['job_id']} cannot be {done}: it is {rows[0][0]}; {rule}")
    raise ValueError(f"there is no job {params['job_id']} in job_instances")
