"""The changes of state of a job and of its steps: one statement and one function per arrow.

The arrows and their order are those in the head of schema.sql. Three rules hold everywhere:
- one state change is one statement; a step's end and the next one's begin, or the job's end and
  the claim of the next job, are the same statement, because commits decide the speed;
- every write of a worker matches `worker_id`. A write that matches no row means that the job was
  taken over (`JobTakenOver`), and the worker leaves it alone from then on;
- every statement of a worker that writes a job's state passes over a job somebody has cancelled:
  CANCELLED_SQL ends that one instead, so an accepted cancel wins whatever else happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from claims import Job, Wanted, and_claim, read

if TYPE_CHECKING:
    from worker import Worker


class JobTakenOver(RuntimeError):
    """The job belongs to another worker by now; nothing more of it may be written here."""


@dataclass(frozen=True, slots=True)
class StepEnd:
    """How a step ended; without values: no step was running."""

    state: str | None = None  # Finished or Failed
    comment: str | None = None
    result: str | None = None  # JSON text

    def values(self) -> dict[str, Any]:
        return {"step_state": self.state, "step_comment": self.comment, "step_result": self.result}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a change has left: the job's state, and the next job if one was claimed with it."""

    state: str
    next_job: Job | None = None


NO_STEP = StepEnd()

# ------------------------------------------------------------- in hand -> free

RELEASE_SQL = """
UPDATE job_instances
   SET worker_id = NULL,
       comment   = COALESCE(%(why)s, comment),
       run_after = CASE WHEN %(why)s::text IS NULL THEN run_after
                        ELSE now() + interval '1 minute' END
 WHERE id = %(job_id)s
   AND worker_id = %(worker_id)s
   AND state IN ('Created', 'Queued')
   AND cancel_requested IS NULL
RETURNING state
"""


def release(worker: Worker, job: Job, why: str | None = None) -> Outcome:
    """Give a claimed job back that was not begun; with `why` it lets others go first."""
    return _leave(worker, job.id, RELEASE_SQL, {"why": why})


# ------------------------------------------------------------------- Created -> Queued, Running

# The steps and the state Queued in one statement; with begin, which the handler asks for, the
# job's and its first step's Running too, since nothing would happen in between. A cancelled job
# stays Queued: what ends it is told how many steps there were. Not waiting for the disk: if a
# crash of the server forgets it, the job is Created as before, with no work recorded without it.
# attempts counted the deaths of workers that took the job up (see worker.py); that is over.
QUEUE_SQL = """
WITH job AS (
    UPDATE job_instances
       SET state     = CASE WHEN %(begin)s AND cancel_requested IS NULL
                            THEN 'Running' ELSE 'Queued' END,
           started   = CASE WHEN %(begin)s AND cancel_requested IS NULL
                            THEN clock_timestamp() END,
           comment   = CASE WHEN cancel_requested IS NOT NULL THEN comment END,
           attempts  = 0,
           last_state_change = clock_timestamp()
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state = 'Created'
    RETURNING id, state, started
), step AS (
    INSERT INTO job_steps (job_instance_id, position, name, object_id, alarm_id, feature_id,
                           parameters, state, started, attempts)
    SELECT job.id, position, COALESCE(s.name, 'step ' || position::text),
           s.object_id, s.alarm_id, s.feature_id, COALESCE(s.parameters, '{}'),
           CASE WHEN position = 1 AND job.state = 'Running' THEN 'Running' ELSE 'Created' END,
           CASE WHEN position = 1 THEN job.started END,
           CASE WHEN position = 1 AND job.state = 'Running' THEN 1 ELSE 0 END
      FROM job,
           ROWS FROM (jsonb_to_recordset(%(steps)s::jsonb) AS (
               name text, object_id int, alarm_id int, feature_id int, parameters jsonb
           )) WITH ORDINALITY AS s(name, object_id, alarm_id, feature_id, parameters, position)
    RETURNING id
)
SELECT state, ARRAY(SELECT id FROM step),
       CASE WHEN state = 'Running'
            THEN set_config('application_name', %(application_name)s, false) END,
       set_config('synchronous_commit', 'off', true)
  FROM job
"""


