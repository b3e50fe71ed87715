"""The changes of state of a job and of its steps: one statement per arrow in the head of schema.sql.

Two rules hold everywhere:
- one state change is one statement; a step's end and the next one's begin, or the job's end and
  the claim of the next job, are the same statement, because commits decide the speed;
- every write to a job or its steps matches `worker_id`. A write that matches no row means that the
  job was taken over (`JobTakenOver`), and the worker leaves it alone from then on.
"""

from __future__ import annotations

from typing import Any


class JobTakenOver(RuntimeError):
    """The job belongs to another worker by now; nothing more of it may be written here."""


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


READ_SQL = f"""
SELECT {JOB_COLUMNS}
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.id = %(job_id)s
"""  # noqa: S608


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