def queue(worker: Worker, job_id: int, steps: str, application_name: str,
          begin: bool) -> tuple[str, list[int]]:
    """Create the job's steps (a JSON array); return its new state and their ids in order."""
    worker.name = application_name
    row = worker.execute(QUEUE_SQL, _ids(worker, job_id) | {
        "steps": steps, "begin": begin, "application_name": application_name}).fetchone()
    if row is None:
        raise JobTakenOver(f"job {job_id} was taken by another worker")
    return row[0], sorted(row[1])


# ---------------------------------------------------------------------------- Created -> Failed

# Of the job whose row the CTE `job` has written: its running step ends, if there is one.
ENDED_CTE = """
ended AS (
    UPDATE job_steps s
       SET state    = %(step_state)s,
           finished = clock_timestamp(),
           comment  = %(step_comment)s,
           result   = %(step_result)s
      FROM job
     WHERE s.job_instance_id = job.id
       AND s.state = 'Running'
)"""

# Usually a Created job whose request makes no sense; but whatever goes wrong in a job file, the
# job ends here and is not left Running in the hands of a worker that has given it up.
REFUSE_SQL = f"""
WITH job AS (
    UPDATE job_instances
       SET state     = 'Failed',
           finished  = clock_timestamp(),
           comment   = %(comment)s,
           worker_id = NULL
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state IN ('Created', 'Queued', 'Running')
       AND cancel_requested IS NULL
    RETURNING id, state
), {ENDED_CTE}
SELECT state FROM job
"""  # noqa: S608


def refuse(worker: Worker, job_id: int, comment: str) -> Outcome:
    """Fail a job that cannot be turned into steps, or whose class goes wrong outside its steps."""
    return _leave(worker, job_id, REFUSE_SQL, {"comment": comment}, StepEnd("Failed", comment))


# ---------------------------------------------------------------------------- Queued -> Running

# Not waiting for the disk: whatever the first step does is recorded by a commit that does wait,
# and that one carries this one with it.
BEGIN_SQL = """
WITH job AS (
    UPDATE job_instances
       SET state   = 'Running',
           started = COALESCE(started, clock_timestamp()),
           comment = NULL,
           last_state_change = clock_timestamp()
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state = 'Queued'
       AND cancel_requested IS NULL
    RETURNING id
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
       AND s.state = 'Created'
)
SELECT set_config('application_name', %(application_name)s, false),
       set_config('synchronous_commit', 'off', true)
  FROM job
"""


def begin(worker: Worker, job_id: int, next_id: int | None, application_name: str) -> Outcome:
    """Let the job and its first step be Running; Failed if it was cancelled.

    Raise `ValueError` if the job is in no state to be run, `JobTakenOver` if it is not ours.
    """
    worker.name = application_name
    if worker.execute(BEGIN_SQL, _ids(worker, job_id) | {
            "next_id": next_id, "application_name": application_name}).fetchone():
        return Outcome("Running")
    if (job := read(worker, job_id)) and job.state != "Queued":
        raise ValueError(f"job {job_id} is in state {job.state!r}, not 'Queued'")
    return end_cancelled(worker, job_id, worker.id)


# ---------------------------------------------------------------------------- Running -> Running

# One step ends and the next begins: one statement, one commit, and at every moment the table says
# which step is running. One UPDATE for both rows, because each further one costs a tenth of the
# whole. The ids that come back: both, go on; the first alone: the job was cancelled; none: it was
# taken over. `was` keeps a recovery that came in between from being undone.
# No row lock on the job is needed: while this session lives, nobody can take the job over, since
# that takes the lock this session holds; after a lost connection worker_id is looked at anew.
NEXT_SQL = """
UPDATE job_steps s
   SET state    = new.state,
       finished = new.finished,
       comment  = new.comment,
       result   = new.result,
       started  = COALESCE(new.started, s.started),
       attempts = s.attempts + new.begun
  FROM job_instances j,
       (VALUES (%(step_id)s::bigint, 'Running', %(step_state)s, clock_timestamp(),
                NULL::timestamptz, %(step_comment)s, %(step_result)s::jsonb, 0),
               (%(next_id)s, 'Created', 'Running', NULL, clock_timestamp(), NULL, NULL, 1)
       ) AS new(id, was, state, finished, started, comment, result, begun)
 WHERE j.id = %(job_id)s
   AND j.worker_id = %(worker_id)s
   AND (j.cancel_requested IS NULL OR new.id = %(step_id)s)
   AND s.id = new.id
   AND s.state = new.was
RETURNING s.id
"""


def end_step(worker: Worker, job_id: int, step_id: int, end: StepEnd, next_id: int) -> Outcome:
    """End a step and begin the next one; Failed if the job was cancelled meanwhile."""
    written = {row[0] for row in worker.execute(
        NEXT_SQL, _ids(worker, job_id) | end.values() | {"step_id": step_id, "next_id": next_id})}
    if step_id not in written:
        raise JobTakenOver(f"job {job_id} was taken over; step {step_id} is not recorded")
    return Outcome("Running") if next_id in written else end_cancelled(worker, job_id, worker.id)


# ------------------------------------------------------------------ Running -> Finished, Failed

END_SQL = f"""
WITH job AS (
    UPDATE job_instances
       SET state     = %(state)s,
           comment   = %(comment)s,
           attempts  = attempts + 1,
           finished  = clock_timestamp(),
           last_state_change = clock_timestamp(),
           worker_id = NULL
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state = 'Running'
       AND cancel_requested IS NULL
    RETURNING id, state
), {ENDED_CTE}
SELECT state, set_config('application_name', %(application_name)s, false) FROM job
"""  # noqa: S608


def end(worker: Worker, job_id: int, step: StepEnd, state: str, comment: str | None) -> Outcome:
    """End a job for good, its last step with it, and claim the next job if one is wanted."""
    return _leave(worker, job_id, END_SQL, {"state": state, "comment": comment}, step,
                  worker.directions.wanted())


# ---------------------------------------------------------------------------- Running -> Queued

# Its failed steps, and only they, wait for another attempt; the one that fails just now is still
# Running in the snapshot. The wait doubles up to a day, or is the type's delay where longer.
AGAIN_SQL = """
WITH job AS (
    UPDATE job_instances j
       SET state     = 'Queued',
           comment   = %(comment)s,
           attempts  = j.attempts + 1,
           run_after = now() + GREATEST(t.retry_delay, LEAST(interval '1 day',
                           power(2::float8, LEAST(j.attempts, 20)::float8) * t.retry_delay)),
           started   = NULL,
           last_state_change = clock_timestamp(),
           worker_id = NULL
      FROM job_types t
     WHERE j.id = %(job_id)s
       AND j.worker_id = %(worker_id)s
       AND j.state = 'Running'
       AND j.cancel_requested IS NULL
       AND t.id = j.job_type_id
    RETURNING j.id, j.state
), ended AS (
    UPDATE job_steps s
       SET state    = CASE %(step_state)s WHEN 'Finished' THEN 'Finished' ELSE 'Created' END,
           finished = CASE %(step_state)s WHEN 'Finished' THEN clock_timestamp() END,
           attempts = CASE %(step_state)s WHEN 'Finished' THEN s.attempts ELSE 0 END,
           comment  = %(step_comment)s,
           result   = %(step_result)s
      FROM job
     WHERE s.job_instance_id = job.id
       AND s.state = 'Running'
), again AS (
    UPDATE job_steps s
       SET state = 'Created', finished = NULL, attempts = 0
      FROM job
     WHERE s.job_instance_id = job.id
       AND s.state = 'Failed'
)
SELECT state, set_config('application_name', %(application_name)s, false) FROM job
"""


def try_again(worker: Worker, job_id: int, step: StepEnd, comment: str) -> Outcome:
    """Put a job back whose failed steps are to run again, after the type's retry_delay."""
    return _leave(worker, job_id, AGAIN_SQL, {"comment": comment}, step)


HAND_BACK_SQL = f"""
WITH job AS (
    UPDATE job_instances
       SET state     = 'Queued',
           last_state_change = clock_timestamp(),
           worker_id = NULL
     WHERE id = %(job_id)s
       AND worker_id = %(worker_id)s
       AND state = 'Running'
       AND cancel_requested IS NULL
    RETURNING id, state
), {ENDED_CTE}
SELECT state, set_config('application_name', %(application_name)s, false) FROM job
"""  # noqa: S608


def hand_back(worker: Worker, job_id: int, step: StepEnd) -> Outcome:
    """Put a job back between two steps; whoever claims it goes on with the next one."""
    return _leave(worker, job_id, HAND_BACK_SQL, {}, step)


# -------------------------------------------------------- whatever it was -> Failed, cancelled

# The job is its worker's, or nobody's where recovery asks. CANCEL_SQL wrote the reason.
CANCELLED_SQL = f"""
WITH job AS (
    UPDATE job_instances j
       SET state     = 'Failed',
           finished  = clock_timestamp(),
           worker_id = NULL,
           comment   = (
               SELECT j.comment || ', ' || (count(*) FILTER (WHERE s.state = 'Created'))::text
                                || ' of ' || count(*)::text || ' steps not run'
                 FROM job_steps s
                WHERE s.job_instance_id = j.id)
     WHERE j.id = %(job_id)s
       AND j.worker_id IS NOT DISTINCT FROM %(owner)s
       AND j.state IN ('Created', 'Queued', 'Running')
       AND j.cancel_requested IS NOT NULL
    RETURNING j.id, j.state, j.comment
), {ENDED_CTE}
SELECT state, set_config('application_name', %(application_name)s, false) FROM job
"""  # noqa: S608


INTERRUPTED = StepEnd("Failed", "Interrupted, and then the job was cancelled")


def end_cancelled(worker: Worker, job_id: int, owner: int | None,
                  step: StepEnd = INTERRUPTED) -> Outcome:
    """End a job of `owner` (None: nobody's) that was cancelled; `JobTakenOver` if it is not."""
    if not worker.execute(CANCELLED_SQL, step.values() | {
            "job_id": job_id, "owner": owner, "application_name": worker.idle_name}).fetchone():
        raise JobTakenOver(f"job {job_id} was taken over; its end is not recorded")
    return Outcome("Failed")


def _leave(worker: Worker, job_id: int, sql: str, values: Mapping[str, Any],
           step: StepEnd = NO_STEP, wanted: Wanted | None = None) -> Outcome:
    """Carry out a change after which the worker no longer has the job.

    Raise `JobTakenOver` if it had not; a job claimed with it is then to be put back.
    """
    worker.name = worker.idle_name
    values = _ids(worker, job_id) | values | step.values() | {"application_name": worker.idle_name}
    if wanted:
        sql, values = and_claim(sql), values | wanted.values(worker)
    state, *claimed = worker.execute(sql, values, over=True).fetchone() or [None]
    next_job = Job(*claimed) if wanted and claimed[0] else None
    if state:
        return Outcome(state, next_job)
    step = step if step.state else INTERRUPTED
    return Outcome(end_cancelled(worker, job_id, worker.id, step).state, next_job)


def _ids(worker: Worker, job_id: int) -> dict[str, Any]:
    return {"job_id": job_id, "worker_id": worker.id}


# ------------------------------------------------------------------------ what operators do

# A job that waits is Failed at once.
CANCEL_WAITING_SQL = """
UPDATE job_instances j
   SET cancel_requested = now(),
       state    = 'Failed',
       finished = clock_timestamp(),
       comment  = (
           SELECT %(comment)s || ', ' || (count(*) FILTER (WHERE s.state = 'Created'))::text
                              || ' of ' || count(*)::text || ' steps not run'
             FROM job_steps s
            WHERE s.job_instance_id = j.id)
 WHERE j.id = %(job_id)s
   AND j.worker_id IS NULL
   AND j.state IN ('Created', 'Queued')
RETURNING j.state
"""

# One in hand is ended by its worker before its next step, one that is Running in nobody's hand by
# recovery. The first reason stays.
CANCEL_IN_HAND_SQL = """
UPDATE job_instances
   SET comment          = CASE WHEN cancel_requested IS NULL THEN %(comment)s ELSE comment END,
       cancel_requested = COALESCE(cancel_requested, now())
 WHERE id = %(job_id)s
   AND state IN ('Created', 'Queued', 'Running')
   AND (worker_id IS NOT NULL OR state = 'Running')
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
       attempts         = 0,
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
